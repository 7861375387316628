"""Data that can be read and still teaches nothing."""

import json
import logging
import pathlib

import pytest
import tiny_pairs

from ftjax.data import synthetic
from ftjax.data.sources import parse_spec
from ftjax.experiment import data as examples
from ftjax.experiment import data_check
from ftjax.experiment import run as experiment
from ftjax.experiment.model import open_model
from ftjax.runtime.errors import DataError


def run(folder, algorithm, train, held=None, **changes):
  """A Run of rows written to files, without weights."""
  c = tiny_pairs.settings(algorithm, **changes)
  for key, rows in (('train', train), ('eval', held)):
    if rows:
      path = folder / f'{key}.jsonl'
      path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
      c.data[key] = str(path)
  model = open_model('', c.model.random.to_dict(), 0)
  data = examples.open_data(c, model.tokenizer, str(folder))
  return experiment.Run(c, str(folder), None, model, data, None)


def judged(kind, values):
  key = {'labels': 'label', 'scores': 'score'}[kind]
  rows = [{'messages': row['messages']} for row in synthetic.sums(len(values))]
  return [row | {key: value} for row, value in zip(rows, values, strict=True)]


KTO = dict(dpo__loss='kto', seq_len=128, batch_size=2)
SCORES = {'reward_model__objective': 'scores', 'batch_size': 2}


@pytest.mark.parametrize(
  ('algorithm', 'settings', 'rows', 'told'),
  [
    ('dpo', KTO, judged('labels', [True] * 16), '"label" is true for all 16 examples'),
    ('dpo', KTO, judged('labels', [False] * 5), '"label" is false for all 5 examples'),
    ('reward_model', SCORES, judged('scores', [0.5] * 8), '"score" is 0.5 for all 8 examples'),
    ('reward_model', SCORES, judged('scores', [0] * 3), '"score" is 0 for all 3 examples'),
  ],
)
def test_labels_or_scores_that_are_all_equal_are_refused(
  algorithm, settings, rows, told, tmp_path, caplog
):
  with pytest.raises(DataError, match=told):
    data_check.check(run(tmp_path, algorithm, rows, **settings))
  # One of another kind is enough; held-out ones of one kind are told.
  other = rows[0] | ({'label': not rows[0]['label']} if 'label' in rows[0] else {'score': 2.0})
  with caplog.at_level(logging.WARNING):
    data_check.check(run(tmp_path, algorithm, [*rows, other], rows, **settings))
  assert told in caplog.text and 'data.eval' in caplog.text


@pytest.mark.parametrize('algorithm', ['sft', 'dpo', 'grpo'])
def test_evaluation_on_the_training_examples_is_reported(algorithm, tmp_path, caplog):
  rows = synthetic._labeled('pairs', 12, 100) if algorithm == 'dpo' else synthetic.sums(12)
  settings = dict(rollout__rewards='length:target=8', rollout__max_tokens=8)
  settings = {'grpo': settings, 'dpo': {'seq_len': 128}}.get(algorithm, {})
  with caplog.at_level(logging.WARNING):
    data_check.check(run(tmp_path, algorithm, rows, rows[:6], **settings))
    assert 'same examples' not in caplog.text
    data_check.check(run(tmp_path, algorithm, rows, rows, **settings))
  assert 'eval.jsonl holds the same examples as data.train' in caplog.text


def test_a_single_example_is_reported(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    data_check.check(run(tmp_path, 'sft', synthetic.sums(2), batch_size=1))
    assert 'one example alone' not in caplog.text
    data_check.check(run(tmp_path, 'sft', synthetic.sums(1), batch_size=1))
  assert 'one example alone' in caplog.text


def test_a_synthetic_file_is_never_half_written(tmp_path):
  """Several processes resolve one source while others read its file."""
  path = pathlib.Path(synthetic.resolve(parse_spec('sums:20'), str(tmp_path)).path)
  whole, first = path.read_text(), path.stat().st_ino
  synthetic.resolve(parse_spec('sums:20'), str(tmp_path))
  assert path.stat().st_ino == first, 'an equal file is left alone'
  path.write_text(whole[:100])
  with path.open() as reader:
    synthetic.resolve(parse_spec('sums:20'), str(tmp_path))
    assert reader.read() == whole[:100] and path.read_text() == whole, 'replaced, not truncated'


@pytest.mark.parametrize(
  ('source', 'rows'), [('sums:90:10', 90), ('pairs:7:3', 7), ('labels:4:2', 4), ('sums:100', 100)]
)
def test_synthetic_sums_may_have_smaller_terms(source, rows, tmp_path):
  found = synthetic.resolve(parse_spec(source), str(tmp_path))
  lines = pathlib.Path(found.path).read_text().splitlines()
  assert len(lines) == len(set(lines)) == rows
  below = int(source.split(':')[2]) if source.count(':') == 2 else 100
  for line in map(json.loads, lines):
    prompt = (line.get('messages') or line['prompt'])[0]['content']
    assert all(int(term) < below for term in prompt.removesuffix(' =').split(' + '))
