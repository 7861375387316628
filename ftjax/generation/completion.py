"""Completions with the log-probabilities that their tokens were drawn with, and what ends them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Completion:
  """One generated continuation of a prompt.

  tokens: ids, with the stop token that ended it. logprobs: float32[len(tokens)], in nats, under
  softmax(logits / temperature) over the whole vocabulary (temperature 0: those of temperature 1):
  what the trainer's forward computes. truncated: whether it was cut at max_tokens, and not ended by
  a stop token or string. choices: int16[len(tokens), L, k], the experts of the token before each,
  in each layer that has experts; None where the engine does not return them."""

  tokens: list[int]
  logprobs: np.ndarray
  truncated: bool
  choices: np.ndarray | None = None

  def before_stop(self, stop_ids: Sequence[int]) -> list[int]:
    """Returns the tokens without a stop token at the end."""
    return self.tokens[:-1] if self.tokens[-1] in stop_ids else self.tokens


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
  choices: list[np.ndarray] = dataclasses.field(default_factory=list)

  def extend(self, drawn, stop_ids, ended) -> Completion | None:
    """Takes what a dispatch drew: tokens, log-probs and perhaps experts. Returns the completion, if
    one of the tokens was its last.
    """
    for token, logprob, *choices in zip(*drawn, strict=True):
      self.tokens.append(int(token))
      self.logprobs.append(logprob)
      self.choices += choices
      stopped = token in stop_ids or bool(ended and ended(self.tokens))
      if stopped or len(self.tokens) == self.most:
        logprobs = np.array(self.logprobs, np.float32)
        choices = np.stack(self.choices) if self.choices else None
        return Completion(self.tokens, logprobs, not stopped, choices)
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
