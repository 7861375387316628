"""python -m ftjax.train --config=FILE [--config.KEY=VALUE ...] --workdir=DIR

Trains a model, and resumes if DIR has a checkpoint; then evaluates the base and the tuned model on
eval.tasks. The next file to read is ftjax/experiment/fit.py."""

import logging

from absl import flags

from ftjax import cli
from ftjax.config import validation

cli.define_config()
cli.define_processes()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; created if missing.', required=True
)


def main() -> None:
  """Checks the config, then trains it."""
  c = flags.FLAGS.config
  validation.validate(c)
  # jax is imported from here on: a misspelt key is reported before.
  build = cli.algorithm(c.algorithm).build
  cli.join()
  for line in validation.warnings(c):
    logging.warning(line)
  from ftjax.experiment import fit

  fit.fit(c, _WORKDIR.value, build)


if __name__ == '__main__':
  cli.run(main)
