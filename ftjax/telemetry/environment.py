"""Describes what a run computes with beside its own code: packages, processor, and environment
variables that change numbers."""

import os
import pathlib
import platform
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata

from ftjax.runtime.redaction import redact_text

_PYPROJECT = pathlib.Path(__file__).resolve().parents[2] / 'pyproject.toml'
# Extras of ftjax whose packages take part in a training step.
_EXTRAS = frozenset({'rewards', 'tpu', 'cuda'})
# Of the accelerators; extras of jax install them, under names that change with CUDA's version.
_ACCELERATORS = ('jax-cuda', 'jax-rocm', 'nvidia-', 'libtpu', 'triton')
# Packages whose version may change the bits of a loss. Those that prepare data are not among them:
# the data has fingerprints of its own.
_NUMERIC = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'ml-dtypes', *_ACCELERATORS)

_ROOTS = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'ml-collections', 'tokenizers', 'numpy')

_NAME = re.compile(r'([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?')
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")

# Instruction sets that XLA's CPU backend compiles for.
_FEATURES = ('avx', 'avx2', 'fma', 'f16c', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16')
_FEATURES += ('amx_tile', 'amx_bf16', 'amx_int8', 'asimd', 'asimdhp', 'bf16', 'sve', 'sve2')

_VARIABLES = (
  'JAX_PLATFORMS', 'JAX_DEFAULT_MATMUL_PRECISION', 'JAX_ENABLE_X64', 'JAX_DEFAULT_DTYPE_BITS',
  'JAX_DEFAULT_PRNG_IMPL', 'JAX_THREEFRY_PARTITIONABLE', 'JAX_DISABLE_JIT', 'JAX_NUM_CPU_DEVICES',
  'LIBTPU_INIT_ARGS', 'NPROC', 'OMP_NUM_THREADS', 'NVIDIA_TF32_OVERRIDE', 'CUBLAS_WORKSPACE_CONFIG',
  'CUBLASLT_WORKSPACE_SIZE', 'NCCL_ALGO', 'NCCL_PROTO', 'NCCL_NVLS_ENABLE', 'NCCL_COLLNET_ENABLE',
)  # fmt: skip
# Flags of XLA that change no number: where it writes, how long it waits, how many devices it makes
# (which are counted on their own).
_SILENT_FLAG = re.compile(r'--xla_(dump|.*timeout|force_host_platform_device_count)')


def packages() -> dict[str, str]:
  """Returns {name: version} of the installed packages that ftjax depends on, directly or through
  others, and of the accelerators' own; sorted by name.
  """
  installed = _installed()
  left = [x for text in _own_requirements(installed) for x in _wanted(text, _EXTRAS)]
  left += [(name, frozenset()) for name in installed if name.startswith(_ACCELERATORS)]
  found: dict[str, str] = {}
  seen = set()
  while left:
    name, extras = item = left.pop()
    if item in seen or name not in installed or name == 'ftjax':  # or it is of another platform
      continue
    seen.add(item)
    found[name] = installed[name].version
    left += [x for text in installed[name].requires or () for x in _wanted(text, extras)]
  return dict(sorted(found.items()))


def is_numeric(package: str) -> bool:
  """Returns whether the version of a package may change the bits of a loss."""
  return package in _NUMERIC or package.startswith(_ACCELERATORS)


def _installed() -> dict[str, metadata.Distribution]:
  """Returns the installed packages by name; of a name that is there twice the first on the path."""
  found: dict[str, metadata.Distribution] = {}
  for distribution in metadata.distributions():
    found.setdefault(_normal(distribution.metadata['Name'] or ''), distribution)
  return found


def _own_requirements(installed: Mapping[str, metadata.Distribution]) -> list[str]:
  """Returns the requirements of ftjax: as installed, else those of the checkout."""
  if 'ftjax' in installed:
    return installed['ftjax'].requires or []
  if not _PYPROJECT.exists():  # a copy of the package alone
    return list(_ROOTS)
  project = tomllib.loads(_PYPROJECT.read_text())['project']
  others = project.get('optional-dependencies', {})
  extras = [f'{text}; extra == "{k}"' for k, texts in others.items() for text in texts]
  return [*project['dependencies'], *extras]


def _wanted(requirement: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
  """Yields (name, its extras) of a requirement, nothing where it belongs to an extra that is not
  among `extras`. Markers of platforms are not read: what they exclude is not installed.
  """
  text, _, marker = requirement.partition(';')
  needed = set(_EXTRA.findall(marker))
  if needed and not needed & extras:
    return
  if match := _NAME.match(text.strip()):
    own = frozenset(e.strip().lower() for e in (match[2] or '').split(',') if e.strip())
    yield _normal(match[1]), own


def _normal(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


def cores() -> int:
  """Returns the CPU cores that this process may use; on macOS those of the machine."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:
    return os.cpu_count()


def cpu() -> dict[str, object]:
  """Returns {"model", "features"} of the processor: its name, and the instruction sets that XLA may
  use.
  """
  fields: dict[str, str] = {}
  path = pathlib.Path('/proc/cpuinfo')
  if path.exists():
    for line in path.read_text(errors='replace').split('\n\n')[0].splitlines():
      key, _, value = line.partition(':')
      fields[key.strip().lower()] = value.strip()
  flags = set((fields.get('flags') or fields.get('features') or '').split())
  model = fields.get('model name') or platform.processor() or platform.machine()
  return {'model': model, 'features': [f for f in _FEATURES if f in flags]}


def variables() -> dict[str, str]:
  """Returns the environment variables that may change numbers and are set, without secrets."""
  return {n: redact_text(os.environ[n]) for n in _VARIABLES if os.environ.get(n)}


def xla_flags(text: str) -> list[str]:
  """Returns the flags in a value of XLA_FLAGS that may change numbers, sorted."""
  return sorted(f for f in text.split() if not _SILENT_FLAG.match(f))
