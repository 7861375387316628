"""Groups of completions from a queue, in slots that are refilled as sequences end."""

import collections
from collections.abc import Callable

import numpy as np

from ftjax.generation.completion import Completion, Unfinished
from ftjax.generation.decoder import Decoder, Request
from ftjax.generation.padding import bucket, left_pad
from ftjax.generation.programs import Programs
from ftjax.models.attention import Tokens
from ftjax.models.kv_cache import Cache
from ftjax.runtime.sharding import batch_axis_size

# Prompts are read in runs of so many rows (times the batch axis size): few programs, and no spare
# rows but in the last run of a split batch.
_RUNS = (16, 4, 1)


def rows_of_run(waiting: int, axis_size: int) -> int:
  """Returns the rows of the next run of prompts, a multiple of the batch axis size."""
  return next(r for r in _RUNS if r * axis_size <= waiting or r == 1) * axis_size


def ring_capacity(longest: int, most: int, width: int) -> int:
  """Returns the entries of a ring that holds the longest prompt, padded, and whole dispatches of
  its own.
  """
  return bucket(max(longest - 1, 1)) + -(-most // width) * width


class Queue:
  """One call of `Engine.generate`: the queue of sequences, and the prompts that are cached.

  Args:
    programs: of the engine.
    pad_id: any valid token id.
    batch: slots.
    request: of this call.
    group: completions of each prompt.
  """

  def __init__(self, programs: Programs, pad_id: int, batch: int, request: Request, group: int):
    self._programs, self._pad_id, self._request = programs, pad_id, request
    self._axis_size = batch_axis_size()
    prompts = request.prompts
    self._waiting = collections.deque((p, c) for p in range(len(prompts)) for c in range(group))
    self.done: list[list[Completion | None]] = [[None] * group for _ in prompts]
    # Prompts that were read and are still to enter: prompt -> (cache of its run, row).
    self._read: dict[int, tuple[Cache, int]] = {}
    longest = max(map(len, prompts))
    capacity = ring_capacity(longest, max(request.most), programs.width)
    cache, device = programs.start(batch, capacity)
    # The first prompts are written at the beginning, so the ring wraps as late as possible.
    at = bucket(max(longest - 1, 1))
    self._decoder = Decoder(programs, request, cache, device, [None] * batch, at)
    self.prefill_tokens = self.prefill_padded = 0

  @property
  def steps(self) -> int:
    """Decoding steps so far."""
    return self._decoder.steps

  def run(self, beat: Callable[[int], None]) -> None:
    """Generates all completions into `done`; calls `beat` after every dispatch, with the number of
    completions that ended in it.
    """
    while self._waiting or any(self._decoder.slots):
      self._refill()
      ended = self._decoder.dispatch(self._programs.width)
      for sequence, completion in ended:
        self.done[sequence.prompt][sequence.completion] = completion
      beat(len(ended))

  def _refill(self) -> None:
    """Fills empty slots from the queue."""
    entering, slots = {}, self._decoder.slots
    for slot, sequence in enumerate(slots):
      if sequence is None and self._waiting:
        prompt, completion = self._waiting.popleft()
        entering[slot] = slots[slot] = Unfinished(prompt, completion, self._request.most[prompt])
    self._read_prompts(list(dict.fromkeys(s.prompt for s in entering.values())))
    runs: dict[int, tuple[Cache, dict[int, int]]] = {}
    for slot, sequence in entering.items():
      cache, row = self._read[sequence.prompt]
      runs.setdefault(id(cache), (cache, {}))[1][slot] = row
    for cache, sources in runs.values():
      self._enter(cache, sources)
    first = self._waiting[0][0] if self._waiting else len(self.done)
    self._read = {p: run for p, run in self._read.items() if p >= first}

  def _read_prompts(self, wanted: list[int]) -> None:
    """Prefills those not read yet, similar lengths together."""
    prompts = self._request.prompts
    wanted = sorted((p for p in wanted if p not in self._read), key=lambda p: len(prompts[p]))
    while wanted:
      size = rows_of_run(len(wanted), self._axis_size)
      run, wanted = wanted[:size], wanted[size:]
      # The last token is left to the first step of decoding; a lone one leaves an empty row.
      known = [prompts[p][:-1] for p in run]
      arrays = left_pad(known, size, self._pad_id)
      tokens, segments, positions = (self._request.put(a, 'batch', 'seq') for a in arrays)
      cache = self._programs.prefill(self._request.params, tokens, Tokens(segments, positions))
      self._read |= {p: (cache, row) for row, p in enumerate(run)}
      self.prefill_tokens += sum(map(len, known))
      self.prefill_padded += arrays[0].size

  def _enter(self, cache: Cache, sources: dict[int, int]) -> None:
    """Begins the sequences of `sources` {slot: row of cache}."""
    decoder = self._decoder
    batch = len(decoder.slots)
    source = np.full(batch, -1, np.int32)
    source[list(sources)] = list(sources.values())
    new = self._request.new_slots({slot: decoder.slots[slot] for slot in sources}, batch)
    decoder.cache, decoder.device = self._programs.enter(
      decoder.cache,
      decoder.device,
      cache,
      self._request.put(source, 'batch'),
      new,
      np.int32(decoder.at),
    )
