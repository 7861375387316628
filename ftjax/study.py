"""python -m ftjax.study --config=FILE [--config.KEY=VALUE ...] --workdir=DIR

Runs a study: many runs of one config, in one table, with one report and one winner. Searches for
hyperparameters, cross-validates, measures a learning curve, or repeats settings with other seeds,
by the keys study.*. Run again, it resumes where it ended. See docs/studies.md."""

from absl import flags

from ftjax import cli
from ftjax.config import validation

cli.define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the study; created if missing.', required=True
)


def main() -> None:
  """Checks the config, then runs the study."""
  c = flags.FLAGS.config
  validation.validate(c)
  from ftjax.studies import kinds

  kinds.run(c, _WORKDIR.value)


if __name__ == '__main__':
  cli.run(main)
