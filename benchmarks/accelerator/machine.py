"""What is attached and installed, found without jax: the runner must not hold the device that the
sections use.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
  'ftjax', 'jax', 'jaxlib', 'jax-cuda13-plugin', 'jax-cuda12-plugin', 'libtpu', 'flax', 'optax',
  'orbax-checkpoint', 'ml-collections', 'numpy', 'torch', 'transformers', 'trl', 'liger-kernel',
)  # fmt: skip


def attached() -> str:
  """Returns 'gpu', 'tpu' or 'cpu': by JAX_PLATFORMS, else by device files and plugins."""
  wanted = os.environ.get('JAX_PLATFORMS', '').lower()
  for name, kind in (('cuda', 'gpu'), ('gpu', 'gpu'), ('tpu', 'tpu'), ('cpu', 'cpu')):
    if name in wanted:
      return kind
  plugins = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
  has_gpu = bool(cuda_version()) or any(Path('/dev').glob('nvidia[0-9]*'))
  if has_gpu and any(map(importlib.util.find_spec, plugins)):
    return 'gpu'
  chips = [*Path('/dev').glob('accel*'), *Path('/dev').glob('vfio/[0-9]*')]
  return 'tpu' if chips and importlib.util.find_spec('libtpu') else 'cpu'


def cuda_version() -> str:
  """Returns the CUDA version of the driver with at least one GPU, such as '13.0'; '' without."""
  try:
    driver = ctypes.CDLL('libcuda.so.1')
  except OSError:
    return ''
  version, count = ctypes.c_int(), ctypes.c_int()
  ok = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
  if not ok or not count.value or driver.cuDriverGetVersion(ctypes.byref(version)):
    return ''
  return f'{version.value // 1000}.{version.value % 1000 // 10}'


def driver() -> str:
  """Returns the version of NVIDIA's driver from nvidia-smi, else from /proc; '' for none."""
  fields = '--query-gpu=name,driver_version,memory.total,power.limit'
  found = _output('nvidia-smi', fields, '--format=csv,noheader')
  if found:
    return found.splitlines()[0]
  file = Path('/proc/driver/nvidia/version')
  return file.read_text().splitlines()[0] if file.exists() else ''


def describe(root: Path, commit: str) -> dict[str, str]:
  """Returns versions, driver and host; of the code its commit, if it is known, and a SHA-256.

  root: of the checkout. commit: as the user gave it; '' asks git.
  """
  found, system = {}, f'{platform.system()} {platform.release()}'
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return {
    'commit': commit or _commit(root),
    'code': code_digest(root),
    'driver': driver(),
    'cuda': cuda_version(),
    'host': f'{platform.machine()}, {os.cpu_count()} cores, {system}',
    'packages': ', '.join(f'{k} {v}' for k, v in found.items()),
  }


def code_digest(root: Path) -> str:
  """Returns the first digits of the SHA-256 of all Python files of ftjax, in the checkout or as it
  is installed: comparable where no commit is known.
  """
  folder = root / 'ftjax'
  if not folder.is_dir():
    spec = importlib.util.find_spec('ftjax')
    if spec is None or not spec.submodule_search_locations:
      return ''
    folder = Path(spec.submodule_search_locations[0])
  total = hashlib.sha256()
  for path in sorted(folder.rglob('*.py')):
    total.update(path.relative_to(folder).as_posix().encode() + b'\0' + path.read_bytes())
  return total.hexdigest()[:16]


def _commit(root: Path) -> str:
  if not (root / '.git').exists():
    return ''
  commit = _output('git', '-C', str(root), 'rev-parse', 'HEAD')
  changed = _output('git', '-C', str(root), 'status', '--porcelain', '-uno')
  return commit + (' with changes' if commit and changed else '')


def _output(*command: str) -> str:
  """Returns what a command prints; '' where it is not installed or fails."""
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
  except (OSError, subprocess.SubprocessError):
    return ''
  return done.stdout.strip()
