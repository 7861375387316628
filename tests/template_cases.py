"""Conversations and settings of the template matrix: for test_template_matrix.py and for
parity/make_template_goldens.py, which runs without ftjax's models."""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

from tiny_tokenizer import tiny_files

TEMPLATES = Path(__file__).parent / 'templates'
GOLDEN = Path(__file__).parent / 'parity' / 'golden' / 'templates.json'


class Settings(NamedTuple):
  """What is known of a template by reading it; what probing must find out by itself.

  bos, eos: texts. developer: role of a developer message. reasoning: key, or 'parts'. arguments:
  'object', 'text', or 'any' as the row has them. tools: 'function', 'bare' or 'any'.
  """

  bos: str = '<s>'
  eos: str = '</s>'
  developer: str = 'developer'
  reasoning: str = ''
  arguments: str = 'any'
  tools: str = 'any'


CHATML = {'bos': '<|im_start|>', 'eos': '<|im_end|>'}
LLAMA = {'bos': '<|begin|>', 'eos': '<|eot_id|>'}
DEEPSEEK = ('<\uff5cbegin\uff5c>', '<\uff5cend\uff5c>')
SYSTEM = {'developer': 'system'}
OBJECT = {'arguments': 'object'}
FUNCTION = {'tools': 'function'}
THINKS = {'reasoning': 'reasoning_content'}

SETTINGS = {
  'llama2': Settings(**SYSTEM),
  'vicuna': Settings(**SYSTEM),
  'llama3': Settings(**LLAMA),
  'llama3_1': Settings(**LLAMA, **OBJECT),
  'llama3_2': Settings(**LLAMA, **OBJECT),
  'llama4': Settings('<|begin|>', '<|eot|>', **OBJECT),
  'qwen2_5': Settings(**CHATML, **SYSTEM, **OBJECT),
  'qwen3': Settings(**CHATML, **SYSTEM, **THINKS),
  'qwen3_coder': Settings(**CHATML, **OBJECT),
  'qwen3_5': Settings(**CHATML, **SYSTEM, **THINKS, **OBJECT),
  'qwq': Settings(**CHATML),
  'gemma2': Settings('<bos>', '<eos>'),
  'gemma3': Settings('<bos>', '<eos>', **SYSTEM),
  'mistral_v1': Settings(),
  'mistral_v3': Settings(**SYSTEM, **OBJECT, **FUNCTION),
  'mistral_v7': Settings(**SYSTEM),
  'mistral_tekken': Settings(**SYSTEM),
  'magistral': Settings(reasoning='parts', **SYSTEM),
  'phi3': Settings('<s>', '<|endoftext|>', **SYSTEM),
  'phi4': Settings(**CHATML, **SYSTEM),
  'phi4_mini': Settings('<s>', '<|endoftext|>', **OBJECT),
  'smollm2': Settings(**CHATML),
  'smollm3': Settings(**CHATML, **SYSTEM, **OBJECT),
  'deepseek_v2': Settings(**SYSTEM),
  'deepseek_v3': Settings(*DEEPSEEK, **SYSTEM, arguments='text'),
  'deepseek_r1': Settings(*DEEPSEEK, **SYSTEM),
  'deepseek_v31': Settings(*DEEPSEEK, **SYSTEM, **FUNCTION),
  'command_r': Settings('<BOS>', '<|END_OF_TURN_TOKEN|>', **SYSTEM, **OBJECT, tools='bare'),
  'command_a': Settings('<BOS>', '<|END_OF_TURN_TOKEN|>', **SYSTEM, **THINKS, **OBJECT, **FUNCTION),
  'granite3': Settings('<|endoftext|>', '<|end_of_text|>', **SYSTEM, **OBJECT),
  'granite3_3': Settings('<|endoftext|>', '<|end_of_text|>', **OBJECT),
  'gpt_oss': Settings('<|endoftext|>', '<|return|>', reasoning='thinking', **OBJECT, **FUNCTION),
  'chatml': Settings(**CHATML),
  'zephyr': Settings(**SYSTEM),
  'hermes': Settings(**CHATML, **SYSTEM, **OBJECT),
  'glm4': Settings('<|endoftext|>', '<|endoftext|>', **OBJECT, **FUNCTION),
  'glm4_5': Settings('<|endoftext|>', '<|eot|>', **SYSTEM, **THINKS, **OBJECT),
  'internlm2': Settings('<s>', '<|im_end|>'),
  'falcon3': Settings('<s>', '<|endoftext|>', **SYSTEM, **OBJECT),
  'olmo2': Settings('<|endoftext|>', '<|endoftext|>', **SYSTEM),
  'olmo3': Settings('<|endoftext|>', '<|im_end|>', **SYSTEM, **OBJECT),
  'yi': Settings(**CHATML, **SYSTEM),
  'nemotron': Settings('<extra_id_3>', '<extra_id_2>', **SYSTEM),
  'exaone': Settings('[BOS]', '[|endofturn|]'),
  'kimi_k2': Settings('[BOS]', '<|im_end|>'),
  'openchat': Settings('<s>', '<|end_of_turn|>'),
  'minimax': Settings(**CHATML, **OBJECT, **FUNCTION),
  'jamba': Settings('<s>', '<|eom|>', **OBJECT, **FUNCTION),
}


def source(name: str, tagged: bool = False) -> str:
  """Returns a template, with or without its generation tags."""
  text = (TEMPLATES / f'{name}.jinja').read_text()
  return text if tagged else re.sub(r'\{%-? (?:end)?generation -?%\}', '', text)


@functools.cache
def specials() -> tuple[str, ...]:
  """Returns all special tokens of all templates."""
  found = {text for s in SETTINGS.values() for text in (s.bos, s.eos)}
  found |= {'<|eot_id|>', '<end_of_turn>', '<|end|>', '<|call|>', '<start_of_turn>', '<|image|>'}
  found -= {'<|endoftext|>', '<|im_start|>', '<|im_end|>'}
  return tuple(sorted(found))


def files(name: str, tagged: bool = False) -> dict[str, bytes]:
  """Returns a tokenizer folder: bytes and special tokens, the template, BOS and EOS."""
  settings = SETTINGS[name]
  found = tiny_files(
    source(name, tagged),
    bos=settings.bos,
    eos=settings.eos,
    extra_special=specials(),
    vocab_size=256 + 3 + len(specials()),
  )
  if name == 'phi3':  # two tokens end a turn, as its generation_config.json says
    ids = {t['content']: t['id'] for t in json.loads(found['tokenizer.json'])['added_tokens']}
    stops = [ids['<|endoftext|>'], ids['<|end|>']]
    found['generation_config.json'] = json.dumps({'eos_token_id': stops}).encode()
  return found


def _call(i, name, arguments):
  return {
    'id': f'call0000{i}',
    'type': 'function',
    'function': {'name': name, 'arguments': arguments},
  }


def _user(text):
  return {'role': 'user', 'content': text}


def _said(text, **more):
  return {'role': 'assistant', 'content': text, **more}


def _result(i, text, name='weather'):
  return {'role': 'tool', 'content': text, 'tool_call_id': f'call0000{i}', 'name': name}


_SYSTEM = {'role': 'system', 'content': 'Be sysbrief.'}
_WEATHER = {
  'name': 'weather',
  'description': 'Gives abouttool.',
  'parameters': {
    'type': 'object',
    'properties': {
      'city': {'type': 'string', 'description': 'Its cityhint'},
      'unit': {'type': 'string', 'enum': ['celsius', 'kelvin']},
    },
    'required': ['city'],
  },
}
_TOOLS = [{'type': 'function', 'function': _WEATHER}]
_PARIS = {'city': 'Pariscity', 'unit': 'kelvin'}
_NESTED = {'city': 'Pariscity', 'days': [1, 2.5], 'more': {'wind': True, 'rain': 'rainvalue'}}

# name -> (messages, tools, template arguments)
CONVERSATIONS = {
  'plain': ([_user('Hi useralpha'), _said('Hello botalpha')], None, None),
  'turns': (
    [_user('q1 u'), _said('a1 b'), _user('q2 u'), _said('a2 b'), _user('q3 u'), _said('a3 b')],
    None,
    None,
  ),
  'system': ([_SYSTEM, _user('Hi'), _said('Hello')], None, None),
  'system turns': ([_SYSTEM, _user('q1'), _said('a1'), _user('q2'), _said('a2')], None, None),
  'developer': (
    [{'role': 'developer', 'content': 'Only devfrench.'}, _user('Hi'), _said('Bonjour')],
    None,
    None,
  ),
  'tools': ([_user('Hi'), _said('Hello')], _TOOLS, None),
  'call': (
    [
      _user('How is it?'),
      _said('', tool_calls=[_call(1, 'weather', _PARIS)]),
      _result(1, 'resultsun'),
      _said('It is sunny.'),
    ],
    _TOOLS,
    None,
  ),
  'call as text': (
    [
      _user('How is it?'),
      _said('', tool_calls=[_call(1, 'weather', '{"city": "Pariscity", "unit": "kelvin"}')]),
      _result(1, 'resultsun'),
      _said('It is sunny.'),
    ],
    _TOOLS,
    None,
  ),
  'parallel calls': (
    [
      _user('How is it?'),
      _said('', tool_calls=[_call(1, 'weather', _PARIS), _call(2, 'weather', {'city': 'Rome'})]),
      _result(1, 'resultsun'),
      _result(2, 'resultrain'),
      _said('It is sunny and wet.'),
    ],
    _TOOLS,
    None,
  ),
  'call with words': (
    [_SYSTEM, _user('How?'), _said('I look botwords.', tool_calls=[_call(1, 'weather', _PARIS)])],
    _TOOLS,
    None,
  ),
  'reasoning': ([_user('12 + 30'), _said('42', reasoning_content='thoughtone')], None, None),
  'reasoning turns': (
    [
      _user('q1'),
      _said('a1', reasoning='thoughtone'),
      _user('q2'),
      _said('a2', reasoning='thoughttwo'),
    ],
    None,
    None,
  ),
  'reasoning call': (
    [
      _user('How is it?'),
      _said('', thinking='thoughtone', tool_calls=[_call(1, 'weather', _PARIS)]),
      _result(1, 'resultsun'),
      _said('It is sunny.'),
    ],
    _TOOLS,
    None,
  ),
  'reasoning inside': (
    [
      _user('q1'),
      _said('<think>\nthoughtone\n</think>\n\na1'),
      _user('q2'),
      _said('<think>\nthoughttwo\n</think>\n\na2'),
    ],
    None,
    None,
  ),
  'empty user': ([_user(''), _said('Hello')], None, None),
  'null content': (
    [_user('How is it?'), _said(None, tool_calls=[_call(1, 'weather', _PARIS)])],
    _TOOLS,
    None,
  ),
  'parts': (
    [
      _user([{'type': 'text', 'text': 'partone '}, {'type': 'text', 'text': 'parttwo'}]),
      _said([{'type': 'text', 'text': 'Hello'}]),
    ],
    None,
    None,
  ),
  'white space': ([_user('  a\n\nb \n'), _said(' c\n\td ')], None, None),
  'unicode': (
    [_SYSTEM | {'content': '再见 sys /no_think'}, _user('é 😀 {{ x }} "q"'), _said('日本 <b>')],
    None,
    None,
  ),
  'nested': (
    [
      _user('How is it?'),
      _said('', tool_calls=[_call(1, 'weather', _NESTED)]),
      _result(1, '{"sky": "resultsun"}'),
      _said('Sunny.'),
      _user('And now?'),
      _said('Still.'),
    ],
    [_WEATHER],
    None,
  ),
  'no thinking': ([_user('q1'), _said('a1')], None, {'enable_thinking': False}),
}


def leaf_words(value) -> set[str]:
  """Returns the words of all texts and the names of all keys in a value."""
  if isinstance(value, str):
    try:
      found = json.loads(value)
    except ValueError:
      found = None
    if isinstance(found, dict):
      return leaf_words(found)
    return {w for w in re.split(r'[\s"{}:,<>/\[\]]+', value) if w}
  if isinstance(value, dict):
    return {w for k, v in value.items() for w in {k} | leaf_words(v)}
  if isinstance(value, list | tuple):
    return {w for v in value for w in leaf_words(v)}
  return set()
