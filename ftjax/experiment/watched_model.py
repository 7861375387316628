"""A model under test with a call between two of its batches: for a watchdog, or to cancel."""

from collections.abc import Callable, Sequence

from ftjax.data.formats import Chat
from ftjax.evaluation.model import Completion, Draw, Likelihood, Model

Done = Callable[[int], None]


class WatchedModel:
  """Another model that calls `between` whenever a part of its work is done.

  Args:
    model: that answers.
    between: called then; it may raise an exception to end the evaluation.
  """

  def __init__(self, model: Model, between: Callable[[], None]):
    self._model, self._between = model, between

  def _watched(self, done: Done) -> Done:
    def both(number: int) -> None:
      self._between()
      done(number)

    return both

  def complete(
    self, prompts: Sequence[Chat | str], places: Sequence[str], draw: Draw, done: Done
  ) -> list[list[Completion]]:
    """Implements `Model.complete`."""
    return self._model.complete(prompts, places, draw, self._watched(done))

  def score(
    self,
    prompts: Sequence[Chat | str],
    responses: Sequence[Sequence[str]],
    places: Sequence[str],
    done: Done,
  ) -> list[tuple[Likelihood, ...]]:
    """Implements `Model.score`."""
    return self._model.score(prompts, responses, places, self._watched(done))

  def score_texts(
    self, texts: Sequence[str], places: Sequence[str], done: Done
  ) -> list[Likelihood]:
    """Implements `Model.score_texts`."""
    return self._model.score_texts(texts, places, self._watched(done))
