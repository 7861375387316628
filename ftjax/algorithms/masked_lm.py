"""Continued pretraining of an encoder: the prediction of masked tokens (Devlin et al. 2018).

The tokens that a step predicts are drawn in the step, from the keys of its rows: other ones in each
epoch, the same ones after a resume and on another mesh."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from ftjax.training.step import LossFn

# Keeps the random numbers of masks apart from others of the same row.
_MASKS = 0x3A5C


def mask(batch: dict, keys: jax.Array, vocab_size: int, c: ml_collections.ConfigDict) -> dict:
  """Returns a batch in which tokens are hidden, with a weight for those alone.

  Args:
    batch: its labels are its tokens, with a weight where one may be hidden.
    keys: key[B], of the rows.
    vocab_size: random tokens are below it.
    c: the config, with its section masked_lm.
  """
  m, length = c.masked_lm, batch['tokens'].shape[1]
  order = sharding.zigzag(length, sharding.axis_size('context'))

  def draw(key):
    a, b, d = jax.random.split(jax.random.fold_in(key, _MASKS), 3)
    chance, fate = jax.random.uniform(a, (length,)), jax.random.uniform(b, (length,))
    other = jax.random.randint(d, (length,), 0, vocab_size)
    return chance[order], fate[order], other[order]

  where = jax.P(*jax.typeof(batch['tokens']).sharding.spec)
  chance, fate, other = (jax.sharding.reshard(x, where) for x in jax.vmap(draw)(keys))
  chosen = (chance < m.share) & (batch['weights'] > 0)
  tokens = jnp.where(chosen & (fate < m.masked), m.mask_id, batch['tokens'])
  is_random = chosen & (fate >= m.masked) & (fate < m.masked + m.random)
  tokens = jnp.where(is_random, other, tokens)
  return batch | {'tokens': tokens, 'weights': jnp.where(chosen, batch['weights'], 0.0)}


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum over hidden tokens, their number, {})."""
  vocab_size = forward.arch.vocab_size

  def loss(params, batch, keys):
    hidden = mask(batch, keys, vocab_size, c)
    total, _ = forward.with_dropout(keys).cross_entropy(params, hidden, LossConfig())
    return total, hidden['weights'].sum(), {}

  return loss


def make_measure(forward: Forward, c: ml_collections.ConfigDict) -> Callable:
  """Returns a jitted (params, batch, number of the batch) -> (sum of -log p, hidden tokens),
  float32[]. Masks depend on `seed` and the number alone: all evaluations hide the same tokens.
  """
  forward, vocab_size = forward.without_remat(), forward.arch.vocab_size

  @jax.jit
  def sums(params, batch, number):
    key = jax.random.fold_in(jax.random.key(c.seed), number)
    keys = jax.random.split(key, len(batch['tokens']))
    spec = jax.typeof(batch['tokens']).sharding.spec
    hidden = mask(batch, jax.sharding.reshard(keys, jax.P(spec[0])), vocab_size, c)
    logp = forward.token_logprobs(params, hidden)
    return -(logp * hidden['weights']).sum(), hidden['weights'].sum()

  return sums


def evaluate(
  measure: Callable, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, float] | None:
  """Returns the loss (nats per hidden token) of the evaluation rows and its exponential; empty
  without rows, None when cancelled.
  """
  total = count = 0.0
  for number, batch in enumerate(run.eval_batches()):
    if is_cancelled():
      return None
    more, hidden = measure(params, batch, jnp.int32(number))
    total, count = total + float(more), count + float(hidden)
  if not count:
    return {}
  return {'loss': total / count, 'perplexity': math.exp(min(total / count, 700.0))}


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run."""
  measured = functools.partial(evaluate, make_measure(run.forward, run.config), run)
  return fit.Parts(make_loss(run.forward, run.config), measured)
