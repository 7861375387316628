"""ftjax models under lm-eval: the numbers of lm-eval's own backend, which make_lm_eval_goldens.py
writes on torch and transformers with batch size 1.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ftjax.runtime import sharding
from parity import lm_eval_cases as cases

pytest.importorskip('lm_eval')

from lm_eval.evaluator import evaluate
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


@pytest.mark.full
@pytest.mark.skipif(not cases.SMOLLM2.exists(), reason='needs `make assets`')
def test_smollm2_has_the_numbers_of_lm_evals_own_backend(folder):
  path = cases.write_tasks(folder / 'real', real=True)
  loaded = TaskManager(include_path=path, include_defaults=False).load(list(cases.TASKS))
  args = {'path': str(cases.SMOLLM2), 'max_length': 4 * cases.SMOLLM2_LENGTH}
  check(numbers(lm_eval_registration.load(args, 4), loaded), 'smollm2')
