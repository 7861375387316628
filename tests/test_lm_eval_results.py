"""Documents of lm-eval as results, and their metrics with weights against sums by hand and
scikit-learn.
"""

import math
import warnings

import numpy as np
import pytest

from ftjax.config import task_specs
from ftjax.config.task_specs import TaskSpec
from ftjax.evaluation import lm_eval_results, result
from ftjax.experiment import lm_eval_tasks
from ftjax.runtime.errors import ConfigError

RNG = np.random.default_rng(0)
N = 40


def sample(doc, values, resps=((-1.0, True), (-2.0, False)), target=0, which='none'):
  row = {'doc_id': doc, 'doc': {}, 'target': target, 'filter': which, 'metrics': list(values)}
  return row | values | {'resps': [[r] for r in resps], 'filtered_resps': list(resps)}


def read(samples, aggregations, figures, choices=('a', 'b'), lengths=None):
  return lm_eval_results.read(
    {'task': samples}, aggregations, lambda task, doc: choices, lengths or {}, figures
  )


def figure(found, name, weights=None):
  metric = next(m for m in found.metrics if m.name == name)
  weights = np.ones((1, len(found.results))) if weights is None else weights
  return metric.value(weights, metric.columns(found.results, ()))


def test_a_choice_has_its_label_scores_and_right():
  rows = [sample(i, {'acc': 1.0 - i % 2, 'acc_norm': 0.0}, target=i % 2) for i in range(4)]
  kinds = {'acc': ('mean', True), 'acc_norm': ('mean', True)}
  found = read(rows, kinds, {'acc,none': 0.5, 'acc_norm,none': 0.0})
  assert [r.label for r in found.results] == ['a', 'b'] * 2
  assert [r.prediction for r in found.results] == ['a'] * 4
  assert [r.right for r in found.results] == [True, False] * 2
  assert found.results[0].scores == (-1.0, -2.0) and found.results[3].id == '3'
  assert [m.name for m in found.metrics] == ['acc', 'acc_norm'] and not found.left_out
  assert all(m.is_proportion and m.better == 'higher' for m in found.metrics)


def test_each_filter_of_a_completion_is_a_metric():
  rows = []
  for i in range(3):
    rows.append(sample(i, {'exact_match': i > 0}, ['#### 1'], '1', 'strict-match'))
    rows.append(sample(i, {'exact_match': i > 1}, ['#### 1'], '1', 'flexible-extract'))
  figures = {'exact_match,strict-match': 2 / 3, 'exact_match,flexible-extract': 1 / 3}
  lengths = {('task', 1): (7, True)}
  found = read(rows, {'exact_match': ('mean', True)}, figures, None, lengths)
  assert [m.name for m in found.metrics] == list(figures)
  assert found.metrics[0].title == 'exact_match (strict-match)'
  one = found.results[1]
  assert (one.response, one.tokens, one.is_cut, one.right) == ('#### 1', 7, True, True)


def test_figures_of_sums_with_weights():
  logp, words = -RNG.uniform(1, 50, N), RNG.integers(1, 9, N)
  gold, guess = RNG.integers(0, 2, (2, N))
  rows = [
    sample(
      i,
      {
        'word_perplexity': (float(logp[i]), int(words[i])),
        'bits_per_byte': (float(logp[i]), int(words[i])),
        'perplexity': float(logp[i]) / 50,
        'f1': (int(gold[i]), np.int64(guess[i])),
        'mcc': (int(gold[i]), np.int64(guess[i])),
        'brier_score': (int(gold[i]), np.array([0.25, 0.75])),
      },
    )
    for i in range(N)
  ]
  kinds = {
    'word_perplexity': ('weighted_perplexity', False),
    'bits_per_byte': ('bits_per_byte', False),
    'perplexity': ('perplexity', False),
    'f1': ('f1', True),
    'mcc': ('matthews_corrcoef', True),
    'brier_score': ('brier_score', False),
  }
  sklearn = pytest.importorskip('sklearn.metrics')

  def by_hand(w):
    mean = (w * logp).sum() / (w * words).sum()
    error = np.where(gold == 0, 2 * 0.75**2, 2 * 0.25**2)
    return {
      'word_perplexity': math.exp(-mean),
      'bits_per_byte': -mean / math.log(2),
      'perplexity': math.exp(-(w * logp / 50).sum() / w.sum()),
      'f1': sklearn.f1_score(gold, guess, sample_weight=w),
      'mcc': sklearn.matthews_corrcoef(gold, guess, sample_weight=w),
      'brier_score': (w * error).sum() / w.sum(),
    }

  figures = {f'{k},none': v for k, v in by_hand(np.ones(N)).items()}
  found = read(rows, kinds, figures)
  assert not found.left_out and len(found.metrics) == 6
  weights = RNG.multinomial(N, [1 / N] * N, 5).astype(np.float64)
  for name in kinds:
    expected = [by_hand(w)[name] for w in weights]
    np.testing.assert_allclose(figure(found, name, weights), expected, rtol=1e-9)
  assert {m.better for m in found.metrics} == {'higher', 'lower'}


def test_of_several_classes_and_of_one():
  sklearn = pytest.importorskip('sklearn.metrics')
  for gold, guess in (RNG.integers(0, 4, (2, N)), np.ones((2, N), int), np.zeros((2, N), int)):
    rows = [
      sample(i, {'mcc': (int(g), int(p))}) for i, (g, p) in enumerate(zip(gold, guess, strict=True))
    ]
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      expected = sklearn.matthews_corrcoef(gold, guess)
    found = read(rows, {'mcc': ('matthews_corrcoef', True)}, {'mcc,none': expected})
    np.testing.assert_allclose(figure(found, 'mcc'), expected, atol=1e-12)


def test_what_has_no_form_with_weights_is_left_out_and_says_why():
  rows = [
    sample(i, {'bleu': ('ref', 'pred'), 'own': 1.0, 'odd': math.nan, 'text': 'x', 'acc': 0.5})
    for i in range(3)
  ]
  kinds = {'bleu': ('bleu', True), 'own': ('of the task itself', True)}
  found = read(rows, kinds, {'acc,none': 0.75, 'bleu,none': 3.0})
  assert found.metrics == () and found.figures['bleu,none'] == 3.0
  assert found.left_out.keys() == {f'{n},none' for n in ('bleu', 'own', 'odd', 'text', 'acc')}
  assert '0.5, and 0.75 by lm-eval' in found.left_out['acc,none']


def test_a_value_that_some_documents_lack():
  rows = [sample(i, {'acc': 1.0} if i else {'other': 1.0}) for i in range(3)]
  found = read(rows, {'acc': ('mean', True)}, {'acc,none': 1.0, 'other,none': 1.0})
  assert [m.name for m in found.metrics] == ['other', 'acc']
  weights = np.array([[1.0, 1, 0], [3, 0, 0]])
  np.testing.assert_array_equal(figure(found, 'acc', weights), [1.0, np.nan])


def test_results_alone_give_the_metrics_again(tmp_path):
  rows = [sample(i, {'word_perplexity': (-3.0 * i, i + 1), 'acc': i % 2}) for i in range(4)]
  kinds = {'word_perplexity': ('weighted_perplexity', False), 'acc': ('mean', True)}
  figures = {'word_perplexity,none': math.exp(1.8), 'acc,none': 0.5}
  found = read(rows, kinds, figures)
  path = str(tmp_path / 'task.jsonl')
  result.save(path, {'base': found.results})
  again = result.load(path)['base']
  assert again == found.results
  for one, other in zip(found.metrics, lm_eval_results.metrics(again), strict=True):
    assert (one.name, one.better, one.is_proportion) == (
      other.name,
      other.better,
      other.is_proportion,
    )
  assert lm_eval_results.metrics([]) == ()


def test_a_group_names_its_documents_by_task():
  both = {t: [sample(0, {'acc': 1.0})] for t in ('first', 'second')}
  found = lm_eval_results.read(
    both, {'acc': ('mean', True)}, lambda task, doc: ['a', 'b'], {}, {'acc,none': 1.0}
  )
  assert [r.id for r in found.results] == ['first/0', 'second/0']
  assert len(found.metrics) == 1


def test_entries_of_eval_tasks():
  assert task_specs.parse('lm_eval:arc_easy') == TaskSpec('arc_easy', 'lm_eval', 'arc_easy')
  assert task_specs.parse('x=lm_eval_chat:gsm8k') == TaskSpec('x', 'lm_eval_chat', 'gsm8k')
  for wrong in ('lm_eval:', 'lm_eval:a/b', 'lm_evil:x'):
    with pytest.raises(ConfigError, match=r'eval\.tasks'):
      task_specs.parse(wrong)
  task_specs.check_objects([TaskSpec('x', 'lm_eval', 'gsm8k')])


def load(name, folder=''):
  return lm_eval_tasks.load_tasks(task_specs.parse_all([f'lm_eval:{name}']), include_path=folder)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
  assert lm_eval_tasks.load_tasks((), include_path='') == ()
  monkeypatch.setattr(lm_eval_tasks.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r'\[eval\]'):
    load('arc_easy')


def test_a_folder_of_tasks_that_is_not_there(tmp_path):
  pytest.importorskip('lm_eval')
  with pytest.raises(ConfigError, match='no such folder'):
    load('arc_easy', str(tmp_path / 'nowhere'))


@pytest.mark.full
def test_tasks_that_cannot_be_had(tmp_path):
  """lm-eval reads all of its 13,000 YAML files, a few seconds for each `load`."""
  pytest.importorskip('lm_eval')
  (tmp_path / 'mine.yaml').write_text(
    f'task: mine\ndataset_path: json\n'
    f'dataset_kwargs: {{data_files: {{test: {tmp_path}/gone.jsonl}}}}\n'
    'test_split: test\noutput_type: multiple_choice\ndoc_to_text: text\n'
  )
  with pytest.raises(ConfigError, match=r'lm_eval:mine.* cannot be loaded.*gone\.jsonl'):
    load('mine', str(tmp_path))
  with pytest.raises(ConfigError, match='no such task; did you mean arc_easy'):
    load('arc_esy', str(tmp_path))
