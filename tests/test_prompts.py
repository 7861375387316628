"""Prompts with columns: what of a row is read, what is paid for, what is too long."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tokenizer import tiny_files

from ftjax.data import encode, prompts, synthetic
from ftjax.data.formats import Chat
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError

TOKENIZER = Tokenizer(synthetic.byte_tokenizer())
USER = {'role': 'user', 'content': 'hi'}


def read(tmp_path, rows, room=100, policy='error', form=None, tokenizer=TOKENIZER, **policies):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return prompts.read(Spec(str(path), form), tokenizer, room, policy, **policies)


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


TEMPLATE = (
  '{% if tools %}<|im_start|>{{ tools | tojson }}<|im_end|>{% endif %}{% if style is defined %}'
  '<|im_start|>{{ style }}<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n'
  '{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n'
  '{% endif %}'
)
SHOWS_ALL = Tokenizer(tiny_files(TEMPLATE))
TOOLS = [{'type': 'function', 'function': {'name': 'add'}}]


def test_columns_of_the_conversation_are_rendered(tmp_path):
  kwargs = {'style': 'dry'}
  rows = [
    {'prompt': [USER], 'system': 'S', 'tools': TOOLS, 'chat_template_kwargs': kwargs},
    {'messages': [{'role': 'system', 'content': 'S'}, USER], 'tools': json.dumps(TOOLS),
     'chat_template_kwargs': json.dumps(kwargs)},
    {'conversations': [{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'yo'}],
     'system': 'S', 'tools': TOOLS, 'chat_template_kwargs': kwargs},
    {'instruction': 'hi', 'output': 'yo', 'input': '', 'system': 'S', 'tools': TOOLS,
     'chat_template_kwargs': kwargs},
  ]  # fmt: skip
  found = read(tmp_path, rows, tokenizer=SHOWS_ALL).rows
  text = SHOWS_ALL.decode(found[0].ids, skip_special=False)
  assert '"name": "add"' in text and 'dry' in text and 'system\nS' in text
  for prompt in found:
    assert prompt.ids == found[0].ids
    assert prompt.text == [{'role': 'system', 'content': 'S'}, USER]
  # What renders the prompt again stays with the row, the prompt itself does not.
  assert set(found[3].columns) == {'output', 'tools', 'chat_template_kwargs', 'answer'}
  assert [p.columns.get('answer') for p in found] == [None, None, 'yo', 'yo']


def test_content_that_the_template_does_not_show(tmp_path):
  rows = [
    {'prompt': [USER]},
    {'prompt': [USER], 'tools': TOOLS},
    {'prompt': [USER | {'mood': 'x'}]},
  ]
  with pytest.raises(
    DataError, match=r"rows.jsonl:2: .*does not render tools.*on_unrendered='warn'"
  ):
    read(tmp_path, rows)
  found = read(tmp_path, rows, on_unrendered='warn')
  assert (found.unrendered, len(found.rows)) == (2, 3)
  assert found.rows[0].ids == found.rows[1].ids == found.rows[2].ids
  with pytest.raises(DataError, match='does not render'):  # another policy than that of bad rows
    read(tmp_path, rows, on_bad_row='drop')


def test_bad_rows_are_left_out_counted_and_listed(tmp_path, caplog):
  caplog.set_level('INFO')
  rows = [{'prompt': 'a'}, {'prompt': 3}, {'prompt': 4}, {'question': 'a'}, {'prompt': 'b'}]
  found = read(tmp_path, rows, on_bad_row='drop')
  assert ([p.text for p in found.rows], found.bad) == (['a', 'b'], 3)
  assert [(r['rows'], r['places']) for r in found.bad_reasons] == [
    (2, [[0, 2], [0, 3]]), (1, [[0, 4]]),
  ]  # fmt: skip
  assert "rows.jsonl:2: 'prompt' is int" in caplog.text and '(2 rows, also' in caplog.text
  assert 'columns for rewards: none' in caplog.text
  with pytest.raises(DataError, match=r'3 of 5:') as error:
    read(tmp_path, rows)
  assert str(error.value).count("'prompt' is int") == 1
  with pytest.raises(DataError, match=r'no prompt in it .* 1 could not be used'):
    read(tmp_path, [{'prompt': 3}], on_bad_row='drop')
  for key, value in (('on_bad_row', 'warn'), ('on_unrendered', 'drop')):
    with pytest.raises(ConfigError, match=f'data.{key}='):
      read(tmp_path, rows, **{key: value})


def test_columns_that_are_no_json_reach_no_reward(tmp_path, caplog):
  table = pa.table({'prompt': ['a'], 'image': [b'\x89'], 'when': [datetime.date(2024, 5, 1)]})
  pq.write_table(table, tmp_path / 'a.parquet')
  found = prompts.read(Spec(str(tmp_path / 'a.parquet')), TOKENIZER, 9, 'error')
  assert found.rows[0].columns == {'when': '2024-05-01'} and found.unread == ('image',)
  assert 'columns not read: image' in caplog.text


def test_prompts_without_room(tmp_path):
  rows = [{'prompt': 'abc'}, {'prompt': 'abcd'}]
  with pytest.raises(
    DataError, match=r'rows.jsonl:2: a prompt of 4 tokens, and rollout.max_tokens leaves 3'
  ):
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
    (
      {'prompt': [USER, {'role': 'assistant', 'content': 'x'}]},
      'expected one that the assistant answers',
    ),
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
