"""python -m ftjax.preview --config=FILE [--config.KEY=VALUE ...] [--rows=N] [--all]

Shows the data that a config would train on: counts, lengths and the share of supervised tokens of
each source, and packed sequences as a table of token | supervised | segment | position; for
on-policy algorithms the first prompts with their columns. By default only the first examples of
each source are read; with --all all of them, and the first batch of the run is shown. Loads no
weights and writes only the token cache."""

import tempfile

from absl import flags

from ftjax import cli
from ftjax.config import algorithms, section, validation

cli.define_config()
_ROWS = flags.DEFINE_integer('rows', 1, 'Number of packed sequences to print.', lower_bound=0)
_ALL = flags.DEFINE_bool(
  'all', False, 'Read all examples: full counts, and the first batch of a run.'
)
# Examples of each source that are read without --all: per packed sequence, and at least.
_ROWS_PER_SEQUENCE, _MIN_ROWS = 50, 200
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the token cache; a temporary one by default.'
)


def main() -> None:
  """Prints the summary and the table."""
  c = flags.FLAGS.config
  validation.validate(c)
  from ftjax.data import describe
  from ftjax.experiment import data as examples
  from ftjax.experiment import vocabulary
  from ftjax.experiment.model import open_model

  model = open_model(
    c.model.path,
    c.model.random.to_dict(),
    c.seed,
    labels=algorithms.of(c).num_labels,
    family=c.model.family,
    vocabulary=vocabulary.of(section.flat(c)),
  )
  rows = min(_ROWS.value, c.batch_size)
  with tempfile.TemporaryDirectory() as scratch:
    workdir = _WORKDIR.value or scratch
    limit = None if _ALL.value else max(_MIN_ROWS, _ROWS_PER_SEQUENCE * _ROWS.value)
    if algorithms.of(c).on_rollouts:
      data = examples.open_prompts(c, model.tokenizer, workdir, limit)
      first = [data.prompt(n) for n in range(rows)]
      print(describe.prompts(data.sources, first, model.tokenizer))
    elif _ALL.value:
      data = examples.open_rows(c, model.tokenizer, workdir)
      print(describe.summary(data.corpora, data.mixture))
      print(describe.table(data.stream.batch(0), model.tokenizer, range(rows)))
    else:
      for corpus, batch in examples.first_rows(c, model.tokenizer, scratch, limit):
        print(describe.opening(corpus))
        used = int((batch['segments'] > 0).any(1).sum())
        print(describe.table(batch, model.tokenizer, range(min(rows, used))))
  if not _ALL.value:
    print(f'read: at most {limit} examples of each source; --all reads and counts all')


if __name__ == '__main__':
  cli.run(main)
