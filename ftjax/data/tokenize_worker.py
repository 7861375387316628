"""Tokenizes blocks of rows in a process of its own.

`python -m ftjax.data.tokenize_worker LINK SETTINGS PARENT`

tokenize_pool.py starts it, a fresh interpreter without jax. LINK is a socket and SETTINGS a file,
both as numbers of open files; PARENT is a process id. Every message is one value written by
`marshal`, which only this program's own processes exchange:

  {'ready': True}                                                 once the tokenizer is loaded
  a block's `request()`  ->  {'done': number}                     its file is in the folder
                             {'gone': number}                     the folder was removed
                             {'error': text}                      all rows lack something

It ends when its parent does.
"""

import marshal
import os
import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ftjax.data.blocks import Block, BlockTokenizer
from ftjax.data.policy import Policy
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

_POLL_SECONDS = 0.5


def _end_with(parent: int) -> None:
  """Ends this process soon after its parent has ended, also while it tokenizes a block."""

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(_POLL_SECONDS)
    os._exit(1)

  threading.Thread(target=watch, daemon=True, name='parent').start()


def _answer(message: dict[str, Any], tokenizer: BlockTokenizer, folder: Path) -> dict[str, Any]:
  block = Block(**message)
  try:
    tokenizer.tokenize(block).write(folder / block.name)
  except FileNotFoundError:  # another process was first and has removed the folder
    return {'gone': block.number}
  except OSError as error:
    return {'error': f'{folder}: tokens cannot be written: {error} (data.cache)'}
  except DataError as error:
    return {'error': str(error)}
  return {'done': block.number}


def serve(link: Connection, settings: dict[str, Any]) -> None:
  """Answers requests until the parent closes its side."""
  tokenizer = Tokenizer(settings['tokenizer'], settings['name'])
  blocks = BlockTokenizer(Policy.from_plain(settings['policy']), tokenizer)
  folder = Path(settings['folder'])
  requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
  threading.Thread(target=_receive, args=(link, requests), daemon=True, name='requests').start()
  link.send_bytes(marshal.dumps({'ready': True}))
  while (message := requests.get()) is not None:
    try:
      link.send_bytes(marshal.dumps(_answer(message, blocks, folder)))
    except BrokenPipeError:
      return


def _receive(link: Connection, requests: queue.SimpleQueue) -> None:
  """Queues requests at once, so that the parent never waits to send one; None ends them."""
  try:
    while True:
      requests.put(marshal.loads(link.recv_bytes()))
  except (EOFError, OSError):
    requests.put(None)


def main() -> None:
  """Reads the settings and serves."""
  link, settings, parent = map(int, sys.argv[1:])
  _end_with(parent)
  # At an offset: all workers share the position of a plain read.
  content = os.pread(settings, os.fstat(settings).st_size, 0)
  serve(Connection(link), marshal.loads(content))


if __name__ == '__main__':
  main()
