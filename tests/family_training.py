"""Training of the models of family_models.py by the step that a run of a config compiles."""

import family_models
import jax
import numpy as np
from tiny_model import place

from ftjax.algorithms import sft
from ftjax.config import keys
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.training.state import create


def start(arch, params, tokens, segments):
  """(compiled step, state of no steps, its shapes, batch) of packed rows int32[B, T]."""
  c = keys.default()
  c.batch_size, c.seq_len = tokens.shape
  c.steps, c.optim.lr, c.optim.schedule = 10, 1e-2, 'constant'
  run = experiment.without_data(c, jax.sharding.get_mesh(), arch)
  trainer = Trainer(run, sft.make_loss(run.forward, c))
  places = jax.tree.map(lambda a: a.sharding, trainer.abstract)
  make = jax.jit(lambda p: create(p, {}, trainer.optimizer, False), out_shardings=places)
  batch = {n: np.asarray(x)[None] for n, x in family_models.batch(tokens, segments).items()}
  placed = {n: place(x, None, 'batch', 'seq') for n, x in batch.items()}
  return trainer.compile(), make(params), trainer.abstract, placed
