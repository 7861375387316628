"""Rewards of completions by a process reward model: the scores of their steps, as one number."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data import batches, step_rows
from ftjax.data.encode import Encoded
from ftjax.data.prompts import Prompt
from ftjax.experiment.run import Run
from ftjax.experiment.transcript import Transcripts
from ftjax.generation.completion import Completion
from ftjax.grading.step_scores import StepGrader
from ftjax.models.architecture import Architecture
from ftjax.models.forward import Forward
from ftjax.rl.measurements import Measure

# Arrays of rows -> the probability that a step that ends at a token is right, float32[R, T].
MeasureRows = Callable[[dict[str, np.ndarray]], np.ndarray]


def measure(arch: Architecture, dtype: jnp.dtype) -> Measure:
  """Returns the measure of a process reward model; see `MeasureRows`."""
  forward = Forward(arch, dtype)

  def probabilities(params: dict, batch: dict) -> jax.Array:
    return jax.nn.softmax(forward.label_logits(params, batch))[..., 1]

  return probabilities


class StepRewards:
  """Scores completions by rollout.step_reward, with steps as the model was trained on: each
  tokenized apart, and followed by rollout.step_separator.

  Args:
    run: the run.
    transcripts: texts of completions.
  """

  def __init__(self, run: Run, transcripts: Transcripts):
    self._run, self._transcripts = run, transcripts
    self._separator = run.config.rollout.step_separator

  def __call__(
    self,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    measured: MeasureRows,
  ) -> np.ndarray:
    """Returns the score of each completion, float32[R] in [0, 1]; 0 of a blank one, and of one
    whose first step does not end within seq_len.

    Args:
      prompts: P of them.
      completions: of each prompt, R in all.
      measured: of the process reward model.
    """
    pairs = [
      (prompt, self._transcripts.completion(one.tokens))
      for prompt, some in zip(prompts, completions, strict=True)
      for one in some
    ]

    def score_steps(solutions):
      return self._score_steps(solutions, measured)

    how = self._run.config.rollout.step_reward
    return np.array(StepGrader(score_steps, how, self._separator)(pairs), np.float32)

  def _score_steps(
    self, solutions: Sequence[tuple[Prompt, Sequence[str]]], measured: MeasureRows
  ) -> list[np.ndarray]:
    """Returns the probability that each step is right; [0] where there is no step to score."""
    examples = [self._example(prompt, steps) for prompt, steps in solutions]
    arrays = batches.empty(len(examples), self._run.config.seq_len)
    for row, example in enumerate(examples):
      if example is not None:
        batches.fill_row(arrays, row, [(example.tokens, example.supervised)])
    found = measured(arrays) if examples else np.zeros((0, 0))
    out = []
    for row, example in zip(found, examples, strict=True):
      is_end = np.zeros(0, bool) if example is None else example.supervised
      out.append(row[: len(is_end)][is_end] if is_end.any() else np.zeros(1))
    return out

  def _example(self, prompt: Prompt, steps: Sequence[str]) -> Encoded | None:
    tokenizer = self._run.model.tokenizer
    *ids, end = tokenizer.encode_batch([*steps, self._separator])
    ids = [one for one in ids if len(one)]
    whole = step_rows.joined(prompt.ids, ids, end, (1.0,) * len(ids), tokenizer)
    return step_rows.fit(whole, self._run.config.seq_len, 'truncate_right')
