"""The errors that end a run, each with the exit code that scripts may rely on.

0 done; 2 bad flag or config; 3 bad data or model files; 4 non-finite training; 5 a check said no;
75 stopped early, run again. Everything else is a bug and keeps Python's own traceback and exit code
1. `caught` and `attempt` are the only ways to go on after an error of any kind."""

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class RunError(Exception):
  """An error whose message is for the user: printed without a traceback, then `exit_code`."""

  exit_code = 1


class ConfigError(RunError, ValueError):
  """A flag or a config key that cannot be meant. The message names the key."""

  exit_code = 2


class DataError(RunError, ValueError):
  """A data or model file that cannot be used. The message names file, place and reason."""

  exit_code = 3


class NonFiniteError(RunError, ArithmeticError):
  """Loss or gradient stayed non-finite, or a non-finite tensor was about to be exported."""

  exit_code = 4


class CheckError(RunError):
  """A check said no: does not fit, replay differs, a gate refused the export."""

  exit_code = 5


class StoppedEarly(RunError):
  """The run was asked to stop and saved its state: run the same command again."""

  exit_code = 75


def caught(call: Callable[[], Any]) -> Exception | None:
  """What `call` raises, for the caller to judge; None where it returns."""
  try:
    call()
  except Exception as error:
    return error
  return None


def attempt(what: str, call: Callable[[], Any]) -> None:
  """For what may fail without harm, next to how the run itself ends: an error is only logged."""
  if error := caught(call):
    log.warning('%s failed: %s: %s', what, type(error).__name__, error)
