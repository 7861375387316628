"""PPO: values, advantages, and a value model that is trained beside the policy and never in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_rollouts
import tiny_tokenizer

from ftjax.algorithms import policy_gradient, ppo
from ftjax.experiment.model import open_model
from ftjax.hf import export, label_files
from ftjax.losses import policy
from ftjax.models import kinds
from ftjax.models.attention import Tokens
from ftjax.rl import rollout_batch, rollout_source
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError


@pytest.fixture(scope='module')
def usual(tmp_path_factory):
  """(the run, its first batch on the host, metrics of its rollout)."""
  s = tiny_rollouts.Steps(tmp_path_factory.mktemp('ppo'), 'ppo')
  batch = tiny_rollouts.host(s.batch())
  return s, batch, s.rows[0][1]


def nudged(s):
  """The parameters with another value model, whose values are not 0."""
  arch = s.run.auxiliary.find('value').architecture()
  value = kinds.init(arch, jax.random.key(5), jnp.float32)
  return s.state.params | {'value': value}


def flat(batch):
  return {k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items()}


def placed(s, arrays):
  shardings = s.run.batch_shardings(micro=False)
  return rollout_source.place({k: arrays[k] for k in shardings}, shardings)


# Values.


def test_the_value_is_that_of_the_state_before_each_label(usual):
  """The score of a prefix, computed on that prefix alone."""
  s, batch, _ = usual
  arch, params = s.run.auxiliary.find('value').architecture(), nudged(s)
  arrays = flat(batch)
  got = jax.jit(ppo.make_measure(s.run.forward))(params, placed(s, arrays))
  row = int(np.argmax(arrays['weights'].sum(-1)))
  for at in np.flatnonzero(arrays['weights'][row])[:3]:
    ids = jnp.asarray(arrays['tokens'][row, : at + 1][None])
    where = Tokens(jnp.ones_like(ids), jnp.arange(at + 1, dtype=jnp.int32)[None])
    x = kinds.apply(arch, params['value'], ids, where, dtype=jnp.float32)
    expected = np.asarray(x)[0, -1] @ np.asarray(params['value']['score']['w'])[0]
    assert np.asarray(got)[row, at] == pytest.approx(float(expected), abs=1e-5)


def test_from_a_language_model_values_begin_at_zero(usual):
  _, batch, metrics = usual
  assert (batch['old_values'] == 0).all() and metrics['value'] == 0


# Advantages.


def test_advantages_and_returns_by_hand():
  """Two tokens and one: reward 1 and 2 at the end, values 0.5 and 0.25, 0; lam 0.5, gamma 1."""
  c = tiny_rollouts.tiny('ppo', **{'ppo.lam': 0.5, 'ppo.whiten': False})
  weights = np.float32([[0, 1, 1, 0], [0, 1, 0, 0]])
  values = np.float32([[9, 0.5, 0.25, 9], [9, 0, 9, 9]])
  arrays = {'weights': weights, 'old_values': values, 'tokens': np.zeros((2, 4), np.int32)}
  s = rollout_batch.RolloutBatch(arrays, np.float32([1, 2]), np.int32([2, 1]), 2)
  built = ppo.ValueAdvantages(c).build(s)
  # d = (0.25 - 0.5, 1 - 0.25); A = (-0.25 + 0.5 * 0.75, 0.75); R = A + V
  np.testing.assert_allclose(built.arrays['advantages'], [[0, 0.125, 0.75, 0], [0, 2, 0, 0]])
  np.testing.assert_allclose(built.arrays['returns'], [[0, 0.625, 1, 0], [0, 2, 0, 0]])
  error, spread = np.float64([0.125, 0.75, 2]), np.float64([0.625, 1, 2])
  assert built.metrics['explained_variance'] == pytest.approx(1 - error.var() / spread.var())


def test_whitened_advantages_have_mean_zero_and_variance_one(usual):
  _, batch, _ = usual
  found = batch['advantages'][batch['weights'] > 0]
  assert found.mean() == pytest.approx(0, abs=1e-6) and found.std(ddof=1) == pytest.approx(1, 1e-5)


def test_the_kl_penalty_is_per_token():
  settings = {'policy.kl': 'reward', 'policy.kl_coef': 0.5, 'ppo.whiten': False, 'ppo.lam': 1.0}
  weights, gap = np.float32([[1, 1]]), np.float32([[0.3, 0.1]])
  arrays = {'weights': weights, 'old_values': np.zeros((1, 2), np.float32)}
  arrays |= {'old_logp': gap - 1, 'ref_logp': np.full((1, 2), -1, np.float32)}
  s = rollout_batch.RolloutBatch(arrays, np.float32([1]), np.int32([2]), 1)
  built = ppo.ValueAdvantages(tiny_rollouts.tiny('ppo', **settings)).build(s)
  np.testing.assert_allclose(built.arrays['advantages'], [[0.8, 0.95]], atol=1e-6)


# The loss and the update.


def test_the_loss_is_the_policys_and_the_values(usual):
  s, batch, _ = usual
  arrays, c = flat(batch), s.run.config
  rng = np.random.default_rng(0)
  arrays['returns'] = rng.normal(size=arrays['returns'].shape).astype(np.float32)
  arrays['old_values'] = rng.normal(size=arrays['returns'].shape).astype(np.float32)
  params, on_device = nudged(s), placed(s, arrays)
  total, weight, metrics = jax.jit(ppo.make_loss(s.run.forward, c))(params, on_device, None)
  of_tokens = policy_gradient.make_loss(c)
  logp, entropy = jax.jit(lambda p, b: s.run.forward.logprobs_and_entropy(p, b, 1.0))(
    params, on_device
  )
  expected, tokens, _ = of_tokens(logp, entropy, on_device)
  values = jax.jit(ppo.make_measure(s.run.forward))(params, on_device)
  of_values, *_ = policy.value_loss(
    values, arrays['old_values'], arrays['returns'], arrays['weights'], c.ppo.value_clip
  )
  assert float(weight) == float(tokens) == arrays['weights'].sum()
  assert float(total) == pytest.approx(float(expected + 0.1 * of_values), rel=1e-5)
  assert {'value_error', 'value_clip', 'entropy', 'ratio'} <= metrics.keys()


def test_policy_and_value_model_do_not_touch_each_other(usual):
  """The gradient of each is that of its own loss."""
  s, batch, _ = usual
  params, on_device = nudged(s), placed(s, flat(batch))

  def gradient(coefficient):
    c = tiny_rollouts.tiny('ppo', **{'ppo.value_coef': coefficient})
    loss = ppo.make_loss(s.run.forward, c)
    g = jax.jit(jax.grad(lambda p: loss(p, on_device, None)[0]))(params)
    return {k: np.asarray(v) for k, v in trees.flatten(g).items()}

  one, two = gradient(1.0), gradient(2.0)
  for name, g in one.items():
    scale = 2 if name.startswith('value/') else 1
    np.testing.assert_allclose(two[name], scale * g, rtol=1e-4, atol=1e-6, err_msg=name)
  assert any(np.abs(g).max() > 1e-3 for n, g in one.items() if n.startswith('value/'))


def test_an_update_trains_both_and_the_export_holds_the_policy_alone(tmp_path):
  s = tiny_rollouts.Steps(tmp_path, 'ppo', **{'rollout.updates': 2, 'policy.kl_coef': 0.1})
  before = tiny_rollouts.host(s.state.params)
  for step in range(4):
    s.state, metrics = s.step(s.state, s.batch(step))
    if step in (0, 2):  # the policy that sampled
      assert float(metrics['ratio']) == pytest.approx(1, abs=1e-5)
  after = tiny_rollouts.host(s.state.params)
  changed = {n for n in before if (before[n] != after[n]).any()}
  assert {'value/score/w', 'value/embed/w', 'embed/w'} <= changed
  assert s.rows[1][1]['value'] != 0
  model = s.trainer.model(s.state)
  assert trees.flatten(model).keys() == kinds.declared(s.run.arch).keys()
  export.export(
    model,
    s.run.arch,
    tmp_path / 'export',
    source_config=s.run.model.config,
    tokenizer_files=s.run.model.files,
    dtype=np.dtype(np.float32),
    stop_ids=s.run.model.stop_ids,
  )


@pytest.mark.parametrize('sizes', [dict(fsdp=8), dict(data=2, context=2, fsdp=2)])
def test_on_a_mesh_the_update_is_the_same(usual, sizes, use_mesh, tmp_path):
  s, batch, _ = usual
  _, whole = s.step(s.trainer.fresh(), placed_micro(s, batch))
  use_mesh(**sizes)
  cut = tiny_rollouts.Steps(tmp_path, 'ppo')
  _, metrics = cut.step(cut.state, placed_micro(cut, batch))
  for key in ('loss', 'grad_norm', 'value_error', 'entropy'):
    assert float(metrics[key]) == pytest.approx(float(whole[key]), rel=3e-5, abs=1e-6), key


def placed_micro(s, batch):
  shardings = s.run.batch_shardings(micro=True)
  return rollout_source.place({k: batch[k] for k in shardings}, shardings)


# Where the value model comes from.


def test_a_value_model_may_start_from_a_reward_model(usual, tmp_path):
  s, *_ = usual
  arch = s.run.auxiliary.find('value').architecture()
  params = kinds.init(arch, jax.random.key(9))
  c = s.run.config
  model = open_model('', c.model.random.to_dict(), c.seed, label_files.REWARD)
  export.export(
    params,
    arch,
    tmp_path / 'rm',
    source_config=model.config,
    tokenizer_files=model.files,
    dtype=np.dtype(np.float32),
    stop_ids=model.stop_ids,
  )
  run = tiny_rollouts.start(tmp_path, 'ppo', **{'ppo.value_from': str(tmp_path / 'rm')})
  tiny_rollouts.parts_of(run).source.close()
  found = trees.flatten(run.load_auxiliary(run.auxiliary.find('value')))
  for name, x in trees.flatten(params).items():
    np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(x), err_msg=name)


@pytest.mark.parametrize('files', [{'vocab_size': 300}, {'extra_special': ('<pad>',)}])
def test_a_value_model_with_other_tokens_is_refused(tmp_path, files):
  for name, data in tiny_tokenizer.tiny_files(**files).items():
    (tmp_path / name).write_bytes(data)
  run = tiny_rollouts.start(tmp_path, 'ppo', **{'ppo.value_from': str(tmp_path)})
  told = rf'ppo\.value_from={tmp_path} has another tokenizer than the policy model\.random'
  with pytest.raises(ConfigError, match=told):
    tiny_rollouts.parts_of(run)


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    ({'ppo.gamma': 0.0}, 'ppo.gamma=0.0'),
    ({'ppo.lam': 1.5}, 'ppo.lam=1.5'),
    ({'policy.aggregate': 'sequence'}, 'expected token'),
    ({'policy.level': 'sequence'}, 'expected token'),
    ({'rollout.redraws': 1}, 'by their outcome'),
    ({'checkpoint.best_metric': 'eval/loss'}, 'which ppo measures'),
    ({'ppo.value_clip': -1.0}, 'ppo.value_clip'),
    ({'policy.kl_target': 1.0}, 'policy.kl_coef=0'),
    ({'policy.kl': 'k2'}, 'policy.kl=k2 does nothing with policy.kl_coef=0'),
    ({'policy.kl_coef': 0.1, 'policy.kl_gain': 0.2}, 'nothing with policy.kl_target=0'),
    ({'policy.kl_coef': 0.1, 'policy.kl_target': 1.0, 'policy.kl_gain': 6.0}, 'at most 1'),
    ({'policy.correction_low': 0.5}, 'policy.correction_low=0.5 does nothing'),
    ({'policy.correction_high': 3.0}, 'policy.correction_high=3.0 does nothing'),
    ({'policy.surrogate': 'cispo', 'policy.clip_low': 0.1}, 'policy.clip_low=0.1 does nothing'),
    ({'policy.surrogate': 'reinforce', 'policy.clip_high': 0.1}, 'clip_high=0.1 does nothing'),
    ({'policy.clip_low': 1.1}, 'expected at most 1'),
    ({'rollout.reward_limit': 0.0}, 'rollout.reward_limit=0'),
    ({'rollout.function_limit': 0.0}, 'rollout.function_limit=0'),
    ({'data.packing': False}, 'data.packing=False does nothing'),
    ({'data.loss_on': 'all'}, 'data.loss_on=all does nothing'),
  ],
)
def test_settings_that_cannot_be(settings, told):
  with pytest.raises(ConfigError, match=told):
    tiny_rollouts.tiny('ppo', **settings)
