"""Rewards that fail, never differ or score nothing are warned of, and end a run in time."""

import logging

import numpy as np
import pytest

from ftjax.grading.reward_alarms import RewardAlarms
from ftjax.grading.reward_batch import Scores
from ftjax.runtime.errors import CheckError


def scores(parts, failed=None):
  """Scores of two prompts with two completions each, by {name: four numbers}."""
  table = np.float32([[np.nan if x is None else x for x in row] for row in parts.values()]).T
  total = np.where(np.isnan(table).all(1), np.nan, np.nan_to_num(table).sum(1))
  failures = dict.fromkeys(parts, 0) | (failed or {})
  reasons = {name: f'{name} went wrong' for name, n in failures.items() if n}
  return Scores(np.float32(total), table, tuple(parts), failures, reasons)


GOOD = {'math': [0, 1, 1, 0], 'length': [-1, -2, -3, -4]}
DEAD = scores({'math': [0, 0, 0, 0], 'length': [-1, -2, -3, -4]}, {'math': 4})


def alarms(max_failed=3, **weights):
  return RewardAlarms({'math': 1.0, 'length': 0.5} | weights, max_failed)


def see(watch, *seen):
  for number, one in enumerate(seen):
    watch.see(one, 2, number)


def told(caplog):
  return [r.getMessage() for r in caplog.records]


def test_a_reward_that_fails_in_every_completion_ends_the_run():
  with pytest.raises(CheckError, match=r'reward math failed .* 3 rollouts .*math went wrong'):
    see(alarms(), DEAD, DEAD, DEAD)
  assert CheckError.exit_code == 5
  with pytest.raises(CheckError, match=r'rollout\.max_failed=1'):
    see(alarms(1), DEAD)


def test_failures_that_are_not_in_a_row_or_not_of_all_do_not():
  some = scores(GOOD, {'math': 3})
  see(alarms(), DEAD, DEAD, some, DEAD, DEAD)
  see(alarms(0), *[DEAD] * 20)
  see(alarms(math=0.0), *[DEAD] * 20)  # logged alone


def test_a_reward_that_is_none_for_all_ends_the_run_too():
  none = scores({'math': [None] * 4, 'length': [None] * 4})
  with pytest.raises(CheckError, match='every reward returned None'):
    see(alarms(), none, none, none)


def test_a_reason_is_logged_once(caplog):
  watch = alarms()
  for number in range(3):
    watch.report_failures(DEAD, f'rollout {number}')
  first, *later = told(caplog)
  assert 'math failed for 4 of 4 completions of rollout 0' in first and 'went wrong' in first
  assert len(later) == 2 and not any('went wrong' in text for text in later)


def test_a_constant_reward_is_warned_of_with_its_value(caplog):
  flat = scores({'math': [0, 0, 0, 0], 'length': [-1, -2, -3, -4]})
  see(alarms(), *[flat] * 12)
  [text] = told(caplog)
  assert 'reward math was 0 for every completion of the last 5 rollouts' in text
  caplog.clear()
  see(alarms(), *[flat, flat, flat, flat, scores(GOOD)] * 3)
  assert not told(caplog)


def test_no_signal_in_any_group_is_warned_of(caplog):
  """Rewards differ from prompt to prompt, never within one."""
  by_prompt = scores({'math': [0, 0, 1, 1], 'length': [-1, -1, 0, 0]})
  see(alarms(), *[by_prompt] * 9)
  [text] = told(caplog)
  assert 'all completions of a prompt had the same reward' in text and 'rollout.group' in text


@pytest.mark.parametrize('value', [0.0, 1.0, -0.5])
def test_a_reward_that_never_differs_is_warned_of_once(caplog, value):
  """Also where several parts are constant: the flat groups say it."""
  flat = scores({'math': [value] * 4, 'length': [-1.0] * 4})
  see(alarms(), *[flat] * 12)
  [text] = told(caplog)
  assert 'the last 5 rollouts' in text and f'(mean {value - 1:g})' in text
  caplog.clear()
  see(alarms(), *[flat] * 5, scores({'math': [value] * 4, 'length': [-1, -2, -3, -4]}))
  assert 'reward math was' in told(caplog)[-1]  # as soon as another part differs


def test_redraws_that_were_not_enough_are_logged_once(caplog):
  watch = alarms()
  with caplog.at_level(logging.WARNING):
    watch.report_redraws(0, 4, 2)
    watch.report_redraws(3, 4, 2)
    watch.report_redraws(2, 4, 2)
  [text] = told(caplog)
  assert 'rollout.redraws=2' in text and '3 of 4' in text
