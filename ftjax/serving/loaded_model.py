"""Reads the model of --model for the entries: a folder, a file, or a checkpoint of a run."""

from typing import Any

import jax

from ftjax.experiment import adapter_folder, saved_model
from ftjax.experiment.model import Model, label_head, open_model
from ftjax.hf import load as hf_load
from ftjax.hf import peft, peft_weights, run_export, sentence_files
from ftjax.hf.label_files import EMBEDDING, Labels
from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import snapshots

TEXT, LABELS, VECTORS = 'text', 'labels', 'vectors'


def load(
  path: str,
  mesh: jax.sharding.Mesh,
  dtype: Any,
  family: str = '',
  base: str = '',
  use: str = TEXT,
) -> tuple[Model, dict]:
  """Returns (experiment.Model, parameters) of --model.

  Args:
    path: HF folder, GGUF file, PEFT folder, or workdir[@STEP].
    mesh: the mesh.
    dtype: of the parameters.
    family: value of model.family; a workdir has its own.
    base: of an adapter; '': the one that its folder names.
    use: what is wanted of the model: TEXT, LABELS or VECTORS.

  Raises:
    DataError: there is no model.
    ConfigError: a model of the other kind, or a base for what is no adapter.
  """

  def axes(arch):
    return sharding.shardings(mesh, kinds.axes(arch))

  def check(model):
    if use == LABELS and not model.arch.num_labels:
      raise ConfigError(
        f'--model={path} has no labels: --classify is for models of the algorithms classification, '
        'token_classification and reward_model'
      )
    if use == TEXT:
      saved_model.check_generates(model, f'--model={path}')
    if use == VECTORS and model.arch.num_labels:
      raise ConfigError(
        f'--model={path} gives labels: --embed is for models of the algorithm embedding, for those '
        'of sentence-transformers, and for encoders and language models without labels'
      )
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
  head = None if use == TEXT else label_head(export or path, family)
  if use == VECTORS and head is None:
    head = Labels(EMBEDDING, pool=sentence_files.find_pool(export or path))
  model = check(open_model(export or path, {}, 0, head, family=family, encoders=use == LABELS))
  return model, hf_load.load_params(export or path, model.arch, axes(model.arch), dtype)
