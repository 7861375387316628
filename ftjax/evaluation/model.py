"""A model as evaluation sees it: texts in, texts and log-probabilities out.

experiment/local_model.py has one on this mesh; evaluation/endpoint.py one behind a server. So
nothing here depends on parameters, meshes or compilation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from ftjax.data.formats import Chat


@dataclasses.dataclass(frozen=True)
class Completion:
  """One answer of a model.

  text: without the tokens that end or frame it, and without white space around it. prompt:
  everything that the model read, whose end may have opened a thought. tokens: their number, the one
  that ended it included. is_cut: it reached the most tokens.
  """

  text: str
  prompt: str
  tokens: int
  is_cut: bool


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """How probable a model finds a text: logp in nats, summed over `tokens` tokens."""

  logp: float
  tokens: int


@dataclasses.dataclass(frozen=True)
class Draw:
  """How completions are drawn: `samples` a prompt, at a temperature (0: greedy).

  stop: texts that end a completion and are not part of it.
  """

  max_tokens: int
  samples: int = 1
  temperature: float = 0.0
  seed: int = 0
  stop: tuple[str, ...] = ()


class Model(Protocol):
  """One model under test. Answers depend on the prompt alone, not on its neighbours."""

  def complete(
    self,
    prompts: Sequence[Chat | str],
    places: Sequence[str],
    draw: Draw,
    done: Callable[[int], None],
  ) -> list[list[Completion]]:
    """Returns draw.samples completions of each prompt.

    Args:
      prompts: conversations that the assistant answers next, or texts to continue.
      places: of their rows, for messages.
      done: called with how many more completions are there.

    Raises:
      DataError: a prompt that is too long, or cannot be rendered; names its place.
    """
    ...

  def score(
    self,
    prompts: Sequence[Chat | str],
    responses: Sequence[Sequence[str]],
    places: Sequence[str],
    done: Callable[[int], None],
  ) -> list[tuple[Likelihood, ...]]:
    """Returns for each prompt how probable each of its responses is, each with its stop token.

    Raises:
      DataError: see `complete`.
    """
    ...

  def score_texts(
    self, texts: Sequence[str], places: Sequence[str], done: Callable[[int], None]
  ) -> list[Likelihood]:
    """Returns how probable each whole text is, from its first token on, in windows of the model's
    length where it is longer.
    """
    ...
