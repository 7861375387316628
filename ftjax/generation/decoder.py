"""What both ways of generating share: the slots, one dispatch of decoding, and what ended in it."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from ftjax.generation.completion import Completion, Unfinished
from ftjax.generation.programs import Programs, Slots
from ftjax.generation.sampling import Sampling
from ftjax.models.kv_cache import Cache
from ftjax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Request:
  """One call of the engine.

  params: nested dict on `mesh`. prompts: token ids. most: the longest completion of each. ids: of
  the prompts in the sampling key. ended: see `Engine.generate`.
  """

  params: dict
  mesh: Mesh
  prompts: Sequence[Sequence[int]]
  most: list[int]
  ids: list[int]
  sampling: Sampling
  seed: int
  ended: Callable[[list[int]], bool] | None

  def put(self, array: np.ndarray, *names):
    """Returns a host array on the request's mesh."""
    return sharding.put(self.mesh, array, *names)

  @property
  def key(self) -> np.uint32:
    """The seed as the programs take it."""
    return np.uint32(self.seed % 2**32)

  def new_slots(self, sequences: dict[int, Unfinished], batch: int) -> Slots:
    """Returns the slots of sequences that begin, each with the last token of its prompt."""
    fields = np.zeros((5, batch), np.int32)
    for slot, s in sequences.items():
      prompt = self.prompts[s.prompt]
      fields[:, slot] = prompt[-1], len(prompt) - 1, self.ids[s.prompt], s.completion, s.most
    return Slots(*(self.put(f, 'batch') for f in fields))


class Decoder:
  """Sequences in slots, their cache, and the index that is written next.

  Args:
    programs: of the engine.
    request: of this call.
    cache, device: cache and slots on the devices.
    slots: the sequence in each slot; None: an empty one.
    at: index of the cache that the next step writes.
  """

  def __init__(
    self,
    programs: Programs,
    request: Request,
    cache: Cache,
    device: Slots,
    slots: list[Unfinished | None],
    at: int,
  ):
    self.cache, self.device, self.slots, self.at = cache, device, slots, at
    self.steps = 0
    self._programs, self._request = programs, request

  @property
  def capacity(self) -> int:
    """Entries of the cache."""
    return self.cache.tokens.segments.shape[1]

  def dispatch(self, steps: int) -> list[tuple[Unfinished, Completion]]:
    """Decodes at most `steps` tokens for all slots; empties the slots of those that ended and
    returns them.
    """
    longest = max(s.most - len(s.tokens) for s in self.slots if s)
    self.cache, self.device, taken, out = self._programs.decode(
      self._request.params,
      self.cache,
      self.device,
      np.int32(self.at),
      np.int32(min(steps, longest)),
      self._request.key,
      sampling=self._request.sampling,
    )
    taken, out = int(taken), [np.asarray(o) for o in out]
    self.at = (self.at + taken) % self.capacity
    self.steps += taken
    return self.collect([o[:, :taken] for o in out])

  def collect(self, out: Sequence[np.ndarray]) -> list[tuple[Unfinished, Completion]]:
    """Gives (tokens, logprobs) [B, steps], and experts beside them, to the sequences; see
    `dispatch`.
    """
    ended = []
    for slot, sequence in enumerate(self.slots):
      if sequence:
        rows = [o[slot] for o in out]
        completion = sequence.extend(rows, self._programs.stop_ids, self._request.ended)
        if completion:
          ended.append((sequence, completion))
          self.slots[slot] = None
    return ended
