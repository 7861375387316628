"""Reads the model of --model for the entries: a folder, a file, or a checkpoint of a run."""

from typing import Any

import jax

from ftjax.experiment import adapter_folder, saved_model
from ftjax.experiment.model import Model, label_head, open_model
from ftjax.hf import load as hf_load
from ftjax.hf import peft, peft_weights, run_export
from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import snapshots


def load(
  path: str,
  mesh: jax.sharding.Mesh,
  dtype: Any,
  family: str = '',
  base: str = '',
  labels: bool = False,
) -> tuple[Model, dict]:
  """Returns (experiment.Model, parameters) of --model.

  Args:
    path: HF folder, GGUF file, PEFT folder, or workdir[@STEP].
    mesh: the mesh.
    dtype: of the parameters.
    family: value of model.family; a workdir has its own.
    base: of an adapter; '': the one that its folder names.
    labels: whether a model with labels is wanted, and not one that writes text.

  Raises:
    DataError: there is no model.
    ConfigError: a model of the other kind, or a base for what is no adapter.
  """

  def axes(arch):
    return sharding.shardings(mesh, kinds.axes(arch))

  def check(model):
    if labels and not model.arch.num_labels:
      raise ConfigError(
        f'--model={path} has no labels: --classify is for models of the algorithms classification, '
        'token_classification and reward_model'
      )
    if not labels:
      saved_model.check_generates(model, f'--model={path}')
    return model

  def from_checkpoint(saved):
    check(saved.model)
    found = trees.flatten(axes(saved.model.arch))
    return saved.model, saved.load(found.__getitem__, dtype.name)

  workdir, which = snapshots.parse(path)
  if which and not snapshots.is_workdir(workdir):
    raise DataError(f'--model={path}: {workdir} is not a workdir of ftjax.train')
  export = None if which else run_export.find_newest(workdir, base)
  if export is None and snapshots.is_workdir(workdir):
    return saved_model.with_step(workdir, which, from_checkpoint)
  family = family or (saved_model.family(workdir) if export else '')
  adapter = peft.find(export or path)
  if adapter is not None:
    model = check(adapter_folder.open_adapter(adapter, base, family))
    return model, peft_weights.load_params(adapter, model.source, model.arch, axes, dtype)
  if base:
    raise ConfigError(f'--base={base}: --model={path} is no adapter and needs no base')
  head = label_head(export or path, family) if labels else None
  model = check(open_model(export or path, {}, 0, head, family=family, encoders=labels))
  return model, hf_load.load_params(export or path, model.arch, axes(model.arch), dtype)
