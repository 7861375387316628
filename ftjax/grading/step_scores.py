"""Scores solutions by the scores of their steps, which a process reward model gives."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

# From the probability that each step is right, float[steps], to the score of a solution. The least
# and the product are those of Lightman et al. 2023, section 2; the last step's is that of Wang et
# al. 2023 (Math-Shepherd) where it is trained on outcomes.
REDUCERS: Mapping[str, Callable[[np.ndarray], float]] = {
  'min': lambda p: float(p.min()),
  'product': lambda p: float(p.prod()),
  'last': lambda p: float(p[-1]),
}

# (prompt, steps) of several solutions -> the probability of each step.
ScoreSteps = Callable[[Sequence[tuple[str, Sequence[str]]]], Sequence[np.ndarray]]


def split(text: str, separator: str) -> list[str]:
  """Returns the steps of a completion: what stands between separators, without blank parts."""
  return [part for part in text.split(separator) if part.strip()]


class StepGrader:
  """Scores completions by their steps.

  Args:
    score_steps: of a process reward model.
    how: a name in REDUCERS.
    separator: of the steps in a completion.

  Raises:
    ValueError: an unknown name, or an empty separator.
  """

  def __init__(self, score_steps: ScoreSteps, how: str, separator: str):
    if how not in REDUCERS:
      raise ValueError(f'how={how!r}; expected one of {list(REDUCERS)}')
    if not separator:
      raise ValueError('separator is empty; expected a text, such as a newline')
    self._score_steps, self._reduce, self._separator = score_steps, REDUCERS[how], separator

  def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Returns the score of each (prompt, completion); 0 of a blank completion."""
    steps = [split(completion, self._separator) for _, completion in pairs]
    kept = [i for i, some in enumerate(steps) if some]
    found = self._score_steps([(pairs[i][0], steps[i]) for i in kept])
    out = [0.0] * len(pairs)
    for i, probabilities in zip(kept, found, strict=True):
      out[i] = self._reduce(np.asarray(probabilities, np.float64))
    return out
