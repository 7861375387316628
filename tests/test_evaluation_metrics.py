"""evaluation/metrics.py: by hand, and against a plain loop over pairs."""

import numpy as np
import pytest

from ftjax.evaluation import metrics


def _slow(labels, predictions):
  """Accuracy and macro means by counting pairs, class by class."""
  rows = []
  for k in sorted(set(labels) | set(predictions)):
    tp = sum(a == b == k for a, b in zip(labels, predictions, strict=True))
    fp = sum(b == k != a for a, b in zip(labels, predictions, strict=True))
    fn = sum(a == k != b for a, b in zip(labels, predictions, strict=True))
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    rows.append((precision, recall, f1))
  right = sum(a == b for a, b in zip(labels, predictions, strict=True)) / len(labels)
  return [right, *np.mean(rows, axis=0)]


def test_by_hand():
  #           class 0: tp 2, fp 1, fn 1;  class 1: tp 1, fp 1, fn 1;  class 2: never
  labels, predictions = [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]
  got = metrics.per_class(labels, predictions, 3)
  np.testing.assert_allclose(got.precision, [2 / 3, 1 / 2, 0])
  np.testing.assert_allclose(got.recall, [2 / 3, 1 / 2, 0])
  np.testing.assert_allclose(got.f1, [2 / 3, 1 / 2, 0])
  assert got.support.tolist() == [3, 2, 0] and got.predicted.tolist() == [3, 2, 0]
  # The class that occurs nowhere is no part of the mean.
  expected = [3 / 5, 7 / 12, 7 / 12, 7 / 12]
  np.testing.assert_allclose(metrics.classification(labels, predictions, 3), expected)


def test_precision_and_recall_are_not_swapped():
  # Class 0 is predicted for all: recall 1, precision 1/4. Class 1: never predicted.
  got = metrics.per_class([0, 1, 1, 1], [0, 0, 0, 0], 2)
  assert got.precision.tolist() == [0.25, 0] and got.recall.tolist() == [1, 0]
  np.testing.assert_allclose(got.f1, [0.4, 0])


def test_equals_counting_pairs_also_in_batches():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, (30, 17))
  predictions = np.where(rng.random((30, 17)) < 0.5, labels, rng.integers(0, 5, (30, 17)))
  got = metrics.classification(labels, predictions, 5)
  assert got.shape == (30, len(metrics.SCORES))
  for row, a, b in zip(got, labels.tolist(), predictions.tolist(), strict=True):
    np.testing.assert_allclose(row, _slow(a, b), rtol=1e-12)


def test_order_of_examples_and_names_of_classes_do_not_matter():
  rng = np.random.default_rng(1)
  labels, predictions = rng.integers(0, 3, (2, 40))
  expected = metrics.classification(labels, predictions, 3)
  order, names = rng.permutation(40), np.array([2, 0, 1])
  got = metrics.classification(names[labels][order], names[predictions][order], 3)
  np.testing.assert_allclose(got, expected)


def test_all_right():
  np.testing.assert_array_equal(metrics.classification([0, 1, 1], [0, 1, 1], 2), np.ones(4))


@pytest.mark.parametrize(
  ('answer', 'output', 'is_match'),
  [
    ('Paris', ' paris.', True),
    ('Paris', '"Paris"', True),
    ('Paris', 'Paris, France', False),
    ('42', '**42**', True),
    ('3.5', '35', False),
    ('-5', '5', False),
    ('.5', '5', False),
    ('.5', '(.5)', True),
    ('5 %', '5', False),
    ("don't", "Don't!", True),
    ('ﬁne', 'fine', True),
    ('Straße', 'STRASSE', True),
    ('a', 'A', True),
    ('a', 'the', False),
    ('new  york', 'New\nYork', True),
    ('東京', '「東京」。', True),
    ('?', '?', True),
    ('?', '', False),
    ('?', '!', False),
    ('yes', '', False),
    ('yes', 'yes yes', False),
  ],
)
def test_normalized_match(answer, output, is_match):
  assert metrics.normalized_match(answer, output) is is_match


def test_exact_match():
  assert metrics.exact_match('Paris', ' Paris\n')
  assert not metrics.exact_match('Paris', 'paris')
