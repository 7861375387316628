"""The compiled programs of the engine; every array of sequences has a row a slot.

`read` and `prefill` read prompts, `begin` those of an encoder-decoder, `enter` copies a prefilled
prompt into slots, `decode` extends all slots by several tokens in one dispatch.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ftjax.generation import ring_cache
from ftjax.generation.sampling import is_stop, sample, token_keys
from ftjax.models import head, kinds
from ftjax.models import kv_cache as kv
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.models.cross_attention import Source
from ftjax.models.kv_cache import Cache
from ftjax.runtime.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Sequences being decoded, int32[B] each: the next token to read, its position, the sequence's
  prompt id and completion index, and how many tokens it may still get (0: it ended, or the slot is
  empty).
  """

  token: jax.Array
  position: jax.Array
  prompt: jax.Array
  completion: jax.Array
  left: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unread:
  """What `read` reads of prompts.

  tokens: int32[B, T], padded on the left. where: their segments, and positions counted from the
  first of them. known: int32[], tokens before them that the cache holds; entries that it holds at
  later positions are forgotten, and states must be of these tokens alone. at: int32[], index of the
  cache that is written first, at most capacity - T.
  """

  tokens: jax.Array
  where: Tokens
  known: jax.Array
  at: jax.Array


class Programs:
  """The jitted functions of one engine; `compilations` counts how often one was traced.

  Args:
    arch: the architecture.
    dtype: compute dtype of activations and cache.
    stop_ids: tokens that end a completion.
    width: columns of the output of `decode`: the most steps of one dispatch.
    vocab_size: ids from it on are never drawn; None: any may be.
    routed: whether `decode` returns the experts that the routers chose.
  """

  def __init__(
    self,
    arch: Architecture,
    dtype: jnp.dtype,
    stop_ids: Sequence[int],
    width: int,
    vocab_size: int | None,
    routed: bool = False,
  ):
    self.routed = routed
    self.arch, self.dtype, self.has_states = arch, dtype, kv.has_states(arch)
    self.stop_ids, self.width, self._vocab_size = tuple(stop_ids), width, vocab_size
    self.compilations = 0  # each function below counts when it is traced
    self.start = jax.jit(self._start, static_argnums=(0, 1))
    self.read = jax.jit(self._read, static_argnames=('capacity', 'sampling'), donate_argnums=1)
    self.prefill = jax.jit(self._prefill)
    self.begin = jax.jit(self._begin, static_argnames='capacity')
    self.enter = jax.jit(self._enter, donate_argnums=(0, 1))
    self.decode = jax.jit(self._decode, static_argnames='sampling', donate_argnums=(1, 2))

  def _start(self, batch: int, capacity: int) -> tuple[Cache, Slots]:
    self.compilations += 1
    none = jnp.zeros(batch, jnp.int32, out_sharding=spec('batch'))
    return kv.empty(self.arch, batch, capacity, self.dtype), Slots(*[none] * 5)

  def _read(
    self, params, cache: Cache | None, unread: Unread, new: Slots, seed, *, capacity, sampling
  ):
    """Reads prompts to their end and draws the first token of each completion.

    Args:
      params: nested dict.
      cache: of earlier tokens, to be extended; None: an empty one of `capacity`.
      unread: the tokens to be read.
      new: the sequences, each with the last token of its prompt.
      seed: of sampling.

    Returns:
      (cache, slots, (tokens int32[B], logprobs float32[B])); the last two whole on every device.
    """
    self.compilations += 1
    places = Tokens(unread.where.segments, unread.where.positions + unread.known)
    if cache is None:
      cache = kv.empty(self.arch, unread.tokens.shape[0], capacity, self.dtype)
    else:
      old = cache.tokens
      kept = jnp.where(old.positions < unread.known, old.segments, 0)
      cache = Cache(cache.entries, cache.states, Tokens(kept, old.positions))
    x, cache = kinds.decode(
      self.arch, params, unread.tokens, places, cache, unread.at, dtype=self.dtype
    )
    slots, drawn = self._draw(params, x[:, -1], new, seed, sampling)
    return cache, slots, tuple(jax.sharding.reshard(d, P()) for d in drawn)

  def _draw(self, params, x, slots: Slots, seed, sampling):
    """(slots after one more token, (tokens int32[B], logprobs float32[B])) from the hidden states
    [B, D] of the slots' tokens.
    """
    keys = token_keys(seed, slots.prompt, slots.completion, slots.position + 1)
    # For one row, jax 0.12 loses in indexing how the batch is sharded.
    x = jax.sharding.reshard(x, spec('batch', None))
    update = kinds.head_update(self.arch, params, x[:, None])
    update = None if update is None else update._replace(u=update.u[:, 0])
    table = kinds.head_weights(self.arch, params)
    logits = head.logits(x, table, self.arch.logit_spec, update)
    # The vocabulary whole on every device.
    logits = jax.sharding.reshard(logits, spec('batch', None))
    token, logprob = sample(logits, keys, sampling, self._vocab_size)
    left = jnp.where(is_stop(token, self.stop_ids), 0, jnp.maximum(slots.left - 1, 0))
    after = Slots(token, slots.position + 1, slots.prompt, slots.completion, left)
    return after, (token, logprob)

  def _prefill(self, params, tokens, where: Tokens) -> Cache:
    """Returns the cache of prompts int32[R, P]."""
    self.compilations += 1
    cache = kv.empty(self.arch, *tokens.shape, self.dtype)
    zero = jnp.zeros((), jnp.int32)
    return kinds.decode(self.arch, params, tokens, where, cache, zero, dtype=self.dtype)[1]

  def _begin(self, params, source: Source, *, capacity: int) -> Cache:
    """Returns the cache of the decoder of an encoder-decoder, whose encoder reads `source`."""
    self.compilations += 1
    return kinds.begin(self.arch, params, source, capacity, dtype=self.dtype)

  def _enter(self, cache: Cache, slots: Slots, prompts: Cache, source, new: Slots, at):
    self.compilations += 1
    slots = jax.tree.map(lambda a, b: jnp.where(source >= 0, a, b), new, slots)
    return ring_cache.enter(cache, prompts, source, at), slots

  def _decode(self, params, cache: Cache, slots: Slots, at, steps, seed, *, sampling):
    """Takes at most `steps` steps, fewer where all sequences end before.

    Returns:
      (cache, slots, steps taken, (tokens, logprobs) [B, width]); the last two are whole on every
      device. Where `routed`, with the experts of the token of each step, int16[B, width, L, k].
    """
    self.compilations += 1
    batch, capacity = cache.tokens.segments.shape

    def step(carry):
      i, cache, slots, out = carry
      alive = slots.left > 0
      # An idle slot counts on: beyond a table of positions its NaN would stay in its entries.
      places = jnp.where(alive, slots.position, 0)
      token, segment, position = (
        jax.sharding.reshard(a[:, None], spec('batch', 'seq'))
        for a in (slots.token, alive.astype(jnp.int32), places)
      )
      where, index = Tokens(segment, position), (at + i) % capacity
      x, cache, *found = kinds.decode(
        self.arch, params, token, where, cache, index, dtype=self.dtype, routed=self.routed
      )
      slots, drawn = self._draw(params, x[:, 0], slots, seed, sampling)
      new = (*drawn, *(r.choices[:, :, 0].transpose(1, 0, 2).astype(jnp.int16) for r in found))
      out = tuple(
        jax.lax.dynamic_update_slice_in_dim(o, d[:, None], i, 1)
        for o, d in zip(out, new, strict=True)
      )
      return i + 1, cache, slots, out

    def should_continue(carry):
      i, _, slots, _ = carry
      return (i < steps) & jnp.any(slots.left > 0)

    columns = [(jnp.int32, ()), (jnp.float32, ())]
    if self.routed:
      mixtures = self.arch.mixtures()
      columns.append((jnp.int16, (len(mixtures), mixtures[0].top_k)))
    out = tuple(
      jnp.zeros(
        (batch, self.width, *more), d, out_sharding=spec('batch', None, *[None] * len(more))
      )
      for d, more in columns
    )
    zero = jnp.zeros((), jnp.int32)
    i, cache, slots, out = jax.lax.while_loop(should_continue, step, (zero, cache, slots, out))
    return cache, slots, i, tuple(jax.sharding.reshard(o, P()) for o in out)
