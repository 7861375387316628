"""The worker process for rewards that may hang: `python -m ftjax.grading.worker FD`.

It receives JSON requests from the socket FD, one at a time, and sends a JSON reply to each. The
parent (worker_pool.py) kills it when a reply is late. Output of reward functions goes to stderr.

  {"load": {"verifiers": [[name, arguments], ..], "memory": bytes}}     -> {"ready": null}
  {"load": {"function": "module:function"}}
      -> {"ready": {"parameters": [[name, required], ..], "takes_all": bool}}
  {"score": [verifier index, values]}                                   -> {"scores": number}
  {"score": {parameter: values}, "n": n, "state": {..}}
      -> {"scores": [number or null, ..], "metrics": {name: mean}, "extra": {name: values}}

Otherwise {"failure": text} if the reward raised, and {"wrong": text} if it cannot be used at all.
"""

import asyncio
import functools
import importlib
import inspect
import json
import math
import os
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Set
from multiprocessing.connection import Connection
from typing import Any

from ftjax.grading import verifiers
from ftjax.grading.reward_batch import SAMPLE_KEYS
from ftjax.telemetry.console import visible

_LARGEST_FLOAT32 = 3.4028234e38
# Seconds beyond the parent's limit after which the kernel ends an orphan that hangs in C code.
_GRACE = 10


class Failed(Exception):
  """A reward raised: its score is 0, and the failure is counted."""


class Wrong(Exception):
  """A reward that cannot be used: the run should end."""


def _call(function: Callable, *args: Any) -> Any:
  """Calls a function; raises Failed with the text and the place of its exception."""
  try:
    return function(*args)
  except Exception as error:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f'{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})'
    raise Failed(visible(text, 500)) from error


# Parameters that TRL's trainer passes in addition to the columns.
_STATE = 'trainer_state'
_LOGGERS = ('log_metric', 'log_extra')


class Function:
  """A user's reward function.

  Attributes:
    parameters: (name, required) of its named parameters, without those that this process provides.
    takes_all: whether it has **kwargs, and so is passed every column.
  """

  def __init__(self, path: str):
    """Raises Wrong: no such module or function, or a positional-only parameter."""
    self._call = _find(path)
    bound = self._call.keywords if isinstance(self._call, functools.partial) else {}
    try:
      found = list(inspect.signature(self._call).parameters.values())
    except (TypeError, ValueError) as error:
      raise Wrong(f'its parameters cannot be read: {error}') from error
    if nameless := [p.name for p in found if p.kind is p.POSITIONAL_ONLY]:
      raise Wrong(f'parameter {nameless[0]} must be taken by name')
    named = [p for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    self.takes_all = any(p.kind is p.VAR_KEYWORD for p in found)
    provided = (_STATE, *_LOGGERS)
    self._provided = provided if self.takes_all else {p.name for p in named} & {*provided}
    self.parameters = [
      (p.name, p.default is p.empty) for p in named if p.name not in (*bound, *provided)
    ]

  def run(self, values: Mapping[str, list], n: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answer to a request for the scores of a batch of n.

    Raises:
      Failed: the function raised.
      Wrong: it did not return n finite numbers, or None in their places.
    """
    logged: dict[str, list[float]] = {}
    extra: dict[str, list] = {}
    provided = {
      _STATE: types.SimpleNamespace(**state),
      'log_metric': lambda name, value: logged.setdefault(str(name), []).append(float(value)),
      'log_extra': lambda name, column: extra.update({str(name): _column(name, column, n)}),
    }
    given = dict(values) | {k: provided[k] for k in self._provided}
    scores = _scores(_call(lambda: _result(self._call, given)), n)
    means = {k: sum(v) / len(v) for k, v in logged.items()}
    return {
      'scores': scores,
      'metrics': {k: v for k, v in means.items() if math.isfinite(v)},
      'extra': extra,
    }


def _find(path: str) -> Callable:
  """Returns the object `module:name`; the name may have dots."""
  module_name, _, name = path.partition(':')
  try:
    module = _call(importlib.import_module, module_name)
  except Failed as error:
    raise Wrong(f'cannot import {module_name}: {error}') from error
  function: Any = module
  for part in name.split('.'):
    function = getattr(function, part, None)
  if not callable(function):
    known = [k for k, v in vars(module).items() if callable(v) and not k.startswith('_')]
    hint = verifiers.nearest(name, known) or f'; it has {sorted(known)}'
    raise Wrong(f'{module_name} has no function {name}{hint}')
  return function


def _result(function: Callable, values: Mapping[str, Any]) -> Any:
  """Returns the result of a function, awaited if it is `async def`; a generator as a list."""
  result = function(**values)
  if inspect.isawaitable(result):

    async def wait():
      return await result

    result = asyncio.run(wait())
  return list(result) if inspect.isgenerator(result) else result


def _scores(result: Any, n: int) -> list[float | None]:
  """Returns the n numbers of a function's result; None stays: no reward for that completion.

  Raises:
    Wrong: a mapping, a set, a text, an array that is not one-dimensional, another length, or values
      that are not finite numbers.
  """
  kind = f'returned {type(result).__name__} {str(result)[:80]!r}'
  wanted = f'expected a list of {n} numbers, one for each completion'
  if isinstance(result, (Mapping, Set, str, bytes)) or not isinstance(result, Iterable):
    raise Wrong(f'{kind}; {wanted}')
  if len(shape := tuple(getattr(result, 'shape', (n,)))) != 1:
    raise Wrong(f'returned an array of the shape {shape}; expected ({n},)')
  values = list(result)
  if len(values) != n:
    raise Wrong(f'returned {len(values)} scores for {n} completions; {wanted}')
  return [_score(value, i) for i, value in enumerate(values)]


def _column(name: Any, values: Iterable, n: int) -> list:
  """Returns the values of log_extra as a column of the samples; NaN as text, which JSON lacks.

  Raises ValueError inside the function for another length, or a column that the samples have.
  """
  column = list(values)
  if len(column) != n:
    raise ValueError(f'log_extra({name!r}): {len(column)} values for {n} completions')
  if name in SAMPLE_KEYS:
    raise ValueError(f'log_extra({name!r}): the samples have a column of that name; rename it')
  return [str(x) if isinstance(x, float) and not math.isfinite(x) else x for x in column]


def _score(value: Any, i: int) -> float | None:
  if value is None:
    return None
  try:
    score = None if isinstance(value, (str, bytes)) else float(value)
  except (TypeError, ValueError, RuntimeError, OverflowError):
    score = None
  if score is None:
    raise Wrong(f'returned {str(value)[:80]!r} for completion {i}; expected a number or None')
  if not math.isfinite(score) or abs(score) > _LARGEST_FLOAT32:
    raise Wrong(
      f'returned {score} for completion {i}; expected finite float32 numbers, or None for a '
      'completion without a reward'
    )
  return score


def serve(link: Connection) -> None:
  """Replies to requests until the parent has closed the connection."""
  loaded: list = []
  while True:
    try:
      request = json.loads(link.recv_bytes())
    except EOFError:
      return
    # The default action ends the process, also where Python does not get to run.
    signal.alarm(math.ceil(request['limit']) + _GRACE)
    try:
      answer = _answer(request, loaded)
    except Failed as error:
      answer = {'failure': str(error)}
    except Wrong as error:
      answer = {'wrong': str(error)}
    signal.alarm(0)
    link.send_bytes(json.dumps(answer, default=str).encode())


def _answer(request: dict, loaded: list) -> dict:
  if load := request.get('load'):
    if 'function' in load:
      loaded[:] = [Function(load['function'])]
      return {'ready': {'parameters': loaded[0].parameters, 'takes_all': loaded[0].takes_all}}
    loaded[:] = [verifiers.build(name, text) for name, text in load['verifiers']]
    for verifier in loaded:
      verifier.warm()
    resource.setrlimit(resource.RLIMIT_AS, (load['memory'], load['memory']))
    return {'ready': None}
  if 'n' in request:
    return loaded[0].run(request['score'], request['n'], request['state'])
  index, values = request['score']
  return {'scores': _call(loaded[index].score, *values)}


_STOPS = (signal.SIGINT, signal.SIGTERM)


def _handle(action: Any) -> None:
  for number in _STOPS:
    signal.signal(number, action)


def _outlive_stops() -> None:
  """Ignores stop signals: one that is sent to every process of a job (SLURM's) must not end this
  process before its parent has ended.

  Processes that a user's function starts or forks must end on these signals from their first
  instruction on: the signals are blocked until the child has its own handlers.
  """
  _handle(lambda *_: None)

  def release():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

  def release_child():
    _handle(signal.SIG_DFL)
    release()

  os.register_at_fork(
    before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS),
    after_in_parent=release,
    after_in_child=release_child,
  )


if __name__ == '__main__':
  _outlive_stops()
  serve(Connection(int(sys.argv[1])))
