"""Collects on each process what the hosts of a run must have in common: code, installed packages,
devices; and what each must have by itself: room on its disks, a clock that is right.
"""

import os
import pathlib
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.cluster import processes
from ftjax.config import user_code
from ftjax.runtime.errors import RunError
from ftjax.storage import files, snapshots
from ftjax.telemetry import environment, source_code

_FLOOR = 64 << 20  # bytes that any disk needs: logs, metrics, a small cache
_WEIGHTS = ('.safetensors', '.gguf')


def collect(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the facts of this process that are compared, a JSON value."""
  code, packages = source_code.identity(), environment.packages()
  devices = jax.local_devices()
  return {
    'host': socket.gethostname(),
    'code': code['digest'],
    'folders': code['folders'],
    'commit': code.get('commit', '')[:12] + '+' * bool(code.get('modified')),
    'user_code': user_code.fingerprints(c),
    'python': platform.python_version(),
    'packages': packages,
    'runtime': devices[0].client.platform_version.splitlines()[0],
    'kinds': sorted({d.device_kind for d in devices}),
    'devices': len(devices),
    'flags': _flags(os.environ),
  }


def _flags(variables: Mapping[str, str]) -> dict[str, Any]:
  """Returns the settings from the environment that change the compiled program."""
  flags = environment.xla_flags(variables.get('XLA_FLAGS', ''))
  return environment.variables() | ({'XLA_FLAGS': ' '.join(flags)} if flags else {})


def connection() -> str:
  """Returns what is wrong with the connection of the processes, '' if nothing: devices of other
  hosts can be listed although no process of theirs is connected to this one.
  """
  connected, seen = processes.count(), jax.process_count()
  if connected == seen:
    return ''
  return (
    f'jax lists devices of {seen} processes, and {connected} are connected. Start the same command '
    'on every host of the slice, or give --coordinator, --num_processes and --process_id'
  )


def exchange() -> str:
  """Sends a number of each process to all over the devices, and compares it with what the processes
  exchanged over the network. Returns what is wrong, '' if nothing. All processes call it.
  """
  own = secrets.randbits(31)
  sent = processes.gather(own)
  devices = np.array(jax.devices())
  everywhere = Mesh(devices, ('devices',))
  place = NamedSharding(everywhere, P('devices'))
  row = np.array([[jax.process_index(), own]], np.int32)
  array = jax.make_array_from_callback((len(devices), 2), place, lambda _: row)
  share = jax.jit(lambda x: x, out_shardings=NamedSharding(everywhere, P()))
  with jax.set_mesh(everywhere):
    received = np.asarray(share(array).addressable_data(0)).tolist()
  expected = [[d.process_index, sent[d.process_index]] for d in devices]
  wrong = sorted({e[0] for e, r in zip(expected, received, strict=True) if e != r})
  if wrong:
    return f'the numbers of process {", ".join(map(str, wrong))} arrived wrong over the devices'
  return ''


def clocks() -> list[float]:
  """Returns the seconds since 1970 on each process, read at the same moment, within milliseconds:
  when all have arrived. All processes call it.
  """
  processes.wait_for_all()  # the first exchange also opens connections
  processes.wait_for_all()
  return processes.gather(time.time())


def sees_shared_file(workdir: str) -> bool:
  """Returns whether a file that process 0 writes into its workdir is in this one's. All call it."""

  def write() -> str:
    name = f'.shared.{secrets.token_hex(8)}'
    files.write_text(files.join(workdir, name), '')
    return name

  path = files.join(workdir, processes.from_main(write))
  found = files.exists(path)
  processes.wait_for_all()
  if processes.is_main():
    files.remove(path)
  return found


def disks(c: ml_collections.ConfigDict, workdir: str, is_training: bool) -> list[dict[str, Any]]:
  """Returns the local folders that the run fills: [{'what', 'path', 'free', 'least', 'usual'}], in
  bytes. `least`: without which it cannot end; `usual`: what it takes with float32 masters and two
  moments.
  """
  least = usual = 0
  if is_training and (weights := weight_bytes(c.model.path)):
    saved = 1 if _has_checkpoint(workdir) else c.checkpoint.keep + 1
    is_adapter = bool(c.lora.rank)
    least = 0 if is_adapter else 2 * weights  # a checkpoint and the export
    usual = weights + (0 if is_adapter else saved * 3 * weights)
  cache = c.data.cache or workdir
  rows = [(workdir, 'workdir', least, usual), (cache, 'data.cache', 0, 0)]
  out: dict[str, dict[str, Any]] = {}
  for path, what, low, high in rows:
    local = os.fspath(files.local_mirror(path))
    if files.is_remote(path):
      what, low, high = 'cache of gs:// ($FTJAX_CACHE)', 0, 0
    folder = _existing(local)
    row = {'what': what, 'path': folder, 'free': shutil.disk_usage(folder).free}
    out.setdefault(folder, row | {'least': low + _FLOOR, 'usual': high + _FLOOR})
  return list(out.values())


def _existing(path: str) -> str:
  """Returns the folder itself, or its nearest parent that exists."""
  place = pathlib.Path(path).absolute()
  return os.fspath(next(p for p in (place, *place.parents) if p.is_dir()))


def _has_checkpoint(workdir: str) -> bool:
  try:
    return snapshots.newest(workdir) is not None
  except (OSError, RunError):
    return False


def weight_bytes(source: str) -> int:
  """Returns the bytes of the weight files of a model: a folder, a GGUF file or a finished workdir;
  0 where they are not known without a download.
  """
  if not source:
    return 0
  try:
    path = files.as_path(source)
    if path.is_file():
      return path.stat().st_size if path.name.endswith(_WEIGHTS) else 0
    folders = (path, path / 'export')
    found = [p for f in folders for s in _WEIGHTS for p in f.glob(f'*{s}') if f.is_dir()]
    return sum(p.stat().st_size for p in found)
  except (OSError, RunError):
    return 0
