"""What a run trains on: batches against the data, first rows for a look, reported counts."""

import json
import logging

import pytest
from test_token_cache import chat_rows, write
from tiny_tokenizer import tiny_files

from ftjax.config import keys
from ftjax.data import corpus_builder
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import data as examples
from ftjax.runtime.errors import ConfigError

TOKENIZER = Tokenizer(tiny_files())


def settings(tmp_path, rows, **changes):
  c = keys.default()
  c.data.train = write(tmp_path / 'train.jsonl', rows).path
  c.seq_len, c.data.packing = 64, False
  c.update_from_flattened_dict(changes)
  return c


@pytest.mark.parametrize(
  'rows, changes, told',
  [
    (3, {'batch_size': 64, 'epochs': 2.0}, ('batch_size=64', 'only 3 ', 'at most 3')),
    (3, {'batch_size': 64, 'steps': 10}, ('batch_size=64', 'only 3 ', 'at most 3')),
    (7, {'batch_size': 8}, ('batch_size=8', 'only 7 ', 'at most 7')),
    (7, {'batch_size': 8, 'grad_accum': 2}, ('batch_size=8', 'only 7 ', 'at most 6')),
    (12, {'batch_size': 16, 'data.packing': True, 'seq_len': 128}, ('batch_size=16', 'packed')),
  ],
)
def test_a_batch_larger_than_an_epoch_is_refused(tmp_path, rows, changes, told):
  with pytest.raises(ConfigError) as caught:
    examples.open_rows(settings(tmp_path, chat_rows(rows), **changes), TOKENIZER, str(tmp_path))
  assert all(words in str(caught.value) for words in told), str(caught.value)


@pytest.mark.parametrize('batch_size, is_warned', [(10, True), (8, True), (6, True), (5, False)])
def test_a_batch_nearly_as_large_as_an_epoch_is_warned_of(tmp_path, caplog, batch_size, is_warned):
  c = settings(tmp_path, chat_rows(10), batch_size=batch_size)
  examples.open_rows(c, TOKENIZER, str(tmp_path))
  found = [r.message for r in caplog.records if 'nearly as much' in r.message]
  assert bool(found) is is_warned
  if is_warned:
    assert (
      f'batch_size={batch_size} is' in found[0] and f'{10 / batch_size:.1f} batches' in found[0]
    )


def open_prompts(tmp_path, **changes):
  rows = [{'prompt': f'question {i}', 'answer': 'a'} for i in range(7)]
  c = settings(tmp_path, rows, **changes)
  c.algorithm, c.rollout.max_tokens = 'grpo', 8
  return examples.open_prompts(c, TOKENIZER, str(tmp_path))


def test_more_prompts_than_there_are_are_refused(tmp_path):
  with pytest.raises(ConfigError, match=r'batch_size=9, .*only 7 prompts.*at most 7'):
    open_prompts(tmp_path, batch_size=9)


def test_prompts_that_may_be_drawn_again_are_warned_of(tmp_path, caplog):
  open_prompts(tmp_path, **{'batch_size': 2, 'rollout.redraws': 3})
  assert 'rollout.redraws=3 (up to 8 prompts at once)' in caplog.text
  caplog.clear()
  open_prompts(tmp_path, batch_size=2)
  assert not caplog.text


def test_what_became_of_rows_is_logged_once_and_goes_into_the_manifest(tmp_path, caplog):
  rows = [*chat_rows(20), {'messages': []}, *chat_rows(2, words=40)]
  rows[0]['id'] = 7
  changes = {
    'batch_size': 2,
    'data.on_bad_row': 'drop',
    'data.on_overlength': 'truncate_right',
    'data.eval_fraction': 0.3,
    'data.packing': True,
  }
  data = examples.open_rows(settings(tmp_path, rows, **changes), TOKENIZER, str(tmp_path))
  caplog.set_level(logging.INFO)
  data.log_summary()
  text = caplog.text
  assert text.count('1 of 23 rows left out') == 1 and 'train.jsonl:21: ' in text
  assert '2 truncated (9.1%)' in text and 'columns not read: id (1 rows)' in text
  assert 'token utilization' not in text  # of one source the summary of the run says it
  found = json.loads(json.dumps(data.counts()))
  assert found['data 0']['bad'] == 1 and found['data 0']['rows'] == 23
  assert found['data 0']['bad_reasons'][0]['places'] == [[0, 21]]
  assert found['data 0']['examples_used'] + found['eval 0']['examples_used'] == 22
  for side in found.values():
    assert sum(side['lengths']['counts']) == side['examples_used']


def test_only_the_first_rows_of_each_source_are_read_for_a_look(tmp_path, monkeypatch):
  c = settings(tmp_path, [*chat_rows(30), {'messages': []}])
  other = write(tmp_path / 'other.jsonl', [{'text': 'x y z'}] * 3)
  c.data.train, c.batch_size = f'{c.data.train},{other.path}', 4
  read, scan = [], corpus_builder.sources.scan
  monkeypatch.setattr(
    corpus_builder.sources, 'scan', lambda spec: (read.append(row) or row for row in scan(spec))
  )
  (chats, batch), (texts, _) = examples.first_rows(c, TOKENIZER, str(tmp_path), 5)
  assert (len(chats), len(texts), len(read)) == (5, 3, 8)
  assert batch['tokens'].shape == (4, 64)
  tokens = batch['tokens'][0][batch['segments'][0] > 0]
  assert tokens.tolist() == chats.example(0)[0].tolist()


def test_only_the_first_prompts_are_read_for_a_look(tmp_path):
  rows = [*({'prompt': f'question {i}'} for i in range(9)), {'neither': 1}]
  c = settings(tmp_path, rows, batch_size=4)
  c.algorithm, c.rollout.max_tokens = 'grpo', 8
  assert len(examples.open_prompts(c, TOKENIZER, str(tmp_path), 3).sources[0].rows) == 3
