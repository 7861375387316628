"""Completions of an encoder-decoder: its encoder reads the prompts of a batch, and the decoder
begins each completion with the model's start token. Batches hold prompts of like lengths.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.generation.beam_search import BeamSearch
from ftjax.generation.completion import Completion, Unfinished
from ftjax.generation.decoder import Decoder, Request
from ftjax.generation.padding import bucket, left_pad
from ftjax.generation.programs import Programs, Slots
from ftjax.models.attention import Tokens
from ftjax.models.cross_attention import Source
from ftjax.runtime.sharding import batch_axis_size

Ended = list[tuple[Unfinished, Completion]]


@dataclasses.dataclass
class Batches:
  """How completions are made, and what it took.

  programs: of the engine. search: None without beam search. start_id: token that a decoder begins
  with. pad_id: any valid token id. rows: completions that are decoded together,
  those of beam search counted too.
  """

  programs: Programs
  search: BeamSearch | None
  start_id: int
  pad_id: int
  rows: int
  steps: int = 0
  prefill_tokens: int = 0
  prefill_padded: int = 0

  def generate(
    self,
    request: Request,
    group: int = 1,
    beat: Callable[[int], None] = lambda ended: None,
    stream: Callable[[list[int]], None] | None = None,
  ) -> list[list[Completion]]:
    """Returns `group` completions of each prompt; beat, group: see Engine.generate. stream: called
    with the tokens of the first completion after each dispatch.
    """
    prompts = request.prompts
    # Beam search draws nothing: all completions of a prompt are the same.
    copies = 1 if self.search else group
    waiting = [
      Unfinished(p, c, request.most[p]) for p in range(len(prompts)) for c in range(copies)
    ]
    waiting.sort(key=lambda s: len(prompts[s.prompt]))
    done: list[list[Completion | None]] = [[None] * copies for _ in prompts]
    size = batch_axis_size()
    rows = self.rows // (self.search.count if self.search else 1)
    rows = max(rows // size, 1) * size
    while waiting:
      some, waiting = waiting[:rows], waiting[rows:]
      batch = rows if waiting or len(some) == rows else -(-len(some) // size) * size
      for ended in (self._search if self.search else self._decode)(request, some, batch, stream):
        for sequence, completion in ended:
          done[sequence.prompt][sequence.completion] = completion
        beat(len(ended) * (group // copies))
    return [row * (group // copies) for row in done]

  def _source(self, request: Request, some: Sequence[Unfinished], batch: int) -> Source:
    """Returns the prompts of some sequences as arrays, padded on the left."""
    own = [request.prompts[s.prompt] for s in some]
    arrays = left_pad(own, batch, self.pad_id)
    self.prefill_tokens += sum(map(len, own))
    self.prefill_padded += arrays[0].size
    tokens, segments, positions = (request.put(a, 'batch', 'seq') for a in arrays)
    return Source(tokens, Tokens(segments, positions))

  def _decode(self, request: Request, some: Sequence[Unfinished], batch: int, stream):
    """Yields what ended in each dispatch of a batch."""
    programs, most = self.programs, max(s.most for s in some)
    cache = programs.begin(
      request.params, self._source(request, some, batch), capacity=bucket(most)
    )
    fields = np.zeros((5, batch), np.int32)
    for slot, s in enumerate(some):
      fields[:, slot] = self.start_id, 0, request.ids[s.prompt], s.completion, s.most
    device = Slots(*(request.put(f, 'batch') for f in fields))
    slots = [*some, *[None] * (batch - len(some))]
    decoder = Decoder(programs, request, cache, device, slots, 0)
    while any(decoder.slots):
      found = decoder.dispatch(programs.width)
      if stream:
        stream(some[0].tokens)
      yield found
    self.steps += decoder.steps

  def _search(self, request: Request, some: Sequence[Unfinished], batch: int, stream):
    """Yields the completions of a batch by beam search, all at once."""
    most = np.ones(batch, np.int32)
    most[: len(some)] = [s.most for s in some]
    source = self._source(request, some, batch)
    out = self.search.run(
      request.params,
      source,
      request.put(most, 'batch'),
      np.int32(self.start_id),
      most=bucket(int(most.max())),
    )
    tokens, logprobs, lengths = map(np.asarray, out)
    self.steps += int(lengths[: len(some)].max())
    ended: Ended = []
    for row, s in enumerate(some):
      own, logp = tokens[row, : lengths[row]].tolist(), logprobs[row, : lengths[row]]
      stopped = own[-1] in self.programs.stop_ids
      ended.append((s, Completion(own, logp, not stopped)))
    if stream:
      stream(ended[0][1].tokens)
    yield ended
