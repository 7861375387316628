"""Preference tuning through the real step: step 0, every loss of the table, cuts, meshes, order."""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
from tiny_model import place

from ftjax.algorithms import dpo, pair_metrics
from ftjax.algorithms import preference as preference_loss
from ftjax.config import algorithms, choices
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.losses import preference, preference_table
from ftjax.models import kinds
from ftjax.models.attention import Tokens
from ftjax.models.forward import Forward
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError

NAMES = tuple(preference_table.LOSSES)
PAIRED = [n for n in NAMES if preference_table.LOSSES[n].paired]


@functools.cache
def _compiled(mesh, changes):
  """(run, trainer, compiled step), once for each mesh and config."""
  c = tiny_pairs.settings(**dict(changes))
  run = tiny_pairs.shapes_only(c)
  trainer = Trainer(run, dpo.make_loss(run.forward, c))
  return run, trainer, trainer.compile()


def prepared(nudge=0.0, **changes):
  """(run, trainer, compiled step, fresh state); `nudge` moves the policy off the reference."""
  key = jax.sharding.get_mesh(), tuple(sorted(changes.items()))
  run, trainer, step = _compiled(*key)
  state = trainer.fresh()
  if nudge:
    state = dataclasses.replace(
      state, params=jax.tree.map(functools.partial(shift, nudge), state.params)
    )
  return run, trainer, step, state


def shift(nudge, x):
  moved = np.asarray(x) + nudge * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
  return jax.device_put(moved, x.sharding)


def one_step(batch, **changes):
  """(metrics as floats, parameters after the step, trainer) of one update."""
  run, trainer, step, state = prepared(**changes)
  state, metrics = step(state, tiny_pairs.on_devices(batch, run))
  host = {k: float(v) for k, v in metrics.items()}
  return host, trees.flatten(jax.tree.map(np.asarray, state.params)), trainer


@functools.cache
def _start():
  """(architecture, reference, policy moved off it) on one device."""
  run, _, _, state = prepared()
  reference = jax.tree.map(jnp.copy, state.frozen['reference'])
  return run.arch, reference, jax.tree.map(functools.partial(shift, 0.02), reference)


def forward(batch, moved=True, **changes):
  """Metrics of the loss alone, without gradient and update."""
  arch, reference, policy = _start()
  c = tiny_pairs.settings(**changes)
  params = policy if moved else reference
  if preference_table.LOSSES[c.dpo.loss].needs_reference:
    params = params | {'reference': reference}
  loss = jax.jit(dpo.make_loss(Forward(arch, jnp.dtype(c.model.compute_dtype)), c))
  total, weight, metrics = loss(params, tiny_pairs.flat_on_devices(batch), None)
  return {k: float(a / b) for k, (a, b) in (metrics | {'loss': (total, weight)}).items()}


# Step 0


def test_step_zero_is_ln_2_and_every_margin_exactly_zero():
  """Guarantee 6.4, with recomputation and accumulation, and without."""
  for changes in ({}, dict(remat='full', grad_accum=4)):
    metrics, _, _ = one_step(tiny_pairs.rows(), **changes)
    assert metrics['loss'] == pytest.approx(math.log(2), abs=1e-6)
    for key in ('rewards/margin', 'rewards/chosen', 'rewards/rejected', 'rewards/accuracy'):
      assert metrics[key] == 0.0, key
    assert metrics['grad_norm'] > 0.01


def test_step_zero_in_bfloat16():
  metrics = forward(tiny_pairs.rows(), moved=False, model__compute_dtype='bfloat16')
  assert metrics['loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert metrics['rewards/margin'] == 0.0


# Every loss


def plain_logps(arch, params, batch):
  """float64[B, T] log p(label) by the whole logits, each row's segments apart and unpacked."""
  out = np.zeros(batch['tokens'].shape)
  for row in range(len(out)):
    for segment in (1, 2):
      at = batch['segments'][row] == segment
      n = int(at.sum())
      if not n:
        continue
      tokens = np.zeros((1, 64), np.int32)
      tokens[0, :n] = batch['tokens'][row][at]
      valid = (np.arange(64) < n).astype(np.int32)[None]
      where = Tokens(place(valid, 'batch', 'seq'), place(valid.cumsum(1) - 1, 'batch', 'seq'))
      logits = _logits(arch, params, place(tokens, 'batch', 'seq'), where)
      logits = np.asarray(logits, np.float64)[0, :n]
      logits -= logits.max(-1, keepdims=True)
      logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      out[row][at] = logp[np.arange(n), batch['labels'][row][at]]
  return out * batch['weights']


@functools.partial(jax.jit, static_argnums=0)
def _logits(arch, params, tokens, where):
  x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32)
  table = jax.sharding.reshard(params['embed']['w'], jax.P(None, None))
  return jnp.einsum('BTD,VD->BTV', x, table, out_sharding=jax.P())


@pytest.fixture(scope='module')
def plain():
  """Summed log-probs of rows by the plain forward: policy and reference, segments 1 and 2."""
  arch, reference, policy = _start()
  batch = tiny_pairs.rows()
  policy, reference = (plain_logps(arch, p, batch) for p in (policy, reference))
  out = {}
  for name, values in (('', policy), ('ref_', reference)):
    for side, segment in (('first', 1), ('second', 2)):
      out[name + side] = (values * (batch['segments'] == segment)).sum(-1)
  for side, segment in (('first_tokens', 1), ('second_tokens', 2)):
    out[side] = (batch['weights'] * (batch['segments'] == segment)).sum(-1)
  return batch, out


# One for each way in which the inputs of a loss are made; each is a compilation.
WAYS = ('sigmoid', 'cpo', 'aot', 'kto')


@pytest.mark.parametrize(
  'name', [n if n in WAYS else pytest.param(n, marks=pytest.mark.full) for n in NAMES]
)
def test_every_loss_is_the_tables_function_of_plain_log_probs(name, plain):
  """Through packed rows and the chunked head, from the numbers of a plain forward."""
  batch, m = plain
  assert np.abs(m['first'] - m['ref_first']).min() > 1e-3  # the policy has moved
  coefficients = dict(beta=0.3, label_smoothing=0.1, gamma=0.2, nll_coef=0.5, desirable=1.5)
  # A config refuses those that the loss does not read.
  idle = {k for k, _, names in choices.only_with() if name not in names}
  changes = {f'dpo__{k}': v for k, v in coefficients.items() if f'dpo.{k}' not in idle}
  changes['dpo__loss'] = name
  metrics = forward(batch, **changes)
  row, ones = preference_table.LOSSES[name], np.ones(tiny_pairs.ROWS, np.float32)
  run = tiny_pairs.shapes_only(tiny_pairs.settings(**changes))
  assert (algorithms.place(run.config, 'reference') == 'state') == row.needs_reference
  known = {k: jnp.float32(v) for k, v in m.items()}
  if not row.needs_reference:
    known |= {k: jnp.zeros(tiny_pairs.ROWS) for k in ('ref_first', 'ref_second')}
  if row.paired:
    arguments = [known[k] for k in ('first', 'second', 'ref_first', 'ref_second')]
    arguments += [known['first_tokens'], known['second_tokens']]
    table = preference.Pairs(*arguments, -known['first'] / known['first_tokens'])
  else:
    z = jnp.float32(max(0.0, float(np.mean(m['second'] - m['ref_second']))))
    table = preference.Singles(known['first'], known['ref_first'], batch['values'] > 0, z)
  total, weight, expected = preference.loss(row, table, ones, preference.Settings(**coefficients))
  assert float(weight) == tiny_pairs.ROWS
  assert metrics['loss'] == pytest.approx(float(total / weight), rel=2e-5)
  for key, (a, b) in expected.items():
    assert metrics[key] == pytest.approx(float(a / b), rel=2e-4, abs=2e-5), key
  if row.paired:
    assert metrics['logps/chosen'] == pytest.approx(float(m['first'].mean()), rel=1e-5)
    assert metrics['logps/rejected'] == pytest.approx(float(m['second'].mean()), rel=1e-5)


def test_a_loss_that_sorts_the_pairs_is_the_same_on_a_mesh(plain, use_mesh):
  expected = forward(plain[0], dpo__loss='aot_unpaired')
  use_mesh(data=2, fsdp=2, tensor=2)
  metrics, _, _ = one_step(plain[0], nudge=0.02, dpo__loss='aot_unpaired')
  for key, value in expected.items():
    assert metrics[key] == pytest.approx(value, rel=3e-5, abs=1e-6), key


@pytest.mark.parametrize('name', ['orpo', 'kto'])
def test_a_loss_without_reference_and_one_of_single_answers_make_a_step(name, plain):
  batch = plain[0]
  metrics, _, trainer = one_step(batch, nudge=0.02, dpo__loss=name)
  expected = forward(batch, dpo__loss=name)
  assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
  assert metrics['supervised_tokens'] == batch['weights'].sum()
  assert metrics['ok'] and metrics['grad_norm'] > 1e-3
  assert ('reference' in trainer.abstract.frozen) == (name == 'kto')


# Cuts, meshes, orders


@pytest.fixture(scope='module')
def whole():
  return one_step(tiny_pairs.rows(), nudge=0.02)


@pytest.mark.parametrize('sizes', [{}, dict(fsdp=2, tensor=2), dict(data=2, context=2, fsdp=2)])
def test_cut_and_sharded_as_whole(sizes, whole, use_mesh):
  use_mesh(**sizes)
  changes = {} if sizes else dict(remat='full', grad_accum=4)
  metrics, params, _ = one_step(tiny_pairs.rows(), nudge=0.02, **changes)
  for key, value in whole[0].items():
    assert metrics[key] == pytest.approx(value, rel=3e-5, abs=1e-6), key
  for name, value in whole[1].items():
    # Adam divides by the gradient's own size: where that is all rounding, the update is too.
    close = np.abs(params[name] - value) <= 1e-4
    assert close.mean() > 0.999, name


def test_the_order_of_pairs_and_padding_rows_do_not_matter(whole):
  batch = tiny_pairs.rows()
  order = np.random.default_rng(1).permutation(tiny_pairs.ROWS)
  shuffled = {k: v[order] for k, v in batch.items()}
  padded = {k: np.concatenate([v, np.zeros_like(v)]) for k, v in batch.items()}
  keys = ('loss', 'rewards/margin', 'rewards/accuracy', 'logps/chosen')
  for found in (one_step(shuffled, nudge=0.02)[0], forward(padded)):
    assert {k: found[k] for k in keys} == pytest.approx({k: whole[0][k] for k in keys}, rel=1e-5)


def test_swapped_sides_have_the_opposite_margin(whole):
  """Segment 1 is the chosen answer whichever is longer."""
  batch = tiny_pairs.rows()
  other = {k: np.zeros_like(v) for k, v in batch.items()}
  for row in range(tiny_pairs.ROWS):
    n = [int((batch['segments'][row] == s).sum()) for s in (1, 2)]
    for key in ('tokens', 'labels', 'positions', 'weights'):
      a = batch[key][row]
      other[key][row, : sum(n)] = np.concatenate([a[n[0] : sum(n)], a[: n[0]]])
    other['segments'][row, : sum(n)] = np.repeat([1, 2], n[::-1])
  metrics, _, _ = one_step(other, nudge=0.02)
  assert metrics['rewards/margin'] == pytest.approx(-whole[0]['rewards/margin'], rel=1e-4)
  assert metrics['logps/chosen'] == pytest.approx(whole[0]['logps/rejected'], rel=1e-6)


# The state, the alarm, the config


def test_the_reference_is_neither_trained_nor_saved():
  run, trainer, step, state = prepared()
  before = trees.flatten(jax.tree.map(np.asarray, state.frozen['reference']))
  for seed in range(2):
    state, _ = step(state, tiny_pairs.on_devices(tiny_pairs.rows(seed), run))
  after = trees.flatten(jax.tree.map(np.asarray, state.frozen['reference']))
  params = trees.flatten(jax.tree.map(np.asarray, state.params))
  for name, value in before.items():
    np.testing.assert_array_equal(after[name], value)
    assert not np.array_equal(params[name], value)
  assert not trainer.saved(state).frozen
  assert 'reference' not in trainer.model(state)
  assert 'reference' in state.averaged()


QUIET = {'skipped': 0, 'no_signal': 0, 'has_signal': True, 'lr': 1e-2}


def alarmed(margins, algorithm='dpo', chosen=-120.0, rejected=-119.0, settings=(), **values):
  """Texts of what the alarm logs of a run with these reward margins, one a step."""
  alarm, records = preference_loss.Alarm(tiny_pairs.settings(algorithm, **dict(settings))), []
  handler = logging.Handler()
  handler.emit = lambda record: records.append(record.getMessage())
  logger = logging.getLogger('ftjax.algorithms.preference')
  logger.addHandler(handler)
  try:
    for done, margin in enumerate(margins, 1):
      row = QUIET | {'logps/chosen': chosen, 'logps/rejected': rejected} | values
      alarm(done, row | {f'rewards/{k}': margin for k in ('chosen', 'rejected', 'margin')})
  finally:
    logger.removeHandler(handler)
  return records


AT_ROUNDING = {
  'exactly 0, the policy stays at the reference': ([0.0] * 9, {}),
  'rounding of both signs': ([0.0, 3e-6, -9e-6, 1e-6, -2e-7, 0.0, 5e-6], {}),
  'long responses round more': ([4e-4] * 8, dict(chosen=-4000.0, rejected=-4000.001)),
  'bfloat16 rounds more': ([1e-3] * 8, dict(settings={'model__compute_dtype': 'bfloat16'})),
  'a larger beta': ([4e-5] * 8, dict(settings={'dpo__beta': 0.5})),
  'after some steps that moved': ([0.0, 0.3, 0.1, *[1e-7] * 5], {}),
}


@pytest.mark.parametrize('name', AT_ROUNDING)
def test_the_alarm_warns_once_of_margins_at_the_level_of_rounding(name):
  margins, rest = AT_ROUNDING[name]
  (told,) = alarmed(margins, **rest)
  assert 'no larger than rounding' in told
  for remedy in ('ftjax.preview', 'optim.lr', 'optim.freeze'):
    assert remedy in told


QUIET_RUNS = {
  'too few steps': ([0.0] * 5, {}),  # the first of them precedes every update
  'a margin now and then': ([0.0, 0.0, 0.0, 0.0, 0.01] * 4, {}),
  'small margins above rounding': ([2e-4] * 20, {}),
  'a rate that still warms up': ([5e-6] * 20, dict(lr=1e-4)),
  'no pair in the batch': ([0.0] * 20, dict(has_signal=False, no_signal=5)),
  'not a number': ([float('nan')] * 20, {}),
}


@pytest.mark.parametrize('name', QUIET_RUNS)
def test_the_alarm_is_silent_otherwise(name):
  margins, rest = QUIET_RUNS[name]
  assert alarmed(margins, **rest) == []


def test_the_alarm_of_a_reward_model_compares_scores():
  scores = {'rewards/chosen': 3.0, 'rewards/rejected': 3.0}
  alarm = preference_loss.Alarm(tiny_pairs.settings('reward_model'))
  for done in range(1, 8):
    alarm(done, QUIET | scores | {'rewards/margin': 1e-6})
  assert alarm._is_warned
  alarm = preference_loss.Alarm(tiny_pairs.settings('reward_model'))
  for done in range(1, 20):
    alarm(done, QUIET | scores | {'rewards/rejected': 2.9999, 'rewards/margin': 1e-4})
  assert not alarm._is_warned


def test_the_names_of_the_losses_are_those_of_the_table():
  for name in NAMES:
    needs = dict(dpo__label_smoothing=0.1) if name == 'exo' else {}
    assert preference_loss.settings(tiny_pairs.settings(dpo__loss=name, **needs)).beta == 0.1
  with pytest.raises(ConfigError, match=r'dpo\.loss='):
    tiny_pairs.settings(dpo__loss='ppo')
  assert set(choices.CHOICES['dpo.loss']) == set(NAMES)


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    (dict(dpo__loss='kto', grad_accum=2), 'grad_accum=2'),
    (dict(dpo__loss='kto', eval__batch_size=1), 'at least 2'),
    (dict(dpo__loss='aot', grad_accum=2), 'compares the examples of the whole step'),
    (dict(dpo__loss='exo'), 'label_smoothing=0'),
    (dict(dpo__loss='discopop', dpo__tau=0.0), r'dpo\.tau=0'),
    (dict(dpo__loss='nca', dpo__divergence='js'), r'dpo\.divergence'),
    (dict(dpo__divergence_alpha=0.3), r'dpo\.divergence'),
    (dict(dpo__beta=0.0), 'dpo.beta'),
    (dict(dpo__label_smoothing=0.5), 'label_smoothing'),
    (dict(loss__z_loss=1.0), 'loss.z_loss=1.0 does nothing'),
    (dict(algorithm='reward_model', eval__prompts=('a',)), 'eval.prompts'),
  ],
)
def test_refused(changes, told):
  with pytest.raises(ConfigError, match=told):
    tiny_pairs.settings(**changes)


# Evaluation


@pytest.mark.parametrize('name', ['sigmoid', 'simpo', 'kto'])
def test_evaluation_is_over_all_rows_once(name, tmp_path):
  """Eleven rows in batches of eight, on eight devices, through the data's own path."""
  kind = 'pairs' if name != 'kto' else 'labels'
  c = tiny_pairs.settings(
    dpo__loss=name, data__train=f'{kind}:40', data__eval=f'{kind}:11', seq_len=128
  )
  c.compile_cache, c.mesh.fsdp, c.eval.batch_size = False, 8, 8
  run = experiment.start(c, str(tmp_path))
  params = run.load_params('', 'float32')
  params = params | {'reference': params}
  measure = dpo.make_measure(run.forward, c)
  found = dpo.evaluate(measure, run, params, lambda: False)
  rows = pair_metrics.collect(measure, run, params, lambda: False)
  assert len(rows['first']) == 11 and (rows['weights'] == 1).all()
  assert dpo.evaluate(measure, run, params, lambda: True) is None
  if name == 'sigmoid':
    assert found['loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert (found['accuracy'], found['margin'], found['pairs']) == (0.0, 0.0, 11)
  if name == 'simpo':
    gap = 0.1 * (rows['first'] / rows['first_tokens'] - rows['second'] / rows['second_tokens'])
    assert found['margin'] == pytest.approx(gap.mean(), rel=1e-5)
    assert found['accuracy'] == pytest.approx((gap > 0).mean())
    assert found['accuracy_low'] < found['accuracy'] < found['accuracy_high'] or found[
      'accuracy'
    ] in (0, 1)
  if name == 'kto':
    assert found['loss'] == pytest.approx(0.5) and found['kto_z'] == 0.0
