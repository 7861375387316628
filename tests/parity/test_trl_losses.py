"""Losses and advantages against TRL's numbers (golden/trl_losses.npz, made by trl_losses.py)."""

import numpy as np
import pytest

from parity import from_ftjax, trl_losses

INPUTS, EXPECTED = trl_losses.read()


@pytest.fixture(scope='module')
def got():
  return from_ftjax.outputs(INPUTS)


@pytest.mark.parametrize('name', EXPECTED)
def test_agrees_with_trl(got, name):
  """max |delta| <= 1e-6 max(1, max |TRL's|)."""
  assert trl_losses.difference(got[name], EXPECTED[name]) <= trl_losses.TOLERANCE


def test_all_is_compared(got):
  assert set(got) == set(EXPECTED)


def test_the_inputs_are_those_of_the_script():
  for name, a in trl_losses.make_inputs().items():
    np.testing.assert_array_equal(a, INPUTS[name])


def test_the_inputs_reach_the_bounds():
  """Ratios lie beyond both bounds, z of KTO is above 0, and a difference would be seen."""
  ratio = np.exp(INPUTS['logp'] - INPUTS['old_logp'])[INPUTS['weights'] > 0]
  assert (ratio < 0.8).any() and (ratio > 1.5).any()
  assert (INPUTS['kto_other'].sum(-1) - INPUTS['kto_ref_other']).mean() > 0.1
  assert len(set(np.round(EXPECTED['sigmoid'], 4))) == 6
  assert trl_losses.difference(EXPECTED['ipo'], EXPECTED['ipo'] * 1.00001) > trl_losses.TOLERANCE
  policies = [float(v) for k, v in EXPECTED.items() if k.startswith('policy_') and v.ndim == 0]
  assert len(set(policies)) >= len(policies) - 1  # bnpo and dapo are one for one micro-batch
