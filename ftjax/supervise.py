"""python -m ftjax.supervise --preflight -- COMMAND [ARGUMENT ...]

Runs COMMAND, and runs it again after a crash or preemption: on every exit code but 0, 2, 3, 4
and 5. Gives up after several starts in a row without a newer finalized checkpoint in the workdir of
COMMAND. See docs/supervise.md."""

import sys

from absl import flags

from ftjax import cli
from ftjax.supervision import child, exit_codes, supervisor

cli.define_command()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, "Folder with the checkpoints; by default the --workdir among COMMAND's words."
)
_MAX_IDLE_STARTS = flags.DEFINE_integer(
  'max_idle_starts', 3, 'Starts in a row without a newer checkpoint to give up after.', 1
)
_BACKOFF = flags.DEFINE_float(
  'backoff', 10.0, 'Seconds to wait after a start without progress; doubles up to 300.', 0.0
)
_TRANSLATE = flags.DEFINE_string(
  'translate', '', 'Exit codes to return in place of others, OLD:NEW comma-separated, as 75:42.'
)
_PREFLIGHT = flags.DEFINE_bool(
  'preflight', False, 'Run COMMAND --preflight before the first start, and stop where it fails.'
)


def main() -> None:
  """Runs the command, and exits with the code of its last start."""
  child.open_standard_streams()
  command = cli.command()
  codes = exit_codes.parse_translation(_TRANSLATE.value)
  settings = supervisor.Settings(
    command,
    _WORKDIR.value or supervisor.find_workdir(command),
    _MAX_IDLE_STARTS.value,
    _BACKOFF.value,
    _PREFLIGHT.value,
  )
  code = supervisor.supervise(settings)
  sys.exit(codes.get(code, code))


if __name__ == '__main__':
  cli.run(main)
