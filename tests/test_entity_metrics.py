"""evaluation/metrics/: named entities, against seqeval, and several samples of a prompt."""

import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from metric_cases import check_resamples, figure, results

from ftjax.evaluation.metric import Metric
from ftjax.evaluation.metrics import samples, tags

# Named entities

TYPES = ('LOC', 'ORG', 'PER')


def _random_tags(rng, n, kinds=TYPES):
  choices = ['O', *(f'{p}-{k}' for p in 'BI' for k in kinds)]
  return rng.choice(choices, n).tolist()


def _tagged(pairs, is_strict=False):
  return results(
    *(
      {
        'values': tags.entity_values(
          tags.tag_spans(found, is_strict), tags.tag_spans(gold, is_strict), TYPES
        ),
        'prediction': str(i),
      }
      for i, (gold, found) in enumerate(pairs)
    )
  )


def _tag_cases():
  rng = np.random.default_rng(0)
  lengths = [0, 1, 2, 5, 9, 30]
  noisy = [(_random_tags(rng, n), _random_tags(rng, n)) for n in lengths * 2]
  near = [(g, [t if rng.random() < 0.8 else 'O' for t in g]) for g, _ in noisy]
  return {
    'noisy': noisy,
    'near': near,
    'nothing_found': [(['B-PER', 'I-PER'], ['O', 'O'])],
    'nothing_there': [(['O', 'O'], ['B-PER', 'I-PER'])],
    'neither': [(['O'], ['O'])],
    'all_right': [(['B-PER', 'B-PER', 'I-LOC'],) * 2],
  }


def _seqeval_figures(pairs, is_strict):
  """[precision, recall, F1, macro F1] by seqeval; None where nothing is divided by nothing."""
  from seqeval import metrics as seqeval
  from seqeval.scheme import IOB2

  gold, found = zip(*pairs, strict=True)
  options = {'mode': 'strict', 'scheme': IOB2} if is_strict else {}
  scores = [seqeval.precision_score, seqeval.recall_score, seqeval.f1_score]
  figures = [score(gold, found, average='micro', **options) for score in scores]
  figures.append(seqeval.f1_score(gold, found, average='macro', **options))
  counts = [sum(len(tags.tag_spans(t, is_strict)) for t in tagged) for tagged in (found, gold)]
  bottoms = [*counts, sum(counts), sum(counts)]
  return [float(f) if b else None for f, b in zip(figures, bottoms, strict=True)]


_ENTITY_METRICS = (tags.PRECISION, tags.RECALL, tags.F1, tags.MACRO_F1)
_GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'entities.json'


@pytest.mark.parametrize('number', range(len(json.loads(_GOLDEN.read_text()))))
def test_entities_equal_recorded_figures_of_seqeval(number):
  case = json.loads(_GOLDEN.read_text())[number]
  for is_strict, wanted in ((False, case['conll']), (True, case['strict'])):
    rows = _tagged(case['pairs'], is_strict)
    got = [figure(metric, rows) for metric in _ENTITY_METRICS]
    np.testing.assert_allclose(got, [np.nan if w is None else w for w in wanted])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('is_strict', [False, True])
@pytest.mark.parametrize('case', _tag_cases())
def test_entities_equal_seqeval_also_under_weights(case, is_strict):
  pytest.importorskip('seqeval', reason='seqeval is not installed; its figures are in golden/')
  pairs = _tag_cases()[case]
  for i, metric in enumerate(_ENTITY_METRICS):

    def reference(rows, i=i):
      own = _seqeval_figures([pairs[int(r.prediction)] for r in rows], is_strict)[i]
      return np.nan if own is None else own

    check_resamples(metric, _tagged(pairs, is_strict), reference)


def test_spans_by_hand():
  given = ['I-PER', 'I-PER', 'B-PER', 'I-LOC', 'O', 'I-LOC']
  wanted = [('PER', 0, 2), ('PER', 2, 3), ('LOC', 3, 4), ('LOC', 5, 6)]
  assert tags.tag_spans(given) == wanted
  assert tags.tag_spans(given, is_strict=True) == [('PER', 2, 3)]
  assert tags.tag_spans([]) == []
  for bad in ('X', 'B', 'B-', 'S-PER', ''):
    with pytest.raises(ValueError, match='tag 0 is'):
      tags.tag_spans([bad])


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('PER: Ada\nLOC: Köln', [('PER', 'Ada'), ('LOC', 'Köln')]),
    (
      '- PER: Ada; Bob\n\n* loc : New  York ',
      [('PER', 'Ada'), ('PER', 'Bob'), ('loc', 'New  York')],
    ),
    ('PER: Ada; LOC: Köln', [('PER', 'Ada'), ('LOC', 'Köln')]),
    ('[["PER", "Ada"], ["LOC", 3], 4]', [('PER', 'Ada')]),
    ('[{"type": "PER", "text": "Ada"}, {"text": "x"}]', [('PER', 'Ada')]),
    ('{"PER": ["Ada", "Bob"], "LOC": "Köln"}', [('PER', 'Ada'), ('PER', 'Bob'), ('LOC', 'Köln')]),
    ('nothing', []),
    ('PER:', []),
    ('', []),
    ('3', []),
    ('[' * 100_000, []),
  ],
)
def test_entities_of_a_generated_list(text, wanted):
  assert list(tags.parse_entities(text)) == wanted


def test_entities_as_a_list_count_each_occurrence():
  assert tags.fold_entity(' per', 'New \n York') == ('PER', 'New York')
  found, there = [('PER', 'a'), ('PER', 'a'), ('LOC', 'b')], [('PER', 'a'), ('X', 'c')]
  got = tags.entity_values(found, there, ('PER', 'LOC'))
  assert got == {'entities': (1.0, 3.0, 2.0, 1.0, 2.0, 1.0, 0.0, 1.0, 0.0)}
  rows = results({'values': got}, {'values': tags.entity_values(there, there, ('PER', 'LOC'))})
  assert tags.type_table(rows, ('PER', 'LOC')) == {
    'PER': {'precision': 2 / 3, 'recall': 1.0, 'f1': 0.8, 'support': 2},
    'LOC': {'precision': 0.0, 'recall': 0.0, 'f1': 0.0, 'support': 0},
  }
  assert tags.type_table([], ('X',))['X']['support'] == 0
  untyped = results({'values': tags.entity_values(found, there, ())})
  assert figure(tags.F1, untyped) == 0.4 and np.isnan(figure(tags.MACRO_F1, untyped))
  for metric in (*tags.METRICS, tags.MACRO_F1):
    assert np.isnan(figure(metric, []))


# Several samples


def test_pass_at_k_equals_all_subsets():
  for n in range(1, 7):
    for right in range(n + 1):
      outcomes = [True] * right + [False] * (n - right)
      for k in range(1, n + 1):
        subsets = list(itertools.combinations(outcomes, k))
        wanted = sum(map(any, subsets)) / len(subsets)
        assert samples.pass_at(right, n, k) == pytest.approx(wanted)
  assert math.isnan(samples.pass_at(1, 2, 3))
  assert samples.pass_at(0, 1000, 500) == 0 and samples.pass_at(1000, 1000, 1) == 1
  for bad in ((3, 2, 1), (-1, 2, 1), (1, 2, 0)):
    with pytest.raises(ValueError, match='pass@'):
      samples.pass_at(*bad)


def _sampled(groups):
  """Results of {prompt: [(prediction, right)]}."""
  return results(
    *(
      {'id': p, 'sample': i, 'prediction': text, 'values': {'right': (float(right),)}}
      for p, group in groups.items()
      for i, (text, right) in enumerate(group)
    )
  )


def _random_samples(prompts, seed):
  rng = np.random.default_rng(seed)
  groups = {}
  for p in range(prompts):
    texts = rng.choice(['1', '2', '3', ''], rng.integers(3, 6))
    groups[str(p)] = [(t, t == '1') for t in texts.tolist()]
  return groups


@pytest.mark.parametrize('metric', [samples.pass_metric(k) for k in (1, 3)], ids=lambda m: m.name)
@pytest.mark.parametrize('prompts', [1, 2, 12])
def test_samples_are_scored_by_prompt_also_when_prompts_are_resampled(metric: Metric, prompts):
  groups, k = _random_samples(prompts, prompts), int(metric.name[-1])
  rows, rng = _sampled(groups), np.random.default_rng(0)
  each = np.array([samples.pass_at(sum(r for _, r in g), len(g), k) for g in groups.values()])
  draws = rng.multinomial(prompts, np.full(prompts, 1 / prompts), 6).astype(float)
  weights = draws[:, [int(r.id) for r in rows]]
  np.testing.assert_allclose(figure(metric, rows, weights=weights), draws @ each / prompts)
  order = rng.permutation(len(rows))
  assert figure(metric, [rows[i] for i in order]) == pytest.approx(each.mean())


def test_pass_at_one_is_the_mean_of_right_where_prompts_have_as_many_samples():
  rng = np.random.default_rng(0)
  groups = {str(p): [('x', bool(r)) for r in rng.integers(0, 2, 4)] for p in range(9)}
  rows = _sampled(groups)
  wanted = np.mean([r.right for r in rows])
  assert figure(samples.pass_metric(1), rows) == pytest.approx(wanted)


def test_too_few_samples_give_no_figure():
  rows = _sampled({'a': [('1', True)] * 4, 'b': [('1', True)] * 2})
  for make in (samples.pass_metric, samples.majority_metric):
    assert figure(make(2), rows) == 1
    assert np.isnan(figure(make(3), rows)) and np.isnan(figure(make(3), []))


def test_majority_by_hand():
  def majority(*pairs):
    return samples.majority_share([p for p, _ in pairs], [r for _, r in pairs])

  assert majority(('1', True), ('2', False), ('1', True)) == 1
  assert majority(('1', True), ('2', False), ('2', False)) == 0
  assert majority(('1', True), ('2', False)) == 0.5  # a tie
  assert majority(('', False), ('', False), ('1', True)) == 1  # no answer, no vote
  assert majority(('', False), ('', False)) == 0
  assert majority(('1', True), ('1', False), ('2', False)) == 1  # one in a form that counts
  # Only the first k samples vote, in whatever order the results stand.
  rows = _sampled({'a': [('1', True), ('1', True), ('2', False), ('2', False), ('2', False)]})
  assert figure(samples.majority_metric(3), rows[::-1]) == 1
  assert figure(samples.majority_metric(5), rows) == 0
