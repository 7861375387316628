"""ftjax models under lm-eval: the numbers of lm-eval's own backend, which make_lm_eval_goldens.py
writes on torch and transformers with batch size 1.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from ftjax.grading.math_answers import Math
from ftjax.runtime import sharding
from parity import lm_eval_cases as cases

pytest.importorskip('lm_eval')

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_fn
from lm_eval.evaluator import evaluate
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from ftjax.serving import lm_eval_registration

GOLDEN = Path(__file__).parent / 'golden' / 'lm_eval'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('lm_eval')


@pytest.fixture(scope='module')
def tasks(folder):
  """The tasks, loaded once."""
  path = cases.write_tasks(folder / 'tasks')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HF_DATASETS_CACHE', str(folder / 'cache'))
    return TaskManager(include_path=path, include_defaults=False).load(list(cases.TASKS))


def opened(folder, name, batch_size=4, devices=1):
  """The model of a case, on some devices."""
  case = cases.TINY[name]
  path = folder / f'bos_{case["adds_bos"]}'
  if not path.exists():
    cases.write_model(path, case['adds_bos'])
  args = {'path': str(path), 'max_length': case['max_length']}
  if case['add_bos'] is not None:
    args['add_bos_token'] = case['add_bos']
  with pytest.MonkeyPatch.context() as patch:
    make = sharding.make_mesh
    patch.setattr(
      lm_eval_registration.sharding,
      'make_mesh',
      lambda sizes: make(sizes, jax.devices()[:devices]),
    )
    return lm_eval_registration.load(args, batch_size)


def numbers(model, tasks, is_chat=False):
  for task in tasks['tasks'].values():
    task.set_fewshot_seed(1234)
  found = evaluate(
    model, tasks, bootstrap_iters=0, apply_chat_template=is_chat, fewshot_as_multiturn=is_chat
  )
  return cases.numbers(found)


def check(found, name):
  arrays, texts = found
  expected = dict(np.load(GOLDEN / f'{name}.npz'))
  assert arrays.keys() == expected.keys() and len(arrays) == 9
  for key, values in expected.items():
    # Where lm-eval's figure is exp or a ratio of log-likelihoods, to as many digits.
    np.testing.assert_allclose(arrays[key], values, rtol=1e-5, atol=1e-4, err_msg=key)
  for key in (k for k in expected if k.endswith('answers')):
    np.testing.assert_allclose(arrays[key], expected[key], rtol=0, atol=1e-4, err_msg=key)
  assert texts == json.loads((GOLDEN / f'{name}.json').read_text())


@pytest.mark.parametrize(
  'name', [n if n == 'bos' else pytest.param(n, marks=pytest.mark.full) for n in cases.TINY]
)
def test_every_document_has_the_numbers_of_lm_evals_own_backend(folder, tasks, name):
  check(numbers(opened(folder, name), tasks), name)


def test_so_it_is_with_the_chat_template(folder, tasks):
  check(numbers(opened(folder, 'plain'), tasks, is_chat=True), 'chat')


@pytest.mark.full
@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('batch_size', [1, 4, 16])
def test_batch_size_and_devices_change_nothing(folder, tasks, batch_size, devices):
  check(numbers(opened(folder, 'bos', batch_size, devices), tasks), 'bos')


needs_smollm2 = pytest.mark.skipif(
  not cases.SMOLLM2.exists(), reason=f'needs `make assets`: {cases.SMOLLM2} is missing'
)


@pytest.fixture(scope='module')
def smollm2():
  """The model, in batches of 4."""
  args = {'path': str(cases.SMOLLM2), 'max_length': cases.SMOLLM2_LENGTH}
  return lm_eval_registration.load(args, 4)


@pytest.fixture(scope='module')
def real(folder):
  """Loads tasks of real rows."""
  path = cases.write_tasks(folder / 'real', real=True)
  return TaskManager(include_path=path, include_defaults=False).load


def check_answers(name, found, expected):
  """Log-likelihoods in nats and greedy flags; of the first documents. Of whole texts, of 360 to
  2,350 nats, float32 models are some 2e-7 of that from a float64 one.
  """
  assert len(found) > 0
  bounds = {'rtol': 5e-7 if name.startswith(cases.READ) else 0, 'atol': 1e-4}
  np.testing.assert_allclose(found, expected[: len(found)], err_msg=name, **bounds)


@needs_smollm2
def test_choices_by_smollm2_have_the_numbers_of_lm_evals_own_backend(smollm2, real):
  name = 'ftjax_last'
  found, _ = cases.numbers(evaluate(smollm2, real([name]), bootstrap_iters=0, limit=4))
  expected = np.load(GOLDEN / 'smollm2.npz')
  check_answers(name, found[f'{name}/answers'], expected[f'{name}/answers'])


@pytest.mark.full
@needs_smollm2
def test_every_document_of_smollm2_has_the_numbers_of_lm_evals_own_backend(smollm2, real):
  found, texts = numbers(smollm2, real(list(cases.TASKS)))
  expected = dict(np.load(GOLDEN / 'smollm2.npz')) | dict(np.load(GOLDEN / 'smollm2_float64.npz'))
  gaps = expected.pop('ftjax_write/gaps')
  assert found.keys() == expected.keys()
  for key in expected:
    if key.endswith('answers'):
      check_answers(key, found[key], expected[key])
    else:
      np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-4, err_msg=key)
  # Completions are equal, unless the two highest logits of a token were.
  right = json.loads((GOLDEN / 'smollm2.json').read_text())['ftjax_write']
  pairs = zip(texts['ftjax_write'], right, strict=True)
  differ = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
  assert len(right) >= 30 and all(gaps[i] < 1e-4 for i in differ), (differ, gaps[differ])


# Completions of a problem by lm-eval's gsm8k and ours: (form, do lm-eval's strict-match and ours
# agree, do flexible-extract and ours). {body}: the gold rationale; {gold}: its number.
FORMS = [
  ('{body}#### {gold}', True, True),
  ('{body}#### {gold}.', True, True),
  ('{body}#### {gold} apples', True, True),
  ('{body}#### {wrong}', True, True),
  ('The answer is {gold}.', True, True),
  ('The answer is {wrong}', True, True),
  ('', True, True),
  ('I do not know.', True, True),
  ('{body}#### ${gold}', False, True),  # lm-eval's pattern has no $
  ('{body}####{gold}', False, True),  # nor the form without a blank
  ('\\boxed{{{gold}}}', False, True),
  # lm-eval takes the first ####, ours is of the last line.
  ('{body}#### {gold}\n#### {wrong}', False, True),
  ('{body}#### {gold}\nQuestion', False, True),
  ('It costs ${gold}.00', True, False),  # lm-eval compares texts, ours compares numbers
]


@pytest.mark.parametrize(('form', 'strict', 'flexible'), FORMS)
def test_filters_of_gsm8k_and_math_count_the_same_answers(form, strict, flexible):
  loaded = _gsm8k()
  for row in cases.sums(20):
    body, gold = row['answer'].split('#### ')
    text = form.format(body=body, gold=gold, wrong=int(gold) + 1)
    for which, mode, is_same in zip(
      loaded, ('strict', 'flexible'), (strict, flexible), strict=True
    ):
      theirs = loaded[which](text, row['answer'])
      ours = Math(mode, symbolic='off').score(text, '', row['answer']) == 1
      assert (theirs == ours) == is_same, (which, text)


@functools.cache
def _gsm8k():
  """By filter of lm-eval's gsm8k, (completion, answer) -> whether it counts."""
  path = Path(lm_eval.tasks.__file__).parent / 'gsm8k' / 'gsm8k.yaml'
  config = yaml.safe_load(path.read_text())
  options = config['metric_list'][0]
  keys = ('ignore_case', 'ignore_punctuation', 'regexes_to_ignore')

  def counts(chain):
    def is_right(text, answer):
      instance = Instance('generate_until', {}, ('', {}), 0, ('gsm8k', 0, 1), resps=[text])
      chain.apply([instance])
      found = instance.filtered_resps[chain.name]
      asked = {k: options[k] for k in keys}
      return exact_match_fn(references=[answer], predictions=[found], **asked)['exact_match'] == 1

    return is_right

  out = {}
  for one in config['filter_list']:
    steps = [
      [f['function'], {k: v for k, v in f.items() if k != 'function'}] for f in one['filter']
    ]
    out[one['name']] = counts(build_filter_ensemble(one['name'], steps))
  return out
