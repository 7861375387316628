"""Decoding by the rollout engine: tokens/s, the share of the memory bandwidth, and whether the
log-probabilities of the sampled tokens are the trainer's.

Every completion has its full length, as no stop token is given. The bound reads weights and cache
once per step at the data sheet's bandwidth. The time includes reading the prompts.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from accelerator import measuring, training
from accelerator.record import Record, check
from ftjax.data import batches
from ftjax.experiment import weights
from ftjax.generation.engine import TOKENS_PER_DISPATCH, Engine
from ftjax.generation.queue import ring_capacity
from ftjax.generation.sampling import Sampling
from ftjax.models import kinds, kv_cache
from ftjax.models.architecture import Architecture
from ftjax.models.forward import Forward
from ftjax.planning import memory, topology
from ftjax.runtime import sharding, trees

COLUMNS = (
  ('slots', 'sequences at once', 'd'),
  ('tokens_per_s', 'tokens/s', ',.0f'),
  ('step_ms', 'step, ms', '.2f'),
  ('bound_ms', 'bound by bandwidth, ms', '.2f'),
  ('share', 'bound / step, %', '.0f'),
  ('mean_gap', 'mean difference of log-probabilities from the trainer, nats', '.2g'),
  ('largest_gap', 'largest', '.2g'),
  ('cache_gib', 'cache, GiB', '.2f'),
  ('peak_gib', 'peak, GiB', '.2f'),
  ('compile_s', 'first rollout with compiling, s', '.1f'),
)
PROMPT, COMPLETION = 128, 256
_TINY = 9, 8
# Mean difference that bfloat16 explains, in nats.
GAP = 0.03


def random_params(arch: Architecture, dtype: str) -> dict:
  """Returns random weights on the current mesh."""
  places = trees.flatten(sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch)))
  return weights.random(arch, jax.random.key(0), jnp.dtype(dtype), places)


def make_engine(arch: Architecture, slots: int) -> Engine:
  """Returns an engine that decodes `slots` sequences at once and stops at no token."""
  return Engine(arch, jnp.dtype('bfloat16'), (), 0, slots=slots)


def _gaps(arch: Architecture, params: dict, prompts: list, completions: list) -> np.ndarray:
  """Returns |log p of the engine - log p of the trainer| of every sampled token."""
  length = -(-max(len(p) + len(c.tokens) for p, c in zip(prompts, completions, strict=True)) // 128)
  batch = batches.empty(len(prompts), 128 * length)
  for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
    tokens = np.array([*prompt, *completion.tokens])
    batches.fill_row(batch, row, [(tokens, np.arange(len(tokens)) >= len(prompt))])
  mesh = jax.sharding.get_mesh()
  placed = {k: sharding.put(mesh, v, 'batch', 'seq') for k, v in batch.items()}
  found = jax.jit(Forward(arch, jnp.dtype('bfloat16')).token_logprobs)(params, placed)
  theirs = np.asarray(found)[batch['weights'] > 0]
  return np.abs(theirs - np.concatenate([c.logprobs for c in completions]))


def _measure(row: dict, arch: Architecture, params: dict, slots: int, tiny: bool) -> None:
  prompt, most = _TINY if tiny else (PROMPT, COMPLETION)
  chance = np.random.default_rng(0)
  prompts = chance.integers(1, arch.vocab_size, (slots, prompt)).tolist()
  engine = make_engine(arch, slots)

  def rollout(seed: int):
    sampling = Sampling(1.0)
    return engine.generate(params, prompts, group=1, max_tokens=most, sampling=sampling, seed=seed)

  first = rollout(0).metrics
  rounds = [rollout(seed) for seed in (1, 2, 3)]
  middle = sorted(rounds, key=lambda r: r.metrics['seconds'])[1]
  found, steps = middle.metrics, middle.metrics['steps']
  row |= {
    'slots': slots,
    'prompt_tokens': prompt,
    'max_tokens': most,
    'tokens_per_s': found['tokens_per_s'],
    'step_ms': 1000 * found['seconds'] / steps,
    'compile_s': first['seconds'],
    'compilations_later': found['compilations'],
  }
  cache = cache_bytes(arch, slots, prompt, most)
  row |= {'cache_gib': cache / 2**30, 'peak_gib': measuring.gib(measuring.memory()['peak'])}
  bandwidth = _bandwidth()
  if math.isfinite(bandwidth):
    row['bound_ms'] = 1000 * (memory.shard_bytes(params) + cache) / bandwidth
    row['share'] = 100 * row['bound_ms'] / row['step_ms']
  completions = [c for (c,) in middle.completions][:8]
  gaps = _gaps(arch, params, prompts[: len(completions)], completions)
  row |= {'mean_gap': gaps.mean(), 'largest_gap': gaps.max()}
  check(row, 'mean difference of log-probabilities, nats', row['mean_gap'], GAP)
  missing = sum(most - len(c.tokens) for (c,) in middle.completions)
  check(row, 'tokens that are missing', missing, 0)


def cache_bytes(arch: Architecture, slots: int, prompt: int, most: int) -> int:
  """Returns the bytes of the cache of `slots` sequences."""
  capacity = ring_capacity(prompt, most, TOKENS_PER_DISPATCH)
  shapes = jax.eval_shape(lambda: kv_cache.empty(arch, slots, capacity, jnp.dtype('bfloat16')))
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))


def _bandwidth() -> float:
  """Returns the bandwidth of the data sheet, bytes/s; NaN for an unknown device."""
  name = training.chip_name(jax.devices()[0].device_kind)
  return topology.CHIPS[name].bandwidth if name else math.nan


def run(record: Record, tiny: bool, *, model: str, slots: list[int]) -> None:
  """Measures one model with each number of sequences."""
  measuring.one_device()
  arch = measuring.architecture(model, tiny)
  params = random_params(arch, 'bfloat16')
  for number in [4] if tiny else slots:
    with record.row(model) as row:
      _measure(row, arch, params, number, tiny)
