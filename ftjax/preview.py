"""python -m ftjax.preview --config=FILE [--config.KEY=VALUE ...] [--rows=N]

Shows what a config would train on: sources with counts and lengths, the share of supervised tokens,
and the first rows as a table of token | supervised | segment | position; of prompts to sample from,
the first ones with their columns. Loads no weights and writes nothing but the token cache."""

import tempfile

from absl import flags

from ftjax import command, config

command.define_config()
_ROWS = flags.DEFINE_integer('rows', 1, 'How many rows of the first batch to print.', lower_bound=0)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the token cache is kept; a temporary folder by default.'
)


def main() -> None:
  """Prints the summary and the table."""
  c = flags.FLAGS.config
  config.validate(c)
  from ftjax import algorithms, examples, experiment
  from ftjax.data import describe

  model = experiment.open_model(
    c.model.path,
    c.model.random.to_dict(),
    c.seed,
    weights=False,
    labels=algorithms.num_labels(c),
  )
  with tempfile.TemporaryDirectory() as scratch:
    data = examples.open_data(c, model.tokenizer, _WORKDIR.value or scratch)
    if isinstance(data, examples.PromptData):
      first = [data.prompt(n) for n in range(min(_ROWS.value, c.batch_size))]
      print(describe.prompts(data.sources, first, model.tokenizer))
      return
    print(describe.summary(data.corpora, data.mixture))
    rows = range(min(_ROWS.value, c.batch_size))
    print(describe.table(data.stream.batch(0), model.tokenizer, rows))


if __name__ == '__main__':
  command.run(main)
