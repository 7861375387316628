"""What ftjax makes of a case of family_cases.py, for check_with_transformers.py:

  PYTHONPATH=tests PYTHON tests/parity/from_families.py CASE FOLDER

Writes FOLDER/source, the case as a HF folder; FOLDER/trained, exported in shards after 5 steps of
training from it, with a config.json of ftjax's own; FOLDER/lora and FOLDER/dora, PEFT folders of
adapters on it; and FOLDER/logits.npz: ids int32[B, T] and the logits of the last three. Of a case
with labels there are no adapters, and its steps are plain gradient descent.
"""

import sys
from pathlib import Path

import family_models
import family_training
import jax
import jax.numpy as jnp
import numpy as np
import tiny_adapters
import tiny_model

from ftjax.families import table
from ftjax.hf import export, load, peft_export, peft_names
from ftjax.models import kinds
from ftjax.models.architecture import MoeSpec
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from parity import family_cases as cases

STEPS = 5
ADAPTERS = {'lora': {}, 'dora': {'dora': True}}


def targets(arch, lora):
  """The maps that PEFT can adapt: of experts not with DoRA, nor those of other layers beside them;
  see peft_names.obstacle.
  """
  if not arch.mixtures():
    return {}
  layers = [i for i, spec in enumerate(arch.layers()) if isinstance(spec.mlp, MoeSpec)]
  experts = '' if lora.get('dora') else f'|layer({"|".join(map(str, layers))})/mlp/.*'
  return {'targets': f'.*/attn/.*{experts}'}


def logits(arch, params, ids):
  return tiny_model.logits(arch, params, ids, tiny_model.tokens_at(np.ones_like(ids)))


def train(arch, params, ids, target: Path):
  """Exports the trained model; returns its logits."""
  step, state, _, batch = family_training.start(arch, params, ids, np.ones_like(ids))
  for _ in range(STEPS):
    state, _ = step(state, batch)
  export.export(
    state.params,
    arch,
    target,
    source_config=None,
    tokenizer_files={},
    dtype=np.float32,
    stop_ids=(),
    max_shard_bytes=20_000,
  )
  return logits(arch, state.params, ids)


def train_labels(name, arch, params, ids, target: Path):
  """The same of a case with labels, whose loss is the mean square of its logits less 1."""
  batch = family_models.batch(ids)

  def found(params):
    forward = Forward(arch, jnp.float32)
    if arch.task == 'sequence':
      return forward.sequence_logits(params, batch, 1)[0]
    return forward.label_logits(params, batch)

  step = jax.jit(jax.grad(lambda p: jnp.square(found(p) - 1).mean()))
  for _ in range(STEPS):
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, step(params))
  export.export(
    params,
    arch,
    target,
    source_config=None,
    tokenizer_files={},
    dtype=np.float32,
    stop_ids=(),
    max_shard_bytes=20_000,
  )
  return np.asarray(jax.jit(found)(params))


def adapt(arch, params, ids, source: Path, target: Path, lora: dict):
  """Exports an adapter whose values are random; returns the model's logits."""
  arch = tiny_adapters.adapted(arch, **lora, **targets(arch, lora))
  assert not peft_names.obstacle(arch)
  params = tiny_adapters.move(arch, tiny_adapters.begin(arch, params))
  peft_export.export(
    params,
    arch,
    target,
    base=str(source),
    sha256=load.fingerprint(source),
    source_config=load.read_config(source),
    tokenizer_files={},
    stop_ids=(),
  )
  return logits(arch, params, ids)


def main(name: str, folder: Path) -> None:
  folder.mkdir()
  source = folder / 'source'
  family_models.write_folder(name, source)
  arch = table.architecture(load.read_config(source))
  ids = cases.ids((cases.CASES | cases.LABELED)[name])
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))

  def load_params():
    return load.load_params(source, arch, places, np.float32)

  if arch.task:
    trained = train_labels(name, arch, load_params(), ids, folder / 'trained')
    np.savez(folder / 'logits.npz', ids=ids, trained=trained)
    return
  found = {'trained': train(arch, load_params(), ids, folder / 'trained')}
  for kind, lora in ADAPTERS.items():
    found[kind] = adapt(arch, load_params(), ids, source, folder / kind, lora)
  np.savez(folder / 'logits.npz', ids=ids, **found)


if __name__ == '__main__':
  jax.config.update('jax_default_matmul_precision', 'highest')
  sizes = dict.fromkeys(sharding.AXES, 1)
  jax.set_mesh(sharding.make_mesh(sizes, jax.devices()[:1]))
  main(sys.argv[1], Path(sys.argv[2]))
