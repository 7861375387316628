"""Settings under which a program returns the same bits at every run on the same devices: those of
`--deterministic`. They must be in the environment before jax makes its backends.

GPU: XLA picks among kernels by timing them, and some kernels add in the order in which threads
arrive. `xla_gpu_deterministic_ops` stops both (openxla/xla, pull requests 12520 and 16635); the two
settings that it implies are given too, so that they are seen. NCCL's sums inside the switch
(NVLS) are switched off, which Megatron-LM's deterministic mode excludes as well.

CPU and TPU: nothing is set. XLA compiles for them without timing, and their programs add in an
order that is fixed when they are compiled. On a CPU it depends on the number of threads.
"""

import os
from collections.abc import MutableMapping
from importlib import metadata

from ftjax.runtime.errors import ConfigError

GPU_FLAGS = {
  'xla_gpu_deterministic_ops': 'true',
  'xla_gpu_exclude_nondeterministic_ops': 'true',
  'xla_gpu_autotune_level': '0',
}
GPU_VARIABLES = {'NCCL_NVLS_ENABLE': '0'}

_GPU_NAMES = ('cuda', 'rocm', 'gpu')
_TRUE, _FALSE = ('', 'true', '1'), ('false', '0')


def may_use_gpu(environment: MutableMapping[str, str] = os.environ) -> bool:
  """Returns whether jax may find a GPU, by JAX_PLATFORMS, else by the installed plugins."""
  if wanted := environment.get('JAX_PLATFORMS', ''):
    return any(name in wanted.lower() for name in _GPU_NAMES)
  plugins = metadata.entry_points(group='jax_plugins')
  return any(name in plugin.name.lower() for plugin in plugins for name in _GPU_NAMES)


def apply(environment: MutableMapping[str, str] = os.environ) -> None:
  """Adds the settings to XLA_FLAGS and the environment; what the user set there stays.

  Raises:
    ConfigError: a setting of the user contradicts one of them.
  """
  if not may_use_gpu(environment):
    return
  words = environment.get('XLA_FLAGS', '').split()
  given = dict(w.lstrip('-').partition('=')[::2] for w in words)  # of a repeated flag the last
  for name, wanted in GPU_FLAGS.items():
    if name in given and not _same(given[name], wanted):
      raise ConfigError(
        f'--deterministic needs --{name}={wanted}, and XLA_FLAGS has --{name}={given[name]}: '
        'remove one of the two'
      )
  for name, wanted in GPU_VARIABLES.items():
    if environment.get(name, wanted) != wanted:
      raise ConfigError(
        f'--deterministic needs {name}={wanted}, and the environment has '
        f'{name}={environment[name]}: remove one of the two'
      )
  words += [f'--{name}={wanted}' for name, wanted in GPU_FLAGS.items() if name not in given]
  environment['XLA_FLAGS'] = ' '.join(words)
  environment.update(GPU_VARIABLES)


def _same(given: str, wanted: str) -> bool:
  """Returns whether two values of a flag mean the same."""
  if wanted == 'true':
    return given.lower() in _TRUE
  return given.lower() == wanted or (wanted in _FALSE and given.lower() in _FALSE)
