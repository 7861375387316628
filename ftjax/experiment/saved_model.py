"""Reads the model of a checkpoint of a run, ended or not: WORKDIR, WORKDIR@STEP, @last, @best.

Reads only: the run may be alive, so its lock is not taken and nothing in its workdir changes. The
model is the one that the run would export: of the moving average where there is one, without a
value model or a reference.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from ftjax.config import algorithms
from ftjax.experiment import vocabulary
from ftjax.experiment.model import Model, open_model
from ftjax.models import kinds
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files, hub, snapshots

_TRIES = 5  # a live run removes old steps while this one reads
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class SavedModel:
  """The model of one checkpoint, its weights not yet read.

  model: architecture, tokenizer and files, from the run's model.path. param_dtype: of the run's
  parameters, which its export has.
  """

  workdir: str
  step: int
  model: Model
  param_dtype: str

  def load(self, sharding: Callable[[str], Any], dtype: str) -> dict[str, Any]:
    """Returns the parameters as a nested dict of arrays.

    Args:
      sharding: of a parameter, by its name such as 'stack0/block0/attn/q/w'.
      dtype: of all parameters.
    """
    saved = snapshots.shapes(self.workdir, self.step)
    places = {
      field: trees.flatten(saved[field]) for field in ('ema', 'params', 'frozen') if saved[field]
    }
    wanted: dict[str, dict[str, Any]] = {}
    arch = self.model.arch
    for name in kinds.names(arch, 'base', 'adapter'):
      shape, own_dtype = kinds.declared(arch)[name].shape, kinds.declared(arch)[name].dtype
      field = next((f for f, leaves in places.items() if name in leaves), None)
      if field is None or tuple(places[field][name].shape) != shape:
        found = 'not there' if field is None else f'of shape {tuple(places[field][name].shape)}'
        raise DataError(
          f'{self.workdir}, checkpoint {self.step}: {name} is {found}; expected {shape} by the '
          "config.json of the run's model.path, which is another model now"
        )
      leaf = jax.ShapeDtypeStruct(shape, np.dtype(own_dtype or dtype), sharding=sharding(name))
      wanted.setdefault(field, {})[name] = leaf
    tree = {field: trees.unflatten(leaves) for field, leaves in wanted.items()}
    found = snapshots.read(self.workdir, self.step, tree)
    merged = {n: x for field in wanted for n, x in trees.flatten(found[field]).items()}
    params = trees.unflatten({name: merged[name] for name in sorted(merged)})
    return kinds.completed(arch, params, sharding, 0, np.dtype(dtype))


def with_step(workdir: str, which: str, use: Callable[[SavedModel], T]) -> T:
  """Calls `use` with the model of a checkpoint and returns what it returns.

  Of a live run the newest checkpoint may be removed before it is read: then `use` is called again,
  with the next one. So `use` reads the weights and keeps nothing of a try that failed.

  Args:
    workdir: of the run.
    which: a step, 'best', or 'last' (also '').

  Raises:
    DataError: no such checkpoint, or the run's model.path is not there.
  """
  for attempt in range(_TRIES):
    step = _step(workdir, which)
    try:
      return use(_open(workdir, step))
    except (DataError, OSError):
      if which.isdigit() or attempt == _TRIES - 1 or _step(workdir, which) == step:
        raise
  raise AssertionError('unreachable')


def family(workdir: str) -> str:
  """Returns model.family of the run in a workdir."""
  return json.loads(files.read_text(files.join(workdir, 'config.json'))).get('model.family', '')


def _step(workdir: str, which: str) -> int:
  steps = snapshots.steps(workdir)
  if not steps:
    raise DataError(
      f'{workdir}: no checkpoint is finalized yet; the run writes the first one after '
      'checkpoint.every steps'
    )
  if which.isdigit():
    if int(which) not in steps:
      raise DataError(f'{workdir}@{which}: there is no such checkpoint; finalized are {steps}')
    return int(which)
  if which != 'best':
    return steps[-1]
  config = snapshots.meta(workdir, steps[-1])['config']
  metric = config.get('checkpoint.best_metric')
  if not metric:
    raise DataError(
      f'{workdir}@best: the run records no best checkpoint (checkpoint.best_metric is empty); '
      f'give @last or one of the steps {steps}'
    )
  step = snapshots.best(workdir, metric, config.get('checkpoint.best_mode', 'min'))
  if step is None:
    raise DataError(f'{workdir}@best: no checkpoint of {steps} has a value of {metric} yet')
  return step


def _open(workdir: str, step: int) -> SavedModel:
  saved = snapshots.meta(workdir, step)
  config: Mapping[str, Any] = saved['config']
  path, random = config.get('model.path', ''), config.get('model.random') or {}
  if path and not files.exists(path) and not hub.is_pinned(path):
    raise DataError(
      f'{workdir}: the run was started with model.path={path}, which is not there. Its config and '
      'tokenizer are needed: run this in the folder where the training was started, or put the '
      'model back'
    )
  labels, family = algorithms.find(config['algorithm']).num_labels, config.get('model.family', '')
  wanted = vocabulary.of(config)
  model = open_model(
    path, dict(random), config['seed'], labels=labels, family=family, vocabulary=wanted
  )
  tokenizer = saved.get('fingerprints', {}).get('tokenizer')
  if tokenizer not in (None, model.tokenizer.fingerprint):
    raise DataError(
      f'{path or workdir}: its tokenizer or chat template is not the one that {workdir} was '
      'trained with; put that one back'
    )
  return SavedModel(workdir, step, model, config['model.param_dtype'])


def check_generates(model: Model, name: str) -> None:
  """Raises ConfigError for a reward model, which writes no text."""
  if model.arch.num_labels:
    raise ConfigError(f'{name} is a reward model; it scores text and cannot write it')
