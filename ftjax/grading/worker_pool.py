"""Processes that may be killed: each answers one request at a time within a time limit.

No fork of a process that runs jax, and no pickle: a worker is a fresh interpreter
(reward_worker.py), and both sides speak JSON over a socket.
"""

import collections
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

# Seconds to import a user's module, or sympy on a busy machine.
LOAD_LIMIT = 120.0


class Worker:
  """One process and the request that it has in hand."""

  def __init__(self, load: dict[str, Any]):
    self._load = load
    self._process: subprocess.Popen | None = None
    self.link: Connection
    self.index: int | None = None  # of the request in hand; None: it loads
    self.deadline = math.inf
    self.start()

  def start(self) -> None:
    """A fresh process, told what to load; its answer is waited for like another."""
    self.link, theirs = Pipe()
    paths = [p or os.getcwd() for p in sys.path]
    environment = os.environ | {
      'PYTHONPATH': os.pathsep.join(paths),
      # The accelerators belong to the trainer; sets of strings keep one order.
      'JAX_PLATFORMS': 'cpu',
      'PYTHONHASHSEED': '0',
    }
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'ftjax.grading.worker', str(theirs.fileno())],
      pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL,
      stdout=2,
      env=environment,
      # Ctrl-C, and a stop sent to the group, are for the trainer: it still wants answers.
      start_new_session=True,
    )
    theirs.close()
    self.send(None, {'load': self._load}, LOAD_LIMIT)

  def send(self, index: int | None, request: dict[str, Any], limit: float) -> None:
    self.index = index
    data = json.dumps(request | {'limit': limit}).encode()
    with contextlib.suppress(OSError):  # where it has died, `receive` says so
      self.link.send_bytes(data)
    self.deadline = time.monotonic() + limit

  def receive(self) -> dict[str, Any]:
    """The answer; a worker that died, or is out of time, answers with a failure and starts anew.

    `killed`: by a signal, and not for being late.
    """
    if self.link.poll():
      try:
        return json.loads(self.link.recv_bytes())
      except (EOFError, OSError):
        # On its way out, after sys.exit say, it closes the link first: its own code is to be told.
        with contextlib.suppress(subprocess.TimeoutExpired):
          self._process.wait(timeout=5)
        self.stop()
        code = self._process.returncode
        answer = {'failure': f'its process ended with exit code {code}', 'killed': code < 0}
    else:
      self.stop()
      answer = {'failure': 'out of time', 'late': True}
    if self.index is None:
      return answer
    self.start()
    return answer | {'restarted': True}

  def stop(self) -> None:
    """Ends the process, whatever it does, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    self.link.close()


class Pool:
  """Workers that have loaded the same.

  Args:
    load: what reward_worker.py is to load.
    count: processes.
    limit: seconds per request.
  """

  def __init__(self, load: dict[str, Any], count: int, limit: float):
    self._limit = limit
    self._workers = [Worker(load) for _ in range(count)]
    self._loading, self._revived = set(self._workers), set()
    self.ready: Any = None  # what the first of them answered when it had loaded

  def _take(self, worker: Worker) -> dict[str, Any] | None:
    """An answer to a request; None where the worker has now loaded, or was killed as it did and
    tries once more. `wrong` may be either's.
    """
    loading = worker in self._loading
    answer = worker.receive()
    if answer.get('restarted'):
      self._loading.add(worker)
    elif loading and 'ready' in answer:
      self._loading.discard(worker)
      self.ready = answer['ready']
      return None
    elif loading and answer.get('killed') and worker not in self._revived:
      self._revived.add(worker)
      worker.start()
      return None
    elif loading and 'failure' in answer:
      return {'wrong': f'did not load: {answer["failure"]}'}
    return answer

  def load(self) -> str | None:
    """Waits until all have loaded; the reason where one cannot."""
    while self._loading:
      for worker in _next(list(self._loading)):
        answer = self._take(worker)
        if answer is not None:
          return answer['wrong']
    return None

  def run(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers, in the order of the requests. One whose worker was killed (by a machine that
    ran out of memory, say) is asked once more.
    """
    answers: list[dict[str, Any]] = [{} for _ in requests]
    waiting, killed = collections.deque(range(len(requests))), set()
    idle = [w for w in self._workers if w not in self._loading]
    busy: set[Worker] = set()
    while waiting or busy:
      while idle and waiting:
        worker = idle.pop()
        index = waiting.popleft()
        worker.send(index, requests[index], self._limit)
        busy.add(worker)
      for worker in _next([*busy, *self._loading]):
        index = worker.index
        answer = self._take(worker)
        busy.discard(worker)
        if worker not in self._loading:
          idle.append(worker)
        if answer is not None:
          if index is None:
            return [answer for _ in requests]
          if answer.get('killed') and index not in killed:
            killed.add(index)
            waiting.append(index)
          else:
            answers[index] = answer
    return answers

  def close(self) -> None:
    """Ends all processes."""
    for worker in self._workers:
      worker.stop()


def _next(workers: list[Worker]) -> list[Worker]:
  """Those that have answered, or are out of time; waits for one."""
  soonest = min(w.deadline for w in workers)
  ready = set(wait([w.link for w in workers], max(0.0, soonest - time.monotonic())))
  now = time.monotonic()
  return [w for w in workers if w.link in ready or w.deadline <= now]
