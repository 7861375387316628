"""Beam search: the most likely completions of a prompt are extended together, and the best finished
one is returned (Sutskever et al. 2014, section 3.2; length penalty: Wu et al. 2016, section 7).

The score of a finished completion of n tokens is its log-probability divided by n**length_penalty.
Which completions count, and when the search ends, is as in transformers' `generate`, so that both
give the same completion. A row of the batch depends on no other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ftjax.generation.sampling import is_stop
from ftjax.models import head, kinds
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.models.cross_attention import Source
from ftjax.models.kv_cache import Cache
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import spec

EARLY_STOPPING = ('false', 'true', 'never')
_NEVER = -1e9  # score of what must not be chosen


@dataclasses.dataclass(frozen=True)
class Beams:
  """Settings of beam search. count: completions that are extended together; 1: no beam search.
  length_penalty: above 0 favours longer completions. early_stopping: 'true' ends a search when
  `count` completions are finished; 'false' when no running one could be better at its present
  length; 'never' when none could be better at any length.
  """

  count: int = 1
  length_penalty: float = 1.0
  early_stopping: str = 'false'

  def __post_init__(self):
    if self.count < 1 or self.early_stopping not in EARLY_STOPPING:
      raise ConfigError(
        f'eval.num_beams (--num_beams)={self.count}, early_stopping={self.early_stopping!r}; '
        f'expected at least 1 beam, and one of {", ".join(EARLY_STOPPING)}'
      )


@dataclasses.dataclass(frozen=True)
class Writer:
  """How the decoder of an encoder-decoder writes: start_id, the token that it begins with, and
  beams.
  """

  start_id: int | None = None
  beams: Beams = Beams()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Found:
  """Completions of each row: tokens int32[B, K, N], logprobs float32[B, K, N] of each of them,
  score float32[B, K], length int32[B, K].
  """

  tokens: jax.Array
  logprobs: jax.Array
  score: jax.Array
  length: jax.Array

  def take(self, index: jax.Array) -> '_Found':
    """Returns the completions with numbers index int32[B, J] in each row."""
    rows = jnp.arange(len(index))[:, None]
    return jax.tree.map(lambda a: a[rows, index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """A search. running: the completions that are extended, best first; their score is the sum of
  log-probabilities. finished: the best finished ones, best first. is_finished bool[B, K]: of
  `finished`, which are none before. can_improve bool[B], continues bool[B].
  """

  running: _Found
  finished: _Found
  is_finished: jax.Array
  can_improve: jax.Array
  continues: jax.Array


class BeamSearch:
  """The compiled program of a search, a shape each.

  Args:
    arch: an encoder-decoder.
    dtype: compute dtype.
    stop_ids: tokens that end a completion.
    beams: settings.
    vocab_size: ids from it on are never chosen; None: any may be.
  """

  def __init__(
    self,
    arch: Architecture,
    dtype: jnp.dtype,
    stop_ids: tuple[int, ...],
    beams: Beams,
    vocab_size: int | None,
  ):
    self._arch, self._dtype, self._stop_ids, self._beams = arch, dtype, stop_ids, beams
    self._vocab_size, self.count = vocab_size, beams.count
    self.compilations = 0
    self.run = jax.jit(self._run, static_argnames='most')

  def _run(self, params, source: Source, most_of_row: jax.Array, start_id: jax.Array, *, most: int):
    """Searches for all rows.

    Args:
      params: nested dict.
      source: prompts, [B, S].
      most_of_row: int32[B], the longest completion of each row.
      start_id: int32[], token that a decoder begins with.
      most: N, the longest of all.

    Returns:
      (tokens int32[B, N], logprobs float32[B, N], length int32[B]), whole on every device.
    """
    self.compilations += 1
    rows, count = source.tokens.shape[0], self._beams.count
    cache = kinds.begin(self._arch, params, source, most, dtype=self._dtype)
    cache = _repeated(cache, count)
    state = _begin(rows, count, most)
    token = jnp.full(rows * count, start_id, jnp.int32, out_sharding=spec('batch'))

    def step(carry):
      i, cache, token, state = carry
      one = jnp.ones((rows * count, 1), jnp.int32, out_sharding=spec('batch', 'seq'))
      tokens = jax.sharding.reshard(token[:, None], spec('batch', 'seq'))
      x, cache = kinds.decode(
        self._arch, params, tokens, Tokens(one, one * i), cache, i, dtype=self._dtype
      )
      x = jax.sharding.reshard(x[:, 0], spec('batch', None))
      update = kinds.head_update(self._arch, params, x[:, None])
      update = None if update is None else update._replace(u=update.u[:, 0])
      table = kinds.head_weights(self._arch, params)
      logits = head.logits(x, table, self._arch.logit_spec, update)
      logits = jax.sharding.reshard(logits, spec('batch', None))
      advance = functools.partial(self._advance, most=most)
      specs = jax.tree.map(
        lambda a: jax.typeof(a).sharding.spec, (logits, state, cache.entries, most_of_row)
      )
      out = specs[1], specs[2], spec('batch')
      advance = sharding.shard_map(advance, (*specs, P()), out)
      state, entries, token = advance(logits, state, cache.entries, most_of_row, i)
      return i + 1, Cache(entries, cache.states, cache.tokens, cache.source), token, state

    def should_continue(carry):
      i, _, _, state = carry
      return (i < most) & jnp.any(state.continues)

    zero = jnp.zeros((), jnp.int32)
    *_, state = jax.lax.while_loop(should_continue, step, (zero, cache, token, state))
    best = jax.tree.map(lambda a: jax.sharding.reshard(a, P())[:, 0], state.finished)
    return best.tokens, best.logprobs, best.length

  def _advance(self, logits, state: _State, entries, most_of_row, i, *, most: int):
    """Returns (state, entries of the cache, tokens to read) after step i; of one device's rows.

    logits: float32[B K, V].
    """
    count, (rows, _) = self._beams.count, state.is_finished.shape
    logp = jax.nn.log_softmax(logits, axis=-1)
    vocab = logp.shape[-1]
    if self._vocab_size is not None and self._vocab_size < vocab:
      logp = jnp.where(jnp.arange(vocab)[None] < self._vocab_size, logp, -jnp.inf)
    logp = logp.reshape(rows, count, vocab)
    total = (logp + state.running.score[..., None]).reshape(rows, -1)
    kept = min(max(2, 1 + len(self._stop_ids)) * count, count * vocab)
    score, index = jax.lax.top_k(total, kept)
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    drawn = jnp.take_along_axis(logp.reshape(rows, -1), index, 1)
    place = (jnp.arange(most) == i)[None, None]
    parents = state.running.take(parent)
    longer = _Found(
      jnp.where(place, token[..., None], parents.tokens),
      jnp.where(place, drawn[..., None], parents.logprobs),
      score,
      parents.length + 1,
    )
    ends = is_stop(token, self._stop_ids) | (i + 1 >= most_of_row)[:, None]
    open_score = score + jnp.where(ends, _NEVER, 0.0)
    _, chosen = jax.lax.top_k(open_score, count)
    running = dataclasses.replace(longer, score=open_score).take(chosen)
    finished, is_finished = self._merged(state, longer, ends, i + 1)
    new = self._settled(running, finished, is_finished, state, ends.all(-1), i + 1, most_of_row)
    keeps = state.continues
    new = jax.tree.map(
      lambda a, b: jnp.where(keeps.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, state
    )
    source = jnp.take_along_axis(parent, chosen, 1) + count * jnp.arange(rows)[:, None]
    entries = jax.tree.map(lambda a: a[:, source.reshape(-1)], entries)
    return new, entries, jnp.take_along_axis(token, chosen, 1).reshape(-1)

  def _merged(self, state: _State, longer: _Found, ends, length) -> tuple[_Found, jax.Array]:
    """Returns the best of the finished completions and of the longer ones that end now, of which
    those beyond the first K are spare ones for running on.
    """
    count, penalty = self._beams.count, self._beams.length_penalty
    ends_now = ends & (jnp.arange(ends.shape[1]) < count)[None]
    is_full = state.is_finished.all(-1) & (self._beams.early_stopping == 'true')
    never = (is_full[:, None] + ~state.can_improve[:, None] + ~ends_now).astype(jnp.float32)
    score = longer.score / length.astype(jnp.float32) ** penalty + never * _NEVER
    both = jax.tree.map(
      lambda a, b: jnp.concatenate([a, b], 1),
      *(state.finished, dataclasses.replace(longer, score=score)),
    )
    _, best = jax.lax.top_k(both.score, count)
    is_finished = jnp.concatenate([state.is_finished, ends_now], 1)
    return both.take(best), jnp.take_along_axis(is_finished, best, 1)

  def _settled(
    self, running, finished, is_finished, state: _State, all_end, length, most_of_row
  ) -> _State:
    """Returns the state with whether each row's search continues."""
    early, penalty = self._beams.early_stopping, self._beams.length_penalty
    longest = length.astype(jnp.float32)
    if early == 'never' and penalty > 0:
      longest = most_of_row.astype(jnp.float32)
    possible = running.score[:, 0] / longest**penalty
    worst = jnp.where(is_finished, finished.score.min(-1, keepdims=True), _NEVER)
    can_improve = state.can_improve & (possible[:, None] > worst).any(-1)
    is_done = is_finished.all(-1) & (early == 'true')
    continues = can_improve & ~is_done & ~all_end
    return _State(running, finished, is_finished, can_improve, continues)


def _begin(rows: int, count: int, most: int) -> _State:
  """Returns the state before the first token, which extends one completion alone."""

  def full(shape, value, dtype):
    where = spec('batch', *[None] * len(shape))
    return jnp.full((rows, *shape), value, dtype, out_sharding=where)

  def none(score):
    tokens = full((count, most), 0, jnp.int32)
    logprobs, length = full((count, most), 0, jnp.float32), full((count,), 0, jnp.int32)
    return _Found(tokens, logprobs, score, length)

  first = jnp.where(jnp.arange(count)[None] == 0, full((count,), 0, jnp.float32), _NEVER)
  running, finished = none(first), none(full((count,), _NEVER, jnp.float32))
  yes = full((), True, jnp.bool_)
  return _State(running, finished, full((count,), False, jnp.bool_), yes, yes)


def _repeated(cache: Cache, count: int) -> Cache:
  """Returns a cache with each row `count` times, one after the other."""

  def repeat(a, axis):
    where = jax.typeof(a).sharding.spec

    def local(a):
      return jnp.repeat(a, count, axis)

    return sharding.shard_map(local, (where,), where)(a)

  entries, states = (
    jax.tree.map(lambda a: repeat(a, 1), arrays) for arrays in (cache.entries, cache.states)
  )
  tokens, source = (jax.tree.map(lambda a: repeat(a, 0), t) for t in (cache.tokens, cache.source))
  return Cache(entries, states, tokens, source)
