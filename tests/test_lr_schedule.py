"""Learning rates by update number: hand values, HF's conventions, optax's own schedules."""

import math

import numpy as np
import optax
import pytest

from ftjax.runtime.errors import ConfigError
from ftjax.training.lr_schedule import SCHEDULES, ScheduleConfig, make_schedule

STEPS, WARM, LR = 20, 4, 0.5


def rates(name, *, steps=STEPS, warmup=WARM, end=0.0, decay=6, count=STEPS + 1):
  schedule = make_schedule(name, ScheduleConfig(LR, steps, warmup, end, decay))
  return np.array([float(schedule(k)) for k in range(count)])


def hf(name, k):
  """What transformers' schedulers multiply the peak rate with at update k."""
  if k < WARM:
    return k / WARM
  if name == 'linear':
    return max(0.0, (STEPS - k) / (STEPS - WARM))
  if name == 'cosine':
    return 0.5 * (1 + math.cos(math.pi * (k - WARM) / (STEPS - WARM)))
  if name == 'inverse_sqrt':
    return 1 / math.sqrt(k / WARM)
  return 1.0


@pytest.mark.parametrize('name', ['constant', 'linear', 'cosine', 'inverse_sqrt'])
def test_as_in_hf(name):
  expected = [LR * hf(name, k) for k in range(STEPS + 1)]
  np.testing.assert_allclose(rates(name), expected, rtol=1e-6, atol=1e-8)


def test_cosine_as_in_optax():
  theirs = optax.warmup_cosine_decay_schedule(0.0, LR, WARM, STEPS, 0.1 * LR)
  expected = [float(theirs(k)) for k in range(STEPS + 1)]
  np.testing.assert_allclose(rates('cosine', end=0.1), expected, rtol=1e-6)


def test_wsd_by_hand():
  expected = [0, 1, 2, 3] + [4] * 11 + [4 * (6 - i) / 6 for i in range(1, 7)]
  np.testing.assert_allclose(rates('wsd'), LR * np.array(expected) / 4, atol=1e-7)


@pytest.mark.parametrize('name', ['linear', 'cosine', 'wsd'])
def test_the_end_value_comes_after_the_last_update(name):
  got = rates(name, end=0.25, count=STEPS + 5)
  last = got[STEPS - 1]
  assert last > 0.25 * LR + 1e-4 if name != 'wsd' else last > 0
  end = 0.25 * LR
  np.testing.assert_allclose(got[STEPS:], end, rtol=1e-6)


@pytest.mark.parametrize('name', SCHEDULES)
def test_without_warmup_the_first_update_has_the_whole_rate(name):
  assert rates(name, warmup=0)[0] == pytest.approx(LR)


@pytest.mark.parametrize('name', SCHEDULES)
def test_warmup_starts_at_zero_and_ends_at_the_peak(name):
  got = rates(name)
  np.testing.assert_allclose(got[: WARM + 1], LR * np.arange(WARM + 1) / WARM, rtol=1e-6)
  assert got.max() == pytest.approx(LR)


@pytest.mark.parametrize('name', ['constant', 'linear', 'cosine', 'inverse_sqrt'])
def test_warmup_may_fill_the_run(name):
  np.testing.assert_allclose(
    rates(name, steps=4, warmup=4, count=4), LR * np.arange(4) / 4, rtol=1e-6
  )


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    (dict(name='step'), "optim.schedule='step'"),
    (dict(name='linear', warmup=21), 'optim.warmup_steps=21'),
    (dict(name='cosine', warmup=-1), 'optim.warmup_steps=-1'),
    (dict(name='wsd', decay=0), 'optim.decay_steps=0'),
    (dict(name='wsd', decay=17), 'optim.decay_steps=17'),
  ],
)
def test_what_cannot_be_is_refused(settings, told):
  with pytest.raises(ConfigError, match=told):
    rates(**settings)
