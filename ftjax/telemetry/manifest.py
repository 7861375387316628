"""Builds manifest.json, the provenance of a run: code, packages, config, data, models, devices and
starts. It is what a replay compares (experiment/replay.py)."""

import dataclasses
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from ftjax import __version__
from ftjax.runtime.digest import digest
from ftjax.runtime.redaction import redact_text
from ftjax.telemetry import environment, source_code

# Keys that name a model; of a hub model the config holds the commit, org/name@COMMIT.
_MODELS = ('model.path', 'init_from', 'distill.teacher', 'ppo.value_from', 'rollout.reward_model')

# Shown in reports and model cards; `dependencies` has all packages.
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
_SHORT = 16  # hexadecimal digits of a digest in `starts`


@dataclasses.dataclass(frozen=True)
class Made:
  """What a run is made of, beside its config and the machine.

  Attributes:
    fingerprints: sha256 of model, tokenizer and each data source.
    executable: sha256 of the compiled step's text; '' where it cannot be printed.
    compiler_options: of the compiled step.
    data: for each source the numbers of examples: read, kept, dropped and why.
    parameters: {"trained", "frozen"}: how many.
    user_code: {config key: sha256 of the user's modules that it names}.
    is_deterministic: whether the run was started with --deterministic.
    steps: optimizer updates of the whole run.
  """

  fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
  executable: str = ''
  compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  data: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)
  user_code: Mapping[str, str] = dataclasses.field(default_factory=dict)
  is_deterministic: bool = False
  steps: int = 0


def build(config: Mapping[str, Any], made: Made) -> dict[str, Any]:
  """Returns the manifest of a run, without `starts`.

  Args:
    config: what config.json holds: the resolved config as plain values, without secrets.
    made: what the run is made of.
  """
  versions = environment.packages()
  devices = jax.devices()
  return {
    'ftjax': __version__,
    'code': source_code.identity(),
    'user_code': dict(made.user_code),
    'python': platform.python_version(),
    'packages': {name: versions.get(name) or metadata.version(name) for name in PACKAGES},
    'dependencies': {'digest': digest(versions), 'versions': versions},
    'config': digest(config),
    'models': {key: config[key] for key in _MODELS if config.get(key)},
    'fingerprints': dict(made.fingerprints),
    'data': made.data,
    'parameters': dict(made.parameters),
    'steps': made.steps,
    'devices': {
      'kind': devices[0].device_kind,
      'count': len(devices),
      'processes': jax.process_count(),
    },
    'host_cores': environment.cores(),
    'cpu': environment.cpu(),
    'executable': made.executable,
    'compiler_options': dict(made.compiler_options),
    'deterministic': made.is_deterministic,
    'xla_flags': redact_text(os.environ.get('XLA_FLAGS', '')),
    'environment': environment.variables(),
  }


def with_start(
  manifest: Mapping[str, Any],
  earlier: Mapping[str, Any],
  step: int,
  changed: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns a manifest with `starts`: an entry for each start of the run whose steps are kept, the
  present one last. So a run that was resumed on another machine, or by other code, shows it.

  Args:
    manifest: of the present start.
    earlier: the manifest of the start before; empty at a fresh start.
    step: the steps that are done where the present start begins.
    changed: {config key: its value before} of what changed since the start before.
  """
  found = earlier.get('starts') or []
  kept = [s for s in found if isinstance(s, dict) and int(s.get('step', 0)) < step]
  entry = {
    'step': step,
    'changed': dict(changed),
    'code': manifest['code']['digest'][:_SHORT],
    'dependencies': manifest['dependencies']['digest'][:_SHORT],
    'devices': manifest['devices'],
    'host_cores': manifest['host_cores'],
    'executable': manifest['executable'][:_SHORT],
  }
  return {**manifest, 'starts': [*kept, entry]}
