"""Losses of the vectors of texts: an anchor's positive against negatives, and a score of two texts.

Axes: B rows of a batch, E groups of texts in a row, K texts in a group (anchor, positive,
negatives), C candidates, D numbers of a vector. Vectors have length 1, so that a product of two is
their cosine. All jnp; a batch may be sharded over B.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.losses import masked

_PRECISE = 'highest'


@dataclasses.dataclass(frozen=True)
class Groups:
  """The texts of a step, or of a micro-batch.

  vectors: float32[B, E, K, D] of length 1. ids: float32[B, E, K, 2], equal for equal texts.
  there: bool[B, E, K], whether there is such a text. weights: float32[B, E], 0 without a group.
  """

  vectors: jax.Array
  ids: jax.Array
  there: jax.Array
  weights: jax.Array


jax.tree_util.register_dataclass(Groups, ['vectors', 'ids', 'there', 'weights'], [])


def unit(x: jax.Array) -> jax.Array:
  """Returns vectors [..., D] scaled to length 1, float32; zeros stay zero."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def _is_same(ids: jax.Array, others: jax.Array) -> jax.Array:
  """Returns bool[B, E, C] of ids [B, E, 2] and others [C, 2]."""
  return (ids[:, :, None] == others[None, None]).all(-1)


def _numbers(own: Groups) -> jax.Array:
  """Returns the number of each group, int32[B, E], with the sharding of a batch."""
  rows, groups = own.weights.shape
  found = jnp.arange(rows * groups, dtype=jnp.int32).reshape(rows, groups)
  return jnp.zeros_like(own.weights, jnp.int32) + found


@dataclasses.dataclass(frozen=True)
class Compared:
  """What is compared with each other.

  own: float32[B, E], cosine of the two texts that belong together. others: float32[B, E, C],
  cosines with all candidates. is_negative: bool[B, E, C].
  """

  own: jax.Array
  others: jax.Array
  is_negative: jax.Array


def _own(groups: Groups) -> jax.Array:
  return (groups.vectors[:, :, 0] * groups.vectors[:, :, 1]).sum(-1)


def negatives_of_anchors(own: Groups, everyone: Groups, in_batch: bool) -> Compared:
  """Compares each anchor with the positives and negatives of all groups.

  No negative is: a text equal to the anchor or to its positive, and a positive of an equal anchor.

  Args:
    own: sharded over B, or not.
    everyone: the same groups, not sharded: every device compares its anchors with them.
    in_batch: whether texts of other groups are negatives; else those of the group alone.
  """
  _, _, size, dim = everyone.vectors.shape
  anchors, ids = own.vectors[:, :, 0], own.ids
  texts = everyone.vectors[:, :, 1:].reshape(-1, dim)
  text_ids = everyone.ids[:, :, 1:].reshape(-1, 2)
  there = everyone.there[:, :, 1:].reshape(-1)
  group = jnp.repeat(jnp.arange(everyone.weights.size, dtype=jnp.int32), size - 1)
  is_positive = jnp.arange(len(group)) % (size - 1) == 0
  anchor_ids = jnp.repeat(everyone.ids[:, :, 0].reshape(-1, 2), size - 1, axis=0)
  in_group = _numbers(own)[:, :, None] == group[None, None]
  shares_anchor = _is_same(ids[:, :, 0], anchor_ids) & is_positive[None, None]
  is_negative = there[None, None] & ~(in_group & is_positive[None, None]) & ~shares_anchor
  is_negative &= ~_is_same(ids[:, :, 0], text_ids) & ~_is_same(ids[:, :, 1], text_ids)
  if not in_batch:
    is_negative &= in_group
  others = jnp.einsum('BED,CD->BEC', anchors, texts, precision=_PRECISE)
  return Compared(_own(own), others, is_negative)


def negatives_of_positives(own: Groups, everyone: Groups) -> Compared:
  """Compares each positive with the anchors of all groups; arguments as above.

  No negative is: an anchor equal to the own one or to the positive, and one with an equal positive.
  """
  dim = everyone.vectors.shape[-1]
  texts = everyone.vectors[:, :, 0].reshape(-1, dim)
  first, second = (everyone.ids[:, :, k].reshape(-1, 2) for k in (0, 1))
  there = everyone.there[:, :, 0].reshape(-1)
  is_negative = there[None, None] & ~_is_same(own.ids[:, :, 0], first)
  is_negative &= ~_is_same(own.ids[:, :, 1], first) & ~_is_same(own.ids[:, :, 1], second)
  others = jnp.einsum('BED,CD->BEC', own.vectors[:, :, 1], texts, precision=_PRECISE)
  return Compared(_own(own), others, is_negative)


def contrastive(found: Compared, temperature: float) -> jax.Array:
  """Computes the cross-entropy of the own text among itself and the negatives, float32[B, E] in
  nats: log(e^(s/t) + sum over negatives e^(s_n/t)) - s/t.

  InfoNCE (van den Oord et al. 2018, eq. 4) of cosines; with temperature 0.05 the
  MultipleNegativesRankingLoss of sentence-transformers with its scale of 20.
  """
  own = found.own / temperature
  others = jnp.where(found.is_negative, found.others / temperature, -jnp.inf)
  most = jax.lax.stop_gradient(jnp.maximum(own, others.max(-1)))
  total = jnp.exp(own - most) + jnp.exp(others - most[:, :, None]).sum(-1)
  return jnp.log(total) + most - own


def margin(found: Compared, least: float) -> jax.Array:
  """Computes max(0, margin - s + s_n) of the nearest negative, float32[B, E]; 0 without one. With
  one negative this is the triplet loss of the distance 1 - cosine.
  """
  nearest = jnp.where(found.is_negative, found.others, -jnp.inf).max(-1)
  return jnp.maximum(0.0, least - found.own + nearest)


def statistics(found: Compared, weights: jax.Array) -> dict[str, masked.Pair]:
  """Returns as (total, weight): accuracy, the share of texts to which the own one is nearer than
  every negative; the cosines of pairs that belong together, and of negatives.

  weights: float32[B, E], 0 for what is no group.
  """
  found = jax.lax.stop_gradient(found)
  present = (weights > 0).astype(jnp.float32)
  count = found.is_negative.sum(-1).astype(jnp.float32)
  nearest = jnp.where(found.is_negative, found.others, -jnp.inf).max(-1)
  has_negative = present * (count > 0)
  total = jnp.where(found.is_negative, found.others, 0.0).sum(-1)
  return {
    'accuracy': masked.mean((found.own > nearest).astype(jnp.float32), has_negative),
    'similarity/positive': masked.mean(found.own, present),
    'similarity/negative': masked.mean(total / jnp.maximum(count, 1.0), has_negative),
  }


jax.tree_util.register_dataclass(Compared, ['own', 'others', 'is_negative'], [])


def cosine_error(
  vectors: jax.Array, scores: jax.Array, weights: jax.Array
) -> tuple[masked.Pair, jax.Array]:
  """Returns the squared error of the cosines of two texts with their scores as (total, weight), and
  the cosines.

  Args:
    vectors: float32[B, E, 2, D] of length 1.
    scores, weights: float32[B, E].
  """
  found = (vectors[:, :, 0] * vectors[:, :, 1]).sum(-1)
  return masked.mean(jnp.square(found - scores), weights), found
