"""Monitors the rewards of a run for parts that fail, that never differ, or that score no
completion.

Runs in process 0, on the scores of every rollout.
"""

import collections
import logging
from collections.abc import Mapping

import numpy as np

from ftjax.grading.reward_batch import Scores
from ftjax.runtime.errors import CheckError

log = logging.getLogger(__name__)

# Rollouts in a row with equal rewards after which a warning is logged.
_FLAT_ROLLOUTS = 5


class RewardAlarms:
  """Logs warnings, and ends a run whose rewards do not work.

  Args:
    weights: of the parts, by name.
    max_failed: rollouts in a row in which every completion failed that end the run; 0: never.
  """

  def __init__(self, weights: Mapping[str, float], max_failed: int):
    self._weights, self._max_failed = dict(weights), max_failed
    self._failed: dict[str, int] = collections.defaultdict(int)
    self._constant: dict[str, tuple[float, int]] = {}
    self._flat = 0
    self._reported: set[str] = set()

  def report_failures(self, scores: Scores, of: str) -> None:
    """Logs a warning for parts that failed, with the reason the first time.

    Args:
      scores: of the completions of a rollout or an evaluation.
      of: name of it for the message, such as 'rollout 3'.
    """
    total = len(scores.total)
    for name, reason in scores.reasons.items():
      if reason in self._reported:
        log.warning('reward %s failed for %d of %d completions of %s, as before',
                    name, scores.failures[name], total, of)  # fmt: skip
      else:
        self._reported.add(reason)
        log.warning('reward %s failed for %d of %d completions of %s, which score 0 there: %s',
                    name, scores.failures[name], total, of, reason)  # fmt: skip
    unscored = int(np.isnan(scores.total).sum())
    if unscored and self._once('unscored'):
      log.warning(
        'no reward scored %d of %d completions of %s (all returned None): they carry no signal',
        *(unscored, total, of),
      )

  def _once(self, what: str) -> bool:
    is_new = what not in self._reported
    self._reported.add(what)
    return is_new

  def see(self, scores: Scores, group: int, number: int) -> None:
    """Checks the scores of rollout `number`, with `group` completions per prompt.

    Raises:
      CheckError: a part with a weight failed for every completion of max_failed rollouts in a row,
        or no part scored any.
    """
    total = len(scores.total)
    failed = {n: scores.failures[n] == total for n, w in self._weights.items() if w}
    self._count_failed(failed, scores.reasons, number)
    self._count_failed(
      {'': bool(np.isnan(scores.total).all())}, {'': 'every reward returned None'}, number
    )
    groups = np.nan_to_num(scores.total).reshape(-1, group)
    is_flat = group > 1 and bool((groups.min(1) == groups.max(1)).all())
    self._flat = self._flat + 1 if is_flat else 0
    if self._flat == _FLAT_ROLLOUTS and self._once('flat'):
      log.warning(
        'in each of the last %d rollouts all completions of a prompt had the same reward (mean '
        '%.4g): there is no training signal. Look at rollouts/%d.jsonl; make the task easier, '
        'add a reward that differs between completions, or raise rollout.group or '
        'rollout.temperature',
        *(_FLAT_ROLLOUTS, scores.metrics()['reward'], number),
      )
    for i, name in enumerate(scores.names):
      if self._weights[name] and not failed[name]:
        self._see_constant(name, scores.parts[:, i], is_flat)

  def _count_failed(
    self, failed: Mapping[str, bool], reasons: Mapping[str, str], number: int
  ) -> None:
    for name, is_failed in failed.items():
      self._failed[name] = self._failed[name] + 1 if is_failed else 0
      if self._max_failed and self._failed[name] >= self._max_failed:
        what = f'reward {name} failed' if name else 'no reward was computed'
        raise CheckError(
          f'{what} for every completion of {self._failed[name]} rollouts in a row, the last of '
          f'them rollout {number}: {reasons.get(name, "")}. Fix the reward; rollout.max_failed='
          f'{self._max_failed} is the number of such rollouts after which a run ends, 0 for never'
        )

  def _see_constant(self, name: str, values: np.ndarray, is_flat: bool) -> None:
    """Warns of a part that is constant; is_flat: all groups have zero variance, warned of
    elsewhere."""
    known = values[~np.isnan(values)]
    if not len(known) or known.min() != known.max():
      self._constant.pop(name, None)
      return
    value, count = float(known[0]), 1
    if name in self._constant and self._constant[name][0] == value:
      count += self._constant[name][1]
    self._constant[name] = value, count
    if count >= _FLAT_ROLLOUTS and not is_flat and self._once(f'constant {name}'):
      log.warning(
        'reward %s was %.6g for every completion of the last %d rollouts: it gives no signal',
        *(name, value, count),
      )

  def report_redraws(self, left: int, total: int, redraws: int) -> None:
    """Warns, once, that `left` of `total` groups have zero variance after `redraws` redraws."""
    if left and self._once('redraws'):
      log.warning(
        'after rollout.redraws=%d the completions of %d of %d prompts still have equal rewards: '
        'these prompts carry no signal (zero_variance_left in the metrics counts them)',
        *(redraws, left, total),
      )
