"""python -m ftjax.train --config=FILE [--config.KEY=VALUE ...] --workdir=DIR
python -m ftjax.train --replay=DIR --workdir=NEW

Trains a model, and resumes if DIR has a checkpoint; then evaluates the base and the tuned model on
eval.tasks. With --replay, runs a run again and compares each step's loss with it. The next file to
read is ftjax/experiment/fit.py."""

import logging
import os

from absl import flags

from ftjax import cli
from ftjax.config import replayed_run, validation
from ftjax.config.replayed_run import ReplayedRun
from ftjax.runtime import determinism
from ftjax.runtime.errors import ConfigError
from ftjax.telemetry import source_code

cli.define_config(is_required=False)
cli.define_processes()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; created if missing.', required=True
)
_REPLAY = flags.DEFINE_string(
  'replay',
  None,
  'Workdir of a run that is run again, by its config, and compared step by step; exit code 5 at '
  'the first difference.',
)
_DESPITE = flags.DEFINE_list(
  'replay_despite',
  [],
  'Differences that do not end a replay at once: code (ftjax or modules of your own were edited), '
  'starts (the run was resumed with other settings).',
)
_DETERMINISTIC = flags.DEFINE_bool(
  'deterministic',
  False,
  'Equal bits at every run on the same devices: on GPUs kernels that always add in the same order, '
  'and no autotuning. A replay takes it from the run.',
)
_PREFLIGHT = flags.DEFINE_bool(
  'preflight',
  False,
  'Check the hosts, the devices and the workdir, print a table, and end: 0, or 5 where a check '
  'failed (2 where only a flag is wrong).',
)


def main() -> None:
  """Checks the config, then trains it."""
  replayed = _replayed()
  c = replayed.config if replayed else flags.FLAGS.config
  is_deterministic = _DETERMINISTIC.value or bool(replayed and replayed.is_deterministic)
  if is_deterministic:
    determinism.apply(os.environ)
  validation.validate(c)
  # jax is imported from here on: a misspelt key is reported before.
  build = cli.algorithm(c.algorithm).build
  cli.join()
  for line in validation.warnings(c):
    logging.warning(line)
  if _PREFLIGHT.value:
    from ftjax.experiment import preflight

    preflight.run(c, _WORKDIR.value)
    return
  from ftjax.experiment import fit
  from ftjax.experiment.replay import Replay

  source_code.identity()  # now: the files may be edited during the run
  replay = Replay(replayed) if replayed else None
  fit.fit(c, _WORKDIR.value, build, is_deterministic=is_deterministic, replay=replay)


def _replayed() -> ReplayedRun | None:
  """Returns the run that --replay names; None without the flag."""
  if _REPLAY.value is None:
    if flags.FLAGS.config is None:
      raise ConfigError(
        '--config is missing: a config file, or the name of a shipped one. See --help'
      )
    if _DESPITE.value:
      raise ConfigError('--replay_despite is for --replay; leave it out, or give --replay=DIR')
    return None
  if flags.FLAGS.config is not None:
    raise ConfigError(
      '--config and --replay are both given: a replay takes the config of its run, so leave '
      '--config out'
    )
  return replayed_run.read(_REPLAY.value, _WORKDIR.value, _DESPITE.value)


if __name__ == '__main__':
  cli.run(main)
