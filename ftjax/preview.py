"""python -m ftjax.preview --config=FILE [--config.KEY=VALUE ...] [--rows=N] [--all] [--audit]

Shows the data that a config would train on: counts, lengths and the share of supervised tokens of
each source, and packed sequences as a table of token | supervised | segment | position; for
on-policy algorithms the first prompts with their columns. By default only the first examples of
each source are read; with --all all of them, and the first batch of the run is shown. Loads no
weights and writes only the token cache.

With --audit all rows are read for faults instead: duplicates, overlap with data.eval, empty and cut
answers, labels, languages, broken characters, personal data and secrets, leaked templates. --clean
writes the rows without them, --against compares with an older version; see docs/audit.md."""

import tempfile

from absl import flags

from ftjax import cli
from ftjax.config import algorithms, section, validation
from ftjax.runtime.errors import ConfigError

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
_AUDIT = flags.DEFINE_bool('audit', False, 'Look for faults in all training rows.')
_AUDIT_OUT = flags.DEFINE_string('audit_out', '', 'A new .jsonl file for all findings of --audit.')
_CLEAN = flags.DEFINE_string(
  'clean', '', 'A new .jsonl file for the rows without findings; what went is in its .log.jsonl.'
)
_CLEAN_KINDS = flags.DEFINE_list(
  'clean_kinds',
  [],
  'Kinds of findings whose rows --clean removes; those of docs/audit.md if empty.',
)
_AGAINST = flags.DEFINE_string(
  'against', '', 'An older version of the training data to compare with, as in data.train.'
)


_OUT_OF_FOLD = flags.DEFINE_string(
  'out_of_fold',
  '',
  'STUDY/out_of_fold/TASK.jsonl of a cross-validation: label errors by its models, with --audit.',
)
_ENCODER = flags.DEFINE_string(
  'encoder', '', 'A model folder whose embeddings show how much the rows cover, with --audit.'
)


def _audit_request():
  """Returns what the flags of the audit ask for; None without one of them."""
  if _CLEAN_KINDS.value and not _CLEAN.value:
    raise ConfigError('--clean_kinds does nothing without --clean=OUT.jsonl')
  is_audit = bool(_AUDIT.value or _AUDIT_OUT.value or _CLEAN.value)
  for name in ('out_of_fold', 'encoder'):
    if flags.FLAGS[name].value and not is_audit:
      raise ConfigError(f'--{name} does nothing without --audit')
  if not (is_audit or _AGAINST.value):
    return None
  from ftjax.experiment.data_audit import Request

  return Request(
    out=_AUDIT_OUT.value,
    clean=_CLEAN.value,
    kinds=tuple(_CLEAN_KINDS.value),
    against=_AGAINST.value,
    workdir=_WORKDIR.value or '',
    is_audit=is_audit,
    out_of_fold=_OUT_OF_FOLD.value,
    encoder=_ENCODER.value,
  )


def main() -> None:
  """Prints the summary and the table, or the audit."""
  c = flags.FLAGS.config
  validation.validate(c)
  request = _audit_request()
  from ftjax.data import describe
  from ftjax.experiment import data as examples
  from ftjax.experiment import label_names, vocabulary
  from ftjax.experiment.model import open_model

  with tempfile.TemporaryDirectory() as scratch:
    label_names.resolve(c, _WORKDIR.value or scratch)
  model = open_model(
    c.model.path,
    c.model.random.to_dict(),
    c.seed,
    label_names.head(c),
    family=c.model.family,
    vocabulary=vocabulary.of(section.flat(c)),
    encoders=algorithms.of(c).predicts_masked,
  )
  rows = min(_ROWS.value, c.batch_size)
  with tempfile.TemporaryDirectory() as scratch:
    workdir = _WORKDIR.value or scratch
    if request is not None:
      from ftjax.experiment import data_audit

      data_audit.show(c, model.tokenizer, scratch, request)
      return
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
