"""A run's training data as texts, compared with its tasks and its evaluation split."""

import json
import logging
import random
import types

import pytest
import tiny_pairs
from test_contamination import text

from ftjax.cluster.watchdog import Watchdog
from ftjax.config import keys
from ftjax.data import formats, preference_rows, sources
from ftjax.evaluation import tasks as tasks_lib
from ftjax.evaluation.contamination import Item
from ftjax.experiment import contamination_check
from ftjax.experiment import data as examples
from ftjax.experiment import run as experiment
from ftjax.experiment.model import open_model
from ftjax.storage import files

RNG = random.Random(0)
QUESTIONS = [text(RNG, 20) for _ in range(40)]
ANSWERS = [text(RNG, 3) for _ in QUESTIONS]


def conversation(question, answer):
  turns = (('user', question), ('assistant', answer))
  return {'messages': [{'role': role, 'content': content} for role, content in turns]}


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def task(folder, questions, name='t'):
  rows = [{'prompt': q, 'answer': 'yes'} for q in questions]
  return tasks_lib.load_task(name, 'match', write(folder / f'{name}.jsonl', rows))


def run(folder, rows, algorithm='sft', held=None, **changes):
  """A Run of rows written to files, without weights."""
  settings = {'seq_len': 512, 'batch_size': 1, 'data__on_bad_row': 'drop'} | changes
  c = tiny_pairs.settings(algorithm, **settings)
  c.data.train = write(folder / 'train.jsonl', rows)
  if held is not None:
    c.data.eval = write(folder / 'held.jsonl', held)
  model = open_model('', c.model.random.to_dict(), 0)
  data = examples.open_data(c, model.tokenizer, str(folder))
  return experiment.Run(c, str(folder), None, model, data, Watchdog(c.watchdog.to_dict()))


def test_planted_rows_of_a_run_are_found(tmp_path, caplog):
  rows = [conversation(q, a) for q, a in zip(QUESTIONS[:20], ANSWERS, strict=False)]
  asked = [*QUESTIONS[20:24], QUESTIONS[7].upper()]
  with caplog.at_level(logging.WARNING):
    found = contamination_check.check(run(tmp_path, rows), [task(tmp_path, asked)])
  report = found['t']
  assert list(found) == ['t'] and report.against == (str(tmp_path / 'train.jsonl'),)
  assert [f.is_contaminated for f in report.findings] == [False] * 4 + [True]
  assert report.findings[4].place == f'{tmp_path}/train.jsonl:8'
  assert 'eval.tasks t: 1 of 5 rows are in the training data' in caplog.text
  assert 'train.jsonl:8' in caplog.text
  summary = contamination_check.to_summary(report, {'tuned': {'value': 0.5}})
  assert (summary['n'], summary['contaminated'], summary['near_duplicates']) == (5, 1, 0)
  assert json.loads(json.dumps(summary)) == summary


def test_the_findings_are_kept_until_the_data_change(tmp_path, monkeypatch):
  rows = [conversation(q, 'yes') for q in QUESTIONS[:20]]
  whole, asked = run(tmp_path, rows), [task(tmp_path, QUESTIONS[18:22])]
  first = contamination_check.check(whole, asked)
  path = files.join(tmp_path, 'eval', 'contamination.json')
  with monkeypatch.context() as patched:
    patched.setattr(contamination_check, '_compare', None)
    assert contamination_check.check(whole, asked) == first
  for spoilt in ('', '{}', '[]', '{"key": 1', files.read_text(path).replace('share', 'part')):
    files.write_text(path, spoilt)
    assert contamination_check.check(whole, asked) == first
  assert contamination_check.check(whole, [task(tmp_path, QUESTIONS[:9])])['t'].contaminated == 9
  (tmp_path / 'train.jsonl').unlink()
  assert contamination_check.check(run(tmp_path, rows[:19]), asked)['t'].contaminated == 1


def test_a_run_without_its_data_has_what_was_found_in_training(tmp_path):
  """`python -m ftjax.evaluate` writes summary.json anew, and does not open the training data."""
  whole = run(tmp_path, [conversation(q, 'yes') for q in QUESTIONS[:20]])
  asked = [task(tmp_path, QUESTIONS[18:22]), task(tmp_path, QUESTIONS[:5], 'other')]
  whole.data, opened = None, whole.data
  assert contamination_check.check(whole, asked) == {}
  whole.data = opened
  first = contamination_check.check(whole, asked)
  whole.data = None
  changed = task(tmp_path, QUESTIONS[1:5], 'other')
  new = task(tmp_path, QUESTIONS[3:5], 'new')
  assert contamination_check.check(whole, [asked[0], changed, new]) == {'t': first['t']}


def test_nothing_without_tasks_data_or_the_key(tmp_path):
  whole, asked = run(tmp_path, [conversation(q, 'yes') for q in QUESTIONS]), task(tmp_path, ['a b'])
  assert contamination_check.check(whole, []) == {}
  whole.data = None
  assert contamination_check.check(whole, [asked]) == {}
  off = run(tmp_path, [conversation(QUESTIONS[0], 'yes')] * 3, eval__contamination=False)
  assert contamination_check.check(off, [asked]) == {}
  assert not (tmp_path / 'eval').exists() and keys.default().eval.contamination


def test_rows_that_are_left_out_are_not_trained_on(tmp_path):
  rows = [conversation(q, 'yes') for q in QUESTIONS[:9]]
  rows[3] = {'messages': QUESTIONS[3]}  # unusable
  rows[5] = conversation(QUESTIONS[5] + ' more' * 400, 'yes')  # too long
  found = contamination_check.check(
    run(tmp_path, rows, data__on_overlength='drop'), [task(tmp_path, QUESTIONS[:9])]
  )
  assert [f.id for f in found['t'].findings if f.is_clean] == ['4', '6']


def test_a_row_of_several_examples_is_read_once(tmp_path):
  class Corpus:
    rows = ((0, 1), (0, 3), (0, 3), (0, 3), (0, 4))

    def __len__(self):
      return len(self.rows)

    def row_of(self, i):
      return self.rows[i]

  path = write(tmp_path / 'rows.jsonl', [conversation(str(i), 'yes') for i in range(1, 7)])
  settings = tiny_pairs.settings('sft')
  read = contamination_check._rows_of(settings, sources.Spec(path), Corpus(), True)
  assert [texts for _, texts in read] == [['1', 'yes'], ['3', 'yes'], ['4', 'yes']]


def test_the_split_is_compared_with_the_other_side_of_its_file(tmp_path):
  rows = [conversation(q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
  whole = run(tmp_path, rows, data__eval_fraction=0.3)
  held = {whole.data.evaluation[0].row_of(i)[1] for i in range(len(whole.data.evaluation[0]))}
  asked = [task(tmp_path, QUESTIONS)]
  found = contamination_check.check(whole, asked)
  assert found[contamination_check.SPLIT].contaminated == 0
  assert len(found[contamination_check.SPLIT].findings) == len(held) > 3
  assert {int(f.id) for f in found['t'].findings if f.is_clean} == held
  # Each held-out question again, with another answer: that row may be on the training side.
  again = run(
    tmp_path, rows + [conversation(q, 'other') for q in QUESTIONS], data__eval_fraction=0.3
  )
  corpus = again.data.evaluation[0]
  held = {corpus.row_of(i)[1] for i in range(len(corpus))}
  leaked = {n for n in held if (n - 40 if n > 40 else n + 40) not in held}
  found = contamination_check.check(again, asked)[contamination_check.SPLIT]
  assert {int(f.id.rpartition(':')[2]) for f in found.findings if not f.is_clean} == leaked
  assert leaked


def test_a_large_split_is_compared_in_part(tmp_path, monkeypatch):
  monkeypatch.setattr(contamination_check, '_SPLIT_ROWS', 4)
  held = [conversation(q, 'yes') for q in QUESTIONS[:11]]
  whole = run(tmp_path, [conversation(q, 'no') for q in QUESTIONS[20:]], held=held)
  found = contamination_check.check(whole, [task(tmp_path, ['a b'])])[contamination_check.SPLIT]
  assert [int(f.id.rpartition(':')[2]) for f in found.findings] == [1, 4, 7, 10]


def test_rows_of_whole_texts_are_texts():
  row = types.SimpleNamespace(id='7', asked=None, choices=('one text', 'another'), answer='another')
  assert contamination_check.item_of(row) == Item('7', ('one text', 'another'))


@pytest.mark.parametrize('algorithm', ['dpo', 'grpo', 'sft'])
def test_every_kind_of_training_rows_is_read(algorithm, tmp_path):
  q = QUESTIONS
  if algorithm == 'dpo':
    rows = [{'prompt': q[i], 'chosen': q[i + 1], 'rejected': q[i + 2]} for i in range(0, 12, 3)]
    changes = {}
  elif algorithm == 'grpo':
    rows = [{'prompt': q[i], 'answer': q[i + 1], 'note': q[i + 2]} for i in range(0, 12, 3)]
    changes = dict(rollout__rewards='length:target=8', rollout__max_tokens=8)
  else:
    rows = [{'prompt': q[i], 'completion': f'{q[i + 1]} {q[i + 2]}'} for i in range(0, 12, 3)]
    changes = {}
  whole = run(tmp_path, rows, algorithm, rows[:1], **changes)
  found = contamination_check.check(whole, [task(tmp_path, q[:14])])
  clean = {i for i, f in enumerate(found['t'].findings) if f.is_clean}
  assert clean == ({2, 5, 8, 11, 12, 13} if algorithm == 'grpo' else {12, 13})
  assert found[contamination_check.SPLIT].contaminated == 1


def test_all_texts_of_an_example_are_read():
  turns = [
    {'role': 'system', 'content': 'a'},
    {'role': 'user', 'content': 'b'},
    {'role': 'assistant', 'content': 'c', 'reasoning_content': 'd'},
  ]
  parsed = formats.parse({'messages': turns}, 'messages', True)
  assert contamination_check.texts_of(parsed) == ['a', 'b', 'd', 'c']
  assert contamination_check.texts_of(formats.Text('e')) == ['e']
  pair = preference_rows.parse({'prompt': 'p', 'chosen': 'x', 'rejected': 'y'}, 'pair', None)
  assert contamination_check.texts_of(pair) == ['p', 'x', 'y']
  label = preference_rows.parse({'prompt': 'p', 'completion': 'x', 'label': True}, 'label', None)
  assert contamination_check.texts_of(label) == ['p', 'x']


def test_training_rows_that_repeat_are_counted(tmp_path):
  rows = [conversation(q, 'yes') for q in QUESTIONS[:10]]
  rows += [rows[2], rows[2], conversation(QUESTIONS[4] + ' x', 'no')]
  contamination_check.check(run(tmp_path, rows), [task(tmp_path, ['a b'])])
  facts = json.loads(files.read_text(files.join(tmp_path, 'eval', 'contamination.json')))
  assert facts['training']['rows'] == 13 and facts['training']['repeated'] == 2
  if facts['training']['near_duplicates'] is not None:
    assert facts['training']['near_duplicates'] == 5 and facts['training']['compared'] == 13
