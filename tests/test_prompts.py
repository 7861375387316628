"""Prompts with columns: what of a row is read, what is paid for, what is too long."""

import json

import pytest

from ftjax.data import encode, made, prompts
from ftjax.data.formats import Chat
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError

TOKENIZER = Tokenizer(made.byte_tokenizer())
USER = {'role': 'user', 'content': 'hi'}


def read(tmp_path, rows, room=100, policy='error', form=None):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return prompts.read(Spec(str(path), form), TOKENIZER, room, policy)


def chat(*messages):
  return encode.encode_prompt(Chat(messages), TOKENIZER)


def test_each_kind_of_row(tmp_path):
  said = {'role': 'assistant', 'content': '12'}
  found = read(
    tmp_path,
    [
      {'prompt': 'abc', 'answer': '1', 'level': 3},
      {'prompt': [USER], 'answer': ['1', 'one']},
      {'messages': [USER], 'answer': '2'},
      {'messages': [USER, said]},
      {'messages': [USER, said], 'answer': 'mine'},
      {'prompt': 'abc', 'completion': 'def'},
    ],
  )
  text = TOKENIZER.encode('abc')
  assert [p.ids for p in found.rows] == [text, *[chat(USER)] * 4, text]
  assert [p.columns['answer'] for p in found.rows] == ['1', ['1', 'one'], '2', '12', 'mine', 'def']
  assert found.rows[0].columns == {'answer': '1', 'level': 3}
  assert found.columns == ('answer',)  # that all rows have
  assert found.rows[3].place.endswith('rows.jsonl:4')


def test_prompts_without_room(tmp_path):
  rows = [{'prompt': 'abc'}, {'prompt': 'abcd'}]
  with pytest.raises(DataError, match=r'rows.jsonl:2: a prompt of 4 tokens .*: 3 tokens beside'):
    read(tmp_path, rows, room=3)
  found = read(tmp_path, rows, room=3, policy='drop')
  assert (len(found.rows), found.dropped, list(found.lengths)) == (1, 1, [3])
  with pytest.raises(DataError, match='no prompt in it'):
    read(tmp_path, rows, room=2, policy='drop')
  with pytest.raises(ConfigError, match='prompts are not cut'):
    read(tmp_path, rows, policy='truncate_left')


@pytest.mark.parametrize(
  ('row', 'told'),
  [
    ({'question': 'a'}, "neither 'prompt' nor 'messages'"),
    ({'prompt': 3}, "'prompt' is int"),
    ({'prompt': ''}, 'no tokens'),
    ({'messages': [{'role': 'assistant', 'content': 'x'}]}, 'no message before the answer'),
    ({'prompt': [USER, {'role': 'assistant', 'content': 'x'}]}, 'who is to speak next'),
    ({'messages': [{'role': 'robot', 'content': 'x'}]}, "role is 'robot'"),
  ],
)
def test_rows_that_hold_no_prompt(tmp_path, row, told):
  with pytest.raises(DataError, match=told):
    read(tmp_path, [{'prompt': 'fine'}, row])


def test_formats_that_hold_no_prompts(tmp_path):
  with pytest.raises(ConfigError, match='::text holds no prompts'):
    read(tmp_path, [{'text': 'a'}], form='text')


def test_the_fingerprint_is_that_of_ids_and_columns(tmp_path):
  base = read(tmp_path, [{'prompt': 'a', 'answer': 1}]).fingerprint
  assert read(tmp_path, [{'prompt': 'a', 'answer': 1}]).fingerprint == base
  assert read(tmp_path, [{'prompt': 'a', 'answer': 2}]).fingerprint != base
  assert read(tmp_path, [{'prompt': 'b', 'answer': 1}]).fingerprint != base
