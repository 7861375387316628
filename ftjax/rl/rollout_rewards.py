"""Rewards of a rollout's completions: reward functions, a reward model's scores, alarms, samples.

Reward functions run in process 0, once for all completions of a rollout; the others are sent the
result."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.cluster import processes
from ftjax.config import algorithms
from ftjax.data.prompts import Prompt
from ftjax.experiment.run import Run
from ftjax.experiment.transcript import Transcripts
from ftjax.generation.completion import Rollout
from ftjax.grading import rewards
from ftjax.grading.reward_alarms import RewardAlarms
from ftjax.grading.reward_batch import sample_rows
from ftjax.rl import rollout_batch
from ftjax.rl.rollout_files import RolloutFiles
from ftjax.runtime.errors import ConfigError


class RolloutRewards:
  """The rewards of a run by rollout.rewards; `close` it.

  Args:
    run: the run.
    transcripts: texts of prompts and completions.
    files: take the samples of every rollout.

  Raises:
    ConfigError: rewards that are not there or cannot be used with the data.
    DataError: an example without an answer to compare with.
  """

  def __init__(self, run: Run, transcripts: Transcripts, files: RolloutFiles):
    c = run.config
    self._run, self._transcripts, self._files = run, transcripts, files
    self._parts = rewards.parse(c.rollout.rewards)
    self._alarms = RewardAlarms({p.name: p.weight for p in self._parts}, c.rollout.max_failed)
    if c.rollout.reward_model and not any(part.spec == 'model' for part in self._parts):
      raise ConfigError(
        f'rollout.reward_model={c.rollout.reward_model} does nothing: rollout.rewards='
        f"{c.rollout.rewards!r} has no part 'model'"
      )
    self._rewards: rewards.Rewards | None = None  # in process 0
    self._rollout = 0  # the last one that was made
    processes.from_main(self._start)

  def _start(self) -> None:
    c, data = self._run.config, self._run.data
    sources = (*data.sources, *data.evaluation)
    self._rewards = rewards.Rewards(
      self._parts,
      {s.name: sorted(set().union(*(p.columns for p in s.rows))) for s in sources},
      has_model=bool(c.rollout.reward_model),
      completion_limit=c.rollout.reward_limit,
      call_limit=c.rollout.function_limit,
    )
    self._rewards.check_rows((p.place, p.columns) for s in sources for p in s.rows)

  def close(self) -> None:
    """Ends the processes of reward functions."""
    if self._rewards:
      self._rewards.close()

  def report_redraws(self, left: int) -> None:
    """Warns where zero-variance groups are left after the redraws of a rollout; left: of them."""
    c = self._run.config
    self._alarms.report_redraws(left, c.batch_size, c.rollout.redraws)

  def score(
    self,
    prompts: Sequence[Prompt],
    found: Rollout,
    model_scores: np.ndarray | None,
    number: int | None,
  ) -> tuple[np.ndarray, dict[str, float]]:
    """Returns (rewards float32[R], metrics).

    A completion that no reward scored gets the mean of its group, so that its advantage is 0.

    Args:
      prompts: P of them.
      found: their completions, R in all.
      model_scores: float32[R] of the reward model; None without one.
      number: of the rollout whose samples are kept; None: an evaluation, or redrawn prompts.
    """
    pairs = [(p, c) for p, cs in zip(prompts, found.completions, strict=True) for c in cs]
    scored = processes.from_main(lambda: self._score_here(pairs, model_scores, number))
    totals = rollout_batch.fill_unscored(
      np.array(scored['totals'], np.float32), len(found.completions)
    )
    return totals, scored['metrics'] | rollout_batch.rollout_statistics(totals, found)

  def _score_here(
    self, pairs: Sequence[tuple], model_scores: np.ndarray | None, number: int | None
  ) -> dict[str, Any]:
    batch = self._transcripts.batch(pairs, self._progress(number))
    scores = self._rewards.score(batch, model_scores)
    what = 'redrawn prompts or an evaluation' if number is None else f'rollout {number}'
    self._alarms.report_failures(scores, what)
    if number is not None:
      # To be read: a model that cheats its rewards shows it here first.
      samples = sample_rows(batch, scores, self._run.config.rollout.samples)
      self._files.write_rows(str(number), samples)
      self._alarms.see(scores, self._run.config.rollout.group, number)
    return {'totals': scores.total.tolist(), 'metrics': scores.metrics()}

  def _progress(self, number: int | None) -> dict[str, float]:
    """Returns the keys of TRL's trainer_state that reward functions may ask for."""
    run = self._run
    if number is not None:
      self._rollout = number
    step = self._rollout * algorithms.steps_per_batch(run.config)
    epoch = run.cursor(step) / run.data.mixture.rows_per_epoch
    return {'global_step': step, 'max_steps': run.steps, 'epoch': epoch}
