"""evaluation/metrics/: JSON, tool calls, instructions that a program can check."""

import importlib.util
import json
import math
import pathlib
import time

import numpy as np
import pytest
from metric_cases import figure, results

from ftjax.evaluation.metrics import constraints, structure, tags, tool_calls
from ftjax.evaluation.metrics.constraints import Constraint
from ftjax.evaluation.metrics.tool_calls import Call
from ftjax.runtime.errors import ConfigError

# JSON


@pytest.mark.parametrize(
  ('text', 'gold', 'is_valid', 'is_equal'),
  [
    ('{"a": 1, "b": [2]}', {'b': [2], 'a': 1.0}, 1, 1),
    ('```json\n{"a": 1}\n```', {'a': 1}, 1, 1),
    ('{"a": true}', {'a': 1}, 1, 0),
    ('{"a": 1}', {'a': True}, 1, 0),
    ('[1, 2]', [2, 1], 1, 0),
    ('[1, 2]', [1, 2, 3], 1, 0),
    ('{"a": null}', {}, 1, 0),
    ('null', None, 1, 1),
    ('"\\u6771"', '東', 1, 1),
    ('{"a": [{"b": []}]}', {'a': [{'b': {}}]}, 1, 0),
    ('{"a": 1, "a": 1}', {'a': 1}, 0, 0),
    ('NaN', math.nan, 0, 0),
    ('', '', 0, 0),
    ('Here: {"a": 1}', {'a': 1}, 0, 0),
    ('[' * 100_000, [], 0, 0),
  ],
)
def test_json(text, gold, is_valid, is_equal):
  assert structure.json_values(text, gold) == {
    'json_valid': (float(is_valid),),
    'json_equal': (float(is_equal),),
  }


def test_schema():
  schema = {
    'type': 'object',
    'properties': {'age': {'type': 'integer', 'minimum': 0}},
    'required': ['age'],
  }
  for text, valid, accepted in [
    ('{"age": 3}', 1, 1),
    ('{"age": -3}', 1, 0),
    ('{}', 1, 0),
    ('{"age": 3', 0, 0),
    ('', 0, 0),
  ]:
    got = structure.schema_values(text, schema)
    assert got == {'json_valid': (float(valid),), 'schema_valid': (float(accepted),)}
  for bad, match in [
    ({'type': 3}, 'is not valid under'),
    ({'pattern': '('}, r'not a .regex.|unterminated'),
    ({'$ref': 'http://example.invalid/x'}, r'\$ref'),
    ('object', 'expected an object'),
  ]:
    with pytest.raises(ValueError, match=match):
      structure.check_schema(bad)
  structure.check_schema(True)


def test_a_schema_without_its_package_names_the_extra(monkeypatch):
  from ftjax.evaluation.metrics import packages

  structure._validator.cache_clear()
  monkeypatch.setattr(packages.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r'jsonschema.*"ftjax\[rewards\]"'):
    structure.check_schema({})


# Tool calls

PARIS = {'name': 'weather', 'arguments': {'city': 'Paris', 'days': 2}}
ROME = {'name': 'weather', 'arguments': {'city': 'Rome'}}


@pytest.mark.parametrize(
  'text',
  [
    json.dumps(PARIS),
    json.dumps([PARIS]),
    f'```json\n{json.dumps(PARIS)}\n```',
    f'<think>hm</think> I ask.\n<tool_call>\n{json.dumps(PARIS)}\n</tool_call>',
    f'<tool_call>{json.dumps(PARIS)}',
    f'[TOOL_CALLS] [{json.dumps(PARIS)}]',
    '<|python_tag|>{"name": "weather", "parameters": {"days": 2.0, "city": "Paris"}}',
    '<function=weather>{"city": "Paris", "days": 2}</function>',
    "[weather(city='Paris', days=2)]",
    '{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Paris\\",'
    ' \\"days\\": 2}"}}',
  ],
)
def test_calls_are_read_in_the_forms_of_many_models(text):
  (call,) = tool_calls.parse_calls(text)
  assert call == Call('weather', {'city': 'Paris', 'days': 2})
  wanted = tool_calls.read_expected([PARIS])
  assert tool_calls.call_values(text, wanted) == {
    'calls_right': (1.0,),
    'names_right': (1.0,),
    'calls_parsed': (1.0,),
    'calls': (1.0, 1.0, 1.0),
  }


@pytest.mark.parametrize(
  'text',
  [
    '<tool_call>{"name": "weather"',
    '<tool_call></tool_call>',
    '{"name": 3}',
    '{"city": "Paris"}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": "x"}',
    '[weather("Paris")]',
    '[weather(city=open("x"))]',
    '[weather(city={1, 2})]',
    '[weather(**{})]',
    '[f(x=' + '(' * 5000 + ')]',
    '[f(x=' + '1,' * 50_000 + ')]',
    '[TOOL_CALLS] Paris',
    '{' * 100_000,
  ],
)
def test_a_call_that_cannot_be_read_is_wrong_and_counted(text):
  with pytest.raises(ValueError):
    tool_calls.parse_calls(text)
  for wanted in ([], [PARIS]):
    got = tool_calls.call_values(text, tool_calls.read_expected(wanted))
    assert got['calls_right'] == got['names_right'] == got['calls_parsed'] == (0.0,)


@pytest.mark.parametrize('text', ['', 'It is sunny in Paris.', '[1] says so', 'f(x)', '東京'])
def test_a_text_without_a_call_is_right_where_none_is_wanted(text):
  assert tool_calls.parse_calls(text) == ()
  assert tool_calls.call_values(text, ())['calls_right'] == (1.0,)
  got = tool_calls.call_values(text, tool_calls.read_expected(PARIS))
  assert got['calls_right'] == (0.0,) and got['calls_parsed'] == (1.0,)


def test_several_calls_in_order_or_not():
  wanted = tool_calls.read_expected([PARIS, ROME])
  turned, short = json.dumps([ROME, PARIS]), json.dumps([PARIS, PARIS])
  assert tool_calls.call_values(turned, wanted)['calls_right'] == (1.0,)
  ordered = tool_calls.call_values(turned, wanted, is_ordered=True)
  assert ordered['calls_right'] == (0.0,) and ordered['names_right'] == (1.0,)
  assert tool_calls.call_values(json.dumps([PARIS, ROME]), wanted, True)['calls_right'] == (1.0,)
  assert tool_calls.call_values(short, wanted)['calls'] == (1.0, 2.0, 2.0)
  rows = results(*({'values': tool_calls.call_values(t, wanted)} for t in (turned, short, '')))
  assert figure(tool_calls.F1, rows) == pytest.approx(2 * 3 / (4 + 6))
  assert figure(tool_calls.RIGHT, rows) == pytest.approx(1 / 3)
  for metric in tool_calls.METRICS:
    assert np.isnan(figure(metric, []))


def test_allowed_values_of_the_leaderboard():
  wanted = tool_calls.read_expected([{'f': {'x': [1, 'one'], 'unit': ['m', '']}}])
  right = [{'x': 1}, {'x': 'one'}, {'x': 1.0, 'unit': 'm'}]
  wrong = [{}, {'x': True}, {'x': 1, 'unit': 'km'}, {'x': 1, 'y': 2}, {'unit': 'm'}]
  for cases, is_right in ((right, 1.0), (wrong, 0.0)):
    for arguments in cases:
      text = json.dumps({'name': 'f', 'arguments': arguments})
      assert tool_calls.call_values(text, wanted)['calls_right'] == (is_right,), text
  # A call without arguments is no name with allowed values.
  assert tool_calls.read_expected({'name': 'f'}) == tool_calls.read_expected([{'f': {}}])


def test_the_largest_matching_is_found_whatever_the_order():
  wide, narrow = {'f': {'x': [1, 2]}}, {'f': {'x': [1]}}
  one, two = ({'name': 'f', 'arguments': {'x': x}} for x in (1, 2))
  for gold in ([wide, narrow], [narrow, wide]):
    for given in ([one, two], [two, one]):
      values = tool_calls.call_values(json.dumps(given), tool_calls.read_expected(gold))
      assert values['calls'] == (2.0, 2.0, 2.0) and values['calls_right'] == (1.0,)


@pytest.mark.parametrize('bad', [3, None, 'f', [{'name': 1}], {'f': 3}, {'f': {'x': 3}}, [[]]])
def test_gold_calls_of_another_form(bad):
  with pytest.raises(ValueError, match='call'):
    tool_calls.read_expected(bad)


# Instructions


@pytest.mark.parametrize(
  ('constraint', 'follows', 'breaks'),
  [
    (('max_words', 3), 'one two - three', 'one two three four'),
    (('min_words', 2), "don't go", 'go - .'),
    (('words', 1), '東京', 'a b'),
    (('sentences', 2), 'It is 3.5 m. Good!', 'It is 3.5 m'),
    (('max_sentences', 1), 'Really?!', 'Yes. No.'),
    (('min_sentences', 2), '東京は大きい。そうです。', '東京は大きい。'),
    (('paragraphs', 2), 'a\n \n\nb\nc', 'a\nb'),
    (('bullets', 2), 'x:\n- a\n  * b\n--- \n-c', '- a\n- b\n- c'),
    (('max_characters', 4), ' 東京\U0001f600 \n', 'abcde'),
    (('include', 'Köln'), 'In KO\u0308LN!', 'Kölner Dom'),
    (('include', ('a b', 'c')), 'c, A\nB', 'a b'),
    (('include', '京'), '東京', '東'),
    (('exclude', 'cat'), 'concatenate', 'the CAT.'),
    (('exclude', ('x+y', 'z')), 'x-y', 'is x+y'),
    (('lowercase', None), 'straße 3!', 'a B'),
    (('uppercase', None), 'A 3!', 'a B'),
    (('starts_with', 'Dear Sir'), 'dear  sir, ...', 'Sir'),
    (('ends_with', 'the end.'), 'So it is "The end."', 'the end'),
    (('json', None), '```json\n[1]\n```', '[1'),
  ],
)
def test_constraints(constraint, follows, breaks):
  kind, value = constraint
  written = {'kind': kind, 'value': list(value) if isinstance(value, tuple) else value}
  (found,) = constraints.read_constraints([written])
  assert found.holds(follows) and not found.holds(breaks)
  assert not found.holds('') and not found.holds(' \n')


@pytest.mark.parametrize(
  ('value', 'match'),
  [
    (None, 'a list of one or more'),
    ([], 'a list of one or more'),
    (['max_words'], 'expected {"kind"'),
    ([{'kind': 'max_word', 'value': 3}], "did you mean 'max_words'|did you mean max_words"),
    ([{'kind': 'zzz'}], 'expected one of words'),
    ([{'kind': 'max_words'}], 'whole number'),
    ([{'kind': 'max_words', 'value': -1}], 'whole number'),
    ([{'kind': 'max_words', 'value': True}], 'whole number'),
    ([{'kind': 'max_words', 'value': 3, 'unit': 'x'}], "unknown keys \\['unit'\\]"),
    ([{'kind': 'include', 'value': []}], 'a text that is not blank'),
    ([{'kind': 'include', 'value': ['a', ' ']}], 'a text that is not blank'),
    ([{'kind': 'json', 'value': 1}], 'expected none'),
  ],
)
def test_constraints_that_cannot_be_read(value, match):
  with pytest.raises(ValueError, match=match):
    constraints.read_constraints(value)


def test_strict_and_loose_accuracy_by_hand():
  rules = constraints.read_constraints(
    [{'kind': 'starts_with', 'value': 'hello'}, {'kind': 'max_words', 'value': 2}]
  )
  cases = {
    'Hello you': ((1, 1), (2, 2)),
    'Sure:\nHello you': ((0, 1), (0, 2)),
    '**Hello** you all': ((0, 0), (0, 1)),
    'no': ((0, 0), (1, 1)),
    '': ((0, 0), (0, 0)),
  }
  rows = []
  for text, ((strict, loose), followed) in cases.items():
    got = constraints.constraint_values(text, rules)
    assert got['prompt_strict'] == (float(strict),), text
    assert got['prompt_loose'] == (float(loose),), text
    assert got['instructions'] == (*map(float, followed), 2.0), text
    rows.append({'values': got})
  rows = results(*rows)
  assert figure(constraints.PROMPT_STRICT, rows) == pytest.approx(1 / 5)
  assert figure(constraints.PROMPT_LOOSE, rows) == pytest.approx(2 / 5)
  assert figure(constraints.INSTRUCTION_STRICT, rows) == pytest.approx(3 / 10)
  assert figure(constraints.INSTRUCTION_LOOSE, rows) == pytest.approx(6 / 10)
  for metric in constraints.METRICS:
    assert np.isnan(figure(metric, []))


def test_loose_forms_equal_those_of_lm_eval():
  """lm-eval's own function, with a check of ours in the place of its English ones."""
  source = importlib.util.find_spec('lm_eval')
  if source is None:
    pytest.skip('lm_eval is not installed: pip install "ftjax[eval]"')
  path = pathlib.Path(source.origin).parent / 'tasks' / 'ifeval' / 'utils.py'
  lines = path.read_text().split('\n')
  # Its registry needs packages and files of English, which are not at hand.
  code = '\n'.join(line for line in lines if not line.startswith('from lm_eval'))

  class Check:
    def __init__(self, kind):
      self.kind = kind

    def build_description(self, value=None):
      self.value = value

    def get_instruction_args(self):
      return None

    def check_following(self, text):
      return Constraint(self.kind, self.value).holds(text)

  registry = type('Registry', (), {'INSTRUCTION_DICT': {k: Check for k in constraints.KINDS}})
  space = {'__name__': 'ifeval', 'instructions_registry': registry}
  exec(compile(code, 'ifeval', 'exec'), space)
  rng = np.random.default_rng(0)
  rules = [Constraint('max_words', 3), Constraint('starts_with', 'a'), Constraint('lowercase')]
  for _ in range(200):
    text = ''.join(rng.choice(['a ', 'B ', '*', '\n', '']) for _ in range(rng.integers(0, 9)))
    doc = {'key': 0, 'prompt': '', 'instruction_id_list': [r.kind for r in rules]}
    doc['kwargs'] = [{'value': r.value} for r in rules]
    wanted = space['process_results'](doc, [text])
    got = constraints.constraint_values(text, rules)
    for form in ('strict', 'loose'):
      assert got[f'prompt_{form}'] == (float(wanted[f'prompt_level_{form}_acc']),), text
    sums = [sum(wanted[f'inst_level_{form}_acc']) for form in ('strict', 'loose')]
    assert got['instructions'] == (*map(float, sums), 3.0), text


# Rubbish


@pytest.mark.parametrize(
  'text',
  [
    ' ' * 100_000,
    '.' * 100_000 + 'x',
    '."' * 50_000,
    '\n ' * 50_000,
    '- ' * 50_000,
    'PER' + ' ' * 100_000 + ';' * 1000,
    ('x' * 50 + ':') * 2000,
    '<tool_call>' * 10_000,
    '<function=f>' * 10_000,
    '*' * 100_000 + 'a',
    "a'" * 50_000,
    '\ud800\x00\u202e' * 1000,
    '[f(x=' + '-' * 15_000 + '1)]',
    '[f(x=' + 'not ' * 4000 + '1)]',
    '[' + 'a.' * 9000 + 'f(x=1)]',
    '[f(x=' + '{1:' * 6000 + ')]',
    '[f(x=' + '[' * 90 + ']' * 90 + ')]',
  ],
  ids=lambda text: f'{text[:8]!a}-{len(text)}',
)
def test_rubbish_is_read_in_linear_time(text):
  start = time.monotonic()
  values = tool_calls.call_values(text, tool_calls.read_expected([PARIS]))
  assert values['calls_right'] == (0.0,)
  structure.json_values(text, {})
  list(tags.parse_entities(text))
  for kind, row in constraints.KINDS.items():
    value = {'number': 3, 'text': 'a b', 'texts': ('a b', 'c'), 'nothing': None}[row.takes]
    constraints.constraint_values(text, [Constraint(kind, value)])
  assert time.monotonic() - start < 10  # all take 0.1 s; squares of the length would take minutes
