"""A tiny preference run inside the test process: its config, its run, batches of random rows."""

import json

import jax
import numpy as np
from tiny_model import place

from ftjax.cluster.watchdog import Watchdog
from ftjax.config import keys, validation
from ftjax.experiment import label_names
from ftjax.experiment import run as experiment
from ftjax.experiment.model import open_model
from ftjax.training import prefetch

SIZES = dict(
  vocab_size=260,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=64,
  tie_word_embeddings=True,
  max_position_embeddings=256,
)
ROWS, T = 8, 64


def settings(algorithm='dpo', **changes):
  """A validated config of ROWS rows of T tokens; keys of `changes` have __ for dots."""
  c = keys.default()
  with c.unlocked():
    c.model.random = dict(SIZES)
  c.algorithm, c.data.train, c.steps = algorithm, 'pairs:64', 8
  c.batch_size, c.seq_len, c.eval.batch_size = ROWS, T, 4
  c.optim.lr, c.optim.schedule = 1e-2, 'constant'
  for axis in ('data', 'fsdp', 'context', 'tensor', 'expert'):
    c.mesh[axis] = jax.sharding.get_mesh().shape[axis]
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  validation.validate(c)
  return c


def architecture(c):
  return open_model('', c.model.random.to_dict(), c.seed, head=label_names.head(c)).arch


def shapes_only(c):
  """A Run on the current mesh, without data."""
  run = experiment.without_data(c, jax.sharding.get_mesh(), architecture(c))
  run.watchdog = Watchdog({'restore': 0.0})
  return run


def rows(seed=0, count=ROWS, length=T, lengths=None):
  """Host arrays [B, T] of two segments a row: prompts of some tokens, answers of some others."""
  rng = np.random.default_rng(seed)
  batch = {k: np.zeros((count, length), np.int32) for k in ('tokens', 'labels', 'segments')}
  batch |= {'positions': np.zeros((count, length), np.int32)}
  batch['weights'] = np.zeros((count, length), np.float32)
  batch['values'] = rng.integers(0, 2, count).astype(np.float32)
  batch['values'][:2] = 0, 1
  for row in range(count):
    prompt, start = rng.integers(3, 256, rng.integers(2, 8)), 0
    for segment in (1, 2):
      answer = rng.integers(3, 256, rng.integers(1, 12))
      tokens = np.concatenate([prompt, answer])
      end = start + len(tokens)
      batch['tokens'][row, start:end] = tokens
      batch['segments'][row, start:end] = segment
      batch['positions'][row, start:end] = np.arange(len(tokens))
      first = start + len(prompt) - 1
      batch['labels'][row, first : end - 1] = answer
      batch['weights'][row, first : end - 1] = 1
      start = end
  return batch


def on_devices(batch, run):
  """[A, M, ...] arrays of a step on the run's mesh."""
  micro, shardings = run.config.grad_accum, run.batch_shardings(micro=True)
  split = {k: v.reshape(micro, len(v) // micro, *v.shape[1:]) for k, v in batch.items()}
  return prefetch.place(split, {k: shardings[k] for k in split})


def flat_on_devices(batch):
  """[B, ...] arrays on the current mesh."""
  return {
    k: place(v, 'batch', 'seq') if v.ndim == 2 else place(v, 'batch') for k, v in batch.items()
  }


def write(path, found):
  path.write_text(''.join(json.dumps(r) + '\n' for r in found))
  return str(path)
