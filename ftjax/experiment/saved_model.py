"""Reads the model of a checkpoint of a run, ended or not: WORKDIR, WORKDIR@STEP, @last, @best.

Reads only: the run may be alive, so its lock is not taken and nothing in its workdir changes. The
model is the one that the run would export: of the moving average where there is one, without a
value model or a reference. Checkpoints of an adapter run hold the adapter alone; its base is read
from where the run read it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from ftjax.config import algorithms, keys
from ftjax.experiment import adapters, init_from, label_names, vocabulary, weights
from ftjax.experiment.model import Model, open_model
from ftjax.families import table
from ftjax.hf import load
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
  parameters, which its export has; of an adapter run that of the merged model. base: folder of the
  base of an adapter run; '': random. base_hash: what its fingerprint must be, '' where it is not
  known; base_record: its name among those of the run, 'model' or 'init_from'. seed: of random
  weights.
  """

  workdir: str
  step: int
  model: Model
  param_dtype: str
  base: str = ''
  base_hash: str = ''
  base_record: str = 'model'
  seed: int = 0

  def load(self, sharding: Callable[[str], Any], dtype: str) -> dict[str, Any]:
    """Returns the parameters as a nested dict of arrays.

    Args:
      sharding: of a parameter, by its name such as 'stack0/block0/attn/q/w'.
      dtype: of all parameters that declare none.

    Raises:
      DataError: the base is not the one that the adapter was trained on.
    """
    saved = snapshots.shapes(self.workdir, self.step)
    places = {
      field: trees.flatten(saved[field]) for field in ('ema', 'params', 'frozen') if saved[field]
    }
    wanted: dict[str, dict[str, Any]] = {}
    arch = self.model.arch
    held = ('adapter',) if arch.adapter else ('base', 'adapter')
    for name in kinds.names(arch, *held):
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
    if arch.adapter:
      merged |= trees.flatten(self._load_base(sharding, dtype))
    params = trees.unflatten({name: merged[name] for name in sorted(merged)})
    return kinds.completed(arch, params, sharding, 0, np.dtype(dtype))

  def _load_base(self, sharding: Callable[[str], Any], dtype: str) -> dict[str, Any]:
    """Returns the leaves of the base under the adapter."""
    arch, seed = self.model.arch, self.seed
    # The head of labels is the adapter's, unless the base has one; the head that is there instead
    # lies like the embedding, and goes.
    bare, head_of = dataclasses.replace(arch, adapter=None, num_labels=0), None
    if self.base:
      found = table.architecture(load.read_config(self.base), arch.family)
      if arch.is_encoder:  # its own head is not read
        bare, head_of = dataclasses.replace(arch, adapter=None), found
      else:
        bare = bare.with_head_of(found)
    known = kinds.declared(arch)
    places = {n: sharding(n if n in known else 'embed/w') for n in kinds.declared(bare)}
    if not self.base:
      found = weights.random(bare, jax.random.key(seed), np.dtype(dtype), places)
    else:
      load.open_source(self.base).hash_reads()
      settings = (np.dtype(dtype), seed, None, head_of)
      found = load.load_params(self.base, bare, trees.unflatten(places), *settings)
      if self.base_hash not in ('', self._fingerprint()):
        raise DataError(
          f'{self.workdir}: the base of its adapter, {self.base}, holds other weights than those '
          'that it was trained on; put them back'
        )
    own = set(kinds.names(arch, 'base'))
    return trees.select(found, lambda n: n in own)[0]

  def _fingerprint(self) -> str:
    """Returns the fingerprint of the base, in the form in which the run recorded it."""
    is_own = self.base_record == 'model'
    return self.model.fingerprint if is_own else load.fingerprint(self.base)


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
  head, family = label_names.saved_head(config), config.get('model.family', '')
  wanted = vocabulary.of(config)
  model = open_model(
    path,
    dict(random),
    config['seed'],
    head,
    family=family,
    vocabulary=wanted,
    encoders=algorithms.find(config['algorithm']).predicts_masked,
  )
  tokenizer = saved.get('fingerprints', {}).get('tokenizer')
  if tokenizer not in (None, model.tokenizer.fingerprint):
    raise DataError(
      f'{path or workdir}: its tokenizer or chat template is not the one that {workdir} was '
      'trained with; put that one back'
    )
  if not config.get('lora.rank'):
    return SavedModel(workdir, step, model, config['model.param_dtype'])
  c = keys.default()
  own = {k: v for k, v in config.items() if k.startswith('lora.') or k == 'init_from'}
  c.update_from_flattened_dict({k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
  model = dataclasses.replace(model, arch=adapters.adapted(model.arch, c))
  base, known = init_from.find(c).base, saved.get('fingerprints', {})
  record = 'init_from' if base else 'model'
  return SavedModel(
    *(workdir, step, model, adapters.merged_dtype(c.lora.base), base or model.source),
    base_hash=known.get(record, ''),
    base_record=record,
    seed=config['seed'],
  )


def check_generates(model: Model, name: str) -> None:
  """Raises ConfigError for a reward model, which writes no text."""
  if model.arch.num_labels:
    raise ConfigError(f'{name} is a reward model; it scores text and cannot write it')
