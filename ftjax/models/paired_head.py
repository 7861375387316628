"""The head of two passes of one model over the same tokens: cross-entropy of both, and the
divergence between them (losses/r_drop.py), a chunk of tokens at a time as in head.py. The gradients
of both passes are computed in that one loop."""

import functools

import jax
import jax.numpy as jnp

from ftjax.losses import cross_entropy, r_drop
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models.architecture import LogitSpec
from ftjax.models.head import PLAIN
from ftjax.models.logit_chunks import Chunks, LowRank, vocab_axis
from ftjax.runtime.sharding import BATCH, shard_map, spec, total

Pass = tuple[jax.Array, jax.Array, LowRank | None]


def _layout(update: LowRank | None) -> tuple:
  """Returns how hidden states, head weights and the update of a pass are split over devices."""
  states, table = spec('batch', 'seq', 'act_embed'), spec('vocab', 'embed')
  if update is None:
    return states, table, None
  gain = None if update.gain is None else spec('vocab')
  return states, table, LowRank(spec('batch', 'seq', None), spec('rank', 'vocab'), gain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def paired_sums(
  first: Pass,
  second: Pass,
  labels: jax.Array,
  weights: jax.Array,
  terms: LossConfig,
  strength: float,
  logit_spec: LogitSpec = PLAIN,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the weighted sums over all tokens of all devices of (the mean loss of both passes +
  strength * divergence, the mean nll of both, the divergence), float32[], in nats.

  Differentiable by the arrays of both passes, through the first result alone.

  Args:
    first: hidden states [B, T, D], head weights [V, D], and the update of an adapter of the head.
    second: those of the other pass.
    labels: int32[B, T], the token that follows.
    weights: float32[B, T]; 0 skips the position.
    terms: of the loss of tokens; static.
    strength: alpha, static.
    logit_spec: how logits follow; static.
  """
  return _both(first, second, labels, weights, terms, strength, logit_spec)[:3]


def _both(first, second, labels, weights, terms, strength, logit_spec):
  local = functools.partial(_local, terms=terms, strength=strength, logit_spec=logit_spec)
  specs = (_layout(first[2]), _layout(second[2]))
  tokens, sums = spec('batch', 'seq'), (spec(), spec(), spec())
  run = shard_map(local, (*specs, tokens, tokens), (*sums, *specs))
  return run(first, second, labels, weights)


def _local(first, second, labels, weights, *, terms, strength, logit_spec):
  passes = [Chunks(logit_spec, x, w, labels, weights, update) for x, w, update in (first, second)]

  def body(i, carry):
    sums, states = carry
    taken = [chunks.take(i) for chunks in passes]
    tokens, logits = taken[0][0], [found.logits for _, found in taken]
    losses, nlls, gradients = zip(
      *(
        cross_entropy.loss_and_gradient(
          x,
          tokens.labels,
          tokens.weights,
          terms,
          vocab_axis(),
          chunks.offset,
          chunks.vocab,
        )
        for x, chunks in zip(logits, passes, strict=True)
      ),
      strict=True,
    )
    apart, *pulls = r_drop.divergence_and_gradients(*logits, vocab_axis())
    apart = (apart * tokens.weights).sum()
    loss = sum(losses) / 2 + strength * apart
    scale = strength * tokens.weights[:, None]
    states = tuple(
      chunks.add(state, i, own, found, g / 2 + scale * pull)
      for chunks, state, (own, found), g, pull in zip(
        passes, states, taken, gradients, pulls, strict=True
      )
    )
    more = (loss, sum(nlls) / 2, apart)
    return tuple(a + b for a, b in zip(sums, more, strict=True)), states

  zero = jnp.zeros((), jnp.float32)
  begin = ((zero,) * 3, tuple(chunks.zeros() for chunks in passes))
  sums, states = jax.lax.fori_loop(0, passes[0].count, body, begin)
  found = (
    tuple(chunks.gradients(state, w.dtype))
    for chunks, state, (_, w, _) in zip(passes, states, (first, second), strict=True)
  )
  return *total(sums, (*BATCH, 'context')), *found


def _forward(first, second, labels, weights, terms, strength, logit_spec):
  *sums, by_first, by_second = _both(first, second, labels, weights, terms, strength, logit_spec)
  return tuple(sums), (by_first, by_second)


def _backward(terms, strength, logit_spec, gradients, cotangents):
  del terms, strength, logit_spec
  scale = cotangents[0]
  return *jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), None, None


paired_sums.defvjp(_forward, _backward)
