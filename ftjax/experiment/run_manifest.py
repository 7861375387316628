"""Writes config.json and manifest.json of a run that trains."""

import json
from typing import Any

import jax
import ml_collections

from ftjax.cluster import processes
from ftjax.config import section
from ftjax.experiment import summary
from ftjax.experiment.resume import Start
from ftjax.experiment.run import Run
from ftjax.experiment.trainer import Trainer
from ftjax.runtime import redaction
from ftjax.storage import files
from ftjax.telemetry import manifest
from ftjax.training.step import executable_fingerprint


def plain_config(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns a config as config.json holds it: {dotted key: JSON value}, without secrets."""
  return redaction.redact(section.plain(c))


def write_json(run: Run, name: str, content: dict[str, Any]) -> None:
  """Writes a JSON file of the workdir, by process 0."""
  if processes.is_main():
    files.write_text(files.join(run.workdir, name), json.dumps(content, indent=1) + '\n')


def write(
  trainer: Trainer,
  compiled: jax.stages.Compiled,
  start: Start,
  *,
  fingerprints: dict[str, str],
  user_code: dict[str, str],
  is_deterministic: bool,
) -> dict[str, Any]:
  """Writes manifest.json and returns its content.

  Args:
    trainer: of the run.
    compiled: its step.
    start: where this start of the run begins.
    fingerprints: of data and models.
    user_code: of the user's modules.
    is_deterministic: whether runtime/determinism.py was applied.
  """
  run, config = trainer.run, plain_config(trainer.run.config)
  made = manifest.Made(
    fingerprints=fingerprints,
    executable=executable_fingerprint(compiled),
    compiler_options=trainer.compiler_options,
    data=run.data.counts(),
    parameters=summary.parameters(trainer),
    user_code=user_code,
    is_deterministic=is_deterministic,
    steps=run.steps,
  )
  before = start.saved['config'] if start.saved else config
  changed = {k: before.get(k) for k in config if before.get(k) != config[k]}
  earlier = processes.from_main(lambda: read(run.workdir)) if start.saved else {}
  content = manifest.with_start(manifest.build(config, made), earlier, start.step, changed)
  write_json(run, 'manifest.json', content)
  return content


def read(workdir: str) -> dict[str, Any]:
  """Returns the manifest of a workdir; {} where it cannot be read."""
  try:
    found = json.loads(files.read_text(files.join(workdir, 'manifest.json')))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}
