"""Nothing that is no answer is paid, within its time; honest answers are paid in many spellings."""

import builtins
import gzip
import importlib.util
import json
import pathlib
import time

import pytest

from ftjax.grading import math_answers, verifiers
from ftjax.grading.final_answer import final_answer, opened
from ftjax.grading.verifiers import build
from ftjax.runtime.errors import ConfigError


def needs(package):
  missing = importlib.util.find_spec(package) is None
  return pytest.mark.skipif(missing, reason=f'{package} is not installed')


# Outside of the repository, where a checkout has it.
SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'gsm8k_train.jsonl.gz'
QUESTION = (
  'A farm has 72 hens and sells half of them on Monday. How many hens are left at the farm?'
)
MEGABYTE = 1_000_000
# Too long for anyone to have answered with, and what makes careless patterns take for ever.
BAIT = {
  'megabyte': 'a' * MEGABYTE,
  'megabyte of digits': '7' * MEGABYTE,
  'megabyte of spaces': ' ' * MEGABYTE + 'x',
  'long a': 'a' * 50_000 + '!',
  'open boxes': '\\boxed{' * 20_000,
  'open fractions': '\\frac{' * 20_000,
  'dollars': '$' * 100_000,
  'stars': '**' * 50_000,
  'minus': '-' * 100_000,
  'marks': '#### ' * 20_000,
  'guesses': '72,' * 30_000,
  'letters': 'B ' * 50_000,
  'answer': 'answer ' * 20_000,
  'says': 'answer is ' * 15_000,
  'brackets': '[' * 100_000,
  'braces': '{"a":' * 30_000,
  'think': '<think>' * 20_000,
  'less': '<' * 100_000,
}
# What pays 0 whatever the verifier of an answer is, `{}` being a right answer.
GAMES = {
  'empty': '',
  'space': ' ',
  'white space': '\n\t \u00a0\u2003\n',
  'twenty times': '{} ' * 20,
  'twenty lines': '{}\n' * 20,
  'pad': '<pad>' * 50,
  'end': '<|im_end|><|endoftext|></s>',
  'padded twenty times': '{}<pad>' * 20,
  'no thought': '<think></think>{}',
  'blank thought': '<think>\n \n</think>\n{}',
  'padded thought': '<think><pad><pad></think>{}',
  'thought closed at once': '</think>{}',
  'thought without end': '<think>It is {}',
  'two thoughts': '<think>a</think><think>b</think>{}',
  'empty answer': '<think>hm</think><answer></answer>',
  'two answers': '<answer>{}</answer><answer>{}</answer>',
  'open answer': '<answer>{}',
  'answer outside': '<answer></answer>{}',
  'question': QUESTION,
  'nan': 'nan',
  'inf': 'inf',
  'infinity': '-infinity',
  'power': '9**9**9',
  'huge': '1e999999999',
  'mark alone': '####',
  'quote': '"\'',
  'null': '\x00',
  'surrogate': '\ud800',
  'none': 'None',
  'article': 'the',
}
SCHEMA = {
  'type': 'object',
  'properties': {'n': {'type': 'integer'}, 's': {'type': 'string', 'pattern': '^[a-z]+$'}},
  'required': ['n'],
  'additionalProperties': False,
}

# verifier: (what it is given after the completion, a right answer, what else pays 0)
MATH_GAMES = [
  '71 or 72', '71 or 72 or 73', '72 or 71', 'either 71 or 72', 'The answer is 71 or maybe 72',
  '70, 71, 72', '71/72', '71 and 72', '(71) (72)', '71|72', '\\boxed{71} \\boxed{72}',
  '\\boxed{71,72}', '\\boxed{71 \\text{ or } 72}', '\\boxed{72, 72}', '\\boxed{\\boxed{72}}',
  '\\boxed{72', '\\boxed{}', '\\boxed{\\infty}', '\\boxed{71=72}', '\\boxed{72 \\pm 1}',
  '9**9**72', '48+72', '2^72', '72^1', '72*1', '144-72', '\uff17\uff12', '\u0667\u0662', '7\uff12',
  '72\u00bd', '1e999', '72e0e0', '1/0', '72/0', '\\frac{72}{0}', '7,2', 'Is it 72?', '72?',
  '#### 71 or 72', '#### 72\n#### 71', '10:72', '2020-10-72', '-72', '0x72', '72.72.72', '7 2',
  'H72', 'The answer is 72. ' * 20, '#### 72\n' * 20, '\\boxed{72} ' * 20, '[0, 100]',
  '\\boxed{9^{9^{9^{9}}}}', '\\boxed{99999999!}', '\\boxed{10^{99999999}}', 'x > 72 or x < 72',
  '\\boxed{72\\text{ or 71}}', '\\boxed{72 \\text{or } 71}', '\\boxed{72\\mathrm{ maybe }}',
  '\\boxed{72 \\equiv 71}', '\\boxed{72 \\approx 71}', '\\boxed{72 \\in \\{71\\}}',
  '\\boxed{72:71}',
  '\\boxed{72 \\le 73}', '\\boxed{72 \\neq 71}', '\\boxed{72 \\to 71}', '\\boxed{72 \\bmod 71}',
  '#### not 72', '#### less than 72', '#### maybe 72', 'It is not 72', "It isn't 72.", 'maybe 72',
  'The answer is not $72$.', 'It is less than $72$.', 'The answer is $71$ or $72$.', 'not (72)',
  'It is not equal to 72', '\\boxed{72\u224571}', '\\boxed{72 \\cong 71}', 'It is over 72',
  'not **72**',
  'It is more than $72.', 'Less than 72', '#### 72 or more than 72', 'less than 71, not 72',
]  # fmt: skip
CASES = {
  'math': (['q', '72'], '72', MATH_GAMES),
  'math:strict': (['q', '72'], '#### 72', [*MATH_GAMES, '72', '#### 72\nor 71', '71\n72 ####']),
  'math:symbolic=off': (['q', '72'], '72', MATH_GAMES),
  'exact': (['Paris'], 'Paris', ['P\u0430ris', 'Paris or Rome', 'paris', 'Par\u200bis']),
  'normalized': (['Paris'], 'Paris', ['P\u0430ris', 'Paris or Rome', '\uff30aris', 'Paris, Rome']),
  'label': (['positive'], 'positive', ['positive or negative', 'not positive', 'p\u043esitive']),
  'choice': (
    ['B'],
    'B',
    [
      'A or B', 'B or C', 'A or B or C', 'A, B, C, D', 'ABCD', 'A B C D', 'A\nB\nC\nD', 'B/C',
      'A. x\nB. y\nC. z\nD. w', 'The answer is A, B, C or D', 'The answer is B or C.',
      'Answer: B, C',
      'The answer is (B) or (C)', 'The answer is A. The answer is B.', '\\boxed{A} \\boxed{B}',
      '\\boxed{B, C}', '(A)(B)', 'Answer: B. Or C? Or maybe D', 'B and C', '\u0412', '\uff22', 'b',
      'Both', 'Bread', 'A', 'The answer is B. ' * 20, 'The answer is B, but it could be or C',
      'The answer is B. Wait, no. A.', 'Answer: B is wrong, A', 'Answer: B. No, it is A.',
      'The answer is B. Actually, A fits better.', "The answer is: B isn't", 'B. Wait, A.',
      'Answer: B\nNo, it is A', 'Answer: `B`, `C`', 'Answer: `B` or `C`',
      'The answer is B. Sorry, C.',
      'Option B is correct or option A is correct', 'Option B is wrong',
    ],
  ),
}  # fmt: skip


def make(spec):
  name, _, text = spec.partition(':')
  return build(name, text)


def timed(verifier, *values):
  start = time.thread_time()
  score = verifier.score(*values)
  assert time.thread_time() - start < 5, 'none of them hangs'
  return score


@pytest.mark.parametrize('spec', CASES)
def test_games_pay_nothing(spec):
  rest, right, more = CASES[spec]
  verifier = make(spec)
  verifier.warm()
  assert verifier.score(right, *rest) == 1, 'a verifier that pays nobody proves nothing'
  games = [*(g.replace('{}', right) for g in GAMES.values()), *BAIT.values(), *more]
  paid = [g[:60] for g in games if timed(verifier, g, *rest) != 0]
  assert not paid


@pytest.mark.parametrize('spec', CASES)
def test_right_answers_after_a_thought_or_in_tags(spec):
  rest, right, _ = CASES[spec]
  for text in (
    '<think>So.</think>\n{}',
    'So.</think>{}',
    '<think>1 + 1</think><answer>{}</answer>',
  ):
    assert make(spec).score(text.format(right), *rest) == 1
  assert make(spec).score(f' {right}\n', *rest) == 1


HONEST = [
  ('1234', '1234'), ('1234', '1,234'), ('1234', '1234.0'), ('1234', '\\frac{2468}{2}'),
  ('1,234', '1234'), ('1234.0', '1,234'), ('1234', '2468/2'), ('1234', '$1,234.00'),
  ('1234', '\\$1{,}234'), ('1234', 'The answer is 1,234.'), ('1234', '**1234**'),
  ('1234', 'x = 1234'), ('1234', '\\boxed{1234}'), ('1234', 'So \\(1234\\).'),
  ('1234', '1.234 \\times 10^{3}'), ('1234', '1000 + 234 = 1234 apples.'),
  ('1234', '#### $1,234 dollars'), ('1234', '\\boxed{1234\\text{ clips}}'),
  ('1234', 'She has 1,234 clips!'), ('1234', 'At 5 m each that is 1234 m^2'),
  ('1234', '\\boxed{1234}. So the answer is \\boxed{1,234}'), ('1234', '$x = 1234$'),
  (1234, '1234'), (0.5, '1/2'), ('5', '$5.00'), ('50', '50%'), ('50%', '50'), ('0.5', '50%'),
  ('50%', '0.5'), ('50%', '50 \\%'), ('-3', '-3'), ('-3', 'The answer is -3'), ('-3', '\u22123'),
  ('-3', '-$3'), ('3.5', '3 1/2'), ('3.5', '3\\frac{1}{2}'), ('0.5', '\\frac12'), ('.5', '1/2'),
  ('-1/2', '-\\dfrac{1}{2}'), ('-0.5', '\\frac{-1}{2}'), ('x+1', '\\boxed{x + 1}'),
  ('72', 'So the amount of money left over is $72.'), ('72', 'There are **72** apples left over.'),
  ('72', '#### The total left over is 72'), ('72', 'The price of the item above is 72.'),
  ('72', 'It is as shown below\n\n72'), ('5', '\\boxed{5\\text{ cm}^2}'),
  ('5', '$5 \\mathrm{cm}^{2}$'),
  ('5', '\\boxed{\\mathbf{5}}'), ('5', '\\boxed{5\\qquad}'), ('5', '\\boxed{5\\,\\text{cm}}'),
  ('[-2,7]', '\\boxed{x \\in [-2,7]}'), ('so 5\n#### 5', '5'), ('so \\boxed{5}', '5'),
  ('1000', '1e3'),
]  # fmt: skip


@pytest.mark.parametrize(('gold', 'answer'), HONEST)
def test_right_numbers_are_rewarded(gold, answer):
  assert build('math', 'symbolic=off').score(answer, '', gold) == 1


@pytest.mark.parametrize(
  ('gold', 'answer'),
  [('5', '6'), ('50%', '5000%'), ('0.5', '0.05'), ('-3', '3'), ('1234', '1,23,4'), ('12', '1'),
   ('0.333', '1/3'), ('x+1', 'x+2')],
)  # fmt: skip
def test_wrong_numbers_are_not(gold, answer):
  assert build('math', 'symbolic=off').score(answer, '', gold) == 0


@needs('math_verify')
@pytest.mark.parametrize(
  ('gold', 'answer', 'paid'),
  [('2', '\\boxed{\\sqrt{4}}', 1), ('x+1', '\\boxed{1+x}', 1), ('\\frac{\\pi}{2}', '$\\pi/2$', 1),
   ('(1,2)', '\\boxed{(1, 2)}', 1), ('(1,2)', '\\boxed{[1,2]}', 0), ('x+1', '\\boxed{x+2}', 0),
   ('0.5x', '\\boxed{x \\cdot 0.5}', 1), ('x/2', '\\boxed{0.5x}', 1),
   ('\\sqrt{2}', '\\boxed{1.414214}', 0), ('\\pi', '\\boxed{3.14159}', 0),
   ('\\text{Evelyn}', '\\boxed{\\text{Evelyn}}', 1), ('\\text{Evelyn}', '\\boxed{nylevE}', 0),
   ('evil', '\\boxed{live}', 0), ('x \\le 3', '\\boxed{x \\leq 3}', 1),
   ('\\frac{1}{\\sqrt{3}}', '\\boxed{\\tan \\frac{\\pi}{6}}', 1),
   ('\\theta+1', '\\boxed{1+\\theta}', 1),
   ('5', '\\boxed{5\\text{ cm^2}}', 1), ('36\\pi', '\\boxed{36\\pi\\text{ cm}^2}', 1),
   ('70\\sqrt{2}', '\\boxed{70 \\sqrt{2} \\mbox{ feet}}', 1), ('3\\leq x', '\\boxed{x \\ge 3}', 1),
   ('\\begin{pmatrix} \\frac{1}{2} \\\\ 3 \\end{pmatrix}',
    '\\boxed{\\begin{pmatrix}\\dfrac{1}{2}\\\\3\\end{pmatrix}}', 1),
   ('mgh+\\frac{1}{2}mv^2', '\\boxed{\\frac12 mv^2+mgh}', 1),
   ('xyz(x + y)', '\\boxed{(x+y)xyz}', 1),
   ('2\\sqrt{3}', '\\boxed{2\\,\\sqrt{3}}', 1), ('x=5', '\\boxed{x=4=5}', 0),
   ('1010_2', '\\boxed{1010_3}', 0),
   ('5', '\\boxed{5\\text{ or 6}}', 0),
   ('\\sqrt{2}', '\\boxed{\\frac{2}{\\sqrt{2}}}', 1), ('72', '\\boxed{72=72}', 0)],
)  # fmt: skip
def test_symbols(gold, answer, paid, monkeypatch):
  # What it imports may use eval, what it reads may not.
  math_answers.symbolic_equal('\\sqrt{4} + x', '2 + x')

  def no_eval(*args):
    raise AssertionError('model text was evaluated')

  monkeypatch.setattr(builtins, 'eval', no_eval)
  run = builtins.exec

  def only_the_import(code, *names):
    assert code == 'from sympy import *', 'model text was executed'
    run(code, *names)

  monkeypatch.setattr(builtins, 'exec', only_the_import)
  assert build('math', 'symbolic=on').score(answer, '', gold) == paid


def test_a_copy_of_the_prompt_is_no_answer():
  prompt = 'Add up what the three of them paid: 20 dollars, then 30 dollars, then 50 dollars.'
  for text in (prompt, prompt[10:]):
    assert build('math', '').score(text, prompt, '50') == 0
  assert build('math', '').score('50', prompt, '50') == 1


@pytest.mark.parametrize(
  'text',
  ['B', '(B)', 'B.', 'B)', '**B**', '$B$', 'B. Paris', 'B) A dog', 'The answer is B', 'Answer: (B)',
   'The answer is (B) Paris.', 'The correct answer is option B.', '\\boxed{B}', '**Answer:** B',
   'The answer is: B', 'Answer:\n\nB', 'The answer is `B`.', '`B`', 'Option B is correct.',
   'Let us see. Option (B) is the right one, as A is not.', 'The answer is B. Option A is wrong.',
   'Wait, it is not A. The answer is B, since there is no other.',
   'B. No.', 'Answer: B. No, because the statute of frauds applies.', 'B. Error correction',
   'B. Wait for the bus', 'The answer is B. Mitochondria actually produce ATP.',
   'Let us check whether option A is correct: it has no basis. The answer is (B).',
   'If choice A is right, x=2, a contradiction. The answer is B.',
   'The answer is B. No other option, such as C, is right.',
   '\\boxed{\\text{B}}', 'A is wrong, so the answer is B. A dog has four legs.'],
)  # fmt: skip
def test_right_choices_are_rewarded(text):
  choice = build('choice', 'ABCD')
  assert choice.score(text, 'B') == choice.score(text, 1) == choice.score(text, '(B)') == 1
  assert choice.score(text, 'A') == choice.score(text, 'C') == 0


def test_choice_needs_a_gold_among_its_letters():
  for gold in ('E', '', 7, None, 'AB', True):
    with pytest.raises(ValueError, match='answer'):
      build('choice', 'ABCD').score('A', gold)


def test_normalized_is_squads_where_values_stay():
  n = build('normalized', '')
  assert n.score('The  Eiffel tower!', 'eiffel tower') == 1
  assert n.score('caf\u0065\u0301', 'caf\u00e9') == 1
  assert n.score('b', ['a b', 'b']) == n.score('1,234', '1234') == n.score('The', 'the') - 0 + 1
  assert n.score('1,234,567 people.', '1234567 people') == n.score('(C++)', 'c++!') == 1
  values = [('3', '-3'), ('35', '3.5'), ('5', '.5'), ('5%', '5'), ('', 'the'), ('1/2', '12')]
  values += [('10^2', '102'), ('- 5', '5'), ('C++', 'C'), ('C#', 'C'), ('<5', '5'), ('3-4', '34')]
  values += [
    ('O-', 'O'),
    ('A-', 'A'),
    ('-$5', '$5'),
    ('1,2', '12'),
    ('1:30', '130'),
    ('2*3', '23'),
    ('1e+5', '1e5'),
  ]
  for pair in values:
    for answer, gold in (pair, pair[::-1]):
      assert not gold or n.score(answer, gold) == 0, (answer, gold)
  with pytest.raises(ValueError, match='answer'):
    n.score('x', '  ')


def test_label():
  assert build('label', 'yes,no').score(' Yes.', 'yes') == 1
  assert build('label', 'yes,no').score('yes', 'no') == 0
  assert build('label', 'column=sentiment').inputs == ('completions', 'sentiment')
  with pytest.raises(ValueError, match='maybe'):
    build('label', 'yes,no').score('maybe', 'maybe')


@needs('re2')
def test_regex():
  r = build('regex', '(a+)+$')
  assert r.score('aaa') == r.score(' a\n') == 1
  for text in (*BAIT.values(), '', ' ', 'ba'):
    assert timed(r, text) == 0
  assert build('regex', '.*').score(' ') == 0
  assert build('regex', 'a,b=[0-9]{2}').score('a,b=12') == 1
  assert build('regex', '[0-9]+').score('\u0667') == 0
  with pytest.raises(ConfigError, match='look-around'):
    build('regex', '(?=a)b')


@pytest.fixture
def schema(tmp_path):
  path = tmp_path / 'schema.json'
  path.write_text(json.dumps(SCHEMA))
  return str(path)


@needs('jsonschema')
def test_json_schema(schema, tmp_path):
  j = build('json_schema', schema)
  for text in ('{"n": 1}', ' {"n": -3, "s": "ab"}\n', '```json\n{"n": 1}\n```', 'x</think>{"n":1}'):
    assert j.score(text) == 1
  games = [
    '{"n": 1, "n": 2}', '{"n": 1.5}', '{"n": NaN}', '{"n": Infinity}', '{"n": 1e999}', '{}', '[]',
    '{"n": "1"}', '{"n": 1} {"n": 1}', '{"n": 1}' * 20, "{'n': 1}", '{"n": 1,}', '{"n": 1, "x": 2}',
    '{"n": ' + '9' * 5000 + '}', '{"n": 1', 'null', '```json\n```', '{"n": 1, "s": "\\u0430"}',
  ]  # fmt: skip
  for text in (*games, *GAMES.values(), *BAIT.values()):
    assert timed(j, text) == 0, text[:60]
  (tmp_path / 'bad.json').write_text('{"type": 3}')
  for path in (tmp_path / 'bad.json', tmp_path / 'none.json'):
    with pytest.raises(ConfigError, match='json_schema'):
      build('json_schema', str(path))


@needs('jsonschema')
def test_a_remote_reference_is_not_fetched(tmp_path, monkeypatch):
  import urllib.request

  asked = []
  monkeypatch.setattr(urllib.request, 'urlopen', lambda *a, **k: asked.append(a))
  path = tmp_path / 'remote.json'
  path.write_text('{"$ref": "http://example.invalid/schema.json"}')
  with pytest.raises(Exception, match=r'schema\.json'):
    build('json_schema', str(path)).score('{}')
  assert not asked


def test_format():
  f, only = build('format', 'think,answer'), build('format', 'think,answer,only=true')
  assert f.score('<think>a</think> so <answer>1</answer>') == 1
  assert only.score('<think>a</think>\n<answer>1</answer>\n') == 1
  assert only.score('<think>a</think> so <answer>1</answer>') == 0
  games = [
    '<think></think><answer></answer>', '<think></think>a', '<think>a</think>1',
    '<answer>1</answer>',
    '<answer>1</answer><think>a</think>', '<think>a<answer>1</answer></think>',
    '<think>a</think><answer>1</answer>' * 20, '<think>a</think><answer>1', '<Think>a</Think>',
    '<think>.</think><answer>!</answer>', '<think><pad></think><answer><pad></answer>',
    '\u2039think\u203aa\u2039/think\u203a<answer>1</answer>',
    '<think>a<think></think><answer>1</answer>',
  ]  # fmt: skip
  for text in (*games, *GAMES.values(), *BAIT.values()):
    assert timed(f, text) == timed(only, text) == 0, text[:60]


def test_penalties_pay_nobody_and_least_to_junk():
  most, target, repetition = (
    build('length', 'at_most=10'), build('length', 'target=10'), build('repetition', '2')
  )  # fmt: skip
  # by hand: 15 tokens are half too many; 0 of 10 and 25 of 10 are all wrong
  assert [most.score(n) for n in (0, 10, 15, 20, 99)] == [0, 0, -0.5, -1, -1]
  assert [target.score(n) for n in (0, 5, 10, 15, 25)] == [-1, -0.5, 0, -0.5, -1]
  # 1 2 | 2 1 | 1 2 | 2 1: two of four stood before
  assert repetition.score([1, 2, 1, 2, 1]) == -0.5
  assert repetition.score([7] * 101) == pytest.approx(0.01 - 1)
  assert repetition.score([]) == repetition.score([1]) == repetition.score([1, 2, 3]) == 0
  assert timed(repetition, [0] * 300_000) < -0.99


@pytest.mark.parametrize(
  ('name', 'text', 'match'),
  [('math', 'mode=loose', 'loose'), ('math', 'mod=strict', 'did you mean mode'),
   ('length', '', 'one'),
   ('math', 'strict,flexible', 'cannot place'), ('length', 'target=1,at_most=2', 'one of them'),
   ('length', 'target=x', 'int'), ('length', '5', 'cannot place'), ('format', '', 'tags'),
   ('format', 'a,a', 'different'), ('format', 'a,only=maybe', 'bool'), ('regex', '', 'PATTERN'),
   ('choice', 'abc', 'capital'), ('repetition', '0', 'at least 1'),
   ('math', 'strict,mode=strict', 'place'),
   ('json_schema', '', 'PATH')],
)  # fmt: skip
def test_bad_arguments(name, text, match):
  with pytest.raises(ConfigError, match=match):
    build(name, text)


def test_a_missing_package_names_the_extra(monkeypatch, schema):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  verifiers._compile.cache_clear()
  verifiers._validator.cache_clear()
  math_answers.can_do_symbols.cache_clear()
  try:
    for name, text in (('regex', 'b+'), ('json_schema', schema), ('math', 'symbolic=on')):
      with pytest.raises(ConfigError, match=r"pip install '\.\[rewards\]'"):
        build(name, text)
    m = build('math', '')
    assert not m.isolated and m.score('\\boxed{\\frac{4}{2}}', '', '2') == 1
  finally:
    math_answers.can_do_symbols.cache_clear()


def test_final_answer():
  assert final_answer('a </think> b') == 'b'
  assert final_answer('<think>a</think> b <answer> c </answer> d') == 'c'
  assert final_answer('x' * 300_000) is None


ROWS = [
  {'question': 'q', 'answer': '48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72.\n#### 72'},
  {'question': 'q', 'answer': '$80,000+$50,000=$<<80000+50000=130000>>130,000\n#### 70,000'},
  {'question': 'q', 'answer': 'It changes by <<2-7=-5>>-5 degrees\n#### -5'},
]


def assert_each_rationale_is_right_for_its_own_question_alone(rows, mode):
  m = build('math', f'{mode},symbolic=off')
  golds = [r['answer'].rpartition('#### ')[2].replace(',', '') for r in rows]
  wrong = 0
  for i, row in enumerate(rows):
    assert m.score(row['answer'], row['question'], row['answer']) == 1, row
    if golds[i] != golds[i - 1]:
      wrong += 1
      assert m.score(row['answer'], row['question'], rows[i - 1]['answer']) == 0, row
  assert wrong > len(rows) / 2


@pytest.mark.parametrize('mode', math_answers.MODES)
def test_gsm8k(mode):
  assert_each_rationale_is_right_for_its_own_question_alone(ROWS, mode)


@pytest.mark.skipif(not SHARED.exists(), reason='GSM8K is not beside the repository')
@pytest.mark.parametrize('mode', math_answers.MODES)
def test_all_of_gsm8k(mode):
  with gzip.open(SHARED, 'rt') as lines:
    rows = [json.loads(line) for i, line in enumerate(lines) if i % 10 == 0]
  assert_each_rationale_is_right_for_its_own_question_alone(rows, mode)


# Gold and answer through one normalization: (gold, answer) pairs, compared both ways.

SAME = [
  ('1000000', '1 000 000'),
  ('-12345.5', '-12 345.5'),
  ('5000000', '5\\text{ million}'),
  ('8', '8 apples'),
  ('5 m', '5\\text{ meters}'),
  ('5 m/s', '5\\text{ m/s}'),
  ('13', '\\text{13}'),
  ('13', '\\textbf{13}'),
  ('13', '\\mathrm{13}'),
  ('13', '$13$.'),
  ('13', '\\boxed{13}'),
  ('Yes', '\\text{Yes}'),
  ('Yes', 'yes'),
  ('No', '\\textbf{no}'),
  ('New York', '\\text{New York}'),
  ('Evelyn', '\\text{Evelyn}.'),
  ('CAB', '\\text{CAB}'),
  ('(B)', 'B'),
  ('B', '\\text{(B)}'),
  ('B', '\\mathrm{B}'),
  ('B', '\\textbf{(B)}'),
  ('5', '5\\ \\text{cm}'),
  ('5', '5~\\text{cm}'),
  ('5 cm', '5\\,\\mathrm{centimeters}'),
  ('12:00 PM', '12:00\\text{ p.m.}'),
  ('10 a.m.', '10\\text{ AM}'),
  ('3 pm', '3\\ \\text{PM}'),
  ('5', '5 inches'),
  ('12', '12\\text{ cm}^2'),
  ('12 square feet', '12\\text{ ft}^{2}'),
  ('60', '60\\text{ km/h}'),
  ('90^\\circ', '90°'),
  ('90^\\circ', '90'),
  ('90', '90^{\\circ}'),
  ('90^\\circ', '90\\text{ degrees}'),
  ('20^\\circ\\text{C}', '20°\\text{C}'),
  ('50\\%', '50%'),
  ('50%', '50 percent'),
  ('\\$5', '5'),
  ('\\$18.90', '18.90 dollars'),
  ('1234', '1,234'),
  ('1234', '1{,}234'),
  ('1234', '1\\,234'),
  ('1234567', '1\u202f234\u202f567'),
  ('1234', '1\\ 234'),
  ('\\frac12', '\\dfrac{1}{2}'),
  ('\\frac12', '0.5'),
  ('\\frac{1}{2}', '1/2'),
  ('3.5', '3\\frac{1}{2}'),
  ('3.5', '3½'),
  ('0.50', '.5'),
  ('\\frac1{20}', '0.05'),
  ('-\\frac{1}{2}', '\\frac{-1}{2}'),
  ('-3', '\u22123'),
  ('1200', '1.2\\times10^{3}'),
  ('1200', '1.2 \\cdot 10^3'),
  ('1200', '1.2\u00d710³'),
  ('1200', '1.2e3'),
  ('2', '2.000'),
  ('x=5', '5'),
  ('5', 'x = 5'),
  ('x=5', 'x = 5.0'),
  ('\\theta=5', '5'),
  ('\\{1,2,3\\}', '\\{3, 1, 2\\}'),
  ('1,2', '2, 1'),
  ('\\{1,2\\}', '1, 2'),
  ('1,2', 'x=1 \\text{ or } x=2'),
  ('2,-2', '\\pm 2'),
  ('(1,2)', '\\left( 1, 2 \\right)'),
  ('(0,1]', '\\left(0, 1\\right]'),
  ('\\left(\\frac12, 3\\right)', '(0.5, 3)'),
  ('x=1,y=2', 'y=2, x=1'),
  ('[-2,7]', 'x \\in [-2,7]'),
  ('(1,2),(3,4)', '(3,4),(1,2)'),
  ('(-\\infty,3)', '(-∞, 3)'),
]
DIFFERENT = [
  ('1000000', '1 00 0000'),
  ('123', '1 23'),
  ('2ab', '2'),
  ('3m', '3'),
  ('5 million', '5'),
  ('8 dozen', '8'),
  ('5\\text{ m/s}', '5\\text{ km/h}'),
  ('CAB', 'ABC'),
  ('ABC', 'CBA'),
  ('no', 'on'),
  ('Yes', 'No'),
  ('Yes', '\\text{Yse}'),
  ('cat', 'act'),
  ('Anna', 'Nana'),
  ('AB', 'ab'),
  ('A', 'B'),
  ('B', 'b'),
  ('5 cm', '5\\text{ m}'),
  ('5 cm', '5\\text{ cm}^2'),
  ('90^\\circ', '90\\text{ radians}'),
  ('12:00 PM', '12:00\\text{ AM}'),
  ('3 p.m.', '3 a.m.'),
  ('7:30 am', '7:30 PM'),
  ('5', '5x'),
  ('5', '5\\text{ or 6}'),
  ('20 dollars', '20 cents'),
  ('50%', '5'),
  ('1234', '1,23,4'),
  ('72', '7 2'),
  ('72', '\uff17\uff12'),
  ('72', '7\\,2'),
  ('1234', '12,34'),
  ('\\frac12', '\\frac21'),
  ('0.333', '1/3'),
  ('3.5', '3\\cdot\\frac{1}{2}'),
  ('1e-300', '2e-300'),
  ('100000000000000000000', '100000000000000000001'),
  ('1.2e3', '1.2e-3'),
  ('-3', '3'),
  ('x=5', 'y=5'),
  ('x=5', '6'),
  ('5', 'x=4=5'),
  ('(1,2)', '(2,1)'),
  ('(1,2)', '[1,2]'),
  ('(0,1]', '[0,1)'),
  ('(1,2)', '\\{1,2\\}'),
  ('\\{1,2\\}', '\\{1,3\\}'),
  ('\\{1,2\\}', '\\{1,1\\}'),
  ('1,2', '1,2,3'),
  ('1,2', '(1,2)'),
  ('x=1,y=2', 'x=2,y=1'),
  ('2', '\\pm 2'),
  ('72', '71 or 72'),
  ('72', '71,72'),
]
SAME_FORMULAS = [
  ('1,000,000', '10^6'),
  ('2ab', '2ba'),
  ('\\varnothing', '\\emptyset'),
  ('\\frac{1}{\\sqrt2}', '\\frac{\\sqrt2}{2}'),
  ('\\log_2 8', '3'),
  ('3', '\\log_{2} 8'),
  ('\\sqrt2', '\\sqrt{2}'),
  ('\\sqrt2', '√2'),
  ('\\sqrt{8}', '2\\sqrt2'),
  ('2\\pi', '2π'),
  ('\\left(\\frac12\\right)^{100}', '2^{-100}'),
  ('1000', '10^3'),
  ('\\frac{\\sqrt3}{2}', '\\sin 60^\\circ'),
  ('x^2+1', '1+x²'),
  ('\\frac{x}{2}', '0.5x'),
  ('(\\sqrt2,\\pi)', '(2^{1/2}, \\pi)'),
  ('\\{\\sqrt2,-\\sqrt2\\}', '\\pm\\sqrt{2}'),
  ('xyz(x+y)', '(x+y)xyz'),
  ('x\\cdot y', 'yx'),
  ('AB+CD', 'CD+AB'),
  ('10^{-20}', '\\frac{1}{10^{20}}'),
  ('3\\pi \\text{ cm}^2', '3\\pi'),
  ('e^{2}', '\\mathrm{e}^2'),
  ('(-\\infty,1)\\cup(2,\\infty)', '(-∞,1)\u222a(2,∞)'),
]
DIFFERENT_FORMULAS = [
  ('2x', '2xm'),
  ('x', 'X'),
  ('0', '\\left(\\frac12\\right)^{100}'),
  ('2^{1000}', '2^{1000}+1'),
  ('\\frac{\\pi}{6}', '30°'),
  ('\\left(\\frac12\\right)^{100}', '\\left(\\frac13\\right)^{100}'),
  ('10^{-20}', '2\\times10^{-20}'),
  ('10^{-20}x', '2\\cdot10^{-20}x'),
  ('10^{20}', '10^{20}+1'),
  ('e^{-50}', 'e^{-51}'),
  ('0.5^{100}', '0.25^{100}'),
  ('(2^{-80},1)', '(3^{-80},1)'),
  ('\\begin{pmatrix}2^{-80}\\\\1\\end{pmatrix}', '\\begin{pmatrix}3^{-80}\\\\1\\end{pmatrix}'),
  ('\\sqrt2', '1.414214'),
  ('\\angle CAB', '\\angle ABC'),
  ('\\log_2 8', '\\log_3 8'),
  ('1010_2', '1010_3'),
  ('10^{-30}\\pi', '10^{-31}\\pi'),
  ('\\frac{22}{7}', '\\pi'),
  ('x^2', 'x^3'),
  ('\\cos 60^\\circ', '\\cos 60'),
  ('x > 10^{-20}', 'x > 10^{-21}'),
  ('e^{100}', 'e^{100}+1'),
  ('ABC + 1', 'CAB + 1'),
]


def unexpected(rows, wanted, symbolic):
  both = [*rows, *((answer, gold) for gold, answer in rows)]
  return [(g, a) for g, a in both if math_answers.equal(a, g, symbolic) is not wanted]


@pytest.mark.parametrize('symbolic', [False, pytest.param(True, marks=needs('math_verify'))])
def test_numbers_words_and_lists_in_other_spellings(symbolic):
  assert unexpected(SAME, True, symbolic) == []
  assert unexpected(DIFFERENT, False, symbolic) == []


@needs('math_verify')
def test_formulas_in_other_spellings_and_of_any_size():
  assert unexpected(SAME_FORMULAS, True, True) == []
  assert unexpected(DIFFERENT_FORMULAS, False, True) == []


@pytest.mark.parametrize(
  ('gold', 'answer', 'reward'),
  [('Yes', '\\boxed{\\text{Yes}}', 1), ('Yes', 'Yes.', 1), ('Yes', '\\boxed{No}', 0),
   ('13', '\\boxed{\\text{13}}', 1), ('5', 'so \\boxed{5\\ \\text{cm}}', 1),
   ('90^\\circ', '\\boxed{90°}', 1), ('CAB', '\\boxed{ABC}', 0), ('CAB', '\\boxed{CAB}', 1),
   ('$\\boxed{\\frac12}$', '0.5', 1), ('B', '\\boxed{\\text{(B)}}', 1)],
)  # fmt: skip
def test_completions_in_other_spellings(gold, answer, reward):
  assert build('math', 'symbolic=off').score(answer, '', gold) == reward


@pytest.mark.parametrize(
  'text',
  ['The answer is \\(B\\).', '\\(\\boxed{B}\\)', '\\boxed{\\textbf{(B)}}', '**\\(B\\)**',
   '\\[\\boxed{\\text{B}}\\]', 'The answer is $\\mathrm{B}$', '\\(B\\)'],
)  # fmt: skip
def test_choices_in_latex(text):
  choice = build('choice', 'ABCD')
  for gold in ('B', '(B)', 'B.', '$B$', '\\text{B}'):
    assert choice.score(text, gold) == 1
  assert choice.score(text, 'A') == 0
  assert choice.score(text.replace('B', 'B or C'), 'B') == 0


# What the end of the prompt opens.

TURN = '<|im_start|>user\nUse <think> and <answer>.<|im_end|>\n<|im_start|>assistant\n'


@pytest.mark.parametrize(
  ('prompt', 'wanted'),
  [(TURN, ''), (TURN + '<think>\n', '<think>\n'), (TURN + '<think>\nOkay', '<think>\nOkay'),
   (TURN + '<think>\n\n</think>\n\n', ''), ('Use <think> tags.', ''), ('Q\n<think>\n', '<think>\n'),
   ('Q <reasoning>', '<reasoning>'), ('Q\n<answer>', '<answer>'), ('Q[THINK]', '[THINK]'),
   ('<\uff5cUser\uff5c>a<\uff5cAssistant\uff5c><think>\n', '<think>\n'), ('a < b > c', ''),
   ('<think>x</think>\n<answer>', '<answer>'), ('Q\n<plan>\n<think>', '<plan>\n<think>'),
   ('True or [FALSE]', ''), ('[INST] <think> [/INST]', ''), ('', '')],
)  # fmt: skip
def test_tags_that_a_prompt_opens(prompt, wanted):
  assert opened(prompt) == wanted


@pytest.mark.parametrize(
  ('prompt', 'completion', 'reward'),
  [(TURN + '<think>\n', 'so 60+12 = 72', 0),
   (TURN + '<think>\n', 'so 72.\n</think>\n<answer>72</answer>', 1),
   (TURN + '<think>\n', 'so 71.\n</think>\n72', 1),
   (TURN + '<think>\n', 'so <think>a</think>72', 0),
   (TURN + '<think>\n', '</think>72', 0), (TURN + '<think>\nOkay', '</think>72', 1),
   (TURN, 'so 60+12 = 72', 1), ('Q\n<answer>', '72</answer>', 1), ('Q\n<answer>', '72', 0),
   ('Q\n<reasoning>\n', '60+12=72', 0), ('Q\n<reasoning>\n', '60+12</reasoning>72', 1),
   ('Q\n<plan>', 'add: 72', 0), ('Q\n<plan>', 'add</plan>72', 1), ('Q[THINK]', 'so 72', 0),
   ('Q[THINK]', 'so[/THINK]72', 1), ('Q\n<solution>', '72</solution>', 1),
   ('<|start|>assistant', '<|channel|>analysis<|message|>so 72', 0),
   ('<|start|>assistant',
    '<|channel|>analysis<|message|>soassistant<|channel|>final<|message|>72', 1)],
)  # fmt: skip
def test_an_answer_stands_behind_the_thought_that_the_prompt_began(prompt, completion, reward):
  assert build('math', 'symbolic=off').score(completion, prompt, '72') == reward
  assert build('exact', '').score(completion, '72', prompt) <= reward


def test_form_counts_with_what_the_prompt_opened():
  closed = 'so 72.\n</think>\n<answer>72</answer>'
  for spec in ('format:think,answer', 'format:think,answer,only=true'):
    assert make(spec).score(closed, TURN + '<think>\n') == 1
    assert make(spec).score(closed, TURN) == make(spec).score('so 72', TURN + '<think>\n') == 0
  assert make('format:answer').score(closed, TURN + '<think>\n') == 1
  assert make('format:reasoning,answer').score('a</reasoning><answer>1</answer>', 'Q <reasoning>')


@needs('re2')
def test_a_pattern_may_begin_with_what_the_prompt_opened():
  for pattern in ('(?s)<think>.*</think>72', '(?s).*</think>72'):
    assert build('regex', pattern).score('so\n</think>72', TURN + '<think>\n') == 1
  assert build('regex', '(?s)<think>.*</think>72').score('so\n</think>72', TURN) == 0


@needs('jsonschema')
def test_a_schema_with_a_pattern_that_is_none(tmp_path):
  for i, schema in enumerate(
    ({'pattern': '('}, {'properties': {'a': {'patternProperties': {'[': {}}}}})
  ):
    path = tmp_path / f'{i}.json'
    path.write_text(json.dumps(schema))
    with pytest.raises(ConfigError, match=f'{i}.json'):
      build('json_schema', str(path))


@pytest.mark.parametrize(
  ('spec', 'bad'),
  [('math:', ['2']), ('math:', None), ('math:', ' '), ('math:', True), ('exact:', {'a': 1}),
   ('exact:', []), ('choice:ABCD', 'E'), ('choice:ABCD', 4), ('label:yes,no', 'maybe')],
)  # fmt: skip
def test_golds_are_checked_as_they_are_scored(spec, bad):
  with pytest.raises(ValueError, match='column'):
    make(spec).check(bad)
