"""The rules of `gate`: their grammar, what they mean, and what a refused export says."""

import json

import pytest

from ftjax.config import gate_rules, keys, validation
from ftjax.evaluation import gate
from ftjax.runtime.errors import CheckError, ConfigError


def score(value, low=None, high=None, **more):
  return {'value': value, 'low': low, 'high': high, 'se': None, **more}


def summary(base=0.80, tuned=0.85, difference=(0.05, 0.02, 0.08), **more):
  scores = {
    'base': {'accuracy': score(base)},
    'tuned': {'accuracy': score(tuned, tuned - 0.03, tuned + 0.03)},
  }
  task = {
    'metrics': [{'name': 'accuracy', 'title': 'accuracy', 'better': 'higher', 'form': 'fraction'}],
    'scores': scores,
    'differences': [
      {
        'first': 'base',
        'second': 'tuned',
        'metrics': {'accuracy': dict(zip(('value', 'low', 'high'), difference, strict=True))},
      }
    ],
  }
  return {'tasks': {'bbq': task | more}}


def passes(text, found=None):
  result = gate.check(gate_rules.parse_all((text,)), found or summary())
  json.dumps(result, allow_nan=False)
  (check,) = result['checks']
  assert result['passed'] == check['passed'] and check['what'].startswith(text)
  return result['passed']


@pytest.mark.parametrize(
  ('text', 'parts'),
  [
    ('bbq/accuracy >= base - 0.02', ('bbq', 'accuracy', '>=', 1, -0.02, False)),
    ('bbq/accuracy>=base-0.02', ('bbq', 'accuracy', '>=', 1, -0.02, False)),
    ('toxic/toxic <= 0.05', ('toxic', 'toxic', '<=', 0, 0.05, False)),
    ('s/accuracy > base', ('s', 'accuracy', '>', 1, 0, False)),
    ('s/accuracy > base significantly', ('s', 'accuracy', '>', 1, 0, True)),
    ('p/nll < base * 1.1', ('p', 'nll', '<', 1.1, 0, False)),
    ('p/nll < base + 1e-3', ('p', 'nll', '<', 1, 0.001, False)),
    ('p/margin > -.5 significantly', ('p', 'margin', '>', 0, -0.5, True)),
    ('lm_eval:arc_easy/acc,none >= .3', ('lm_eval:arc_easy', 'acc,none', '>=', 0, 0.3, False)),
    ('  s/accuracy  <  2  ', ('s', 'accuracy', '<', 0, 2, False)),
  ],
)
def test_rules(text, parts):
  assert gate_rules.parse(text) == (text.strip(), *parts)


@pytest.mark.parametrize(
  'text',
  [
    '',
    'right >= 0.5',
    'bbq/accuracy',
    'bbq/accuracy >=',
    'bbq/accuracy = 0.5',
    'bbq/accuracy == 0.5',
    'bbq/accuracy => 0.5',
    'bbq/accuracy >= best',
    'bbq/accuracy >= tuned',
    'bbq/accuracy >= base - ',
    'bbq/accuracy >= base - x',
    'bbq/accuracy >= base / 2',
    'bbq/accuracy >= 2 * base',
    'bbq/accuracy >= 50 %',
    'bbq/accuracy >= 50%',
    'bbq/accuracy >= base maybe',
    'bbq/accuracy >= nan',
    'bbq/accuracy >= inf',
    'bbq/accuracy >= 1e999',
    'bbq/accuracy >= base * 0',
    'bbq/accuracy >= base * -1',
    'bbq/accuracy >= base * 1.1 significantly',
    'bbq/accuracy >= 0.5; toxic/toxic < 1',
    'a/b/c >= 1',
    'bbq/accuracy >= 0.5\nx',
    0.5,
    None,
    ('bbq/accuracy', '>=', 0.5),
  ],
)
def test_rules_of_another_form_name_the_key(text):
  with pytest.raises(ConfigError, match=r'^gate: ') as caught:
    gate_rules.parse(text)
  assert caught.value.exit_code == 2


def test_a_text_is_no_tuple_of_rules():
  with pytest.raises(ConfigError, match='tuple'):
    gate_rules.parse_all('bbq/accuracy >= 0.5')


def test_unknown_names_are_found_before_training():
  known = {'bbq': ['accuracy', 'bias_size'], 'toxic': ['toxic']}
  gate_rules.check_known(gate_rules.parse_all(('bbq/accuracy > 0', 'toxic/toxic < 1')), known)
  for text, reason in (
    ('bqb/right > 0', r"no task 'bqb'; did you mean bbq\?"),
    ('other/right > 0', "no task 'other'; there are bbq, toxic"),
    ('bbq/acuracy > 0', r"no figure 'acuracy'; did you mean accuracy\?"),
    ('toxic/right > 0', "no figure 'right'; there are toxic"),
  ):
    with pytest.raises(ConfigError, match=reason):
      gate_rules.check_known(gate_rules.parse_all((text,)), known)
  with pytest.raises(ConfigError, match=r'eval\.tasks is empty'):
    gate_rules.check_known(gate_rules.parse_all(('bbq/accuracy > 0',)), {})


def test_the_config_is_checked():
  c = keys.default()
  c.model.path, c.data.train, c.steps = 'model', 'train.jsonl', 1
  c.gate = ('bbq/accuracy > base',)
  validation.validate(c)
  c.gate = ('bbq right > base',)
  with pytest.raises(ConfigError, match='gate: '):
    validation.validate(c)


@pytest.mark.parametrize(
  ('text', 'passed'),
  [
    ('bbq/accuracy >= 0.85', True),
    ('bbq/accuracy > 0.85', False),
    ('bbq/accuracy <= 0.85', True),
    ('bbq/accuracy < 0.85', False),
    ('bbq/accuracy > base', True),
    ('bbq/accuracy >= base + 0.05', True),  # 0.80 + 0.05 in floats is above 0.85
    ('bbq/accuracy > base + 0.05', False),
    ('bbq/accuracy <= base + 0.05', True),
    ('bbq/accuracy < base + 0.05', False),
    ('bbq/accuracy >= base + 0.06', False),
    ('bbq/accuracy >= base * 1.05', True),
    ('bbq/accuracy >= base * 1.1', False),
    ('bbq/accuracy > base significantly', True),
    ('bbq/accuracy >= base + 0.02 significantly', True),
    ('bbq/accuracy > base + 0.02 significantly', False),
    ('bbq/accuracy >= base + 0.03 significantly', False),
    ('bbq/accuracy <= base + 0.08 significantly', True),
    ('bbq/accuracy <= base + 0.07 significantly', False),
    ('bbq/accuracy >= 0.82 significantly', True),
    ('bbq/accuracy >= 0.83 significantly', False),
    ('bbq/accuracy <= 0.88 significantly', True),
    ('bbq/accuracy <= 0.86 significantly', False),
  ],
)
def test_what_rules_mean(text, passed):
  assert passes(text) == passed


@pytest.mark.parametrize(
  ('found', 'text', 'reason'),
  [
    ({'tasks': {}}, 'bbq/accuracy > 0', 'no results'),
    (summary(tuned=0.5, base=None), 'bbq/accuracy > base', 'of the base cannot be computed'),
    (summary(scores={'tuned': {'accuracy': score(0.5)}}), 'bbq/accuracy > base', 'base'),
    (summary(scores={'base': {'accuracy': score(0.5)}}), 'bbq/accuracy > 0', 'tuned'),
    (
      summary(scores={'tuned': {'accuracy': score(None, why='no rows')}}),
      'bbq/accuracy > 0',
      'cannot be computed: no rows',
    ),
    (summary(), 'bbq/other > 0', 'other of the tuned model cannot'),
    (summary(difference=(0.05, None, None)), 'bbq/accuracy > base significantly', 'no interval'),
    (summary(differences=[]), 'bbq/accuracy > base significantly', 'no interval'),
  ],
)
def test_what_cannot_be_computed_passes_nothing(found, text, reason):
  (check,) = gate.check(gate_rules.parse_all((text,)), found)['checks']
  assert not check['passed'] and reason in check['what']
  assert check['value'] is None and check['limit'] is None


def test_a_refusal_names_every_figure():
  rules = ('bbq/accuracy >= base + 0.1', 'bbq/accuracy > 0.5', 'bbq/accuracy <= 0.6')
  found = gate.check(gate_rules.parse_all(rules), summary())
  assert [c['passed'] for c in found['checks']] == [False, True, False]
  with pytest.raises(CheckError) as caught:
    gate.enforce(found, 'It is not exported.')
  text = str(caught.value)
  assert caught.value.exit_code == 5
  assert 'accuracy is 0.8500, below the limit 0.9000 (base 0.8000)' in text
  assert 'accuracy is 0.8500, above the limit 0.6000' in text and '> 0.5' not in text
  (interval,) = gate.check(
    gate_rules.parse_all(('bbq/accuracy > base + 0.03 significantly',)), summary()
  )['checks']
  assert 'is +0.0500 [+0.0200, +0.0800], its low end not above +0.0300' in interval['what']


def test_no_rules_refuse_nothing():
  assert gate.check((), summary()) is None
  gate.enforce(None, '')
  gate.enforce(gate.check(gate_rules.parse_all(('bbq/accuracy > base',)), summary()), '')
