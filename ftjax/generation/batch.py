"""One completion of each of a few prompts that begin together; a conversation turn by turn."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ftjax.generation.completion import Completion, Unfinished
from ftjax.generation.decoder import Decoder, Request
from ftjax.generation.padding import bucket, left_pad
from ftjax.generation.programs import Programs
from ftjax.models.attention import Tokens
from ftjax.models.kv_cache import Cache
from ftjax.runtime.sharding import batch_axis_size

# Called with the tokens of each prompt's completion so far.
Stream = Callable[[list[list[int]]], None]

# Steps between two looks of the host while tokens are streamed.
_STREAMED_STEPS = 4
# A conversation's cache has room for so many tokens at least, then for twice as many, and so on.
_LEAST_CAPACITY = 512


@dataclasses.dataclass
class Conversation:
  """What is kept between two turns of a conversation with one model: the cache of what was read
  and generated, so that the next turn reads only what is new.

  cache: of one sequence; None before the first turn. tokens: those in the cache, from position 0.
  at: index of the cache that is written next.
  """

  cache: Cache | None = None
  tokens: list[int] = dataclasses.field(default_factory=list)
  at: int = 0

  def take(self, prompt: list[int], most: int) -> tuple[Cache | None, int, int]:
    """Takes the cache out, for a prompt and `most` tokens after it.

    Returns:
      (cache, how many tokens of the prompt it holds, index to be written next); (None, 0, 0) where
      it holds none or has no room.
    """
    cache, self.cache = self.cache, None  # what is interrupted leaves none
    pairs = zip(self.tokens, prompt[:-1], strict=False)
    known = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if known is None:
      known = min(len(self.tokens), len(prompt) - 1)
    if cache is None or not known:
      return None, 0, 0
    room = cache.tokens.segments.shape[1]
    if self.at + conversation_bucket(len(prompt) - known) + most > room:
      return None, 0, 0
    return cache, known, self.at


def conversation_bucket(length: int) -> int:
  """Returns the smallest of 32, 64, 128, ... that holds `length`."""
  return max(32, 1 << (length - 1).bit_length())


def generate(
  programs: Programs,
  pad_id: int,
  request: Request,
  beat: Callable[[], None],
  stream: Stream | None,
  conversation: Conversation | None,
) -> list[Completion]:
  """Returns the completions of a request; see `Engine.generate_at_once`."""
  prompts, size = request.prompts, batch_axis_size()
  batch = -(-len(prompts) // size) * size
  cache, known, at = None, 0, 0
  if conversation:
    cache, known, at = conversation.take(prompts[0], max(request.most))
  new = [p[known:] for p in prompts]
  length = (conversation_bucket if cache else bucket)(max(map(len, new)))
  capacity = length + -(-(max(request.most) - 1) // programs.width) * programs.width
  if conversation:
    capacity = max(_LEAST_CAPACITY, 1 << (capacity - 1).bit_length())
  tokens, segments, positions = left_pad(new, batch, pad_id, length)
  positions += known * segments
  slots = [Unfinished(p, 0, most) for p, most in enumerate(request.most)]
  sequences: list[Unfinished | None] = [*slots, *[None] * (batch - len(slots))]
  cache, device, first = programs.read(
    request.params,
    cache,
    request.put(tokens, 'batch', 'seq'),
    Tokens(request.put(segments, 'batch', 'seq'), request.put(positions, 'batch', 'seq')),
    request.put(np.full(batch, known, np.int32), 'batch'),
    np.int32(at),
    request.new_slots(dict(enumerate(slots)), batch),
    request.key,
    capacity=None if known else capacity,
    sampling=request.sampling,
  )
  decoder = Decoder(programs, request, cache, device, sequences, at + length)
  ended = decoder.collect([np.asarray(a)[:, None] for a in first])
  done = {}
  while True:
    done |= {sequence.prompt: completion for sequence, completion in ended}
    beat()
    if stream:
      stream([s.tokens for s in slots])
    if not any(decoder.slots):
      break
    ended = decoder.dispatch(_STREAMED_STEPS if stream else programs.width)
  if conversation:
    # The last token was drawn, but not read.
    conversation.tokens = [*prompts[0], *done[0].tokens[:-1]]
    conversation.cache, conversation.at = decoder.cache, at + length + decoder.steps
  return [done[p] for p in range(len(prompts))]
