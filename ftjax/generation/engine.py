"""The one engine of generation: rollouts, evaluation, `ftjax.generate` and its chat.

Sequences are decoded in slots. There are two ways into the slots:
- `generate` makes groups of completions from a queue, in slots that are refilled as sequences end.
  Prompts are prefilled, all but their last token, once each however many completions they get; the
  cache of a prompt is copied into the slots of its completions, and the first step of a sequence
  reads its prompt's last token.
- `generate_at_once` makes one completion of each of a few prompts. All begin together: one program
  reads the prompts and draws the first token of each, so nothing is copied and the first token
  comes early. `respond` is the same for one prompt of a conversation, whose cache is kept, so that
  each turn reads only what is new.

Both decode up to `tokens_per_dispatch` steps for all slots in one dispatch; in between the host
collects what ended. The host decides from arrays that are whole on every process, so all processes,
given the same prompts, decide alike.

An encoder-decoder reads a prompt by its encoder: its completions are made a batch at a time by
encoder_decoder.py, in the same slots, or by beam_search.py.

A completion depends on (seed, prompt id, completion index) and its prompt alone: not on its slot,
on its neighbours, on the padding, or on when it entered."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.generation import batch as at_once
from ftjax.generation.batch import Conversation
from ftjax.generation.beam_search import BeamSearch, Writer
from ftjax.generation.completion import Completion, Rollout
from ftjax.generation.decoder import Request
from ftjax.generation.encoder_decoder import Batches
from ftjax.generation.padding import bucket
from ftjax.generation.programs import Programs
from ftjax.generation.queue import Queue, ring_capacity, rows_of_run
from ftjax.generation.sampling import Sampling
from ftjax.generation.weights import check_decodable
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.models.kv_cache import Cache
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import batch_axis_size, spec

TOKENS_PER_DISPATCH = 16


class Compiled(NamedTuple):
  """The two large programs of a rollout: run prompts that `prefill` reads at once, slots sequences
  that `decode` extends in `cache` (in shapes with shardings).
  """

  prefill: jax.stages.Compiled
  decode: jax.stages.Compiled
  run: int
  slots: int
  cache: Cache


class Engine:
  """Generates completions with one architecture. Programs are compiled once per shape: `decode` per
  number of sequences, capacity of the cache (a bucket of the longest prompt, and max_tokens) and
  sampling; those that read prompts per bucket of prompt length and number of rows.

  Args:
    arch: the architecture.
    dtype: compute dtype of activations and cache.
    stop_ids: tokens that end a completion; they are returned as its last token.
    pad_id: any valid token id.
    slots: sequences that `generate` decodes at once; rounded up to a multiple of the batch axis
      size.
    tokens_per_dispatch: most steps between two looks of the host.
    vocab_size: of the tokenizer; ids from it on are never drawn. Many models have rows beyond it
      (Qwen2.5: 151,936 for 151,665 ids), which no training has seen and no text has tokens for.
      None: the model's.
    routed: whether the completions of `generate` have `choices`, of a model with experts.
    writer: of an encoder-decoder.
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
    routed: bool = False,
    writer: Writer = Writer(),  # noqa: B008 - frozen
  ):
    if slots < 1 or tokens_per_dispatch < 1:
      raise ConfigError(f'{slots=}, {tokens_per_dispatch=}: expected both to be at least 1')
    self.arch, self.pad_id = arch, pad_id
    self.stop_ids, self.slots = tuple(stop_ids), slots
    self.tokens_per_dispatch = tokens_per_dispatch
    self._programs = Programs(arch, dtype, self.stop_ids, tokens_per_dispatch, vocab_size, routed)
    self._start_id, self._search, beams = writer.start_id, None, writer.beams
    self._beams = beams.count
    if arch.is_encoder_decoder and self._start_id is None:
      raise ConfigError(
        'an encoder-decoder needs decoder_start_token_id in generation_config.json or config.json'
      )
    if beams.count > 1:
      if not arch.is_encoder_decoder:
        raise ConfigError(
          f'eval.num_beams (--num_beams)={beams.count}: beam search is for encoder-decoders, and '
          f'the model is of kind {arch.kind!r} (family {arch.family!r}); leave it at 1'
        )
      self._search = BeamSearch(arch, dtype, self.stop_ids, beams, vocab_size)

  @property
  def compilations(self) -> int:
    """Programs that were compiled so far."""
    return self._programs.compilations + (self._search.compilations if self._search else 0)

  def _batches(self, rows: int) -> Batches:
    """Returns how an encoder-decoder makes completions, `rows` together."""
    return Batches(self._programs, self._search, self._start_id, self.pad_id, rows)

  def _batch(self) -> int:
    """Returns the slots on the current mesh."""
    size = batch_axis_size()
    return -(-self.slots // size) * size

  def compile(
    self, params: dict, *, prompts: int, longest: int, max_tokens: int, sampling: Sampling
  ) -> Compiled:
    """Compiles the programs of `generate` from shapes alone, on a mesh whose devices need not be
    attached.

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

    mesh, programs = jax.tree.leaves(params)[0].sharding.mesh, self._programs
    run, slots = rows_of_run(prompts, batch_axis_size()), self._batch()
    tokens = shaped((run, bucket(max(longest - 1, 1))), 'batch', 'seq')
    capacity = ring_capacity(longest, max_tokens, self.tokens_per_dispatch)
    cache, device = jax.eval_shape(lambda: programs.start(slots, capacity))
    number, seed = (jax.ShapeDtypeStruct((), d) for d in (jnp.int32, jnp.uint32))
    state = (cache, device, number, number, seed)
    return Compiled(
      programs.prefill.lower(params, tokens, Tokens(tokens, tokens)).compile(),
      programs.decode.lower(params, *state, sampling=sampling).compile(),
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
    beat: Callable[[int], None] = lambda ended: None,
  ) -> Rollout:
    """Returns `group` completions of each of many prompts.

    Args:
      params: nested dict, best as `weights.rollout_params` gives it: in the compute dtype, not
        split over fsdp. Work is done on their mesh.
      prompts: token ids, none empty; the same on every process.
      group: completions a prompt.
      max_tokens: longest completion, or one such number a prompt.
      sampling: how tokens are chosen.
      seed: of sampling.
      prompt_ids: distinguish prompts in the sampling key; their index by default.
      ended: whether the tokens of a completion so far end it (stop strings). Called for every
        token, between dispatches; must be the same function on every process.
      beat: called after every dispatch, with the number of completions that ended in it.

    Raises:
      ConfigError: an empty prompt, group or max_tokens below 1, more positions than the model was
        made for, or a mesh that splits the sequence.
    """
    if group < 1:
      raise ConfigError(f'rollout.group={group} must be at least 1')
    request = self._request(params, prompts, max_tokens, sampling, seed, prompt_ids, ended)
    begin, compiled = time.perf_counter(), self.compilations
    with jax.set_mesh(request.mesh):
      batch = self._batch()
      if self.arch.is_encoder_decoder:
        made = self._batches(batch)
        done = made.generate(request, group, beat)
      else:
        made = Queue(self._programs, self.pad_id, batch, request, group)
        made.run(beat)
        done = made.done
    completions = [c for row in done for c in row]
    tokens, seconds = sum(len(c.tokens) for c in completions), time.perf_counter() - begin
    metrics = {
      'seconds': seconds,
      'tokens': tokens,
      'tokens_per_s': tokens / seconds,
      'mean_length': tokens / len(completions),
      'truncated': sum(c.truncated for c in completions) / len(completions),
      'steps': made.steps,
      'slot_occupancy': tokens / (made.steps * batch),
      'prefill_tokens': made.prefill_tokens,
      'prefill_padding': 1 - made.prefill_tokens / max(made.prefill_padded, 1),
      'compilations': self.compilations - compiled,
    }
    return Rollout(done, metrics)

  def generate_at_once(
    self,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    sampling: Sampling,
    seed: int = 0,
    prompt_ids: Sequence[int] | None = None,
    ended: Callable[[list[int]], bool] | None = None,
  ) -> list[Completion]:
    """Returns one completion of each of a few prompts, which begin together whatever `slots` is;
    for the arguments see `generate`.

    Raises:
      ConfigError: as `generate`.
    """
    request = self._request(params, prompts, max_tokens, sampling, seed, prompt_ids, ended)
    with jax.set_mesh(request.mesh):
      if self.arch.is_encoder_decoder:
        return [row[0] for row in self._batches(len(prompts) * self._beams).generate(request)]
      return at_once.generate(self._programs, self.pad_id, request)

  def respond(
    self,
    params: dict,
    prompt: Sequence[int],
    conversation: Conversation,
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    prompt_id: int = 0,
    ended: Callable[[list[int]], bool] | None = None,
    stream: Callable[[list[int]], None] | None = None,
  ) -> Completion:
    """Returns the completion of one prompt, and keeps its cache for the next turn.

    Args:
      prompt: token ids of the whole conversation so far.
      conversation: holds the cache of earlier turns, and then of this one; `params` must be the
        same in all turns. An interrupted turn leaves no cache.
      stream: called with the tokens of the completion so far, from the first on.
      params, max_tokens, sampling, seed, prompt_id, ended: see `generate`.

    Raises:
      ConfigError: as `generate`.
    """
    request = self._request(params, [prompt], max_tokens, sampling, seed, [prompt_id], ended)
    with jax.set_mesh(request.mesh):
      if self.arch.is_encoder_decoder:  # which reads each turn anew
        return self._batches(self._beams).generate(request, stream=stream)[0][0]
      return at_once.respond(self._programs, self.pad_id, request, conversation, stream)

  def _request(self, params, prompts, max_tokens, sampling, seed, prompt_ids, ended) -> Request:
    most = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    ids = list(range(len(prompts))) if prompt_ids is None else [int(i) for i in prompt_ids]
    self._check(prompts, most, ids)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    check_decodable(mesh)
    return Request(params, mesh, prompts, most, ids, sampling, seed, ended)

  def _check(self, prompts, most: list[int], ids: list[int]) -> None:
    if not prompts or not all(len(p) for p in prompts):
      raise ConfigError('generate: every prompt needs at least one token')
    if not len(prompts) == len(most) == len(ids):
      raise ConfigError(
        f'generate: {len(prompts)} prompts, but {len(most)} max_tokens and {len(ids)} prompt_ids'
      )
    if min(most) < 1:
      raise ConfigError(f'max_tokens={min(most)} must be at least 1')
    longest = max(len(p) + m for p, m in zip(prompts, most, strict=True))
    if longest > self.arch.max_len:
      raise ConfigError(
        f'a prompt and max_tokens={max(most)} make {longest} positions; the model was made for '
        f'{self.arch.max_len}: lower max_tokens or leave the prompt out'
      )
