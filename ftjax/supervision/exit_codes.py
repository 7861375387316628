"""What the exit code of a run means for whoever started it: whether to start again, and why."""

import signal

from ftjax.runtime.errors import (
  CheckError,
  ConfigError,
  DataError,
  NonFiniteError,
  StoppedEarly,
)

# Codes after which the same command would end the same way; runtime/errors.py.
FINAL = {
  0: 'done',
  ConfigError.exit_code: 'bad flag or config',
  DataError.exit_code: 'bad data or model files',
  NonFiniteError.exit_code: 'non-finite training',
  CheckError.exit_code: 'a check failed',
}
_REASONS = {
  1: 'an error (see stderr)',
  StoppedEarly.exit_code: 'stopped early: asked to stop, preempted, hung, or a process was missing',
  126: 'the program may not be executed',
  127: 'the program was not found',
}
_SIGNALS = {
  signal.SIGABRT: 'another process of the run was lost, or a library aborted',
  signal.SIGKILL: 'killed: out of memory, or by someone',
  signal.SIGSEGV: 'a library crashed',
  signal.SIGTERM: 'ended by someone, without a checkpoint',
}
# What to look at when a run is given up.
_ADVICE = {
  1: 'the traceback in stderr: a bug, or an environment that lacks something',
  StoppedEarly.exit_code: (
    'stderr for the cause: a limit of watchdog.*, a process that did not connect '
    '(--init_timeout_s), or a machine that is preempted before its first checkpoint'
  ),
  126: 'the words after --',
  127: 'the words after --, and PATH',
  128 + signal.SIGABRT: 'stderr of the other hosts: the process that ended first has the cause',
  128 + signal.SIGKILL: (
    'the memory of this host: `dmesg`, and the limit of the container or job; '
    '`python -m ftjax.plan` shows the memory of a step'
  ),
  128 + signal.SIGSEGV: 'the versions of jaxlib, libtpu and the driver',
}


def is_final(code: int) -> bool:
  """Returns whether starting the same command again is useless."""
  return code in FINAL


def signal_name(code: int) -> str:
  """Returns the name of the signal that an exit code above 128 stands for, else ''."""
  try:
    return signal.Signals(code - 128).name if code > 128 else ''
  except ValueError:
    return ''


def reason(code: int) -> str:
  """Returns what an exit code means, in words."""
  if code in FINAL or code in _REASONS:
    return FINAL.get(code) or _REASONS[code]
  if name := signal_name(code):
    return f'{name}: {_SIGNALS.get(signal.Signals(code - 128), "ended by a signal")}'
  return f'exit code {code}'


def advice(code: int) -> str:
  """Returns what to look at after a code."""
  return _ADVICE.get(code, 'stderr of the last start')


def parse_translation(text: str) -> dict[int, int]:
  """Returns {exit code: code in its place} of '75:42,134:42'; {} for ''.

  Raises:
    ConfigError: it is written differently, or a code is not between 0 and 255.
  """
  out = {}
  for pair in filter(None, text.replace(' ', '').split(',')):
    old, colon, new = pair.partition(':')
    codes = [int(c) if c.isdecimal() and int(c) < 256 else -1 for c in (old, new)]
    if not colon or -1 in codes or out.get(codes[0], codes[1]) != codes[1]:
      raise ConfigError(
        f'--translate={text}: expected OLD:NEW of exit codes from 0 to 255, comma-separated and '
        'each OLD once, as 75:42'
      )
    out[codes[0]] = codes[1]
  return out
