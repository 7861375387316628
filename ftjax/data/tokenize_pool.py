"""Worker processes that tokenize blocks of rows, each a fresh interpreter (tokenize_worker.py).

Never a fork: the parent runs jax and threads. Processes and not threads, for rendering is Python. A
process that dies is started anew and its block tokenized once more.
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

from ftjax.data.blocks import Block, Policy
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

# Given to a process at once: it has the next one when it is done with the first.
_BLOCKS_EACH = 2


def cores() -> int:
  """Returns the cores that this process may use; macOS knows only those of the machine."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:
    return os.cpu_count() or 1


class Gone(Exception):
  """The folder of blocks was removed: another process has finished the same corpus."""


class _Worker:
  """One process, and the blocks that it was given, the first of which it has in hand."""

  def __init__(self, settings: int, block: Block):
    """Starts it; the block is sent when it is ready. `settings`: number of an open file."""
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
    with contextlib.suppress(OSError):  # where it has died, `receive` says so
      self.link.send_bytes(marshal.dumps(block.request()))

  def receive(self) -> dict[str, Any] | None:
    """Its answer about the first block; {} where it has none yet; None where it has died."""
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
    """Ends the process, whatever it does; returns its exit code, as of `subprocess`."""
    self.link.close()
    self._process.kill()
    return self._process.wait()

  def exit_code(self) -> int:
    """Of a process that has died; a moment may lie between its link's end and its own."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=5)
    return self.end()


class Pool:
  """Worker processes with one tokenizer and one policy; a context manager that ends them."""

  def __init__(self, policy: Policy, tokenizer: Tokenizer, folder: Path, count: int):
    """Takes what all share; processes start with the first blocks, at most `count`. They write
    block files into `folder`.
    """
    self._count, self._workers = count, []
    self._settings = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
    settings = {
      'policy': vars(policy),
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
    """Ends all processes, whatever they do."""
    for worker in self._workers:
      worker.end()
    self._workers = []
    self._settings.close()

  def run(self, blocks: Iterable[Block]) -> Iterator[Block]:
    """Yields each block when its file is written, in whatever order.

    Blocks are read as processes take them, so that memory does not grow with the source.

    Raises:
      DataError: what a worker raised; a block over which two processes died.
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
    """Gives a block to the process with least to do; whether there is one with room for it."""
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
    """Starts a process that has died anew, with the same blocks; once for each one in hand."""
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
