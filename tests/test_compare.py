"""Base against tuned, as a run asks for it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_rollouts

from ftjax.experiment import compare, local_model
from ftjax.runtime import checksum, sharding, trees
from ftjax.runtime.errors import RunError, StoppedEarly


def test_tasks_on_one_file_are_logged_once(tmp_path, monkeypatch):
  rows = [{'prompt': f'{i} + 1 =', 'answer': str(i + 1)} for i in range(5)]
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  names = tuple(f'{kind}={kind}:{path}' for kind in ('match', 'math', 'math_strict'))
  run = tiny_rollouts.start(
    tmp_path, **{'eval.tasks': names, 'eval.batch_size': 2, 'eval.max_tokens': 4}
  )
  loads, asked, load, evaluator = [], [], run.load_params, compare.Evaluator(run)
  engine = evaluator.programs.engine
  generate = engine.generate
  monkeypatch.setattr(run, 'load_params', lambda *a: loads.append(a) or load(*a))
  monkeypatch.setattr(engine, 'generate', lambda *a, **k: asked.append(0) or generate(*a, **k))
  base = {name: found['base'] for name, found in evaluator.base().items()}
  assert len(asked) == 1 and len(loads) == 1
  given = [[r.response for r in base[kind]] for kind in ('match', 'math', 'math_strict')]
  assert given[0] == given[1] == given[2] and len(given[0]) == 5
  evaluator.base()
  assert len(asked) == 1 and len(loads) == 1
  assert evaluator.tuned(load('', 'float32')) == {'gate': None}  # other weights are asked anew
  assert len(asked) == 2
  summary = json.loads((tmp_path / 'eval' / 'summary.json').read_text())
  assert summary['models'] == ['base', 'tuned']
  assert list(summary['tasks']) == ['match', 'math', 'math_strict']


def test_a_stopped_evaluation_goes_on_with_the_next_task(tmp_path, monkeypatch):
  """Results of the tuned model are those of its weights: equal ones are read, others asked."""
  paths = [tmp_path / f'{n}.jsonl' for n in 'ab']
  for path in paths:
    path.write_text(json.dumps({'prompt': f'{path.stem} 1 =', 'answer': '1'}))
  settings = {'eval.tasks': tuple(f'{p.stem}=match:{p}' for p in paths), 'eval.max_tokens': 4}
  run = tiny_rollouts.start(tmp_path, **settings)
  asked, evaluator = [], compare.Evaluator(run)
  params, score = run.load_params('', 'float32'), evaluator._score
  evaluator.base()

  def stops(model, task, title):
    asked.append(task.name)
    if asked == ['a', 'b']:
      raise StoppedEarly('SIGTERM')
    return score(model, task, title)

  for self in (evaluator, again := compare.Evaluator(run)):
    monkeypatch.setattr(self, '_score', stops)
  with pytest.raises(StoppedEarly):
    evaluator.tuned(params)
  again.tuned(params)
  assert asked == ['a', 'b', 'b']
  again.tuned(params)
  assert asked == ['a', 'b', 'b']
  flat = trees.flatten(params)
  name = min(flat)
  flat[name] = flat[name] * 1.0001
  again.tuned(trees.unflatten(flat))
  assert asked == ['a', 'b', 'b', 'a', 'b']


def test_the_fingerprint_of_weights_is_of_all_their_bits():
  x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
  mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])

  def of(**leaves):
    return checksum.fingerprint({n: sharding.put(mesh, np.asarray(a)) for n, a in leaves.items()})

  assert of(a=x) == of(a=x + 0)
  others = [of(b=x), of(a=x.T), of(a=x.reshape(4, 3)), of(a=x.astype(jnp.bfloat16)), of(a=x, b=x)]
  others += [of(a=x.at[2, 3].add(1e-6)), of(a=x.at[0, 0].set(-0.0)), of(a=x[::-1])]
  others += [of(a=x.astype(jnp.int8)), of(a=x.astype(jnp.uint8))]
  assert len({of(a=x), *others}) == len(others) + 1


class Fails:
  """A server whose answers are an error."""

  def __init__(self, error):
    self.error = error

  def complete(self, prompts, places, draw, done):
    raise self.error


def test_a_server_that_fails_is_left_out_and_a_stop_is_a_stop(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'prompt': '1 + 1 =', 'answer': '2'}))
  settings = {'eval.tasks': (f'sum=match:{path}',), 'eval.batch_size': 2, 'eval.max_tokens': 4}
  run = tiny_rollouts.start(tmp_path, **settings)
  evaluator = compare.Evaluator(run)
  evaluator._endpoints = {'server': Fails(RunError('no answer'))}
  params = run.load_params('', 'float32')
  evaluator.tuned(params)
  summary = json.loads((tmp_path / 'eval' / 'summary.json').read_text())
  assert summary['models'] == ['base', 'tuned']
  evaluator._endpoints = {'server': Fails(StoppedEarly('SIGTERM'))}
  with pytest.raises(StoppedEarly):
    evaluator.tuned(params)


def test_a_copy_for_decoding_is_made_only_where_it_fits(tmp_path, monkeypatch, caplog):
  caplog.set_level('INFO')
  run = tiny_rollouts.start(tmp_path, **{'model.compute_dtype': 'bfloat16'})
  programs, params = local_model.Programs(run), run.load_params('', 'float32')
  copy = programs.decoding_params(params)
  assert {x.dtype.name for x in jax.tree.leaves(copy)} == {'bfloat16'}
  size = sum(x.nbytes for x in jax.tree.leaves(copy))
  for free, is_made in ((2 * size, True), (size, False)):
    monkeypatch.setattr(local_model, 'free_bytes', lambda free=free: free)
    assert (programs.decoding_params(params) is not params) == is_made
  assert 'does not fit beside them' in caplog.text
