"""What ftjax makes of a case of t5_cases.py, for check_with_transformers.py:

  PYTHONPATH=tests PYTHON tests/parity/from_t5.py CASE FOLDER

Writes FOLDER/source, the case as a HF folder; FOLDER/trained, exported in shards after 5 steps of
algorithm=seq2seq from it, with a config.json of ftjax's own; FOLDER/lora, the PEFT folder of an
adapter on it; FOLDER/logits.npz: rows, and the logits of the last two.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import t5_models
import tiny_adapters
from tiny_model import place

from ftjax.algorithms import seq2seq
from ftjax.config import keys
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.families import table
from ftjax.hf import export, load, peft_export
from ftjax.models import kinds
from ftjax.runtime import sharding
from ftjax.training.state import create
from parity import t5_cases as cases

STEPS = 5


def train(arch, params, batch):
  """Returns the parameters after some steps of the step that a run compiles."""
  c = keys.default()
  c.algorithm, c.batch_size, c.seq_len = 'seq2seq', cases.ROWS, cases.TARGET
  c.seq2seq.source_len, c.steps, c.optim.lr, c.optim.schedule = cases.SOURCE, 10, 1e-2, 'constant'
  run = experiment.without_data(c, jax.sharding.get_mesh(), arch)
  trainer = Trainer(run, seq2seq.make_loss(run.forward, c))
  places = jax.tree.map(lambda a: a.sharding, trainer.abstract)
  make = jax.jit(lambda p: create(p, {}, trainer.optimizer, False), out_shardings=places)
  step, state = trainer.compile(), make(params)
  placed = {n: place(np.asarray(x)[None], None, 'batch', 'seq') for n, x in batch.items()}
  for _ in range(STEPS):
    state, _ = step(state, placed)
  return state.params


def main(name: str, folder: Path) -> None:
  folder.mkdir()
  source = folder / 'source'
  t5_models.write_folder(name, source)
  arch = table.architecture(load.read_config(source))
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  rows = t5_models.rows()
  batch = t5_models.batch(*rows)

  def load_params():
    return load.load_params(source, arch, places, np.float32)

  params = train(arch, load_params(), batch)
  files = {'tokenizer_files': {}, 'stop_ids': ()}
  export.export(
    params,
    arch,
    folder / 'trained',
    source_config=None,
    dtype=np.float32,
    max_shard_bytes=20_000,
    **files,
  )
  found = {'trained': np.asarray(t5_models._logits(arch, params, batch))}
  own = tiny_adapters.adapted(arch)
  params = tiny_adapters.move(own, tiny_adapters.begin(own, load_params()))
  peft_export.export(
    params,
    own,
    folder / 'lora',
    base=str(source),
    sha256=load.fingerprint(source),
    source_config=load.read_config(source),
    **files,
  )
  found['lora'] = np.asarray(t5_models._logits(own, params, batch))
  arrays = dict(zip(('source', 'inside', 'labels', 'segments'), rows, strict=True))
  np.savez(folder / 'logits.npz', **arrays, **found)


if __name__ == '__main__':
  jax.config.update('jax_default_matmul_precision', 'highest')
  sizes = dict.fromkeys(sharding.AXES, 1)
  jax.set_mesh(sharding.make_mesh(sizes, jax.devices()[:1]))
  main(sys.argv[1], Path(sys.argv[2]))
