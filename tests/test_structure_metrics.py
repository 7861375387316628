"""evaluation/metrics/: JSON, tool calls, instructions, named entities, several samples a prompt."""

import importlib.util
import itertools
import json
import math
import pathlib
import time

import numpy as np
import pytest
from metric_cases import check_resamples, figure, results

from ftjax.evaluation.metric import Metric
from ftjax.evaluation.metrics import constraints, samples, structure, tags, tool_calls
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


# Named entities

TYPES = ('LOC', 'ORG', 'PER')


def _random_tags(rng, n, kinds=TYPES):
  choices = ['O', *(f'{p}-{k}' for p in 'BI' for k in kinds)]
  return rng.choice(choices, n).tolist()


def _tagged(pairs, is_strict=False):
  return results(
    *(
      {
        'values': tags.entity_values(
          tags.tag_spans(found, is_strict), tags.tag_spans(gold, is_strict), TYPES
        ),
        'prediction': str(i),
      }
      for i, (gold, found) in enumerate(pairs)
    )
  )


def _tag_cases():
  rng = np.random.default_rng(0)
  lengths = [0, 1, 2, 5, 9, 30]
  noisy = [(_random_tags(rng, n), _random_tags(rng, n)) for n in lengths * 2]
  near = [(g, [t if rng.random() < 0.8 else 'O' for t in g]) for g, _ in noisy]
  return {
    'noisy': noisy,
    'near': near,
    'nothing_found': [(['B-PER', 'I-PER'], ['O', 'O'])],
    'nothing_there': [(['O', 'O'], ['B-PER', 'I-PER'])],
    'neither': [(['O'], ['O'])],
    'all_right': [(['B-PER', 'B-PER', 'I-LOC'],) * 2],
  }


def _seqeval_figures(pairs, is_strict):
  """[precision, recall, F1, macro F1] by seqeval; None where nothing is divided by nothing."""
  from seqeval import metrics as seqeval
  from seqeval.scheme import IOB2

  gold, found = zip(*pairs, strict=True)
  options = {'mode': 'strict', 'scheme': IOB2} if is_strict else {}
  scores = [seqeval.precision_score, seqeval.recall_score, seqeval.f1_score]
  figures = [score(gold, found, average='micro', **options) for score in scores]
  figures.append(seqeval.f1_score(gold, found, average='macro', **options))
  counts = [sum(len(tags.tag_spans(t, is_strict)) for t in tagged) for tagged in (found, gold)]
  bottoms = [*counts, sum(counts), sum(counts)]
  return [float(f) if b else None for f, b in zip(figures, bottoms, strict=True)]


_ENTITY_METRICS = (tags.PRECISION, tags.RECALL, tags.F1, tags.MACRO_F1)
_GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'entities.json'


@pytest.mark.parametrize('number', range(len(json.loads(_GOLDEN.read_text()))))
def test_entities_equal_recorded_figures_of_seqeval(number):
  case = json.loads(_GOLDEN.read_text())[number]
  for is_strict, wanted in ((False, case['conll']), (True, case['strict'])):
    rows = _tagged(case['pairs'], is_strict)
    got = [figure(metric, rows) for metric in _ENTITY_METRICS]
    np.testing.assert_allclose(got, [np.nan if w is None else w for w in wanted])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('is_strict', [False, True])
@pytest.mark.parametrize('case', _tag_cases())
def test_entities_equal_seqeval_also_under_weights(case, is_strict):
  pytest.importorskip('seqeval', reason='seqeval is not installed; its figures are in golden/')
  pairs = _tag_cases()[case]
  for i, metric in enumerate(_ENTITY_METRICS):

    def reference(rows, i=i):
      own = _seqeval_figures([pairs[int(r.prediction)] for r in rows], is_strict)[i]
      return np.nan if own is None else own

    check_resamples(metric, _tagged(pairs, is_strict), reference)


def test_spans_by_hand():
  given = ['I-PER', 'I-PER', 'B-PER', 'I-LOC', 'O', 'I-LOC']
  wanted = [('PER', 0, 2), ('PER', 2, 3), ('LOC', 3, 4), ('LOC', 5, 6)]
  assert tags.tag_spans(given) == wanted
  assert tags.tag_spans(given, is_strict=True) == [('PER', 2, 3)]
  assert tags.tag_spans([]) == []
  for bad in ('X', 'B', 'B-', 'S-PER', ''):
    with pytest.raises(ValueError, match='tag 0 is'):
      tags.tag_spans([bad])


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('PER: Ada\nLOC: Köln', [('PER', 'Ada'), ('LOC', 'Köln')]),
    (
      '- PER: Ada; Bob\n\n* loc : New  York ',
      [('PER', 'Ada'), ('PER', 'Bob'), ('loc', 'New  York')],
    ),
    ('PER: Ada; LOC: Köln', [('PER', 'Ada'), ('LOC', 'Köln')]),
    ('[["PER", "Ada"], ["LOC", 3], 4]', [('PER', 'Ada')]),
    ('[{"type": "PER", "text": "Ada"}, {"text": "x"}]', [('PER', 'Ada')]),
    ('{"PER": ["Ada", "Bob"], "LOC": "Köln"}', [('PER', 'Ada'), ('PER', 'Bob'), ('LOC', 'Köln')]),
    ('nothing', []),
    ('PER:', []),
    ('', []),
    ('3', []),
    ('[' * 100_000, []),
  ],
)
def test_entities_of_a_generated_list(text, wanted):
  assert list(tags.parse_entities(text)) == wanted


def test_entities_as_a_list_count_each_occurrence():
  assert tags.fold_entity(' per', 'New \n York') == ('PER', 'New York')
  found, there = [('PER', 'a'), ('PER', 'a'), ('LOC', 'b')], [('PER', 'a'), ('X', 'c')]
  got = tags.entity_values(found, there, ('PER', 'LOC'))
  assert got == {'entities': (1.0, 3.0, 2.0, 1.0, 2.0, 1.0, 0.0, 1.0, 0.0)}
  rows = results({'values': got}, {'values': tags.entity_values(there, there, ('PER', 'LOC'))})
  assert tags.type_table(rows, ('PER', 'LOC')) == {
    'PER': {'precision': 2 / 3, 'recall': 1.0, 'f1': 0.8, 'support': 2},
    'LOC': {'precision': 0.0, 'recall': 0.0, 'f1': 0.0, 'support': 0},
  }
  assert tags.type_table([], ('X',))['X']['support'] == 0
  untyped = results({'values': tags.entity_values(found, there, ())})
  assert figure(tags.F1, untyped) == 0.4 and np.isnan(figure(tags.MACRO_F1, untyped))
  for metric in (*tags.METRICS, tags.MACRO_F1):
    assert np.isnan(figure(metric, []))


# Several samples


def test_pass_at_k_equals_all_subsets():
  for n in range(1, 7):
    for right in range(n + 1):
      outcomes = [True] * right + [False] * (n - right)
      for k in range(1, n + 1):
        subsets = list(itertools.combinations(outcomes, k))
        wanted = sum(map(any, subsets)) / len(subsets)
        assert samples.pass_at(right, n, k) == pytest.approx(wanted)
  assert math.isnan(samples.pass_at(1, 2, 3))
  assert samples.pass_at(0, 1000, 500) == 0 and samples.pass_at(1000, 1000, 1) == 1
  for bad in ((3, 2, 1), (-1, 2, 1), (1, 2, 0)):
    with pytest.raises(ValueError, match='pass@'):
      samples.pass_at(*bad)


def _sampled(groups):
  """Results of {prompt: [(prediction, right)]}."""
  return results(
    *(
      {'id': p, 'sample': i, 'prediction': text, 'values': {'right': (float(right),)}}
      for p, group in groups.items()
      for i, (text, right) in enumerate(group)
    )
  )


def _random_samples(prompts, seed):
  rng = np.random.default_rng(seed)
  groups = {}
  for p in range(prompts):
    texts = rng.choice(['1', '2', '3', ''], rng.integers(3, 6))
    groups[str(p)] = [(t, t == '1') for t in texts.tolist()]
  return groups


@pytest.mark.parametrize('metric', [samples.pass_metric(k) for k in (1, 3)], ids=lambda m: m.name)
@pytest.mark.parametrize('prompts', [1, 2, 12])
def test_samples_are_scored_by_prompt_also_when_prompts_are_resampled(metric: Metric, prompts):
  groups, k = _random_samples(prompts, prompts), int(metric.name[-1])
  rows, rng = _sampled(groups), np.random.default_rng(0)
  each = np.array([samples.pass_at(sum(r for _, r in g), len(g), k) for g in groups.values()])
  draws = rng.multinomial(prompts, np.full(prompts, 1 / prompts), 6).astype(float)
  weights = draws[:, [int(r.id) for r in rows]]
  np.testing.assert_allclose(figure(metric, rows, weights=weights), draws @ each / prompts)
  order = rng.permutation(len(rows))
  assert figure(metric, [rows[i] for i in order]) == pytest.approx(each.mean())


def test_pass_at_one_is_the_mean_of_right_where_prompts_have_as_many_samples():
  rng = np.random.default_rng(0)
  groups = {str(p): [('x', bool(r)) for r in rng.integers(0, 2, 4)] for p in range(9)}
  rows = _sampled(groups)
  wanted = np.mean([r.right for r in rows])
  assert figure(samples.pass_metric(1), rows) == pytest.approx(wanted)


def test_too_few_samples_give_no_figure():
  rows = _sampled({'a': [('1', True)] * 4, 'b': [('1', True)] * 2})
  for make in (samples.pass_metric, samples.majority_metric):
    assert figure(make(2), rows) == 1
    assert np.isnan(figure(make(3), rows)) and np.isnan(figure(make(3), []))


def test_majority_by_hand():
  def majority(*pairs):
    return samples.majority_share([p for p, _ in pairs], [r for _, r in pairs])

  assert majority(('1', True), ('2', False), ('1', True)) == 1
  assert majority(('1', True), ('2', False), ('2', False)) == 0
  assert majority(('1', True), ('2', False)) == 0.5  # a tie
  assert majority(('', False), ('', False), ('1', True)) == 1  # no answer, no vote
  assert majority(('', False), ('', False)) == 0
  # Only the first k samples vote, in whatever order the results stand.
  rows = _sampled({'a': [('1', True), ('1', True), ('2', False), ('2', False), ('2', False)]})
  assert figure(samples.majority_metric(3), rows[::-1]) == 1
  assert figure(samples.majority_metric(5), rows) == 0


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
