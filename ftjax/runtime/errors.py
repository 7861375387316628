"""Defines the errors that end a run, each with an exit code that scripts may rely on.

0 done; 2 bad flag or config; 3 bad data or model files; 4 non-finite training; 5 check failed; 75
stopped early, run again. Everything else is a bug and keeps Python's own traceback and exit code 1.
Only `caught` and `attempt` continue after an error of any kind.
"""

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class RunError(Exception):
  """An error whose message is for the user: printed without a traceback, then `exit_code`."""

  exit_code = 1


class ConfigError(RunError, ValueError):
  """An unusable flag or config key. The message names the key."""

  exit_code = 2


class DataError(RunError, ValueError):
  """An unusable data or model file. The message names file, position and reason."""

  exit_code = 3


class NonFiniteError(RunError, ArithmeticError):
  """Loss or gradient stayed non-finite, or a non-finite tensor was about to be exported."""

  exit_code = 4


class CheckError(RunError):
  """A failed check: does not fit in memory, replay differs, a gate refused the export."""

  exit_code = 5


class StoppedEarly(RunError):
  """The run was asked to stop and saved its state: run the same command again."""

  exit_code = 75


def caught(call: Callable[[], Any]) -> Exception | None:
  """Returns the exception that `call` raises, or None where it returns."""
  try:
    call()
  except Exception as error:
    return error
  return None


def attempt(what: str, call: Callable[[], Any]) -> None:
  """Calls a function that may fail without harm: an exception is logged and dropped."""
  if error := caught(call):
    log.warning('%s failed: %s: %s', what, type(error).__name__, error)
