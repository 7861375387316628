"""The process that runs what may hang: `python -m ftjax.rollout.reward_worker FD`.

It takes one request after the other from the socket FD, JSON each, and answers each. The parent
(workers.py) kills it when an answer is late. What a reward function prints goes to standard error.

  {"load": {"verifiers": [[name, arguments], ..], "memory": bytes}}     -> {"ready": null}
  {"load": {"function": "module:function"}}                    -> {"ready": [[name, required], ..]}
  {"score": [verifier index, values]}  or  {"score": {parameter: values}, "n": n}  -> {"scores": ..}

Else {"failure": text} where the reward raised, and {"wrong": text} where it cannot be used at all.
"""

import importlib
import inspect
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from ftjax.rollout import verifiers

_LARGEST_FLOAT32 = 3.4028234e38
# Seconds beyond the parent's limit at which the kernel ends an orphan that hangs in C.
_GRACE = 10


class Failed(Exception):
  """A reward raised: its score is 0, and the failure is counted."""


class Wrong(Exception):
  """A reward that cannot be used: the run should end."""


def _call(function: Callable, *args: Any) -> Any:
  """Raises Failed with the exception's text and place."""
  try:
    return function(*args)
  except Exception as error:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f'{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})'
    raise Failed(text[:500]) from error


def load_function(path: str) -> tuple[Callable, list[tuple[str, bool]]]:
  """A user's function, and its parameters as (name, required).

  Raises:
    Wrong: no such module or function, or a parameter that has no name.
  """
  module_name, _, name = path.partition(':')
  try:
    module = _call(importlib.import_module, module_name)
  except Failed as error:
    raise Wrong(f'cannot import {module_name}: {error}') from error
  function = vars(module).get(name)
  if not callable(function):
    known = [k for k, v in vars(module).items() if callable(v) and not k.startswith('_')]
    hint = verifiers.nearest(name, known) or f'; it has {sorted(known)}'
    raise Wrong(f'{module_name} has no function {name}{hint}')
  out = []
  for p in inspect.signature(function).parameters.values():
    if p.kind is p.POSITIONAL_ONLY:
      raise Wrong(f'parameter {p.name} must be taken by name')
    if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
      out.append((p.name, p.default is p.empty))
  return function, out


def run_function(function: Callable, values: Mapping[str, list], n: int) -> list[float]:
  """Scores of a batch of n.

  Raises:
    Failed: the function raised.
    Wrong: not n finite numbers.
  """
  result = _call(lambda: function(**values))
  try:
    scores = [float(x) for x in result]
  except (TypeError, ValueError) as error:
    raise Wrong(f'returned {str(result)[:80]!r}; expected a list of {n} numbers') from error
  if len(scores) != n:
    raise Wrong(f'returned {len(scores)} scores for {n} completions')
  for i, x in enumerate(scores):
    if not math.isfinite(x) or abs(x) > _LARGEST_FLOAT32:
      raise Wrong(f'returned {x} for completion {i}; expected finite float32 numbers')
  return scores


def serve(link: Connection) -> None:
  """Answers until the parent is gone."""
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
    link.send_bytes(json.dumps(answer).encode())


def _answer(request: dict, loaded: list) -> dict:
  if load := request.get('load'):
    if 'function' in load:
      function, parameters = load_function(load['function'])
      loaded[:] = [function]
      return {'ready': parameters}
    loaded[:] = [verifiers.build(name, text) for name, text in load['verifiers']]
    for verifier in loaded:
      verifier.warm()
    resource.setrlimit(resource.RLIMIT_AS, (load['memory'], load['memory']))
    return {'ready': None}
  if 'n' in request:
    return {'scores': run_function(loaded[0], request['score'], request['n'])}
  index, values = request['score']
  return {'scores': _call(loaded[index].score, *values)}


_STOPS = (signal.SIGINT, signal.SIGTERM)


def _handle(action: Any) -> None:
  for number in _STOPS:
    signal.signal(number, action)


def _outlive_stops() -> None:
  """A stop that is sent to every process of a job (SLURM's) leaves this one to answer until the
  parent is gone. What a user's function starts or forks must end when it is told to, from its first
  instruction on: until the child has its own handlers, a stop waits.
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
