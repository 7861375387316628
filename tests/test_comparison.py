"""evaluation/comparison.py: figures agree with the rows they come from, and what cannot be computed
has a reason.
"""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from ftjax.evaluation import comparison, function_kinds, kinds, verdict
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row
from ftjax.evaluation.statistics.intervals import wilson
from ftjax.evaluation.tasks import Task
from ftjax.reporting import findings, page, text_table
from ftjax.runtime.errors import ConfigError, DataError, StoppedEarly

NAMES = ('negative', 'positive')


def _task(kind, rows, classes=(), name='sentiment'):
  return Task(name, kind, 'f', tuple(rows), 'd', classes)


def _label_rows(n):
  rng = np.random.default_rng(n)
  return [Row(str(i), f'f:{i}', f'p{i}', NAMES, (NAMES[rng.integers(2)],)) for i in range(n)]


def _results(rows, share, seed, samples=1):
  rng, out = np.random.default_rng(seed), []
  for row in rows:
    for sample in range(samples):
      right = bool(rng.random() < share)
      said = row.answer if right else NAMES[row.answer == NAMES[0]]
      values = {'right': (float(right),)}
      out.append(Result(row.id, row.answer, said, values, response=said, sample=sample, tokens=3))
  return out


def _models(n=200, base=0.7, tuned=0.9, samples=1):
  rows = _label_rows(n)
  task = _task('label', rows, NAMES)
  return task, {
    'base': _results(rows, base, 0, samples),
    'tuned': _results(rows, tuned, 1, samples),
  }


def _fast(monkeypatch, resamples=100):
  monkeypatch.setattr(comparison, 'RESAMPLES', resamples)


def test_figures_agree_with_the_rows():
  task, results = _models()
  got = comparison.compare(task, results)
  base, tuned = results['base'], results['tuned']
  right = sum(r.right for r in base)
  assert (got['n'], got['prompts'], got['samples']) == (200, 200, 1)
  accuracy = got['scores']['base']['accuracy']
  assert accuracy['value'] == right / 200
  assert (accuracy['low'], accuracy['high']) == wilson(right, 200)
  only_tuned = sum(t.right and not b.right for b, t in zip(base, tuned, strict=True))
  only_base = sum(b.right and not t.right for b, t in zip(base, tuned, strict=True))
  [difference] = got['differences']
  assert (difference['first'], difference['second']) == ('base', 'tuned')
  test = difference['test']
  assert (test['name'], test['metric']) == ('exact McNemar', 'accuracy')
  assert (test['only_second_right'], test['only_first_right']) == (only_tuned, only_base)
  expected = scipy.stats.binomtest(only_base, only_base + only_tuned, 0.5).pvalue
  assert test['p'] == pytest.approx(expected)
  for name, found in difference['metrics'].items():
    if found['value'] is None:
      continue
    values = [got['scores'][m][name]['value'] for m in ('tuned', 'base')]
    assert found['value'] == pytest.approx(values[0] - values[1])
    assert found['low'] <= found['value'] <= found['high'] and 0 < found['p'] <= 1
  assert difference['metrics']['accuracy']['value'] == pytest.approx((only_tuned - only_base) / 200)
  support = sum(row.answer == 'negative' for row in task.rows)
  assert got['per_class']['base']['negative']['support'] == support
  confusion = got['confusion']['tuned']
  assert np.sum(confusion['counts']) == 200
  assert [m['name'] for m in got['metrics'] if m['is_primary']] == ['accuracy']


def test_swapping_the_models_turns_the_sign_and_the_outcome():
  task, results = _models()
  there = comparison.compare(task, results)['differences'][0]
  swapped = {'base': results['tuned'], 'tuned': results['base']}
  back = comparison.compare(task, swapped)['differences'][0]
  for name, found in there['metrics'].items():
    other = back['metrics'][name]
    if found['value'] is None:
      assert other['value'] is None
      continue
    assert other['value'] == pytest.approx(-found['value'])
    assert other['low'] == pytest.approx(-found['high'])
    assert other['p'] == pytest.approx(found['p'])
  assert (there['outcome'], back['outcome']) == ('better', 'worse')
  assert there['verdict'].startswith('tuned is better than base: accuracy +0.')
  assert back['verdict'].startswith('tuned is worse than base: accuracy -0.')
  assert there['test']['p'] == back['test']['p']


def test_equal_models_are_not_called_different(monkeypatch):
  _fast(monkeypatch)
  task, results = _models(n=30)
  got = comparison.compare(task, {'base': results['base'], 'tuned': results['base']})
  [difference] = got['differences']
  test = difference['test']
  assert (test['p'], test['only_first_right'], test['only_second_right']) == (1.0, 0, 0)
  metrics = dict(difference['metrics'])
  # The interval of a share has a width where no pair differs.
  shares = [metrics.pop(m.name) for m in (*task.metrics, *task.details) if m.is_proportion]
  assert len(shares) > 1
  assert all(d['value'] == 0 and d['low'] < 0 < d['high'] and d['p'] == 1 for d in shares)
  values = [d for d in metrics.values() if d['value'] is not None]
  assert values
  assert all((d['value'], d['low'], d['high'], d['p']) == (0, 0, 0, 1) for d in values)
  assert difference['outcome'] == 'undecided' and difference['rows_needed'] is None
  assert 'no significant difference' in difference['verdict']


def test_a_test_set_that_is_too_small_is_called_so(monkeypatch):
  _fast(monkeypatch)
  task, results = _models(n=12, base=0.6, tuned=0.75)
  difference = comparison.compare(task, results)['differences'][0]
  assert difference['outcome'] == 'undecided' and difference['is_too_small']
  if difference['rows_needed']:
    assert 'would do' in difference['verdict']


def test_rows_without_common_choices_have_no_figures_of_classes(monkeypatch):
  _fast(monkeypatch)
  rows = [Row(str(i), f'f:{i}', 'p', (), (str(i),)) for i in range(10)]
  task = _task('match', rows)
  base = [Result(r.id, r.answer, 'x', {'right': (0.0,)}) for r in rows]
  tuned = [Result(r.id, r.answer, r.answer, {'right': (float(int(r.id) < 8),)}) for r in rows]
  got = comparison.compare(task, {'base': base, 'tuned': tuned})
  assert [m['name'] for m in got['metrics'] if not m['is_detail']] == ['accuracy']
  assert got['scores']['tuned']['accuracy']['value'] == 0.8
  assert got['classes'] is got['per_class'] is got['confusion'] is got['calibration'] is None
  assert 'macro' not in text_table.text(comparison.summarize([got]))


def test_results_of_other_rows_are_refused():
  task, results = _models(n=10)
  tuned = results['tuned']
  for wrong in (tuned[::-1], tuned[:-1], [], [*tuned, dataclasses.replace(tuned[0], id='x')]):
    with pytest.raises(ValueError, match='row by row'):
      comparison.compare(task, {'base': results['base'], 'tuned': wrong})


def test_a_metric_of_a_value_that_is_not_there_names_it():
  task, results = _models(n=4)
  wrong = [dataclasses.replace(r, values={'other': (1.0,)}) for r in results['base']]
  with pytest.raises(DataError, match=r"sentiment: the metric 'accuracy' .* 'right'"):
    comparison.compare(task, {'base': wrong})


def test_a_share_of_other_numbers_is_an_error_before_training():
  task, results = _models(n=3)
  own = [dataclasses.replace(r, values={'right': (7.0,)}) for r in results['base']]
  with pytest.raises(DataError, match=r"'accuracy' is a share .*got 7\. .*metric\.mean"):
    comparison.compare(task, {'base': own})


def test_samples_of_a_prompt_are_a_cluster(monkeypatch):
  _fast(monkeypatch, 400)
  task, results = _models(n=40, samples=4)
  got = comparison.compare(task, results)
  assert (got['n'], got['prompts'], got['samples']) == (160, 40, 4)
  names = [m['name'] for m in got['metrics']]
  assert {'pass_at_4', 'maj_at_4', 'accuracy'} <= set(names)
  by_prompt = np.array([r.right for r in results['tuned']]).reshape(40, 4)
  score = got['scores']['tuned']
  assert score['pass_at_4']['value'] == pytest.approx(by_prompt.any(1).mean())
  assert score['accuracy']['value'] == pytest.approx(by_prompt.mean())
  [difference] = got['differences']
  assert difference['test']['name'] == 'permutation'
  # Four equal samples are worth one.
  same = {m: [r for r in own for _ in range(4)] for m, own in _models(n=40)[1].items()}
  same = {
    m: [dataclasses.replace(r, sample=i % 4) for i, r in enumerate(own)] for m, own in same.items()
  }
  alone = comparison.compare(*_models(n=40))
  wide = comparison.compare(task, same)
  for m in ('base', 'tuned'):
    one, four = (x['scores'][m]['accuracy'] for x in (alone, wide))
    assert four['high'] - four['low'] == pytest.approx(one['high'] - one['low'], rel=0.05)
  monkeypatch.setattr(comparison, 'EXAMPLES', 3)
  assert len(comparison.compare(task, results)['examples']) == 3


def test_several_models_are_compared_with_the_tuned_one(monkeypatch):
  _fast(monkeypatch)
  task, results = _models(n=60)
  shots = _results(task.rows, 0.8, 2)
  got = comparison.compare(task, {'base': results['base'], 'base_shots': shots} | results)
  pairs = [(d['first'], d['second']) for d in got['differences']]
  assert pairs == [('base', 'tuned'), ('base_shots', 'tuned'), ('base', 'base_shots')]
  assert list(got['scores']) == ['base', 'base_shots', 'tuned']
  others = comparison.compare(task, {'A': shots, 'B': results['base'], 'C': results['tuned']})
  assert [(d['first'], d['second']) for d in others['differences']] == [('A', 'B'), ('A', 'C')]


def test_one_model_alone_has_scores_and_nothing_to_compare(monkeypatch):
  _fast(monkeypatch)
  task, results = _models(n=20)
  got = comparison.compare(task, {'tuned': results['tuned']})
  assert got['differences'] == [] and got['scores']['tuned']['accuracy']['value'] is not None
  summary = comparison.summarize([got])
  assert summary['verdict'] == []
  assert 'accuracy' in text_table.text(summary)


def test_p_values_of_several_tasks_are_adjusted(monkeypatch):
  _fast(monkeypatch)
  entries = []
  for name, n in (('a', 120), ('b', 60), ('c', 30)):
    task, results = _models(n=n, base=0.6, tuned=0.85)
    entries.append(comparison.compare(dataclasses.replace(task, name=name), results))
  summary = comparison.summarize(entries)
  ps = [e['differences'][0]['test']['p'] for e in entries]
  # Holm by hand: the smallest times three, the next times two, never falling.
  order, expected, most = np.argsort(ps), [0.0] * 3, 0.0
  for rank, i in enumerate(order):
    most = max(most, min(1.0, (3 - rank) * ps[i]))
    expected[i] = most
  assert [e['differences'][0]['test']['p_holm'] for e in entries] == pytest.approx(expected)
  assert [v.partition(':')[0] for v in summary['verdict']] == ['a', 'b', 'c']
  assert summary['models'] == ['base', 'tuned'] and summary['version'] == 2


def test_the_adjusted_test_decides():
  """p = 0.03 alone is significant; among five tasks it is not."""
  metric = {'title': 'accuracy', 'better': 'higher', 'name': 'accuracy', 'form': 'fraction'}
  difference = {
    'first': 'base',
    'second': 'tuned',
    'metrics': {'accuracy': {'value': 0.1, 'low': 0.01, 'high': 0.19}},
    'test': {'p': 0.03},
    'smallest_difference': 0.12,
    'rows_needed': 310,
  }
  alone = verdict.decide(difference, metric, 200)
  assert alone['outcome'] == 'better' and '+0.100 [+0.010, +0.190]' in alone['verdict']
  among = verdict.decide(difference | {'test': {'p': 0.03, 'p_holm': 0.15}}, metric, 200)
  assert among['outcome'] == 'undecided'
  assert (
    '0.120 would show in four of five cases' in among['verdict']
    and 'some 310 would do' in among['verdict']
  )
  lower = verdict.decide(difference, metric | {'better': 'lower'}, 200)
  assert lower['outcome'] == 'worse'
  neither = verdict.decide(difference, metric | {'better': ''}, 200)
  assert neither['outcome'] == 'undecided' and 'has a higher accuracy' in neither['verdict']
  unknown = verdict.decide(difference | {'test': {'p': None}}, metric, 200)
  assert unknown['outcome'] == 'undecided' and 'cannot be compared' in unknown['verdict']


@pytest.mark.parametrize('n', [1, 2])
def test_a_figure_that_cannot_be_computed_has_a_reason(monkeypatch, n):
  _fast(monkeypatch)
  task, results = _models(n=n)
  got = comparison.compare(task, results)
  for found in (f for own in got['scores'].values() for f in own.values()):
    assert found['value'] is not None or 'cannot be computed' in found['why']
    assert found['low'] is not None or 'why' in found
  for difference in got['differences']:
    assert difference['outcome'] == 'undecided' and difference['verdict']
  json.dumps(comparison.summarize([got]), allow_nan=False)


def test_a_reward_of_texts_without_any_spread(monkeypatch):
  _fast(monkeypatch)
  rows = [Row(str(i), f'f:{i}', 'p') for i in range(6)]
  task = _task('reward/length:at_most=3', rows)
  own = [Result(r.id, '', 'x', {'reward': (1e100,)}, response='x') for r in rows]
  got = comparison.compare(task, {'base': own, 'tuned': own})
  json.dumps(comparison.summarize([got]), allow_nan=False)
  assert got['differences'][0]['outcome'] == 'undecided'


def test_figures_by_source(monkeypatch):
  _fast(monkeypatch)
  task, results = _models(n=40)
  rows = tuple(
    dataclasses.replace(r, columns={'source': 'ab'[i % 2]}) for i, r in enumerate(task.rows)
  )
  got = comparison.compare(dataclasses.replace(task, rows=rows), results)['by_source']
  for i, name in enumerate('ab'):
    part = [r.right for r in results['tuned']][i::2]
    assert got[name]['n'] == 20 and got[name]['tuned'] == pytest.approx(np.mean(part))


def test_a_part_of_the_rows(monkeypatch):
  _fast(monkeypatch)
  task, results = _models(n=40)
  ids = frozenset(r.id for r in task.rows[:10])
  got = comparison.on_rows(task, results, ids)
  assert got['base']['value'] == np.mean([r.right for r in results['base'][:10]])
  nothing = comparison.on_rows(task, results, frozenset())
  assert nothing['base'] == {'value': None, 'low': None, 'high': None}


@pytest.mark.parametrize('samples', [1, 3])
def test_equal_shares_of_few_prompts_have_an_interval_with_a_width(monkeypatch, samples):
  """One of no width would pass every rule of `gate` with "significantly"."""
  _fast(monkeypatch)
  task = _task('preference', _label_rows(4))
  values = {'right': (1.0,), 'right_per_token': (1.0,), 'margin': (2.0,)}
  own = [
    Result(row.id, row.answer, row.answer, values, sample=i)
    for row in task.rows
    for i in range(samples)
  ]
  found = comparison.compare(task, {'base': own, 'tuned': own})['differences'][0]['metrics']
  for name in ('accuracy', 'right_per_token'):
    assert found[name]['low'] < -0.2 < 0.2 < found[name]['high']
    assert found[name]['effect'] == 0
  worse = [dataclasses.replace(r, values=values | {'right_per_token': (0.0,)}) for r in own]
  found = comparison.compare(task, {'base': own, 'tuned': worse})['differences'][0]['metrics']
  assert found['right_per_token']['value'] == -1 < found['right_per_token']['high'] < 0


# A judge


def prefer_short(prompt, first, second):
  assert prompt.startswith('p')
  return float(len(second) < len(first))


def always_first(prompt, first, second):
  return 0.0


def fails(prompt, first, second):
  raise KeyError('x')


def rubbish(prompt, first, second):
  return {'p0': None, 'p1': 'yes', 'p2': 7}[prompt]


def is_stopped(prompt, first, second):
  raise StoppedEarly('SIGTERM')


def no_number(prompt, first, second):
  return [1]


def _judged(name, texts, beat=lambda: None):
  rows = tuple(Row(str(i), f'f:{i}', f'p{i}') for i in range(len(texts[0])))
  task = _task(f'judge/test_comparison:{name}', rows)
  results = {
    model: [Result(str(i), '', t, {}, response=t) for i, t in enumerate(own)]
    for model, own in zip(('base', 'tuned'), texts, strict=True)
  }
  return task, function_kinds.judged(task.rows, kinds.find(task.kind_name), results, beat)


def test_a_judge_is_asked_in_both_orders(monkeypatch):
  _fast(monkeypatch)
  task, results = _judged('prefer_short', (['long', 'b', 'same'], ['x', 'longer', 'same']))
  assert [r.values['win'] for r in results['base']] == [(0.5,)] * 3
  assert [r.values['win'] for r in results['tuned']] == [(1.0,), (0.0,), (0.5,)]
  got = comparison.compare(task, results)
  assert got['scores']['tuned']['win']['value'] == 0.5
  _, results = _judged('always_first', (['a', 'b'], ['c', 'd']))
  assert [r.values['win'] for r in results['tuned']] == [(0.5,), (0.5,)], 'a place is no win'


def test_a_judge_that_fails_names_the_row():
  with pytest.raises(DataError, match=r'f:0: the judge: KeyError'):
    _judged('fails', (['a'], ['b']))
  for at in range(3):
    texts = (['same'] * at + ['a'], ['same'] * at + ['b'])
    with pytest.raises(DataError, match=rf'f:{at}: the judge returned .*from 0 to 1'):
      _judged('rubbish', texts)
  task, results = _judged('prefer_short', (['a'], ['b']))
  more = results | {'tuned': results['tuned'] * 2}
  with pytest.raises(ConfigError, match='as many completions'):
    function_kinds.judged(task.rows, kinds.find(task.kind_name), more, lambda: None)
  with pytest.raises(DataError, match=r'f:0: the judge returned \[1\]; expected a number'):
    _judged('no_number', (['a'], ['b']))
  with pytest.raises(StoppedEarly):
    _judged('is_stopped', (['a'], ['b']))


def test_a_slow_judge_is_no_hang(monkeypatch):
  beats = []
  _judged('prefer_short', (['a', 'b', 'c'], ['d', 'e', 'c']), lambda: beats.append(0))
  assert len(beats) == 6, 'before each answer, for the watchdog'


# Its forms


def test_the_summary_is_strict_json_and_every_form_reads_it(monkeypatch, tmp_path):
  _fast(monkeypatch)
  task, results = _models(n=20)
  hostile = dataclasses.replace(results['tuned'][0], response='\x1b[31m</script>\u2028\ud800' * 900)
  results['tuned'] = [hostile, *results['tuned'][1:]]
  entry = comparison.compare(task, results, {'base': {'seconds': 1.0, 'tokens': 5, 'rows': 20}})
  shown = entry['examples'][0]['responses']['tuned']
  assert len(shown) == comparison.LONGEST + 1 and shown.endswith('…')
  summary = comparison.summarize([entry], [{'prompt': 'p', 'base': 'b', 'tuned': 't'}])
  again = json.loads(json.dumps(summary, allow_nan=False))
  assert again == summary and not findings.problem(summary)
  assert 'accuracy' in text_table.text(summary)
  (tmp_path / 'eval').mkdir()
  (tmp_path / 'eval' / 'summary.json').write_text(json.dumps(summary))
  page.write(str(tmp_path))
  html = (tmp_path / 'report.html').read_text()
  assert 'sentiment' in html and '\x1b' not in html


def test_nothing_to_compare():
  summary = comparison.summarize([], [{'prompt': 'p', 'base': 'b', 'tuned': 't'}])
  assert (summary['models'], summary['tasks'], summary['verdict']) == ([], {}, [])
  assert 'p' in text_table.text(summary)
