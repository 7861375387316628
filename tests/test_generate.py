"""Prompts of generate, and the conversation on the terminal."""

import builtins
import functools
import io
import json
import logging
import sys

import jax
import numpy as np
import pytest
import tiny_model

from ftjax.data import synthetic
from ftjax.data.formats import Chat
from ftjax.generation.completion import Completion
from ftjax.hf import export
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.serving import generator, terminal_chat
from ftjax.serving.terminal_chat import Reply, TerminalChat

USER = {'role': 'user', 'content': 'q'}
SAID = {'role': 'assistant', 'content': 'a'}


# --prompts


def test_an_answer_of_the_row_is_kept_with_the_completion(model):
  """S26."""
  rows = [
    {'prompt': 'q', 'answer': '42'},
    {'messages': [USER], 'answer': ['1'], 'id': 3},
    {'prompt': [USER], 'label': None},
  ]
  placed = [(f'f:{i}', row) for i, row in enumerate(rows, 1)]
  out = list(model(max_tokens=4).answer_rows(placed))
  assert [{k: v for k, v in r.items() if k != 'completion'} for r in out] == rows
  assert len({r['completion'] for r in out}) == 1  # three ways to ask the same


@pytest.mark.parametrize(
  ('row', 'reason'),
  [
    ({'messages': [USER, SAID]}, '"messages" ends with the assistant'),
    ({'prompt': [USER, SAID]}, '"prompt" ends with the assistant'),
    ({'messages': [USER, SAID], 'answer': 'a'}, 'ends with the assistant'),
    ({'prompt': 'q', 'completion': 'a'}, 'has a "completion".*row for training'),
    ({'prompt': [USER], 'completion': [SAID]}, 'has a "completion"'),
    ({'messages': [USER], 'completion': ''}, 'has a "completion"'),
    ({'prompt': 'other', 'messages': [USER]}, 'all hold a prompt'),
    ({'answer': '42'}, "neither 'prompt' nor 'messages'"),
    ({'prompt': ' '}, '"prompt" is empty'),
    ({'messages': []}, 'list of messages is empty'),
    ({'messages': 'q'}, 'expected a list of messages'),
    ({'messages': [{'role': 'boss', 'content': 'x'}]}, "role is 'boss'"),
    ({'prompt': 'q', 'tools': 3}, "'tools' is no list"),
    ({'prompt': 'q', 'system': 3}, "'system' is int"),
    ({'messages': [{'role': 'system', 'content': 's'}, USER], 'system': 't'}, 'keep one of them'),
  ],
)
def test_rows_that_are_no_prompt_are_named(tmp_path, row, reason):
  path = tmp_path / 'p.jsonl'
  path.write_text(json.dumps({'prompt': 'fine'}) + '\n\n' + json.dumps(row) + '\n')
  with pytest.raises(DataError, match=rf'p\.jsonl:3: .*{reason}'):
    generator.read_prompts(str(path))


def test_columns_of_the_conversation_are_honoured():
  tools = [{'type': 'function', 'function': {'name': 'add'}}]
  system = {'role': 'system', 'content': 's'}
  for value in (tools, json.dumps(tools)):
    found = generator.read_prompt({'prompt': 'q', 'system': 's', 'tools': value}, True)
    assert found == Chat((system, USER), tuple(tools))
  assert generator.read_prompt({'prompt': 'q'}, False) == 'q'
  with pytest.raises(ValueError, match="'tools' belongs to a conversation"):
    generator.read_prompt({'prompt': 'q', 'tools': tools}, False)


def test_lines_of_text_are_prompts(tmp_path):
  path = tmp_path / 'p.txt'
  path.write_bytes('\ufeffone\r\n\n two\n'.encode())
  assert generator.read_prompts(str(path)) == [
    (f'{path}:1', {'prompt': 'one'}),
    (f'{path}:3', {'prompt': ' two'}),
  ]
  for content, message in (
    (b'', 'no row in it'),
    (b'\xff', 'not UTF-8'),
    (b'{', ':1: not JSON'),
  ):
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
      generator.read_prompts(str(path))
  with pytest.raises(DataError, match='No such file'):
    generator.read_prompts(str(tmp_path / 'none'))


# The model


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """Makes a Generator of a random model with 96 positions."""
  arch = tiny_model.decoder(
    vocab_size=synthetic.VOCAB_SIZE,
    model_dim=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_len=96,
  )
  folder = tmp_path_factory.mktemp('model') / 'm'
  export.export(
    tiny_model.init(arch),
    arch,
    folder,
    source_config=None,
    tokenizer_files=synthetic.byte_tokenizer(),
    dtype=np.float32,
    stop_ids=(2,),
  )
  # One of each: every Generator compiles programs of its own.
  made_once = functools.cache(lambda **s: generator.Generator(str(folder), generator.Settings(**s)))

  def get(**settings):
    found = made_once(**settings)
    jax.set_mesh(jax.tree.leaves(found._params)[0].sharding.mesh)  # conftest sets another one
    return found

  return get


def test_a_prompt_that_is_too_long_is_named_before_any_is_answered(model):
  rows = [('f:1', {'prompt': 'q'}), ('f:2', {'prompt': 'q' * 95})]
  for settings, named in (({}, '=1 more'), ({'max_tokens': 50}, '=50 more')):
    with pytest.raises(DataError, match=rf'f:2: .*--max_tokens{named}.*96 positions'):
      next(model(**settings).answer_rows(rows))


def test_a_conversation_that_is_too_long_is_reported_and_the_chat_continues(model, capsys):
  chat = TerminalChat(model(max_tokens=4).respond)
  chat.run(lines('hello', 'x' * 90, 'hi'))
  assert 'the model was made for 96 positions: /reset begins a new one' in capsys.readouterr().err
  questions = [m['content'] for m in chat.messages if m['role'] == 'user']
  assert questions == ['hello', 'hi']


def test_a_completion_that_ends_at_a_limit_is_marked(model):
  question = [{'role': 'user', 'content': 'hello'}]
  shown = []
  reply = model(max_tokens=4).respond(question, 0, shown.append)
  assert reply.hint == '[cut after 4 tokens: --max_tokens]' and shown
  assert 'the context is full' in model(max_tokens=500).respond(question, 0, shown.append).hint


def test_a_system_message_reaches_the_model_or_is_refused(model):
  plain, told = model(), model(system='Be brief.')
  assert len(told.encode_text('q')) > len(plain.encode_text('q'))
  assert told.encode_text('q') == plain.encode({'prompt': 'q', 'system': 'Be brief.'})
  with pytest.raises(ConfigError, match='--system needs a model with a chat template'):
    model(system='Be brief.', raw=True)


def test_rows_keep_their_random_numbers_in_any_batch(model, monkeypatch):
  rows = [(f'f:{i}', {'prompt': 'q' * i}) for i in range(1, 6)]
  for size in (2, 5):
    answers, seen = model(batch_size=size, seed=7), []

    def generate(params, prompts, *, seed, prompt_ids, seen=seen, own=answers._engine, **_):
      seen += [(seed, i, len(p)) for i, p in zip(prompt_ids, prompts, strict=True)]
      stop = own.stop_ids[0]
      return [Completion([stop], np.zeros(1, np.float32), False) for _ in prompts]

    monkeypatch.setattr(answers._engine, 'generate_at_once', generate)
    assert [r['completion'] for r in answers.answer_rows(rows)] == [''] * 5
    lengths = [len(answers.encode(row)) for _, row in rows]
    assert seen == [(7, i, n) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(
  ('text', 'stops', 'shown'),
  [
    ('caf\ufffd', (), 'caf'),
    ('one STO', ('STOP',), 'one '),
    ('one STOX', ('STOP',), 'one STOX'),
    ('a##', ('###', '#!'), 'a'),
    ('plain', ('STOP',), 'plain'),
  ],
)
def test_what_the_next_token_may_change_is_not_shown_yet(text, stops, shown):
  assert generator._settled(text, stops) == shown


# The conversation


def lines(*typed):
  """A `read` that gives these lines, or raises them, then the end of input."""
  left = [*typed, EOFError()]

  def read(prompt):
    line = left.pop(0)
    if isinstance(line, str):
      return line
    raise line

  return read


def echo(messages, number, show):
  """Answers with the number and the question, in two parts."""
  text = f'{number}:{messages[-1]["content"]}'
  show(text[:1])
  return Reply(text)


def test_questions_and_answers_are_all_that_is_printed(capsys):
  chat = TerminalChat(echo)
  chat.run(lines('hello', '  ', 'again'))
  out, err = capsys.readouterr()
  assert (out, err) == ('0:hello\n1:again\n', '')
  assert [m['content'] for m in chat.messages] == ['hello', '0:hello', 'again', '1:again']


def test_reset_keeps_the_system_message(capsys):
  chat = TerminalChat(echo, system='Be brief.')
  system = {'role': 'system', 'content': 'Be brief.'}
  chat.run(lines('a', '/reset', 'b'))
  assert chat.messages == [
    system,
    {'role': 'user', 'content': 'b'},
    {'role': 'assistant', 'content': '1:b'},
  ]
  chat.run(lines('/reset'))
  assert chat.messages == [system]


def test_save_writes_a_row_of_training_data_and_overwrites_only_its_own(tmp_path, capsys):
  file, other = tmp_path / 'my chat.jsonl', tmp_path / 'other'
  other.write_text('mine')
  chat = TerminalChat(echo, system='s')
  chat.run(lines('é', f'/save {file}', 'b', f'/save {file}', f'/save {other}', '/save'))
  assert json.loads(file.read_text()) == {'messages': chat.messages} and 'é' in file.read_text()
  assert other.read_text() == 'mine'
  err = capsys.readouterr().err
  assert f'{file}: 3 messages' in err and f'{file}: 5 messages' in err
  assert 'exists and is not overwritten' in err and 'needs the name of a file' in err
  chat.run(lines(f'/save {tmp_path}/none/x', 'c'))
  assert 'No such file' in capsys.readouterr().err and len(chat.messages) == 7


def test_exit_help_and_unknown_commands(capsys):
  chat = TerminalChat(echo)
  chat.run(lines('/help', '/quit', '/reset now', '/exit', 'never'))
  err = capsys.readouterr().err
  assert all(name in err for name in ('/reset', '/save FILE', '/exit', 'Ctrl-C'))
  assert 'unknown command /quit' in err and '/reset takes no argument' in err
  assert chat.messages == []
  chat.run(lines('/etc/hosts is a file', ' /exit'))  # no commands
  assert [m['content'] for m in chat.messages[::2]] == ['/etc/hosts is a file', ' /exit']


def interrupted(shown):
  def respond(messages, number, show):
    if number == 0:
      show(shown)
      raise KeyboardInterrupt
    return Reply('done')

  return respond


def test_ctrl_c_stops_the_answer_and_keeps_what_was_shown(capsys):
  chat = TerminalChat(interrupted('half an'), is_terminal=True)
  chat.run(lines('q', 'more'))
  assert [m['content'] for m in chat.messages] == ['q', 'half an', 'more', 'done']
  assert '[stopped]' in capsys.readouterr().err


def test_ctrl_c_before_the_first_word_drops_the_question(capsys):
  chat = TerminalChat(interrupted(''), is_terminal=True)
  chat.run(lines('q', 'more'))
  assert [m['content'] for m in chat.messages] == ['more', 'done']
  assert 'no answer' in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_prints_how_to_end(capsys):
  chat = TerminalChat(echo, is_terminal=True)
  chat.run(lines(KeyboardInterrupt(), 'q', KeyboardInterrupt()))
  assert capsys.readouterr().err.count('Ctrl-D or /exit ends the chat') == 2
  assert len(chat.messages) == 2


def test_ctrl_c_ends_a_script(capsys):
  for read in (lines('q'), lines(KeyboardInterrupt())):
    with pytest.raises(KeyboardInterrupt):
      TerminalChat(interrupted('half')).run(read)


def test_a_conversation_that_cannot_be_rendered_is_reported(capsys):
  def respond(messages, number, show):
    if 'bad' in messages[-1]['content']:
      raise DataError('the template refuses it')
    return Reply(f'{len(messages)}', '[cut after 1 tokens]')

  chat = TerminalChat(respond)
  chat.run(lines('bad', 'good'))
  out, err = capsys.readouterr()
  assert out == '1\n' and err == 'error: the template refuses it\n[cut after 1 tokens]\n'


def test_bytes_that_are_no_text_are_replaced():
  chat = TerminalChat(echo)
  chat.run(lines('caf\udce9'))
  assert chat.messages[0]['content'] == 'caf\ufffd'


class FakeReadline:
  def __init__(self):
    self.calls = []

  def __getattr__(self, name):
    return lambda *arguments: self.calls.append((name, *arguments))


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def typed(monkeypatch):
  """`typed('a', 'b')`: what a person types on a terminal."""

  def give(*text):
    monkeypatch.setattr(sys, 'stdin', Terminal())
    monkeypatch.setattr(builtins, 'input', lines(*text))
    monkeypatch.setattr(TerminalChat.run, '__defaults__', (builtins.input,))

  return give


def test_the_history_is_read_and_written_also_after_an_error(typed, monkeypatch, tmp_path):
  fake = FakeReadline()
  monkeypatch.setattr(terminal_chat, '_readline', lambda: fake)
  (tmp_path / 'h').write_text('earlier')
  typed('a', RuntimeError())
  with pytest.raises(RuntimeError):
    terminal_chat.run(echo, history=str(tmp_path / 'h'))
  assert fake.calls == [
    ('read_history_file', str(tmp_path / 'h')),
    ('set_history_length', 1000),
    ('write_history_file', str(tmp_path / 'h')),
  ]


def test_a_history_that_cannot_be_kept_does_not_end_the_chat(typed, tmp_path, capsys):
  readline = pytest.importorskip('readline')
  del readline
  typed('a')
  terminal_chat.run(echo, history=str(tmp_path / 'no folder' / 'h'))
  out, err = capsys.readouterr()
  assert '0:a' in out and '--history=' in err


def test_a_python_without_readline_chats_all_the_same(typed, monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(sys.modules, 'readline', None)
  typed('a')
  terminal_chat.run(echo, history=str(tmp_path / 'h'))
  assert '0:a' in capsys.readouterr().out


def test_a_script_on_standard_input_needs_no_terminal(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('hello\n/reset\nagain'))
  monkeypatch.setattr(terminal_chat, '_readline', lambda: pytest.fail('no terminal is there'))
  terminal_chat.run(echo)
  assert capsys.readouterr().out == '> 0:hello\n> > 1:again\n> '


def test_nothing_is_logged_between_question_and_answer(model, capsys, caplog):
  chat = TerminalChat(model(max_tokens=4).respond)
  capsys.readouterr()
  with caplog.at_level(logging.WARNING):
    chat.run(lines('hello', 'again'))
  assert not caplog.records
  out, err = capsys.readouterr()
  answers = [m['content'] for m in chat.messages if m['role'] == 'assistant']
  assert out.count('\n') == 2 and all(a in out for a in answers)
  assert err == '[cut after 4 tokens: --max_tokens]\n' * 2
