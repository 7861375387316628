"""Runs worker processes that tokenize blocks of rows (tokenize_worker.py).

Each is a fresh interpreter, never a fork: the parent runs jax and threads. Threads would not help,
since rendering is Python. A process that dies is restarted and its block tokenized again.
"""

import contextlib
import marshal
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from ftjax.data.blocks import Block
from ftjax.data.policy import Policy
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

# Blocks of a process at once: it has the next one when it finishes the first.
_BLOCKS_EACH = 2


def cores() -> int:
  """Returns the number of cores that this process may use (on macOS all of the machine)."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:
    return os.cpu_count() or 1


class Gone(Exception):
  """The folder of blocks was removed: another process has finished the same corpus."""


class _Worker:
  """One process and its blocks, of which it tokenizes the first."""

  def __init__(self, settings: int, block: Block):
    """Starts the process, which gets the block when it is ready. `settings`: an open file."""
    self._settings = settings
    self.blocks = [block]
    self.start()

  def start(self) -> None:
    self.is_ready = False
    self.link, theirs = Pipe()
    environment = os.environ | {
      'PYTHONPATH': os.pathsep.join(p or os.getcwd() for p in sys.path),
      'TOKENIZERS_PARALLELISM': 'false',  # one core each
      'OPENBLAS_NUM_THREADS': '1',
    }
    opened = [theirs.fileno(), self._settings]
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'ftjax.data.tokenize_worker', *map(str, [*opened, os.getpid()])],
      pass_fds=opened,
      stdin=subprocess.DEVNULL,
      stdout=2,
      env=environment,
      start_new_session=True,  # Ctrl-C is for the parent, which ends this one
    )
    theirs.close()

  def give(self, block: Block) -> None:
    self.blocks.append(block)
    self._send(block)

  def _send(self, block: Block) -> None:
    with contextlib.suppress(OSError):  # `receive` reports a dead process
      self.link.send_bytes(marshal.dumps(block.request()))

  def receive(self) -> dict[str, Any] | None:
    """Returns the process's answer about the first block; {} for none yet, None if it has died."""
    try:
      answer = marshal.loads(self.link.recv_bytes())
    except (EOFError, OSError):
      return None
    if self.is_ready:
      return answer
    self.is_ready = True
    for block in self.blocks:
      self._send(block)
    return {}

  def end(self) -> int:
    """Kills the process; returns its exit code, as `subprocess`."""
    self.link.close()
    self._process.kill()
    return self._process.wait()

  def exit_code(self) -> int:
    """Returns the exit code of a process that has closed its link, after up to 5 s."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=5)
    return self.end()


class Pool:
  """Worker processes with one tokenizer and one policy; a context manager that ends them."""

  def __init__(self, policy: Policy, tokenizer: Tokenizer, folder: Path, count: int):
    """Stores the common settings.

    At most `count` processes start with the first blocks, and write block files into `folder`.
    """
    self._count, self._workers = count, []
    self._settings = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
    settings = {
      'policy': policy.facts(),
      'tokenizer': dict(tokenizer.files),
      'name': tokenizer.name,
      'folder': os.fspath(folder),
    }
    self._settings.write(marshal.dumps(settings))
    self._settings.flush()

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Kills all processes."""
    for worker in self._workers:
      worker.end()
    self._workers = []
    self._settings.close()

  def run(self, blocks: Iterable[Block]) -> Iterator[Block]:
    """Yields each block when its file is written, in any order.

    Blocks are read as processes take them, so that memory does not grow with the source.

    Raises:
      DataError: a worker's error; two processes died with the same block.
      Gone: the folder was removed.
    """
    source = iter(blocks)
    following = next(source, None)
    failed: set[int] = set()
    while following is not None or any(w.blocks for w in self._workers):
      while following is not None and self._give(following):
        following = next(source, None)
      busy = {w.link: w for w in self._workers if w.blocks}
      for link in wait(list(busy)):
        worker = busy[link]
        answer = worker.receive()
        if answer is None:
          self._restart(worker, failed)
        elif 'error' in answer:
          raise DataError(answer['error'])
        elif 'gone' in answer:
          raise Gone
        elif 'done' in answer:
          yield worker.blocks.pop(0)

  def _give(self, block: Block) -> bool:
    """Gives a block to the process with the fewest; returns False where all have enough."""
    ready = [w for w in self._workers if w.is_ready and len(w.blocks) < _BLOCKS_EACH]
    least = min(ready, key=lambda w: len(w.blocks), default=None)
    if (least is None or least.blocks) and len(self._workers) < self._count:
      self._workers.append(_Worker(self._settings.fileno(), block))
    elif least is None:
      return False
    else:
      least.give(block)
    return True

  def _restart(self, worker: _Worker, failed: set[int]) -> None:
    """Restarts a dead process with the same blocks, once for each first block."""
    code, block = worker.exit_code(), worker.blocks[0]
    if block.number in failed:
      reason = f'killed by signal {-code}' if code < 0 else f'ended with exit code {code}'
      raise DataError(
        f'a process that tokenizes was {reason}, twice over the same rows: from line '
        f'{block.first[1]} of file {block.first[0] + 1} to line {block.last[1]} of file '
        f'{block.last[0] + 1} of the source. If the machine ran out of memory, set data.workers '
        f'below {len(self._workers)}'
      )
    failed.add(block.number)
    worker.start()
