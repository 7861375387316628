"""evaluation/metrics/: classes, probabilities and rankings, against scikit-learn and by hand."""

import dataclasses

import numpy as np
import pytest
from metric_cases import check_resamples, figure, library, results

from ftjax.evaluation.metrics import calibration, classification, ranking

CLASSES = ('a', 'b', 'c')


def _rows(labels, predictions):
  return results(
    *(
      {'label': a, 'prediction': b, 'values': {'right': (float(a == b),)}}
      for a, b in zip(labels, predictions, strict=True)
    )
  )


def _random(n, seed, predicted='abc?'):
  rng = np.random.default_rng(seed)
  labels = rng.choice(list('abc'), n, p=[0.6, 0.3, 0.1])
  wrong = rng.choice(list(predicted), n)
  return _rows(labels.tolist(), np.where(rng.random(n) < 0.5, labels, wrong).tolist())


EDGES = {
  'one_row_right': _rows('a', 'a'),
  'one_row_wrong': _rows('a', 'b'),
  'one_row_none': _rows('a', '?'),
  'one_class': _rows('aaaa', 'aaaa'),
  'one_class_in_part': _rows('aaaa', 'abca'),
  'never_predicted': _rows('aabbcc', 'aaaaab'),
  'one_prediction': _rows('aabbcc', 'bbbbbb'),
  'none_of_these': _rows('aabbcc', '??????'),
  'random': _random(60, 0),
  'random_of_classes': _random(60, 1, 'abc'),
}


def _reference(name):
  """The same figure by scikit-learn, as a function of results."""
  sk = library('sklearn.metrics')

  def of(rows):
    labels, predictions = [r.label for r in rows], [r.prediction for r in rows]
    occurs = sorted((set(labels) | set(predictions)) & set(CLASSES))
    if name == 'accuracy':
      return sk.accuracy_score(labels, predictions)
    if name == 'balanced_accuracy':
      return sk.balanced_accuracy_score(labels, predictions)
    if name == 'mcc':
      return sk.matthews_corrcoef(labels, predictions)
    average, _, kind = name.partition('_')
    score = {'precision': sk.precision_score, 'recall': sk.recall_score, 'f1': sk.f1_score}[kind]
    # Over all classes at once a denominator of 0 leaves nothing to count; of one class it is 0.
    zero = np.nan if average == 'micro' else 0
    return score(labels, predictions, labels=occurs, average=average, zero_division=zero)

  return of


@pytest.mark.filterwarnings('ignore')  # of scikit-learn, about the edges
@pytest.mark.parametrize('metric', classification.METRICS, ids=lambda m: m.name)
@pytest.mark.parametrize('case', EDGES)
def test_classes_equal_scikit_learn_also_under_weights(metric, case):
  check_resamples(metric, EDGES[case], _reference(metric.name), CLASSES)


def test_classes_by_hand():
  #  a: tp 2, fp 1, fn 1;  b: tp 1, fp 1, fn 1;  c: never
  rows = _rows('aaabb', 'aabba')
  table = classification.per_class_table(rows, CLASSES)
  for c, share, support in (('a', 2 / 3, 3), ('b', 1 / 2, 2), ('c', 0, 0)):
    assert table[c] == {'precision': share, 'recall': share, 'f1': share, 'support': support}
  # The class that occurs nowhere is no part of the mean.
  assert figure(classification.MEANS['macro_f1'], rows, CLASSES) == pytest.approx(7 / 12)
  # a is predicted for all: recall 1, precision 1/4.
  table = classification.per_class_table(_rows('abbb', 'aaaa'), ('a', 'b'))
  assert table['a'] == {'precision': 0.25, 'recall': 1.0, 'f1': 0.4, 'support': 1}
  assert set(table['b'].values()) == {0.0, 3}
  assert classification.per_class_table([], ('a',))['a']['support'] == 0


def test_names_of_classes_do_not_matter():
  rows, names = EDGES['random'], {'a': 'z', 'b': 'é', 'c': '', '?': '東'}
  other = [
    dataclasses.replace(r, label=names[r.label], prediction=names[r.prediction]) for r in rows
  ]
  for metric in classification.METRICS:
    got = figure(metric, other, ('', 'z', 'é'))
    assert got == pytest.approx(figure(metric, rows, CLASSES), rel=1e-12)


def test_a_table_by_class_and_confusions_equal_scikit_learn():
  sk, rows = library('sklearn.metrics'), EDGES['random']
  labels, predictions = [r.label for r in rows], [r.prediction for r in rows]
  wanted = sk.precision_recall_fscore_support(labels, predictions, labels=CLASSES, zero_division=0)
  table = classification.per_class_table(rows, CLASSES)
  names = ('precision', 'recall', 'f1', 'support')
  got = [[table[c][name] for c in CLASSES] for name in names]
  np.testing.assert_allclose(got, wanted)
  found = classification.confusion(rows, CLASSES)
  assert found['predictions'] == [*CLASSES, classification.NONE]
  matrix = sk.confusion_matrix(labels, predictions, labels=[*CLASSES, '?'])
  assert found['counts'] == matrix[:3].tolist()
  assert classification.confusion(EDGES['one_class'], CLASSES) == {
    'labels': list(CLASSES),
    'predictions': list(CLASSES),
    'counts': [[4, 0, 0], [0, 0, 0], [0, 0, 0]],
  }


def test_without_classes_or_with_a_foreign_label():
  rows = EDGES['random']
  for metric in classification.METRICS[1:]:
    assert np.isnan(figure(metric, rows, ()))
  with pytest.raises(ValueError, match="label 'a' is none of"):
    figure(classification.MCC, rows, ('b', 'c'))
  assert classification.confusion([], CLASSES)['counts'] == [[0, 0, 0]] * 3


def _scored(n, seed, classes=CLASSES, decimals=1):
  """Rows with scores of choices in an order of their own, with ties."""
  rng = np.random.default_rng(seed)
  rows = []
  for _ in range(n):
    choices = rng.permutation(classes).tolist()
    label = choices[rng.integers(len(choices))]
    scores = np.round(rng.normal(size=len(choices)) - 5, decimals).tolist()
    scores[choices.index(label)] += 0.5
    rows.append(_scored_row(choices, scores, label))
  return results(*rows)


def _scored_row(choices, scores, label):
  prediction = choices[int(np.argmax(scores))]
  values = calibration.calibration_values(choices, scores, label)
  values |= ranking.ranking_values(choices, scores) | {'right': (float(prediction == label),)}
  return {'label': label, 'prediction': prediction, 'values': values, 'scores': tuple(scores)}


def _probabilities(rows):
  """float64[n, K], by the log odds."""
  odds = np.array([r.values['class_log_odds'] for r in rows])
  return 1 / (1 + np.exp(-odds))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('metric', ranking.METRICS, ids=lambda m: m.name)
@pytest.mark.parametrize('classes', [('a', 'b'), CLASSES])
@pytest.mark.parametrize('n', [1, 2, 3, 40])
def test_areas_equal_scikit_learn_also_with_ties_and_missing_classes(metric, classes, n):
  sk = library('sklearn.metrics')
  score = {'roc_auc': sk.roc_auc_score, 'average_precision': sk.average_precision_score}

  def reference(rows):
    found, labels = np.array([r.values['class_log_odds'] for r in rows]), [r.label for r in rows]
    sides = [np.array([x == c for x in labels]) for c in classes]
    areas = [
      score[metric.name](side, found[:, k])
      for k, side in enumerate(sides)
      if side.any() and not side.all()
    ]
    return np.mean(areas) if areas else np.nan

  for seed in range(3):
    check_resamples(metric, _scored(n, seed, classes), reference, classes)


def test_areas_of_equal_scores_of_one_class_and_of_saturated_scores():
  same = results(*(_scored_row(['a', 'b'], [-1.0, -1.0], x) for x in 'aab'))
  assert figure(ranking.ROC_AUC, same, ('a', 'b')) == 0.5
  assert figure(ranking.AVERAGE_PRECISION, same, ('a', 'b')) == pytest.approx(0.5)
  one = results(*(_scored_row(['a', 'b'], [-1.0, -2.0], 'a') for _ in range(4)))
  for metric in ranking.METRICS:
    assert np.isnan(figure(metric, one, ('a', 'b')))
    assert np.isnan(figure(metric, one, ()))
  # Both probabilities are 1 in float64; the scores still rank the rows.
  far = [_scored_row(['a', 'b'], [0.0, -s], x) for s, x in ((90.0, 'a'), (60.0, 'b'))]
  assert figure(ranking.ROC_AUC, results(*far), ('a', 'b')) == 1
  with pytest.raises(ValueError, match='not sorted'):
    figure(ranking.ROC_AUC, same, ('b', 'a'))
  with pytest.raises(ValueError, match='finite'):
    ranking.ranking_values(['a', 'b'], [np.nan, 0.0])


def _ece(rows, bins):
  """ECE bin by bin, in the words of Guo et al. 2017: (lower, upper]."""
  total = 0.0
  for k in range(bins):
    inside = [r for r in rows if k / bins < max(_softmax(r.scores)) <= (k + 1) / bins]
    if inside:
      confidence = np.mean([max(_softmax(r.scores)) for r in inside])
      total += len(inside) / len(rows) * abs(np.mean([r.right for r in inside]) - confidence)
  return total


def _softmax(scores):
  each = np.exp(np.array(scores))
  return each / each.sum()


@pytest.mark.parametrize('n', [1, 7, 60])
@pytest.mark.parametrize('classes', [('a', 'b'), CLASSES])
def test_calibration_equals_scikit_learn_and_the_definition_of_ece(n, classes):
  sk, rows = library('sklearn.metrics'), _scored(n, n, classes)

  def brier(rows):
    labels, options = [r.label for r in rows], {'labels': classes, 'scale_by_half': True}
    return sk.brier_score_loss(labels, _probabilities(rows), **options)

  def log_loss(rows):
    return sk.log_loss([r.label for r in rows], _probabilities(rows), labels=classes)

  check_resamples(calibration.BRIER, rows, brier, classes)
  check_resamples(calibration.LOG_LOSS, rows, log_loss, classes)
  check_resamples(calibration.ECE, rows, lambda rows: _ece(rows, 10), classes)
  check_resamples(calibration.ECE_15, rows, lambda rows: _ece(rows, 15), classes)


def test_calibration_by_hand():
  # Sure and right, sure and wrong: confidence 1, accuracy 1/2.
  rows = results(*(_scored_row(['a', 'b'], [0.0, -800.0], x) for x in 'ab'))
  assert figure(calibration.ECE, rows) == 0.5
  assert figure(calibration.BRIER, rows) == 0.5
  assert figure(calibration.LOG_LOSS, rows) == 400
  table = calibration.bin_table(rows, 10)
  assert table[-1] == {'low': 0.9, 'high': 1.0, 'n': 2, 'confidence': 1.0, 'accuracy': 0.5}
  assert table[0] == {'low': 0.0, 'high': 0.1, 'n': 0, 'confidence': None, 'accuracy': None}
  assert sum(row['n'] for row in calibration.bin_table(_scored(50, 3), 15)) == 50
  bins = calibration.bin_index(np.array([0.0, 0.1, 0.100001, 0.2, 1.0]), 10)
  assert bins.tolist() == [0, 0, 1, 1, 9]
  for bad in (([0.0], 'a'), ([0.0, np.inf], 'a'), ([0.0, 0.0], 'c')):
    with pytest.raises(ValueError, match='choices'):
      calibration.calibration_values(['a', 'b'], *bad)
