"""The mixture of experts: a router that gives each token its top_k experts, and their gated MLPs.

Dropless: every choice is computed, whatever the load, so a token's result does not depend on the
other tokens of its batch. Padding is given to no expert.

One shard_map holds the whole layer. Experts are spread over `expert`, an axis that also splits the
batch: its members gather their tokens, each computes the choices that fall on its own experts, and
a reduce-scatter brings the sums back (`ragged_all_to_all`, which would move each token to its
experts alone, has no form on CPU). `tensor` splits the inner axis of each expert."""

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models.architecture import MoeSpec
from ftjax.models.experts import ExpertLinear, Rows
from ftjax.models.layers import Dropout, declare
from ftjax.models.mlp import ACTIVATIONS
from ftjax.models.routing import Routing
from ftjax.runtime.sharding import (
  BATCH,
  axis_size,
  gather,
  index,
  scatter_sum,
  shard_map,
  spec,
  total,
)


class Moe(nnx.Module):
  """x [B, T, D] -> [B, T, D] through top_k of E experts of F = ffn_dim."""

  def __init__(self, model_dim: int, spec: MoeSpec):
    e, k, d, f = spec.num_experts, spec.top_k, model_dim, spec.ffn_dim
    self.spec = spec
    # In float32 always: a rounded weight would give a token other experts.
    self.router = nnx.Dict(w=declare((d, e), ('embed', 'route'), d, dtype='float32'))
    self.gate = ExpertLinear(e, k, d, f, ('embed', 'ffn'))
    self.up = ExpertLinear(e, k, d, f, ('embed', 'ffn'))
    self.down = ExpertLinear(e, k, f, d, ('ffn', 'embed'))

  def __call__(
    self, x: jax.Array, segments: jax.Array, dropout: Dropout | None = None
  ) -> tuple[jax.Array, Routing]:
    """Returns (the layer's output, 0 for padding; what the router did).

    x: [B, T, D] in the compute dtype. segments: int32[B, T], 0 for padding. dropout: not read, as
    adapters of experts have none; see ExpertLinear.adapt.
    """
    del dropout
    maps = {name: own.leaves() for name, own in self._maps.items()}
    axes = {name: names for name, (_, names) in maps.items()}
    specs = jax.tree.map(lambda a: spec(*a), axes, is_leaf=lambda a: isinstance(a, tuple))
    states, tokens = spec('batch', 'seq', 'act_embed'), spec('batch', 'seq')
    choices, whole = spec('batch', 'seq', None), spec()
    island = shard_map(
      self._local,
      (states, tokens, spec('embed', 'route'), specs),
      (states, Routing(spec(None), spec(None), whole, choices)),
    )
    return island(x, segments, self.router.w[...], {n: found for n, (found, _) in maps.items()})

  @property
  def _maps(self) -> dict[str, ExpertLinear]:
    return {'gate': self.gate, 'up': self.up, 'down': self.down}

  # Inside the shard_map; n: tokens of the shard, m: choices that the shard looks at.

  def _local(self, x, segments, router, maps):
    shape, k = x.shape, self.spec.top_k
    x, is_real = x.reshape(-1, shape[-1]), segments.reshape(-1) > 0
    probs, weights, choices = self._route(x, router)
    out = Routing(
      *total(_counts(probs, choices, is_real), (*BATCH, 'context')),
      choices.reshape(*shape[:2], k),
    )
    weights = jnp.where(is_real[:, None], weights, 0.0)
    # The tokens of all members of `expert`.
    x, weights, choices, is_real = (gather(a, 'expert', 0) for a in (x, weights, choices, is_real))
    mine = self.spec.num_experts // axis_size('expert')
    owner = choices - index('expert') * mine
    owner = jnp.where((owner >= 0) & (owner < mine) & is_real[:, None], owner, mine).reshape(-1)
    y = self._experts(jnp.repeat(x, k, axis=0), owner, maps, mine).reshape(-1, k, shape[-1])
    # No product of matrices: it would round the weights to bfloat16 on a TPU.
    y = (y.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)
    y = total(scatter_sum(y, 'expert', 0), 'tensor')
    return y.reshape(shape), out

  def _route(self, x, router):
    """Returns (probabilities float32[n, E], weights float32[n, k], experts int32[n, k])."""
    router = gather(router.astype(jnp.float32), 'fsdp', 0)
    logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    probs = jax.nn.softmax(logits, axis=-1)
    weights, choices = jax.lax.top_k(probs, self.spec.top_k)
    if self.spec.renormalize:
      weights = weights / weights.sum(-1, keepdims=True)
    return probs, weights, choices

  def _experts(self, x, owner, maps, experts):
    """Returns [m, D], the output of expert `owner` of each row of x [m, D]: 0 where it is
    `experts`, another shard's.
    """
    order = jnp.argsort(owner)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    sizes = jnp.bincount(owner, length=experts + 1)[:experts].astype(jnp.int32)
    rows = Rows(sizes, jnp.minimum(owner[order], experts - 1))
    x = _permuted(x, order, place)
    gate, up = (self._maps[n].multiply(maps[n], x, rows) for n in ('gate', 'up'))
    y = self.down.multiply(maps['down'], ACTIVATIONS[self.spec.activation](gate) * up, rows)
    return _permuted(y, place, order)


def _counts(probs, choices, is_real):
  """Returns the first three fields of Routing, of a shard."""
  picked = jax.nn.one_hot(choices, probs.shape[1], dtype=jnp.float32).sum(1)
  sums = (jnp.where(is_real[:, None], a, 0.0).sum(0) for a in (picked, probs))
  return *sums, is_real.sum(dtype=jnp.float32)


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
  """Returns x[order]; place: the inverse of `order`. Its gradient is no scatter."""
  del place
  return x[order]


def _permuted_forward(x, order, place):
  return x[order], place


def _permuted_backward(place, g):
  return g[place], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
