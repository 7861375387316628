"""The plateau rule: when the learning rate falls, what a fall does to an update, and a run with it
that is resumed.
"""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny_run
from parity import plateau as torch_plateau
from test_loop import QUIET, Record
from test_saved_model import tiny, train
from test_step import toy

from ftjax.cluster.step_sync import StepSync
from ftjax.cluster.watchdog import Watchdog
from ftjax.config import keys
from ftjax.runtime.errors import ConfigError
from ftjax.telemetry.console import Console, Headline
from ftjax.training import optimizer, plateau
from ftjax.training.loop import Hooks, Loop, Outputs, Progress
from ftjax.training.plateau import Plateau
from ftjax.training.state import create

# The rule in the loop


def loop_scales(rule, mode, metric, start=None, until=None, **changes):
  """(factor that each step ran with, what was saved) of a loop that evaluates after every step.

  metric: {step: value}; a step that is not in it measured nothing. start: (step, saved).
  """
  record, scales = Record(), []

  def step(state, batch):
    scales.append(float(plateau.find_scale(state.opt)))
    metrics = dict(loss=jnp.float32(1), grad_norm=jnp.float32(1), ok=jnp.bool_(True))
    metrics |= dict(supervised_tokens=jnp.float32(4), bad_streak=jnp.int32(0))
    metrics |= dict(has_signal=jnp.bool_(True), no_signal=jnp.int32(0), skipped=jnp.int32(0))
    metrics |= dict(tokens=jnp.int32(5), attended=jnp.float32(7))
    return dataclasses.replace(state, step=state.step + 1), metrics

  settings = dict(eval_every=1, metric='eval/x', mode=mode, plateau=rule, steps=until, **changes)
  loop = Loop(
    step,
    dataclasses.replace(QUIET, **settings),
    Hooks(
      evaluate=lambda state, done, _: {'x': metric[done]} if done in metric else {},
      meta=lambda done: {'step': done},
      saved=lambda state: state,
      watch=lambda done, values: None,
    ),
    Outputs(record, record, record, Console(Headline()), 'unused'),
    signals=StepSync(jax.sharding.get_mesh()),
    watchdog=Watchdog(dict.fromkeys(('step', 'evaluate', 'save'), 0.0)),
  )
  done, progress = 0, Progress()
  state = create({}, {}, optax.chain(optax.identity(), plateau.scale_updates()), False)
  if start:
    done, (state, meta, _) = start
    progress = Progress(**meta['progress'])
  loop.run(state, done, lambda state, step: None, progress)
  return scales, record.saved


@pytest.mark.parametrize('case', range(len(torch_plateau.CASES)))
def test_it_falls_when_torch_lets_it_fall(case):
  """The factor after every value of a sequence, with ties, NaN and infinity."""
  rule, metric, want = torch_plateau.read()[case]
  values = {k + 1: float(x) for k, x in enumerate(metric)}
  found, _ = loop_scales(
    Plateau(rule.factor, rule.patience, rule.floor), rule.mode, values, until=len(metric) + 1
  )
  assert len(set(want)) > 2, 'the rule acts'
  assert (np.diff(found) != 0).tolist() == (np.diff([1.0, *want]) != 0).tolist()
  np.testing.assert_allclose(found, [1.0, *want], rtol=1e-5)


def test_by_hand_and_the_line_it_logs(caplog):
  """Best at step 2; steps 3 and 4 are flat, and 5 and 6 again; 7 is better."""
  caplog.set_level(logging.INFO)
  values = dict(enumerate([3.0, 2.0, 2.0, 2.5, 9.0, 2.0, 1.0, 1.0, 1.0], 1))
  found, _ = loop_scales(Plateau(0.5, 2, 0.3), 'min', values, until=9)
  assert found == [1, 1, 1, 1, 0.5, 0.5, pytest.approx(0.3), *[pytest.approx(0.3)] * 2]
  lines = [r.getMessage() for r in caplog.records if 'plateau' in r.getMessage()]
  assert [line.partition(':')[0] for line in lines] == ['step 4', 'step 6'], 'the floor is silent'
  assert 'eval/x has not improved since step 2 (optim.plateau_patience=2)' in lines[1]
  assert "0.3 times the schedule's; it was 0.5 times" in lines[1]


def test_an_evaluation_without_the_metric_does_not_count():
  found, _ = loop_scales(Plateau(0.5, 2, 0.0), 'min', {1: 1.0, 3: 1.0, 5: 1.0}, until=7)
  assert found == [1, 1, 1, 1, 1, 0.5, 0.5]


@pytest.mark.parametrize('step', range(1, 12))
def test_a_resume_from_any_step_goes_on_as_the_uninterrupted(step):
  """The factor is in the checkpoint of the step that lowered it, the count is as well."""
  values = dict(enumerate([3, 2, 4, 4, 4, 1, 4, 4, 4, 4, 4, 4], 1))
  rule = Plateau(0.5, 2, 0.0)
  whole, saved = loop_scales(rule, 'min', values, until=12, save_every=1)
  resumed, again = loop_scales(
    rule, 'min', values, start=(step, saved[step]), until=12, save_every=1
  )
  assert resumed == whole[step:] and len(set(whole)) == 4
  assert again[12][1]['progress']['evals_flat'] == saved[12][1]['progress']['evals_flat']


def test_a_checkpoint_from_before_the_rule_is_read():
  told = dataclasses.asdict(Progress(value=1.0, step=2, evals_since=1))
  del told['evals_flat']
  assert Progress(**told).evals_flat == 0


# An update

RATE, SCALE, STEPS = 0.05, 0.3, 6


def chain(name, schedule, has_plateau):
  info = {
    'w': optimizer.Leaf(('w',), False, 1, False, ('a', 'b')),
    'b': optimizer.Leaf(('b',), False, 0, False, ('b',)),
  }
  c = keys.default()
  config = optimizer.OptimizerConfig(
    name=name, moments='float32', schedule=schedule, b1=0.9, b2=0.99, eps=1e-8,
    weight_decay=0.1, clip_norm=1.0, decay=(('.*', 1.0),), multipliers=c.optim.multipliers,
    freeze=c.optim.freeze, has_plateau=has_plateau,
  )  # fmt: skip
  return optimizer.make_optimizer(config, info, info)


@pytest.mark.parametrize('name', optimizer.OPTIMIZERS)
def test_a_fall_is_another_learning_rate(name):
  """As a schedule that falls at the same step, with decay, momentum and steps relative to weights;
  the moments are the same.
  """
  rng = np.random.default_rng(3)
  start = {'w': rng.normal(size=(6, 4)), 'b': rng.normal(size=4)}
  start = jax.tree.map(jnp.float32, start)
  gradients = [jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), start)] * STEPS
  ends = []
  for has_plateau in (True, False):
    schedule = (lambda k: RATE) if has_plateau else lambda k: jnp.where(k < 3, RATE, SCALE * RATE)
    tx = chain(name, schedule, has_plateau)
    params, opt, update = start, tx.init(start), jax.jit(tx.update)
    for k, gradient in enumerate(gradients):
      if has_plateau and k == 3:
        opt = plateau.with_scale(opt, SCALE)
      updates, opt = update(gradient, opt, params)
      params = optax.apply_updates(params, updates)
    ends.append((params, opt))
  (params, opt), (want, want_opt) = ends
  assert opt[:-1][0] is not None and len(opt) == len(want_opt) + 1
  for got, expected in zip(
    jax.tree.leaves((params, opt[0])), jax.tree.leaves((want, want_opt[0])), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-7)


def test_without_the_rule_the_state_is_as_before():
  params = {'w': jnp.ones((6, 4)), 'b': jnp.ones(4)}
  opt = chain('adamw', lambda k: RATE, False).init(params)
  assert plateau.find_scale(opt) is None and len(opt) == 4
  with_rule = chain('adamw', lambda k: RATE, True).init(params)
  assert jax.tree.structure(with_rule[:-1]) == jax.tree.structure(opt)


@pytest.mark.parametrize('micro', [1, 4])
def test_the_step_moves_less_and_logs_its_rate(micro):
  tx = optax.chain(optax.sgd(0.1), plateau.scale_updates())
  state, step, batch = toy(micro, optimizer=tx)
  start = np.array(state.params['a'])
  whole, metrics = step(jax.tree.map(jnp.copy, state), batch)
  assert float(metrics['lr']) == np.float32(0.1)
  lower = dataclasses.replace(state, opt=plateau.with_scale(state.opt, 0.25))
  less, metrics = step(lower, batch)
  assert float(metrics['lr']) == np.float32(0.1) * np.float32(0.25)
  assert float(plateau.find_scale(less.opt)) == 0.25
  moved = (np.array(s.params['a']) - start for s in (less, whole))
  np.testing.assert_allclose(next(moved), 0.25 * next(moved), rtol=1e-5)


# A run

# The loss falls, and the largest one is asked for: the first evaluation is the best.
FLAT = {
  'steps': 8,
  'batch_size': 16,
  'grad_accum': 2,
  'eval.every': 2,
  'optim.schedule': 'constant',
  'optim.warmup_steps': 0,
  'optim.plateau_factor': 0.5,
  'optim.plateau_patience': 1,
  'checkpoint.best_metric': 'eval/loss',
  'checkpoint.best_mode': 'max',
}


def rates(workdir):
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [row['lr'] for row in rows if row['split'] == 'train']


def last_state(workdir):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(workdir / 'checkpoints' / '8' / 'state')


@pytest.mark.full
def test_a_run_that_stalls_and_is_resumed_after_a_fall(tmp_path):
  """Over eight devices, with accumulation; bit for bit."""
  c = tiny('sft', **FLAT)
  whole = train(c, tmp_path / 'whole')
  assert len(jax.devices()) == 8
  np.testing.assert_allclose(np.array(rates(whole)) / c.optim.lr, [1] * 4 + [0.5] * 2 + [0.25] * 2)
  copy = shutil.copytree(whole, tmp_path / 'copy')
  for step in (6, 8):
    shutil.rmtree(copy / 'checkpoints' / str(step))
  shutil.rmtree(copy / 'export')
  train(c, copy)
  assert tiny_run.differences(copy, whole) == []
  ours, theirs = (jax.tree.leaves(last_state(w)) for w in (copy, whole))
  assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))
  c.optim.plateau_factor = 1.0
  c.optim.plateau_patience = keys.default().optim.plateau_patience
  with pytest.raises(ConfigError, match=r'optim.plateau_factor switched on or off'):
    train(c, copy)


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    ({'optim.plateau_factor': 0.0}, r'optim.plateau_factor=0.0; expected more than 0'),
    ({'optim.plateau_factor': 2.0}, r'optim.plateau_factor=2.0; expected more than 0'),
    ({'optim.plateau_patience': 0}, r'optim.plateau_patience=0; expected at least 1'),
    ({'optim.plateau_min': 1.0}, r"optim.plateau_min=1.0; expected a share of the schedule's"),
    ({'optim.plateau_min': -0.1}, r"optim.plateau_min=-0.1; expected a share of the schedule's"),
    (
      {'optim.plateau_factor': 1.0, 'optim.plateau_patience': 3},
      r'optim.plateau_patience=3 does nothing with optim.plateau_factor=1',
    ),
    (
      {'optim.plateau_factor': 1.0, 'optim.plateau_min': 0.1, 'optim.plateau_patience': 2},
      r'optim.plateau_min=0.1 does nothing with optim.plateau_factor=1',
    ),
    ({'checkpoint.best_metric': ''}, r'optim.plateau_factor=0.5 needs checkpoint.best_metric'),
    ({'checkpoint.patience': 1}, r'plateau_patience=1 with checkpoint.patience=1: training ends'),
    (
      {'optim.plateau_patience': 3},
      r'optim.plateau_patience=3 can never lower the learning rate in a run of 4 evaluations',
    ),
  ],
)
def test_a_rule_that_cannot_act_is_refused(settings, told):
  with pytest.raises(ConfigError, match=told):
    tiny('sft', **FLAT | settings)


def test_a_rule_that_can_act_once_is_taken():
  tiny('sft', **FLAT | {'optim.plateau_patience': 2, 'checkpoint.patience': 3})
