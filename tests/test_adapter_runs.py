"""Runs with adapters inside the test process: the first step of the algorithms that compare with a
reference, what the state holds, and what the optimizer moves.
"""

import functools
import math
import types

import jax
import numpy as np
import pytest
import tiny_pairs
import tiny_rollouts
from tiny_model import host

from ftjax.algorithms import dpo, reference_logps
from ftjax.experiment.trainer import Trainer
from ftjax.models import kinds
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError

FULL = pytest.mark.full
LR = 1e-5
FEW = '.*(attn/q|mlp/down)'
LORA = dict(lora__rank=4, lora__alpha=8.0)
CASES = {
  'lora': dict(lora__train='embed/w', optim__lr=LR),
  'nf4': dict(
    lora__base='nf4',
    lora__block=8,
    lora__init='pissa',
    lora__dora=True,
    lora__b_lr_ratio=16.0,
    lora__targets=FEW,
    optim__weight_decay=0.0,
  ),
  'int8': dict(lora__base='int8', lora__dora=True, lora__train='embed/w|.*norm/scale'),
}


def trained(case):
  """(run, trainer, compiled step, a batch on the devices), on the current mesh."""
  return _trained(case, jax.sharding.get_mesh())


@functools.cache
def _trained(case, mesh):
  del mesh  # the current one
  run = tiny_pairs.shapes_only(tiny_pairs.settings(**LORA, **CASES[case]))
  trainer = Trainer(run, dpo.make_loss(run.forward, run.config))
  return run, trainer, trainer.compile(), tiny_pairs.on_devices(tiny_pairs.rows(), run)


MARKED = ['lora', 'nf4', pytest.param('int8', marks=FULL)]


@pytest.mark.parametrize('case', MARKED)
def test_the_reference_is_the_base_under_the_adapter(case):
  """Before the first step policy and reference are one model; the reference has what is trained
  whole for itself, and keeps it.
  """
  run, trainer, step, batch = trained(case)
  state = trainer.fresh()
  own = host(state.frozen.get('reference', {}))
  assert own.keys() == set(run.arch.adapter.trained)
  for name, leaf in own.items():
    np.testing.assert_array_equal(leaf, host(state.params)[name])
  state, metrics = step(state, batch)
  assert float(metrics['loss']) == pytest.approx(math.log(2), abs=1e-6)
  for key in ('rewards/margin', 'rewards/chosen', 'rewards/rejected'):
    if case == 'lora':
      assert metrics[key] == 0, key
    assert abs(metrics[key]) < 1e-5, key
  assert metrics['grad_norm'] > 0.01 and metrics['ok']
  for name, leaf in own.items():
    np.testing.assert_array_equal(host(state.frozen['reference'])[name], leaf)
    assert (host(state.params)[name] != leaf).any()
  moved = float(step(state, batch)[1]['loss'])
  assert moved < math.log(2) - (1e-6 if case == 'lora' else 1e-3)


@pytest.mark.parametrize('case', MARKED)
def test_the_state_holds_the_base_once_and_moments_of_the_adapter_alone(case):
  """By the leaves of the state, and by the bytes of the compiled step's arguments."""
  run, trainer, step, batch = trained(case)
  declared = kinds.declared(run.arch)
  size = {n: math.prod(p.shape) for n, p in declared.items()}
  base = {n for n, p in declared.items() if p.origin == 'base'}
  names = {n for n, p in declared.items() if p.origin == 'adapter' and not p.is_fixed}
  bytes_of = {n: size[n] * jax.numpy.dtype(p.dtype).itemsize for n, p in declared.items()}
  state = trainer.abstract
  assert trees.flatten(state.params).keys() == names
  whole = sum(size[n] for n in run.arch.adapter.trained)
  kept = sum(bytes_of[n] for n in declared if n not in names) + 4 * whole
  moments = 2 * 4 * sum(size[n] for n in names)
  held = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
  few = 100  # counters
  expected = kept + sum(bytes_of[n] for n in names) + moments
  assert expected <= sum(held) <= expected + few
  given = sum(held) + sum(x.nbytes for x in batch.values())
  assert step.memory_analysis().argument_size_in_bytes <= given + few * len(held)
  saved = trees.flatten(trainer.saved(state).frozen)
  assert not base & saved.keys() and not any(n.startswith('reference/') for n in saved)


def test_a_run_begins_with_the_base_as_it_was_read(monkeypatch):
  """The very arrays: a copy, though short-lived, would need the memory of two bases. The state is
  donated, so what else begins with the same weights has copies.
  """
  run, trainer, step, batch = trained('lora')
  first = run.load_first()
  monkeypatch.setattr(run, 'load_first', lambda: first)
  state = trainer.fresh()
  flat, held = trees.flatten(first), trees.flatten(state.frozen)
  for name in kinds.names(run.arch, 'base'):
    assert held[name] is flat[name]
  assert held['reference/embed/w'] is not flat['embed/w']
  assert float(step(state, batch)[1]['loss']) == pytest.approx(math.log(2), abs=1e-6)


def test_a_hundred_steps_at_a_small_rate_move_the_adapter_on_a_bfloat16_base():
  """At 1e-5, which is lost on bfloat16 weights: the adapter is float32."""
  run, trainer, step, batch = trained('lora')
  assert run.arch.base == 'bfloat16' and run.config.optim.lr == LR
  state = trainer.fresh()
  before, base = host(state.params), host(state.frozen)
  for _ in range(100):
    state, metrics = step(state, batch)
  assert metrics['lr'] == np.float32(LR) and metrics['skipped'] == 0
  after = host(state.params)
  adapter = [n for n in after if 'lora_' in n]
  moved = sum((after[n] != before[n]).sum() for n in adapter)
  assert moved >= 0.99 * sum(after[n].size for n in adapter)
  assert all(after[n].dtype == np.float32 for n in adapter)
  for name, leaf in host(state.frozen).items():
    np.testing.assert_array_equal(leaf, base[name])


def test_b_learns_faster_than_a():
  """LoRA+: Adam's first step is the rate, whatever the gradient is."""
  run, trainer, step, batch = trained('nf4')
  state = trainer.fresh()
  before = host(state.params)
  after = host(step(state, batch)[0].params)
  rate = run.config.optim.lr
  for name in before:
    moved = np.median(np.abs(after[name] - before[name]))
    ratio = 16 if name.endswith('/lora_b') else 1
    assert moved == pytest.approx(ratio * rate, rel=0.01), name


def three_steps(case):
  """[(loss, norm of the gradient)] of three steps."""
  _, trainer, step, batch = trained(case)
  state, found = trainer.fresh(), []
  for _ in range(3):
    state, metrics = step(state, batch)
    found.append([float(metrics[k]) for k in ('loss', 'grad_norm')])
  return found


@FULL
@pytest.mark.parametrize(
  'sizes', [dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=2, expert=2)], ids=str
)
def test_with_a_reference_on_a_mesh_the_steps_are_the_same(sizes, use_mesh):
  expected = three_steps('int8')
  use_mesh(**sizes)
  found = three_steps('int8')
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  assert expected[2][0] < expected[0][0] - 1e-3


def test_a_freeze_that_leaves_nothing_of_an_adapter_is_refused():
  freeze = (('.*lora_.*', True), ('.*', False))
  run = tiny_pairs.shapes_only(tiny_pairs.settings(**LORA, optim__freeze=freeze))
  with pytest.raises(ConfigError, match=r'optim\.freeze freezes the whole adapter'):
    Trainer(run, dpo.make_loss(run.forward, run.config))


def test_a_cached_reference_is_of_the_base_whatever_the_adapter_is():
  """Runs with another adapter read the same log-probs; with a base held in another way, others."""

  def key(**changes):
    settings = tiny_pairs.settings(dpo__reference='cache', **(LORA | changes))
    corpus = types.SimpleNamespace(fingerprint='rows')
    return reference_logps._key(tiny_pairs.shapes_only(settings), corpus, 'weights')

  assert key() == key(lora__rank=8, lora__dora=True, lora__targets='.*attn/q', lora__dropout=0.1)
  assert key() != key(lora__base='int8')


# On rollouts.

ROLLOUTS = {'lora.rank': 4, 'policy.kl_coef': 0.1}


@pytest.mark.parametrize(
  'changes',
  [
    pytest.param({'lora.train': 'embed/w', 'lora.base': 'int8'}, marks=FULL),
    pytest.param({'lora.base': 'nf4', 'lora.block': 8, 'lora.init': 'pissa'}, marks=FULL),
    pytest.param({'lora.dora': True, 'policy.kl': 'reward', 'lora.train': 'embed/w'}, marks=FULL),
  ],
  ids=str,
)
def test_on_policy_the_ratio_is_one_and_the_divergence_zero(changes, tmp_path):
  s = tiny_rollouts.Steps(tmp_path, **ROLLOUTS, **changes)
  batch = s.batch()
  state, metrics = s.step(s.state, batch)
  metrics = {k: float(v) for k, v in metrics.items()}
  assert metrics['ratio'] == 1 and metrics['approx_kl'] == 0
  assert abs(metrics.get('kl', 0.0)) < 1e-9
  assert abs(s.rows[0][1]['kl']) < 1e-6, 'the log-probs of the sampler, within rounding'
  assert metrics['ok'] and metrics['grad_norm'] > 1e-3
  assert not any(n.startswith('reference') for n in trees.flatten(state.frozen))
  own = trees.flatten(s.run.load_auxiliary(s.run.auxiliary.find('reference')))
  assert set(own) == set(filter(None, [changes.get('lora.train')])), 'no second copy of the base'


@pytest.mark.full
def test_a_value_model_shares_the_base_and_has_an_adapter_of_its_own(tmp_path):
  changes = {'lora.base': 'nf4', 'lora.block': 8, 'lora.targets': FEW, 'lora.train': 'embed/w'}
  s = tiny_rollouts.Steps(tmp_path, 'ppo', **ROLLOUTS, **changes)
  before, frozen = host(s.state.params), host(s.state.frozen)
  batch = s.batch()
  assert not np.asarray(batch['old_values']).any(), 'values begin at 0'
  state, metrics = s.step(s.state, batch)
  assert metrics['ratio'] == 1 and metrics['approx_kl'] == 0 and metrics['ok']
  assert abs(s.rows[0][1]['kl']) < 1e-6, 'the log-probs of the sampler, within rounding'
  after = host(state.params)
  value = {n for n in after if n.startswith('value/')}
  policy = after.keys() - value
  assert {n.removeprefix('value/') for n in value} == policy | {'score/w'}
  assert (after['value/score/w'] != before['value/score/w']).any()
  held = [n for n in frozen if n.startswith(('value/', 'reference/'))]
  assert all(n.endswith('lora_scale') for n in held), 'no second copy of the base'
  # A score of 0 gave the value model's adapter no gradient yet.
  state, _ = s.step(state, batch)
  last = host(state.params)
  assert all((last[n] != before[n]).any() for n in last if n.endswith(('/lora_b', '/lora_m')))
  for name, leaf in frozen.items():
    np.testing.assert_array_equal(host(state.frozen)[name], leaf)
