"""Generation with a key/value cache: prefill once, then decode in dispatches of several tokens.

Prompts are padded on the left to a common bucket, so that all rows write the cache at one index;
where tokens stand is said by segments and positions, so a row's answer depends neither on the
padding nor on the other rows. A sampled token's key is (seed, row id, completion 0, position).
engine.py refills slots as sequences end; what both share (the choice of a token, its key, buckets)
stands here."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ftjax.models import head, kinds
from ftjax.models import kv_cache as kv
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import batch_axis_size, spec

TOKENS_PER_DISPATCH = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen. temperature 0: the likeliest. top_k 0 and top_p 1: no truncation.

  After temperature, top_k keeps the k likeliest tokens; of what is left, renormalized, top_p keeps
  the smallest set of likeliest ones with at least that probability."""

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ConfigError(f'{self}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1')


# Tokens whose probabilities are added up in one go before the choice among blocks of them.
_BLOCK = 256


def choose(
  logits: jax.Array, keys: jax.Array, sampling: Sampling, vocab_size: int | None = None
) -> jax.Array:
  """int32[B] from logits float32[B, V] and one random key a row; vocab_size as in `sample`."""
  return sample(logits, keys, sampling, vocab_size)[0]


def sample(
  logits: jax.Array, keys: jax.Array, sampling: Sampling, vocab_size: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses tokens and tells how likely they were.

  Args:
    logits: float32[B, V].
    keys: one random key a row, [B].
    sampling: how tokens are chosen.
    vocab_size: ids from it on are never chosen; None: any may be.

  Returns:
    (int32[B] tokens; float32[B] their log-probabilities in nats under softmax(logits /
    temperature), before vocab_size, top_k and top_p; float32[B] the same among what these left,
    renormalized: what they were drawn from). At temperature 0 the first are those of temperature
    1, and the second 0.
  """
  if sampling.temperature == 0:
    token = jnp.argmax(_known(logits, vocab_size), axis=-1).astype(jnp.int32)
    return token, _logprob(logits, token), jnp.zeros_like(token, jnp.float32)
  logits = logits / sampling.temperature
  kept = _truncate(_known(logits, vocab_size), sampling)
  token = _draw(kept, keys)
  return token, _logprob(logits, token), _logprob(kept, token)


def _known(logits: jax.Array, vocab_size: int | None) -> jax.Array:
  """logits with -inf from vocab_size on."""
  if vocab_size is None or vocab_size >= logits.shape[-1]:
    return logits
  return jnp.where(jnp.arange(logits.shape[-1])[None] < vocab_size, logits, -jnp.inf)


def _truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """logits with -inf for what top_k and top_p leave out; of equally likely tokens at the border the
  first stay.
  """
  if not sampling.top_k and sampling.top_p == 1:
    return logits
  ordered = -jnp.sort(-logits, axis=-1)
  if sampling.top_k:
    among = jnp.arange(logits.shape[-1])[None] < sampling.top_k
    ordered = jnp.where(among, ordered, -jnp.inf)
  keep = ordered > -jnp.inf
  if sampling.top_p < 1:  # at 1 the sum's rounding would leave out the last ones
    probs = jax.nn.softmax(ordered, axis=-1)
    keep &= jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
  least = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
  above, equal = logits > least, logits == least
  room = keep.sum(-1, keepdims=True) - above.sum(-1, keepdims=True)
  return jnp.where(above | (equal & (jnp.cumsum(equal, axis=-1) <= room)), logits, -jnp.inf)


def _logprob(logits: jax.Array, token: jax.Array) -> jax.Array:
  # A where, not an indexing: the batch may be split.
  mine = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None] == token[:, None]
  return jnp.where(mine, logits, 0).sum(-1) - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
  """int32[B], by inverting the distribution function at one uniform number a row: first over sums
  of blocks, then within the block. (Gumbel noise would take V random numbers a row, 20 ms a step on
  two cores for 16 rows of 49,152.)
  """
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  rows, vocab = weights.shape
  weights = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
  sums = weights.sum(-1)
  ends = jnp.cumsum(sums, axis=-1)
  uniform = jax.vmap(jax.random.uniform)(keys)
  goal = uniform[:, None] * jnp.max(ends, axis=-1, keepdims=True)
  block = _first(ends > goal, sums > 0)
  numbers = jnp.arange(sums.shape[1], dtype=jnp.int32)[None]
  goal = goal - jnp.where(numbers < block, sums, 0).sum(-1, keepdims=True)
  inside = jnp.where((numbers == block)[..., None], weights, 0).sum(1)
  return (block * _BLOCK + _first(jnp.cumsum(inside, axis=-1) > goal, inside > 0))[:, 0]


def _first(reached: jax.Array, possible: jax.Array) -> jax.Array:
  """int32[B, 1]: the first place that is reached and possible; where rounding leaves none, the last
  possible one.
  """
  places = jnp.arange(reached.shape[-1], dtype=jnp.int32)[None]
  first = jnp.where(reached & possible, places, reached.shape[-1]).min(-1, keepdims=True)
  return jnp.minimum(first, jnp.where(possible, places, 0).max(-1, keepdims=True))


def token_keys(
  seed: jax.Array | int, prompt: jax.Array, completion: jax.Array, position: jax.Array
) -> jax.Array:
  """One key a row, of (seed, prompt id, completion index, position of the token to be drawn); the
  last three int32[B].
  """
  base = jax.random.key(seed)

  def one(*numbers):
    return functools.reduce(jax.random.fold_in, numbers, base)

  return jax.vmap(one)(prompt, completion, position)


def is_stop(token: jax.Array, stop_ids: Sequence[int]) -> jax.Array:
  """bool[B]."""
  return functools.reduce(
    jnp.logical_or, [token == s for s in stop_ids], jnp.zeros_like(token, bool)
  )


def next_logits(arch: Architecture, params: dict, x: jax.Array) -> jax.Array:
  """float32[B, V] of last hidden states [B, D], the vocabulary whole on every device."""
  table = kinds.head_weights(arch, params)
  return jax.sharding.reshard(head.logits(x, table), spec('batch', None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  """A batch being decoded: last token, its position, row id, whether it ended; all [B]. `at`: next
  cache index.
  """

  token: jax.Array
  position: jax.Array
  row: jax.Array
  done: jax.Array
  at: jax.Array


class Sampler:
  """Generates from one architecture; programs are compiled per (batch, bucket, capacity, sampling).

  Args:
    arch: the architecture.
    dtype: compute dtype.
    stop_ids: tokens that end an answer; they are not returned.
    pad_id: any valid token id.
    vocab_size: of the tokenizer. Many models have rows beyond it (Qwen2.5: 151,936 for 151,665
      ids), which no training has seen and no text has tokens for. None: the model's.
  """

  def __init__(
    self,
    arch: Architecture,
    dtype: jnp.dtype,
    stop_ids: Sequence[int],
    pad_id: int,
    *,
    vocab_size: int | None = None,
  ):
    self.arch, self.dtype, self.pad_id = arch, dtype, pad_id
    self.stop_ids, self.vocab_size = tuple(stop_ids), vocab_size
    self._prefill = jax.jit(self._prefill_fn, static_argnames=('capacity', 'sampling'))
    self._decode = jax.jit(self._decode_fn, static_argnames=('sampling',), donate_argnums=(1,))

  def _next(self, params, x, rows: jax.Array, position: jax.Array, seed, sampling):
    keys = token_keys(seed, rows, jnp.zeros_like(rows), position)
    return choose(next_logits(self.arch, params, x), keys, sampling, self.vocab_size)

  def _prefill_fn(self, params, tokens, segments, positions, rows, seed, *, capacity, sampling):
    batch, length = tokens.shape
    memory = kv.empty(self.arch, batch, capacity, self.dtype)
    zero = jnp.zeros((), jnp.int32)
    where = Tokens(segments, positions)
    x, memory = kinds.decode(self.arch, params, tokens, where, memory, zero, dtype=self.dtype)
    # For one row, jax 0.12 forgets in indexing how the batch lies.
    position = jax.sharding.reshard(positions[:, -1] + 1, spec('batch'))
    token = self._next(params, x[:, -1], rows, position, seed, sampling)
    at = jnp.asarray(length, jnp.int32)
    return memory, _Rows(token, position, rows, is_stop(token, self.stop_ids), at), _whole(token)

  def _decode_fn(self, params, memory, rows: _Rows, seed, *, sampling):
    def step(i, carry):
      memory, rows, out = carry
      token, segment, position = (
        jax.sharding.reshard(a[:, None], spec('batch', 'seq'))
        for a in (rows.token, jnp.ones_like(rows.token), rows.position)
      )
      where = Tokens(segment, position)
      x, memory = kinds.decode(self.arch, params, token, where, memory, rows.at, dtype=self.dtype)
      token = self._next(params, x[:, 0], rows.row, rows.position + 1, seed, sampling)
      token = jnp.where(rows.done, self.pad_id, token)
      done = rows.done | is_stop(token, self.stop_ids)
      out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, 1)
      return memory, _Rows(token, rows.position + 1, rows.row, done, rows.at + 1), out

    shape = (rows.token.shape[0], TOKENS_PER_DISPATCH)
    out = jnp.full(shape, self.pad_id, jnp.int32, out_sharding=spec('batch', None))
    memory, rows, out = jax.lax.fori_loop(0, TOKENS_PER_DISPATCH, step, (memory, rows, out))
    return memory, rows, _whole(out)

  def generate(
    self,
    params: dict,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    ended: Callable[[list[int]], bool] | None = None,
    stream: Callable[[list[list[int]]], None] | None = None,
  ) -> list[list[int]]:
    """Answers to prompts, without stop tokens.

    Args:
      params: nested dict.
      prompts: token ids, none empty.
      max_tokens: longest answer.
      sampling: how tokens are chosen.
      seed: of sampling.
      row_ids: what tells rows apart in the sampling key; their index by default.
      ended: asked between dispatches for each answer so far; True ends it (stop strings).
      stream: shown the answers so far, from the first token on, after each dispatch.
    """
    count = len(prompts)
    if not count or not all(len(p) for p in prompts):
      raise ConfigError('generate: every prompt needs at least one token')
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    check_decodable(mesh)
    batch = -(-count // batch_axis_size()) * batch_axis_size()
    steps = -(-max(max_tokens - 1, 0) // TOKENS_PER_DISPATCH)
    tokens, segments, positions = left_pad(prompts, batch, self.pad_id)
    ids = np.zeros(batch, np.int32)
    ids[:count] = np.arange(count) if row_ids is None else row_ids

    put = functools.partial(sharding.put, mesh)
    memory, rows, first = self._prefill(
      params,
      put(tokens, 'batch', 'seq'),
      put(segments, 'batch', 'seq'),
      put(positions, 'batch', 'seq'),
      put(ids, 'batch'),
      seed,
      capacity=tokens.shape[1] + steps * TOKENS_PER_DISPATCH,
      sampling=sampling,
    )
    answers = [[int(t)] for t in np.asarray(first)[:count]]
    finished = [False] * count
    self._finish(answers, finished, max_tokens, ended)
    if stream:
      stream(answers)
    for _ in range(steps):
      if all(finished):
        break
      memory, rows, out = self._decode(params, memory, rows, seed, sampling=sampling)
      for b, more in enumerate(np.asarray(out)[:count]):
        if not finished[b]:
          answers[b] += more.tolist()
      self._finish(answers, finished, max_tokens, ended)
      if stream:
        stream(answers)
    return answers

  def _finish(self, answers: list[list[int]], finished: list[bool], max_tokens: int, ended):
    """Cuts answers in place at their first stop token or max_tokens, and marks those that are
    complete; they stay so.
    """
    for b, answer in enumerate(answers):
      if finished[b]:
        continue
      stop = next((i for i, t in enumerate(answer) if t in self.stop_ids), None)
      complete = stop is not None or len(answer) >= max_tokens
      del answer[min(max_tokens, len(answer) if stop is None else stop) :]
      finished[b] = complete or bool(ended and ended(answer))


def _whole(x: jax.Array) -> jax.Array:
  """What the host reads lies whole in every process."""
  return jax.sharding.reshard(x, P())


def check_decodable(mesh: Mesh) -> None:
  """Raises ConfigError where the sequence is split: a cache is written along it."""
  if mesh.shape['context'] > 1:
    raise ConfigError(f'mesh.context={mesh.shape["context"]}: decoding needs mesh.context=1')


def left_pad(
  prompts: Sequence[Sequence[int]], rows: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(tokens, segments, positions), int32[rows, bucket]: prompts at the right end, segment 0 before
  them and in rows to spare.
  """
  length = bucket(max(len(p) for p in prompts))
  tokens = np.full((rows, length), pad_id, np.int32)
  segments, positions = np.zeros((2, rows, length), np.int32)
  for b, prompt in enumerate(prompts):
    begin = length - len(prompt)
    tokens[b, begin:], segments[b, begin:], positions[b, begin:] = prompt, 1, np.arange(len(prompt))
  return tokens, segments, positions


def bucket(length: int) -> int:
  """Smallest of 16, 24, 32, 48, 64, 80, 96, ... that holds `length`: few programs, at most a third
  of padding.
  """
  step = max(8, 1 << max(length.bit_length() - 3, 0))
  return max(16, -(-length // step) * step)
