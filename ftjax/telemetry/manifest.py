"""Builds manifest.json, the provenance of a run: code, versions, config, data, models, devices."""

import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

import jax

from ftjax import __version__
from ftjax.runtime.digest import digest

# Keys that name a model; of a hub model the config holds the commit, org/name@COMMIT.
_MODELS = ('model.path', 'init_from', 'ppo.value_from', 'rollout.reward_model')

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'tokenizers',
  'ml-collections',
)


def _git() -> dict[str, Any]:
  """Returns the commit and whether files differ from it; empty outside of a checkout or without
  git.
  """
  here = pathlib.Path(__file__).resolve().parents[2]
  if not (here / '.git').exists():
    return {}

  def ask(*words):
    run = subprocess.run(
      ['git', '-C', here, *words], capture_output=True, text=True, timeout=10, check=False
    )
    return run.stdout.strip()

  try:
    return {
      'commit': ask('rev-parse', 'HEAD'),
      'modified': bool(ask('status', '--porcelain', '-uno')),
    }
  except (OSError, subprocess.SubprocessError):
    return {}


def build(
  config: dict[str, Any],
  fingerprints: dict[str, str],
  executable: str,
  compiler_options: dict[str, Any],
  data: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
  """Returns the manifest of a run.

  Args:
    config: the resolved config as plain values.
    fingerprints: sha256 of model, tokenizer and each data source.
    executable: sha256 of the compiled step's text.
    compiler_options: of the compiled step.
    data: for each source the numbers of examples: read, kept, dropped and why.
  """
  devices = jax.devices()
  return {
    'ftjax': __version__,
    'code': _git(),
    'python': platform.python_version(),
    'packages': {name: metadata.version(name) for name in PACKAGES},
    'config': digest(config),
    'models': {key: config[key] for key in _MODELS if config.get(key)},
    'fingerprints': fingerprints,
    'data': data or {},
    'devices': {
      'kind': devices[0].device_kind,
      'count': len(devices),
      'processes': jax.process_count(),
    },
    'host_cores': _cores(),
    'executable': executable,
    'compiler_options': compiler_options,
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }


def _cores() -> int:
  """Returns the CPU cores that this process may use; on macOS those of the machine."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:
    return os.cpu_count()
