"""The rollout engine: groups of completions from slots that are refilled as sequences end.

Three programs. `prefill` reads prompts, all but their last token, once each however many
completions they get. `enter` copies a prompt's cache into the slots of its completions. `decode`
takes up to TOKENS_PER_DISPATCH steps for all slots, the first of a sequence with its prompt's last
token; between dispatches the host collects what ended and refills. The host decides from arrays
that are whole on every process, so all processes, given the same prompts, decide alike.

A completion depends on (seed, prompt id, completion index) and its prompt alone: not on its slot,
on its neighbours, on the padding, or on when it entered."""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.generation import ring_cache
from ftjax.generation.completion import Completion, Rollout, Unfinished
from ftjax.generation.sampler import (
  TOKENS_PER_DISPATCH,
  Sampling,
  bucket,
  check_decodable,
  is_stop,
  left_pad,
  next_logits,
  sample,
  token_keys,
)
from ftjax.models import kinds
from ftjax.models import kv_cache as kv
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.models.kv_cache import Cache
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import batch_axis_size, spec

# Prompts are read in runs of so many rows (times the ways that the batch is split): few programs,
# and no rows to spare but in the last run of a split batch.
_RUNS = (16, 4, 1)


class Compiled(NamedTuple):
  """The two large programs of a rollout: run prompts that `prefill` reads at once, slots sequences
  that `decode` extends in `cache` (in shapes with shardings).
  """

  prefill: jax.stages.Compiled
  decode: jax.stages.Compiled
  run: int
  slots: int
  cache: Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
  """Sequences being decoded, int32[B] each: the next token to read, its position, the sequence's
  prompt id and completion index, and how many tokens it may still get (0: it ended, or the slot is
  empty).
  """

  token: jax.Array
  position: jax.Array
  prompt: jax.Array
  completion: jax.Array
  left: jax.Array


class Engine:
  """Generates groups of completions with one architecture. Programs are compiled once per shape:
  decode and enter per capacity (a bucket of the longest prompt, and max_tokens) and sampling,
  prefill per bucket of prompt length and run of rows.

  Args:
    arch: the architecture.
    dtype: compute dtype of activations and cache.
    stop_ids: tokens that end a completion; they are returned as its last token.
    pad_id: any valid token id.
    slots: sequences decoded at once; rounded up to a multiple of the ways that the batch is split.
    tokens_per_dispatch: steps between two looks of the host.
    vocab_size: of the tokenizer; ids from it on are never drawn (see Sampler). None: the model's.
  """

  def __init__(
    self,
    arch: Architecture,
    dtype: jnp.dtype,
    stop_ids: Sequence[int],
    pad_id: int,
    *,
    slots: int,
    tokens_per_dispatch: int = TOKENS_PER_DISPATCH,
    vocab_size: int | None = None,
  ):
    if slots < 1 or tokens_per_dispatch < 1:
      raise ConfigError(f'{slots=}, {tokens_per_dispatch=}: expected both to be at least 1')
    self.arch, self.dtype, self.pad_id, self.vocab_size = arch, dtype, pad_id, vocab_size
    self.stop_ids, self.slots = tuple(stop_ids), slots
    self.tokens_per_dispatch = tokens_per_dispatch
    self.compilations = 0  # each function below counts when it is traced
    self._start = jax.jit(self._start_fn, static_argnums=(0, 1))
    self._prefill = jax.jit(self._prefill_fn)
    self._enter = jax.jit(self._enter_fn, donate_argnums=(0, 1))
    self._decode = jax.jit(self._decode_fn, static_argnames='sampling', donate_argnums=(1, 2))

  def _start_fn(self, batch: int, capacity: int) -> tuple[Cache, _Slots]:
    self.compilations += 1
    none = jnp.zeros(batch, jnp.int32, out_sharding=spec('batch'))
    return kv.empty(self.arch, batch, capacity, self.dtype), _Slots(*[none] * 5)

  def _prefill_fn(self, params, tokens, where: Tokens) -> Cache:
    """The cache of prompts int32[R, P]."""
    self.compilations += 1
    memory = kv.empty(self.arch, *tokens.shape, self.dtype)
    zero = jnp.zeros((), jnp.int32)
    return kinds.decode(self.arch, params, tokens, where, memory, zero, dtype=self.dtype)[1]

  def _enter_fn(self, memory: Cache, slots: _Slots, prompts: Cache, source, new: _Slots, at):
    self.compilations += 1
    slots = jax.tree.map(lambda a, b: jnp.where(source >= 0, a, b), new, slots)
    return ring_cache.enter(memory, prompts, source, at), slots

  def _decode_fn(self, params, memory: Cache, slots: _Slots, at, steps, seed, *, sampling):
    """At most `steps` steps, fewer where all sequences end before.

    Returns:
      (memory, slots, steps taken, (tokens, logprobs, kept logprobs) [B, tokens_per_dispatch]); the
      last two are whole on every device.
    """
    self.compilations += 1
    batch, width = slots.token.shape[0], self.tokens_per_dispatch
    capacity = memory.tokens.segments.shape[1]

    def step(carry):
      i, memory, slots, out = carry
      alive = slots.left > 0
      token, segment, position = (
        jax.sharding.reshard(a[:, None], spec('batch', 'seq'))
        for a in (slots.token, alive.astype(jnp.int32), slots.position)
      )
      x, memory = kinds.decode(
        self.arch,
        params,
        token,
        Tokens(segment, position),
        memory,
        (at + i) % capacity,
        dtype=self.dtype,
      )
      keys = token_keys(seed, slots.prompt, slots.completion, slots.position + 1)
      # For one row, jax 0.12 forgets in indexing how the batch lies.
      x = jax.sharding.reshard(x[:, 0], spec('batch', None))
      drawn = sample(next_logits(self.arch, params, x), keys, sampling, self.vocab_size)
      out = tuple(
        jax.lax.dynamic_update_slice_in_dim(o, d[:, None], i, 1)
        for o, d in zip(out, drawn, strict=True)
      )
      left = jnp.where(is_stop(drawn[0], self.stop_ids), 0, jnp.maximum(slots.left - 1, 0))
      slots = _Slots(drawn[0], slots.position + 1, slots.prompt, slots.completion, left)
      return i + 1, memory, slots, out

    def goes_on(carry):
      i, _, slots, _ = carry
      return (i < steps) & jnp.any(slots.left > 0)

    out = tuple(
      jnp.zeros((batch, width), d, out_sharding=spec('batch', None))
      for d in (jnp.int32, jnp.float32, jnp.float32)
    )
    zero = jnp.zeros((), jnp.int32)
    i, memory, slots, out = jax.lax.while_loop(goes_on, step, (zero, memory, slots, out))
    return memory, slots, i, tuple(jax.sharding.reshard(o, spec(None, None)) for o in out)

  def compile(
    self, params: dict, *, prompts: int, longest: int, max_tokens: int, sampling: Sampling
  ) -> Compiled:
    """The programs of `generate` from shapes alone, on a mesh whose devices need not be here.

    Args:
      params: nested dict of ShapeDtypeStruct with shardings.
      prompts: that are read before the first step.
      longest: tokens of the longest of them.
      max_tokens: longest completion.
      sampling: how tokens are chosen.
    """

    def shaped(shape, *names):
      where = jax.sharding.NamedSharding(mesh, spec(*names))
      return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)

    mesh, ways = jax.tree.leaves(params)[0].sharding.mesh, batch_axis_size()
    run, slots = _run(prompts, ways), -(-self.slots // ways) * ways
    tokens = shaped((run, bucket(max(longest - 1, 1))), 'batch', 'seq')
    cache, device = jax.eval_shape(
      lambda: self._start_fn(slots, _capacity(longest, max_tokens, self.tokens_per_dispatch))
    )
    number, seed = (jax.ShapeDtypeStruct((), d) for d in (jnp.int32, jnp.uint32))
    state = (cache, device, number, number, seed)
    return Compiled(
      self._prefill.lower(params, tokens, Tokens(tokens, tokens)).compile(),
      self._decode.lower(params, *state, sampling=sampling).compile(),
      *(run, slots, cache),
    )

  def generate(
    self,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    group: int,
    max_tokens: int | Sequence[int],
    sampling: Sampling,
    seed: int,
    prompt_ids: Sequence[int] | None = None,
    ended: Callable[[list[int]], bool] | None = None,
    beat: Callable[[], None] = lambda: None,
  ) -> Rollout:
    """Completions of prompts.

    Args:
      params: nested dict, best as `weights.rollout_params` gives it: in the compute dtype, not
        split over fsdp. Work is done on their mesh.
      prompts: token ids, none empty; the same on every process.
      group: completions a prompt.
      max_tokens: longest completion, or one such number a prompt.
      sampling: how tokens are chosen.
      seed: of sampling.
      prompt_ids: what tells prompts apart in the sampling key; their index by default.
      ended: True for the tokens of a completion so far ends it (stop strings). Asked for every
        token, between dispatches; must be the same function on every process.
      beat: called after every dispatch, for a watchdog.

    Raises:
      ConfigError: an empty prompt, group or max_tokens below 1, more positions than the model was
        made for, or a mesh that splits the sequence.
    """
    most = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    ids = list(range(len(prompts))) if prompt_ids is None else [int(i) for i in prompt_ids]
    self._check(prompts, group, most, ids)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    check_decodable(mesh)
    with jax.set_mesh(mesh):
      call = _Call(self, params, mesh, prompts, group, most, ids, sampling, seed, ended)
      return call.run(beat)

  def _check(self, prompts, group: int, most: list[int], ids: list[int]) -> None:
    if not prompts or not all(len(p) for p in prompts):
      raise ConfigError('generate: every prompt needs at least one token')
    if group < 1 or min(most) < 1:
      raise ConfigError(
        f'rollout.group={group} and rollout.max_tokens={min(most)} must be at least 1'
      )
    if not len(prompts) == len(most) == len(ids):
      raise ConfigError(
        f'generate: {len(prompts)} prompts, but {len(most)} max_tokens and {len(ids)} prompt_ids'
      )
    longest = max(len(p) + m for p, m in zip(prompts, most, strict=True))
    if longest > self.arch.max_len:
      raise ConfigError(
        f'a prompt and rollout.max_tokens={max(most)} make {longest} positions; the model was made '
        f'for {self.arch.max_len}: lower rollout.max_tokens or leave the prompt out'
      )


def _run(waiting: int, ways: int) -> int:
  """Rows of the next run of prompts."""
  return next(r for r in _RUNS if r * ways <= waiting or r == 1) * ways


def _capacity(longest: int, most: int, width: int) -> int:
  """Entries of a ring that holds the longest prompt, padded, and whole dispatches of its own."""
  return bucket(max(longest - 1, 1)) + -(-most // width) * width


class _Call:
  """One call of generate: the queue of sequences, who is in which slot, and what is cached."""

  def __init__(self, engine: Engine, params, mesh: Mesh, prompts, group, most, ids, *sampling):
    self.engine, self.params, self.mesh, self.prompts = engine, params, mesh, prompts
    self.ids, self.most = ids, most
    self.sampling, self.seed, self.ended = sampling
    self.ways = batch_axis_size()
    self.batch = -(-engine.slots // self.ways) * self.ways
    self.queue = collections.deque((p, c) for p in range(len(prompts)) for c in range(group))
    self.done: list[list[Completion | None]] = [[None] * group for _ in prompts]
    self.slots: list[Unfinished | None] = [None] * self.batch
    # Prompts that were read and are still to enter: prompt -> (cache of its run, row).
    self.read: dict[int, tuple[Cache, int]] = {}
    longest = max(map(len, prompts))
    self.capacity = _capacity(longest, max(most), engine.tokens_per_dispatch)
    # The first prompts lie at the beginning, and no ring goes round before it must.
    self.at = bucket(max(longest - 1, 1))
    self.steps = self.prefill_tokens = self.prefill_padded = 0

  def _put(self, array: np.ndarray, *names):
    return sharding.put(self.mesh, array, *names)

  def run(self, beat: Callable[[], None]) -> Rollout:
    begin, engine = time.perf_counter(), self.engine
    compiled = engine.compilations
    self.memory, self.device = engine._start(self.batch, self.capacity)
    while self.queue or any(self.slots):
      self._refill()
      self._dispatch()
      beat()
    completions = [c for row in self.done for c in row]
    tokens, seconds = sum(len(c.tokens) for c in completions), time.perf_counter() - begin
    metrics = {
      'seconds': seconds,
      'tokens': tokens,
      'tokens_per_s': tokens / seconds,
      'mean_length': tokens / len(completions),
      'truncated': sum(c.truncated for c in completions) / len(completions),
      'steps': self.steps,
      'slot_occupancy': tokens / (self.steps * self.batch),
      'prefill_tokens': self.prefill_tokens,
      'prefill_padding': 1 - self.prefill_tokens / max(self.prefill_padded, 1),
      'compilations': engine.compilations - compiled,
    }
    return Rollout(self.done, metrics)

  def _refill(self) -> None:
    """Fills empty slots from the queue."""
    entering = {}
    for slot in range(self.batch):
      if self.slots[slot] is None and self.queue:
        prompt, completion = self.queue.popleft()
        entering[slot] = self.slots[slot] = Unfinished(prompt, completion, self.most[prompt])
    self._read_prompts(list(dict.fromkeys(s.prompt for s in entering.values())))
    runs: dict[int, tuple[Cache, dict[int, int]]] = {}
    for slot, sequence in entering.items():
      memory, row = self.read[sequence.prompt]
      runs.setdefault(id(memory), (memory, {}))[1][slot] = row
    for memory, sources in runs.values():
      self._enter(memory, sources)
    waiting = self.queue[0][0] if self.queue else len(self.prompts)
    self.read = {p: run for p, run in self.read.items() if p >= waiting}

  def _read_prompts(self, wanted: list[int]) -> None:
    """Prefills those not read yet, like lengths together."""
    wanted = sorted((p for p in wanted if p not in self.read), key=lambda p: len(self.prompts[p]))
    while wanted:
      size = _run(len(wanted), self.ways)
      run, wanted = wanted[:size], wanted[size:]
      # The last token is left to the first step of decoding; a lone one leaves an empty row.
      known = [self.prompts[p][:-1] for p in run]
      arrays = left_pad(known, size, self.engine.pad_id)
      tokens, segments, positions = (self._put(a, 'batch', 'seq') for a in arrays)
      memory = self.engine._prefill(self.params, tokens, Tokens(segments, positions))
      self.read |= {p: (memory, row) for row, p in enumerate(run)}
      self.prefill_tokens += sum(map(len, known))
      self.prefill_padded += arrays[0].size

  def _enter(self, memory: Cache, sources: dict[int, int]) -> None:
    """Sequences of `sources` {slot: row of memory} begin."""
    fields = np.zeros((6, self.batch), np.int32)
    fields[0] = -1
    for slot, row in sources.items():
      s = self.slots[slot]
      prompt = self.prompts[s.prompt]
      fields[:, slot] = (
        row,
        prompt[-1],
        len(prompt) - 1,
        self.ids[s.prompt],
        s.completion,
        s.most,
      )
    source, *new = (self._put(f, 'batch') for f in fields)
    self.memory, self.device = self.engine._enter(
      self.memory, self.device, memory, source, _Slots(*new), np.int32(self.at)
    )

  def _dispatch(self) -> None:
    """Decodes for all slots, and takes out what ended."""
    engine = self.engine
    longest = max(s.most - len(s.tokens) for s in self.slots if s)
    steps = min(engine.tokens_per_dispatch, longest)
    self.memory, self.device, taken, out = engine._decode(
      self.params,
      self.memory,
      self.device,
      np.int32(self.at),
      np.int32(steps),
      np.uint32(self.seed % 2**32),
      sampling=self.sampling,
    )
    taken, out = int(taken), [np.asarray(o) for o in out]
    self.at = (self.at + taken) % self.capacity
    self.steps += taken
    for slot, sequence in enumerate(self.slots):
      if sequence:
        rows = (o[slot, :taken] for o in out)
        completion = sequence.extend(*rows, engine.stop_ids, self.ended)
        if completion:
          self.done[sequence.prompt][sequence.completion] = completion
          self.slots[slot] = None
