"""One completion of each of a few prompts that begin together; a conversation turn by turn."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.generation.completion import Completion, Unfinished
from ftjax.generation.decoder import Decoder, Request
from ftjax.generation.padding import bucket, left_pad
from ftjax.generation.programs import Programs, Unread
from ftjax.models.attention import Tokens
from ftjax.models.kv_cache import Cache
from ftjax.runtime.sharding import batch_axis_size

# Steps of a dispatch while tokens are streamed: a few at first, more where they take less than so
# many seconds.
_STREAMED_STEPS, _STREAMED_SECONDS = 4, 0.1
# Room of a conversation's first cache, in tokens.
_LEAST_CAPACITY = 512

Ended = list[tuple[Unfinished, Completion]]


@dataclasses.dataclass
class Conversation:
  """The cache of a conversation between two of its turns.

  cache: of one sequence; None before the first turn, after an interrupted one, and where it holds
  states of tokens that do not belong to the conversation. tokens: those that the cache holds, from
  position 0. at: index of the cache that is written next; beyond it nothing was written.
  """

  cache: Cache | None = None
  tokens: list[int] = dataclasses.field(default_factory=list)
  at: int = 0

  def take(
    self, prompt: Sequence[int], most: int, has_states: bool
  ) -> tuple[Cache | None, int, int]:
    """Takes the cache out, for a prompt and `most` tokens after it.

    has_states: of the model; no token can be taken out of a state again.

    Returns:
      (cache, how many tokens of the prompt it holds, index to be written next); (None, 0, 0) where
      it holds none of them, has states of other tokens too, has no room for the rest, or is more
      than twice as large as a new one: every step reads all of it, also what a conversation that
      was reset has left there.
    """
    cache, self.cache = self.cache, None
    # One token at least is read, for the logits of the next.
    known = 0
    for ours, theirs in zip(self.tokens, prompt[:-1], strict=False):
      if ours != theirs:
        break
      known += 1
    if cache is None or not known or (has_states and known < len(self.tokens)):
      return None, 0, 0
    needed = self.at + short_bucket(len(prompt) - known) + most
    capacity = cache.tokens.segments.shape[1]
    anew = _conversation_capacity(bucket(len(prompt)) + most)
    if needed > capacity or capacity > 2 * anew:
      return None, 0, 0
    return cache, known, self.at


def short_bucket(length: int) -> int:
  """Returns the smallest of 32, 64, 128, ... that holds `length`: a turn is short, so few programs
  count for more than little padding.
  """
  return max(32, 1 << (length - 1).bit_length())


def generate(programs: Programs, pad_id: int, request: Request) -> list[Completion]:
  """Returns the completions of a request; see `Engine.generate_at_once`."""
  length = bucket(max(map(len, request.prompts)))
  capacity = length + _room(request, programs)
  decoder, found = _read(programs, pad_id, request, length, capacity)
  done: list[Completion | None] = [None] * len(request.prompts)
  while True:
    for sequence, completion in found:
      done[sequence.prompt] = completion
    if not any(decoder.slots):
      return done
    found = decoder.dispatch(programs.width)


def respond(
  programs: Programs,
  pad_id: int,
  request: Request,
  conversation: Conversation,
  stream: Callable[[list[int]], None] | None,
) -> Completion:
  """Returns the completion of a request of one prompt; see `Engine.respond`."""
  (prompt,) = request.prompts
  cache, known, at = conversation.take(prompt, max(request.most), programs.has_states)
  length = (short_bucket if known else bucket)(len(prompt) - known)
  needed = length + _room(request, programs)
  capacity = _conversation_capacity(needed)
  decoder, found = _read(programs, pad_id, request, length, capacity, (cache, known, at))
  sequence = decoder.slots[0] or found[0][0]
  steps = _STREAMED_STEPS if stream else programs.width
  while True:
    if stream:
      stream(sequence.tokens)
    if found:
      break
    begin = time.monotonic()
    found = decoder.dispatch(steps)
    if time.monotonic() - begin < _STREAMED_SECONDS / 2:
      steps = min(2 * steps, programs.width)
  # The last token was drawn, but not read.
  conversation.tokens = [*prompt, *sequence.tokens[:-1]]
  conversation.cache, conversation.at = decoder.cache, at + length + decoder.steps
  # `ended` looks at tokens between dispatches: the model has then read more than it gave.
  if programs.has_states and decoder.steps >= len(sequence.tokens):
    conversation.cache = None
  return found[0][1]


def _conversation_capacity(needed: int) -> int:
  """Returns the smallest of 512, 768, 1024, 1536, 2048, ... that holds `needed`: a conversation
  grows for some turns before a larger cache is needed and programs are compiled for it.
  """
  capacity = max(_LEAST_CAPACITY, 1 << (needed - 1).bit_length())
  smaller = capacity * 3 // 4
  return smaller if capacity > _LEAST_CAPACITY and needed <= smaller else capacity


def _room(request: Request, programs: Programs) -> int:
  """Returns the entries of the cache after the prompts: whole dispatches, less the first token."""
  return -(-(max(request.most) - 1) // programs.width) * programs.width


def _read(
  programs: Programs,
  pad_id: int,
  request: Request,
  length: int,
  capacity: int,
  earlier: tuple[Cache | None, int, int] = (None, 0, 0),
) -> tuple[Decoder, Ended]:
  """Reads the prompts and draws the first token of each.

  Args:
    length: to which what is read of each prompt is padded.
    capacity: of a new cache.
    earlier: what `Conversation.take` returns; by default there is nothing earlier.

  Returns:
    (the decoder of the sequences, those that ended with their first token).
  """
  cache, known, at = earlier
  size, count = batch_axis_size(), len(request.prompts)
  batch = -(-count // size) * size
  arrays = left_pad([p[known:] for p in request.prompts], batch, pad_id, length)
  tokens, segments, positions = (request.put(a, 'batch', 'seq') for a in arrays)
  unread = Unread(tokens, Tokens(segments, positions), np.int32(known), np.int32(at))
  sequences = {i: Unfinished(i, 0, most) for i, most in enumerate(request.most)}
  cache, device, first = programs.read(
    request.params,
    cache,
    unread,
    request.new_slots(sequences, batch),
    request.key,
    capacity=None if known else capacity,
    sampling=request.sampling,
  )
  slots = [sequences.get(i) for i in range(batch)]
  decoder = Decoder(programs, request, cache, device, slots, at + length)
  return decoder, decoder.collect([np.asarray(a)[:, None] for a in first])
