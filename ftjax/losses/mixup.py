"""Mixup of rows (Zhang et al. 2018), for the states that the head of a classifier reads (Guo et al.
2019, "Augmenting data with mixup for sentence classification", eq. 3 and 4: senMixup).

Row i is mixed with a partner j: the state becomes weight * x_i + (1 - weight) * x_j, and the loss
weight * loss(label i) + (1 - weight) * loss(label j) of the mixed state. Both follow from the keys
of the rows alone."""

import jax
import jax.numpy as jnp

# Keeps the two draws of a row apart from each other and from other uses of its key.
_ORDER, _WEIGHT = 0x3117, 0x3118


def mixup_rows(key: jax.Array, alpha: float, batch: int) -> tuple[jax.Array, jax.Array]:
  """Draws the partner and the weight of each row.

  The rows stand on a circle in the order of numbers that their keys draw, and each one's partner is
  the next: every row is the partner of one other, and of itself only where it is alone. The same
  keys in another order give the same pairs. Pairs are made among the rows that are given, so they
  depend on how a step is cut into micro-batches.

  Args:
    key: key[B], of the rows; or one key, from which those of rows 0 to B - 1 are made.
    alpha: weights are drawn from Beta(alpha, alpha): near 0 or 1 for small alpha, near 1/2 for
      large ones.
    batch: B.

  Returns:
    (partner int32[B], weight float32[B], in [0, 1]), not split over devices.

  Raises:
    ValueError: alpha that is not positive, or another number of keys than rows.
  """
  if not alpha > 0:
    raise ValueError(f'alpha={alpha}; expected a positive number')
  if key.ndim == 0:
    key = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch, dtype=jnp.uint32))
  if key.shape != (batch,):
    raise ValueError(f'keys {key.shape} for {batch} rows; expected one for each')
  key = jax.sharding.reshard(key, jax.P(None))  # a sort over a sharded axis does not compile

  def draw(one):
    place = jax.random.bits(jax.random.fold_in(one, _ORDER), (), jnp.uint32)
    return place, jax.random.beta(jax.random.fold_in(one, _WEIGHT), alpha, alpha)

  places, weights = jax.vmap(draw)(key)
  order = jnp.argsort(places)
  partner = jnp.zeros(batch, jnp.int32).at[order].set(jnp.roll(order, -1).astype(jnp.int32))
  return partner, weights.astype(jnp.float32)


def mixed(x: jax.Array, partner: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns weight * x + (1 - weight) * x[partner], computed in float32, in x's dtype and layout.

  Args:
    x: [B, ...], such as pooled states [B, D], or targets float32[B, R].
    partner: int32[B].
    weight: float32[B].
  """
  where = jax.typeof(x).sharding.spec
  whole = jax.sharding.reshard(x, jax.P(*(None for _ in x.shape))).astype(jnp.float32)
  share = weight.reshape(-1, *(1 for _ in x.shape[1:]))
  found = share * whole + (1 - share) * whole[partner]
  return jax.sharding.reshard(found.astype(x.dtype), where)


def mixed_loss(own: jax.Array, other: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns weight * own + (1 - weight) * other, float32[B]: the losses of mixed rows under their
  own labels and under those of their partners.
  """
  return weight * own + (1 - weight) * other
