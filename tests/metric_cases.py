"""What the tests of evaluation/metrics/ share: results made by hand, figures of resamples."""

import dataclasses

import numpy as np
import pytest

from ftjax.evaluation.metric import Metric
from ftjax.evaluation.result import Result


def library(name):
  """Returns a module of the extra [eval]; skips the test where it is not installed."""
  return pytest.importorskip(name, reason=f'{name} is not installed: pip install "ftjax[eval]"')


def results(*rows):
  """Results of dicts {label, prediction, values, ...}, with ids by position."""
  usual = {'label': '', 'prediction': '', 'values': {}}
  return [Result(**({'id': str(i)} | usual | row)) for i, row in enumerate(rows)]


def figure(metric: Metric, rows, classes=(), weights=None):
  """The figure of results; with weights [R, n] one of each resample."""
  ones = np.ones((1, len(rows))) if weights is None else np.asarray(weights, np.float64)
  value = metric.value(ones, metric.columns(rows, classes))
  assert value.shape == (len(ones),) and value.dtype == np.float64
  return value if weights is not None else float(value[0])


def repeat(rows, weights):
  """Rows as often as their whole weights; ids of their own, for a row that is drawn twice."""
  return [
    dataclasses.replace(r, id=f'{r.id}/{i}')
    for r, w in zip(rows, weights, strict=True)
    for i in range(int(w))
  ]


def check_resamples(metric: Metric, rows, reference, classes=(), seed=0, count=5):
  """Checks that whole weights count rows: the value at weights is `reference` of repeated rows."""
  rng = np.random.default_rng(seed)
  n = len(rows)
  weights = np.concatenate(
    [np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), count), rng.integers(0, 3, (count, n))]
  )
  got = figure(metric, rows, classes, weights)
  wanted = [reference(repeat(rows, w)) if w.any() else np.nan for w in weights]
  np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9, err_msg=metric.name)
  # Only proportions of weights count, and no figure depends on the order of rows.
  if n:
    order = rng.permutation(n)
    moved = figure(metric, [rows[i] for i in order], classes, weights[:, order])
    np.testing.assert_allclose(moved, got, rtol=1e-9, atol=1e-12, err_msg=metric.name)
  assert np.isnan(figure(metric, [], classes))
