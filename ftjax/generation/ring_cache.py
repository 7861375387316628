"""The cache of the engine: a ring that all slots write at one common index.

At every step all slots write their token at index `at`, which goes round modulo the capacity, so a
step is one slice per layer. A sequence that enters a slot later finds room just before `at`: the
entries of its prompt, padded on the left, are written there (over the end of the ring where need
be), and what the slot held before is forgotten. States have no index: the slot takes those that its
prompt ended with. The index of an entry in the ring has no meaning:
keys are rotated before they are cached, and segments and positions alone say who looks at whom. A
sequence spans at most its padded prompt and its own tokens, and a ring that holds so many never
overwrites what is still looked at."""

import jax
import jax.numpy as jnp

from ftjax.models.attention import Tokens
from ftjax.models.kv_cache import Cache
from ftjax.runtime.sharding import BATCH, gather, shard_map, spec

_SLOTS, _WHOLE = spec('batch'), spec()


def enter(ring: Cache, prompts: Cache, source: jax.Array, at: jax.Array) -> Cache:
  """Writes prompts into slots, at the P indices before `at`.

  Inside `shard_map` every shard takes what its slots need out of all prompts.

  Args:
    ring: of B slots and S entries; the caller donates it.
    prompts: a cache of R rows filled with P <= S entries, padding on the left.
    source: int32[B], the row that a slot takes; -1: the slot stays as it is.
    at: int32[], the index that the next step writes.

  Returns:
    The ring.
  """

  def local(ring, prompts, source, at):
    prompts = Cache(
      *(jax.tree.map(lambda a: gather(a, BATCH, 1), d) for d in (prompts.entries, prompts.states)),
      Tokens(*(gather(a, BATCH, 0) for a in (prompts.tokens.segments, prompts.tokens.positions))),
    )
    length, capacity = prompts.tokens.segments.shape[1], ring.tokens.segments.shape[1]
    places = (at - length + jnp.arange(length, dtype=jnp.int32)) % capacity
    stays = (source < 0)[:, None]
    old = ring.tokens
    ring = Cache(
      ring.entries, ring.states, Tokens(jnp.where(stays, old.segments, 0), old.positions)
    )
    slots = jnp.argsort(source < 0, stable=True)

    def fill(i, ring):
      slot = slots[i]
      row = source[slot]

      def pick(out_of):
        return jax.lax.dynamic_index_in_dim(out_of, row, 1, keepdims=False)

      entries = jax.tree.map(
        lambda into, out_of: into.at[:, slot, places].set(pick(out_of)),
        *(ring.entries, prompts.entries),
      )
      states = jax.tree.map(
        lambda into, out_of: into.at[:, slot].set(pick(out_of)), ring.states, prompts.states
      )
      segments = ring.tokens.segments.at[slot, places].set(prompts.tokens.segments[row])
      positions = ring.tokens.positions.at[slot, places].set(prompts.tokens.positions[row])
      return Cache(entries, states, Tokens(segments, positions))

    return jax.lax.fori_loop(0, (source >= 0).sum(), fill, ring)

  where, sources = (jax.tree.map(lambda a: jax.typeof(a).sharding.spec, c) for c in (ring, prompts))
  return shard_map(local, (where, sources, _SLOTS, _WHOLE), where)(ring, prompts, source, at)
