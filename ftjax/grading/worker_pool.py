"""A pool of worker processes that run rewards with a time limit and may be killed.

A process that runs jax is never forked, and nothing is pickled: a worker is a new interpreter
(worker.py), and both sides exchange JSON over a socket.
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
  """One process and its current request."""

  def __init__(self, load: dict[str, Any]):
    self._load = load
    self._process: subprocess.Popen | None = None
    self.link: Connection
    self.index: int | None = None  # of the current request; None while it loads
    self.deadline = math.inf
    self.start()

  def start(self) -> None:
    """Starts a new process and sends its load request; the reply is received like any other."""
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
      # Ctrl-C, and a stop sent to the group, are for the trainer: it still needs replies.
      start_new_session=True,
    )
    theirs.close()
    self.send(None, {'load': self._load}, LOAD_LIMIT)

  def send(self, index: int | None, request: dict[str, Any], limit: float) -> None:
    """Sends a request whose reply is due in `limit` seconds."""
    self.index = index
    data = json.dumps(request | {'limit': limit}).encode()
    with contextlib.suppress(OSError):  # if it has died, `receive` reports it
      self.link.send_bytes(data)
    self.deadline = time.monotonic() + limit

  def receive(self) -> dict[str, Any]:
    """Returns the reply; for a worker that died or is late a failure, and restarts it.

    `killed` in the reply: whether it was ended by a signal, and not because it was late.
    """
    if self.link.poll():
      try:
        return json.loads(self.link.recv_bytes())
      except (EOFError, OSError):
        # A process that exits, such as by sys.exit, closes the link first: wait for its exit code.
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
    """Kills the process and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    self.link.close()


class Pool:
  """Workers that have loaded the same rewards.

  Args:
    load: the load request of worker.py.
    count: number of processes.
    limit: seconds per request.
  """

  def __init__(self, load: dict[str, Any], count: int, limit: float):
    self._limit = limit
    self._workers = [Worker(load) for _ in range(count)]
    self._loading, self._revived = set(self._workers), set()
    self.ready: Any = None  # the reply of a worker to its load request

  def _take(self, worker: Worker) -> dict[str, Any] | None:
    """Returns the reply to a request; None if the worker has just loaded, or was killed while
    loading and is tried once more. `wrong` may be the reply to either.
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
    """Waits until all workers have loaded; returns the reason if one cannot."""
    while self._loading:
      for worker in _next(list(self._loading)):
        answer = self._take(worker)
        if answer is not None:
          return answer['wrong']
    return None

  def run(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the replies, in the order of the requests. A request whose worker was killed, such as
    by a machine that ran out of memory, is sent once more.
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
  """Waits for one, and returns the workers that have replied or are late."""
  soonest = min(w.deadline for w in workers)
  ready = set(wait([w.link for w in workers], max(0.0, soonest - time.monotonic())))
  now = time.monotonic()
  return [w for w in workers if w.link in ready or w.deadline <= now]
