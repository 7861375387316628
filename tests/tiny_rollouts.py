"""Tiny runs of the algorithms that train on rollouts: by hand, and as a user runs them."""

import dataclasses
import functools
import importlib
import json

import jax
import numpy as np

from ftjax.cluster.watchdog import Watchdog
from ftjax.config import keys, validation
from ftjax.experiment import adapters
from ftjax.experiment import data as examples
from ftjax.experiment import run as experiment
from ftjax.experiment.model import open_model
from ftjax.experiment.trainer import Trainer
from ftjax.runtime import trees

VOCAB_REWARDS = 'length:target=4'


def tiny(algorithm='grpo', **overrides):
  """4 prompts of 4 completions of at most 8 tokens."""
  c = keys.default()
  c.algorithm, c.steps, c.batch_size, c.seq_len = algorithm, 8, 4, 48
  if algorithm == 'online_dpo':
    c.seq_len = 96
  sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
  c.model.random = sizes | dict(tie_word_embeddings=True, max_position_embeddings=64)
  c.data.train = 'sums:30'
  c.rollout.group, c.rollout.max_tokens, c.rollout.slots = 4, 8, 16
  c.rollout.rewards = VOCAB_REWARDS
  # Many texts end a completion, so that lengths and rewards differ.
  c.rollout.stop = tuple('abcdefghijklmnopqrstuvwxyz0123456789')
  c.optim.lr = 1e-2
  c.update_from_flattened_dict(overrides)
  validation.validate(c)
  return c


def start(folder, algorithm='grpo', **overrides):
  c = tiny(algorithm, **overrides)
  model = open_model('', c.model.random.to_dict(), c.seed)
  model = dataclasses.replace(model, arch=adapters.adapted(model.arch, c))
  data = examples.open_data(c, model.tokenizer, str(folder))
  mesh = jax.sharding.get_mesh()
  return experiment.Run(c, str(folder), mesh, model, data, Watchdog(c.watchdog.to_dict()))


def parts_of(run):
  """What the algorithm gives to a run."""
  for model in run.auxiliary:
    model.check(run.model.tokenizer, run.config.seq_len)
  return importlib.import_module(f'ftjax.algorithms.{run.config.algorithm}').build(run)


class Steps:
  """A run by hand: its rollouts, states and metrics."""

  def __init__(self, folder, algorithm='grpo', **overrides):
    self.run = start(folder, algorithm, **overrides)
    self.rows = []
    parts = parts_of(self.run)
    self.trainer, self.source = Trainer(self.run, parts.loss), parts.source
    self.source.cut(-1, False)
    self.source.begin(lambda *row: self.rows.append(row), 0, {})
    self.state = self.trainer.fresh()

  @functools.cached_property
  def step(self):
    return self.trainer.compile()

  def batch(self, step=0):
    return self.source.take(self.state, step)


def host(tree):
  return {k: np.asarray(v) for k, v in trees.flatten(tree).items()}


def arguments(workdir, *overrides, algorithm='grpo'):
  """Eight steps, four on each rollout, a checkpoint after every one."""
  settings = [
    'steps=8',
    'batch_size=2',
    'rollout.group=4',
    'rollout.max_tokens=8',
    'rollout.slots=8',
    'rollout.samples=8',
    'rollout.rewards=length:target=4',
    "rollout.stop=('a','e','i','o','u','0','1','2','3')",
    'rollout.updates=2',
    'rollout.minibatches=2',
    *['policy.kl_coef=0.05'] * (algorithm in ('grpo', 'ppo')),
    'checkpoint.every=1',
    'checkpoint.keep=8',
    'eval.prompts=()',
    *overrides,
  ]
  return [
    f'--config=tiny_{algorithm}',
    f'--workdir={workdir}',
    *(f'--config.{s}' for s in settings),
  ]


def rollouts(workdir):
  """{file or step: content} of all rollouts, without what depends on the clock."""
  out = {p.name: p.read_text() for p in (workdir / 'rollouts').glob('*.jsonl')}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    if row['split'] == 'rollout':
      clock = ('engine/seconds', 'engine/tokens_per_s', 'engine/compilations')
      out[row['step']] = {k: v for k, v in row.items() if k not in clock}
  return out
