"""What a rollout hands out: completions with the log-probabilities they were drawn with, and what
ends them."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Completion:
  """One sampled continuation of a prompt.

  tokens: ids, with the stop token that ended it. logprobs: float32[len(tokens)], in nats, under
  softmax(logits / temperature) over the whole vocabulary (temperature 0: those of temperature 1):
  what the trainer's forward computes. kept_logprobs: the same among the tokens that vocab_size,
  top_k and top_p left, as drawn. truncated: whether it was cut at max_tokens, and not ended by a
  stop token or string."""

  tokens: list[int]
  logprobs: np.ndarray
  kept_logprobs: np.ndarray
  truncated: bool


@dataclasses.dataclass(frozen=True)
class Rollout:
  """What `Engine.generate` returns: completions[prompt][completion], and metrics by name for the
  log.
  """

  completions: list[list[Completion]]
  metrics: dict[str, float]


@dataclasses.dataclass
class Unfinished:
  """A completion that is being decoded."""

  prompt: int
  completion: int
  most: int
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  kept: list[float] = dataclasses.field(default_factory=list)

  def extend(self, tokens, logprobs, kept, stop_ids, ended) -> Completion | None:
    """Takes a dispatch's tokens; the completion, if one of them was its last."""
    for token, logprob, among in zip(tokens, logprobs, kept, strict=True):
      self.tokens.append(int(token))
      self.logprobs.append(logprob)
      self.kept.append(among)
      stopped = token in stop_ids or bool(ended and ended(self.tokens))
      if stopped or len(self.tokens) == self.most:
        scores = (np.array(a, np.float32) for a in (self.logprobs, self.kept))
        return Completion(self.tokens, *scores, truncated=not stopped)
    return None


def stops(texts: tuple[str, ...], tokenizer) -> Callable[[list[int]], bool] | None:
  """Returns whether one of `texts` ends a completion; None without any. A text may begin and end
  within tokens, and may be a special token. stop_texts.py refuses those that cannot occur."""
  if not texts:
    return None
  # A token holds a byte at least, so this tail holds every text that the last token completes.
  tail = 2 * max(len(t.encode()) for t in texts)

  def ended(tokens: list[int]) -> bool:
    text = tokenizer.decode(tokens[-tail:], skip_special=False)
    return any(t in text for t in texts)

  return ended
