"""Process reward models: rows, tokens, the loss by hand, scores of solutions, and a run whose
export scores steps. Parity with torch: parity/test_prm.py."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from ftjax.algorithms import prm
from ftjax.data import batches, step_rows, synthetic
from ftjax.data.formats import Bad
from ftjax.data.tokenizer import Tokenizer
from ftjax.grading import step_scores
from ftjax.losses import process_reward

ROW = {'prompt': '1 + 1 =', 'completions': ['one', 'two'], 'labels': [True, 0.25]}


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer(synthetic.byte_tokenizer())


# Rows.


def test_labels_are_booleans_or_probabilities():
  assert step_rows.parse(ROW).values == (1.0, 0.25)
  as_text = ROW | {'completions': '["one", "two"]', 'labels': '[false, 1]'}
  assert step_rows.parse(as_text).values == (0.0, 1.0)
  assert step_rows.unread(ROW | {'other': 1, 'id': 7}) == {'other'}


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (dict(labels=[True]), '2 completions and 1 labels'),
    (dict(labels=[True, 1.5]), r'labels\[1\] is 1.5'),
    (dict(labels=[True, 'good']), r"labels\[1\] is 'good'"),
    (dict(labels=[True, float('nan')]), r'labels\[1\]'),
    (dict(labels=None), "no 'labels'"),
    (dict(completions=[]), "'completions' is empty"),
    (dict(completions='one'), "'completions' is str"),
    (dict(completions=['one', '']), r'completions\[1\]'),
    (dict(completions=['one', 2]), r'completions\[1\]'),
    (dict(prompt=None), 'prompt'),
    (dict(prompt=''), 'prompt'),
  ],
)
def test_rows_that_cannot_be_used(changes, words):
  with pytest.raises(ValueError, match=words):
    step_rows.parse(ROW | changes)


def encoded(tokenizer, row=ROW, separator='\n'):
  ((found,),) = step_rows.encode([step_rows.parse(row)], tokenizer, separator)
  return found


def test_a_label_stands_at_the_end_of_each_separator(tokenizer):
  found = encoded(tokenizer, separator='..')
  text = tokenizer.decode(found.tokens, skip_special=False)
  assert text.endswith('1 + 1 =one..two..')
  ends = np.flatnonzero(found.labels >= 0)
  assert ends.tolist() == [len(found.tokens) - 6, len(found.tokens) - 1]
  assert found.labels[ends].tolist() == [1_000_000, 250_000]
  chat = ROW | {'prompt': [{'role': 'user', 'content': '1 + 1 ='}]}
  text = tokenizer.decode(encoded(tokenizer, chat).tokens, skip_special=False)
  assert 'user\n1 + 1 =' in text and text.endswith('assistant\none\ntwo\n')


def test_what_has_no_token_is_refused(tokenizer):
  class Nothing:
    bos_id = None

    def encode_batch(self, texts):
      return [np.array([1] * (t != 'one'), np.int32) for t in texts]

  (found,) = step_rows.encode([step_rows.parse(ROW)], Nothing(), '\n')
  assert isinstance(found, Bad) and found.reason == 'completions[0] has no token'
  (found,) = step_rows.encode([step_rows.parse(ROW)], Nothing(), 'one')
  assert isinstance(found, Bad) and 'prm.separator' in found.reason


def test_long_rows(tokenizer):
  found, n = encoded(tokenizer), len(encoded(tokenizer).tokens)
  assert step_rows.fit(found, n, 'error') is found
  with pytest.raises(ValueError, match=f'{n} tokens, more than seq_len={n - 1}'):
    step_rows.fit(found, n - 1, 'error')
  assert step_rows.fit(found, n - 1, 'drop') is None
  right = step_rows.fit(found, n - 1, 'truncate_right')
  assert right.labels[right.labels >= 0].tolist() == [1_000_000]
  left = step_rows.fit(found, 3, 'truncate_left')
  assert left.tokens.tolist() == found.tokens[-3:].tolist()
  assert left.labels[left.labels >= 0].tolist() == [250_000]
  assert step_rows.fit(found, 4, 'truncate_right') is None


def test_a_batch_has_the_labels_where_they_stand(tokenizer):
  found = encoded(tokenizer)

  class Corpus:
    shape, columns, weights, top_tokens = 'steps', {}, None, None
    lengths = np.array([len(found.tokens)] * 2)

    def example(self, i):
      return found.tokens, found.supervised

    def labels(self, i):
      return found.labels

  (batch,) = batches.eval_batches(Corpus(), 1, 2 * len(found.tokens) + 1, packed=True)
  n = len(found.tokens)
  ends = np.flatnonzero(found.labels >= 0)
  assert np.flatnonzero(batch['weights'][0]).tolist() == [*ends, *(n + ends)]
  assert batch['labels'][0, ends].tolist() == [1_000_000, 250_000]
  assert batch['segments'][0].tolist() == [1] * n + [2] * n + [0]
  assert 'values' not in batch


# Loss and figures.


def test_the_loss_by_hand():
  """Two step ends: p(right) = 3/4 of a right step, 1/2 of one that is right with 1/4."""
  logits = jnp.array([[0.0, math.log(3)], [7.0, -7.0], [1.0, 1.0]])
  values, weights = jnp.array([1.0, 0.0, 0.25]), jnp.array([1.0, 0.0, 2.0])
  (total, weight), (right, steps) = process_reward.step_cross_entropy(logits, values, weights)
  assert float(total) == pytest.approx(math.log(4 / 3) + 2 * math.log(2), rel=1e-6)
  assert float(weight) == 3 and float(right) == 1 and float(steps) == 2


def test_figures_of_solutions():
  """The first finds its first wrong step, the second finds one where there is none."""
  found = [
    (np.array([2.0, -1.0, 1.0]), np.array([1.0, 0.0, 0.0])),
    (np.array([1.0, -3.0]), np.array([1.0, 1.0])),
  ]
  got = prm.scores(found)
  assert got['accuracy'] == 3 / 5 and got['first_error'] == 0.5
  assert got['steps'] == 5 and got['solutions'] == 2
  by_hand = [math.log1p(math.exp(s)) for s in (-2.0, -1.0, 1.0, -1.0, 3.0)]
  assert got['loss'] == pytest.approx(sum(by_hand) / 5, rel=1e-12)
  assert got['accuracy_low'] < 0.6 < got['accuracy_high']


def test_steps_are_in_the_order_of_their_positions():
  found = {
    'segment': np.array([[1, 0, 1, 2]]),
    'position': np.array([[5, 0, 2, 1]]),
    'logit': np.array([[1.0, 9.0, 2.0, 3.0]]),
    'value': np.array([[1.0, 9.0, 0.0, 1.0]]),
  }
  first, second = prm.solutions(found)
  assert first[0].tolist() == [2.0, 1.0] and first[1].tolist() == [0.0, 1.0]
  assert second[0].tolist() == [3.0]


def test_solutions_are_scored_by_the_least_the_product_or_the_last():
  def score(solutions):
    return [np.array([0.5, 0.25, 0.8][: len(steps)]) for _, steps in solutions]

  pairs = [('p', 'a\nb\n\nc\n'), ('p', ' \n'), ('p', 'a')]
  expected = {'min': 0.25, 'product': 0.1, 'last': 0.8}
  for how, value in expected.items():
    found = step_scores.StepGrader(score, how, '\n')(pairs)
    assert found == pytest.approx([value, 0.0, 0.5])
  with pytest.raises(ValueError, match='expected one of'):
    step_scores.StepGrader(score, 'mean', '\n')
  with pytest.raises(ValueError, match='separator is empty'):
    step_scores.StepGrader(score, 'min', '')


# Runs.


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('prm') / 'a run'
  code, printed = tiny_run.run('train', ['--config=tiny_prm', f'--workdir={workdir}'])
  assert code == 0, printed
  return workdir, printed


@pytest.mark.full
def test_a_run_learns_which_step_is_right_and_its_export_scores_steps(trained, tmp_path):
  workdir, _ = trained
  rows = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  last = [r for r in rows if r['split'] == 'eval'][-1]
  assert last['accuracy_low'] > 0.7 and last['first_error'] > 0.5
  config = json.loads((workdir / 'export' / 'config.json').read_text())
  assert config['architectures'] == ['LlamaForTokenClassification']
  assert config['id2label'] == {'0': 'incorrect', '1': 'correct'}
  solutions = tmp_path / 'some rows.jsonl'
  right = {'prompt': '7 + 4 =', 'completions': ['first 7', 'then 4']}
  wrong = {'prompt': '7 + 5 =', 'completion': 'first 7\nthen 5\n'}
  solutions.write_text(json.dumps(right) + '\n' + json.dumps(wrong) + '\n')
  code, printed = tiny_run.run(
    'generate', [f'--model={workdir}', '--steps=min', f'--prompts={solutions}']
  )
  assert code == 0, printed
  one, two = (json.loads(x) for x in printed.splitlines() if x.startswith('{'))
  assert one['score'] == min(one['step_scores']) and len(one['step_scores']) == 2
  assert two['step_scores'][1] < one['step_scores'][1] and two['completion'] == wrong['completion']


@pytest.mark.full
@pytest.mark.parametrize(
  ('words', 'code', 'told'),
  [
    (['--steps=min'], 2, 'needs a file of solutions'),
    (['--steps=mean', '--prompts=ROWS'], 2, 'mean'),
    (['--steps=min', '--classify', '--prompts=ROWS'], 2, 'give one of them'),
    (['--steps=min', '--separator=', '--prompts=ROWS'], 2, 'is empty'),
    (['--steps=min', '--prompts=ROWS'], 3, 'rows.jsonl:1: '),
  ],
)
def test_wrong_flags(words, code, told, trained, tmp_path):
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('{"prompt": "a"}\n')
  words = [w.replace('ROWS', str(rows)) for w in words]
  found, printed = tiny_run.run('generate', [f'--model={trained[0]}', *words])
  assert found == code and told in printed, printed


@pytest.mark.full
def test_text_tasks_and_an_empty_separator_are_refused(tmp_path):
  for word, told in (("eval.prompts=('a',)", 'cannot write'), ('prm.separator=', 'prm.separator')):
    command = ['--config=tiny_prm', f'--workdir={tmp_path}', f'--config.{word}']
    code, printed = tiny_run.run('train', command)
    assert code == 2 and told in printed, printed
