"""GRPO: what a rollout and its updates must keep, whatever the numbers are.

The runs at the end are those of a user, one of them killed between two updates on a rollout.
tests/exhaustive_grpo_kill.py does every step.
"""

import contextlib
import dataclasses
import functools
import importlib
import logging

import jax
import numpy as np
import pytest
import tiny_rollouts
import tiny_run

from ftjax.algorithms import grpo
from ftjax.experiment import compare
from ftjax.generation.completion import Completion, Rollout, stops
from ftjax.generation.sampling import Sampling
from ftjax.rl import rollout_batch as sampled_rows
from ftjax.rl import rollout_source
from ftjax.rl.rollout_files import RolloutFiles
from ftjax.runtime.errors import CheckError, ConfigError, DataError
from ftjax.training.step import SIGNAL


@pytest.fixture(scope='module')
def usual(tmp_path_factory):
  """(the run, its first batch on the host, parameters before and after its update, metrics)."""
  s = tiny_rollouts.Steps(tmp_path_factory.mktemp('usual'), **{'policy.kl_coef': 0.1})
  before, batch = tiny_rollouts.host(s.state.params), s.batch()
  arrays = tiny_rollouts.host(batch)
  state, metrics = s.step(s.state, batch)
  after = tiny_rollouts.host(state.params)
  s.state = s.trainer.fresh()
  return s, arrays, before, after, {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope='module')
def twice(tmp_path_factory):
  """A run with four updates on a rollout, at another temperature, and its four batches."""
  settings = {'rollout.updates': 2, 'rollout.minibatches': 2, 'rollout.temperature': 0.6}
  s = tiny_rollouts.Steps(tmp_path_factory.mktemp('twice'), **settings)
  return s, [tiny_rollouts.host(s.batch(step)) for step in range(4)]


def test_neither_rollouts_nor_evaluations_hold_ids_that_the_tokenizer_does_not_know(tmp_path):
  """The model has four times the rows: left alone it would draw three unknown ids of four."""
  run = tiny_rollouts.start(tmp_path)
  known, arch = run.model.tokenizer.vocab_size, dataclasses.replace(run.arch, vocab_size=1024)
  run.model = dataclasses.replace(run.model, arch=arch)
  params, prompts = run.load_params('', 'float32'), [run.data.prompt(n) for n in range(4)]
  source = tiny_rollouts.parts_of(run).source
  found = source.sampler.sample(params, prompts, range(4), seed=0, group=4)
  drawn = [t for row in found.completions for c in row for t in c.tokens]
  assert len(drawn) > 16 and max(drawn) < known == 259
  engine = compare.Evaluator(run).programs.engine
  answers = engine.generate(
    params, [p.ids for p in prompts], group=1, max_tokens=8, sampling=Sampling(), seed=0
  )
  assert max(t for row in answers.completions for c in row for t in c.tokens) < known


# The first update.


def test_the_ratio_is_one_and_the_divergence_zero_at_first(usual):
  *_, metrics = usual
  assert metrics['ratio'] == 1 and metrics['approx_kl'] == 0
  assert metrics['clip/low'] == metrics['clip/high'] == 0
  assert abs(metrics['kl']) < 1e-9, 'the policy is the reference still'
  assert metrics['ok'] and metrics['grad_norm'] > 0.01
  assert 0 < metrics['entropy'] < np.log(259)


def test_the_update_changes_parameters(usual):
  _, _, before, after, _ = usual
  assert any((before[k] != after[k]).any() for k in before)


def test_sampler_and_trainer_agree_at_any_temperature(usual, twice):
  """Guarantees 6.2 and 6.3: 1e-5 nats in float32; the old log-probs are the trainer's own."""
  *_, metrics = usual
  assert 0 < metrics['mismatch/abs_diff'] < 1e-5
  s, batches = twice
  for batch in batches:
    counts = batch['weights'] > 0
    assert counts.sum() > 20
    assert np.abs(batch['old_logp'] - batch['sampler_logp'])[counts].max() < 1e-5
  (_, values), *_ = s.rows
  assert 0 < values['mismatch/max'] < 1e-5


def test_the_mismatch_is_logged_with_the_rounding_error_of_the_trainer(tmp_path, caplog):
  s = tiny_rollouts.Steps(tmp_path, **{'rollout.updates': 2})
  with caplog.at_level(logging.INFO):
    s.batch()
    s.source.take(s.state, 2)  # of the second rollout: told once
  (told,) = [r for r in caplog.records if 'another batch size' in r.getMessage()]
  mean, largest, noise, most = told.args
  assert 0 < mean <= largest < 1e-5 and 0 <= noise <= most < 1e-5


# Rewards to advantages.


def sampled(rewards, group, lengths):
  rewards = np.float32(rewards)
  weights = np.arange(8) < np.int32(lengths)[:, None]
  arrays = {'weights': weights.astype(np.float32)}
  return sampled_rows.RolloutBatch(arrays, rewards, np.int32(lengths), group)


def taught(c, sampled):
  """(advantages, weights, metrics) of a rollout."""
  built = grpo.GroupAdvantages(c).build(sampled)
  return built.arrays['advantages'], built.arrays['weights'], built.metrics


def test_equal_rewards_have_no_signal_and_update_nothing(usual):
  """No gradient at all where every completion of a prompt earns the same, not by the KL either."""
  s, arrays, before, *_ = usual
  flat = {k: v.reshape(16, -1) for k, v in arrays.items()}
  levels = np.repeat(np.float32([0.3, 0.7, -1, 0]), 4)
  told = sampled_rows.RolloutBatch(flat, levels, np.ones(16, np.int32), 4)
  advantages, weights, _ = taught(s.run.config, told)
  assert (advantages == 0).all() and (weights == 0).all()
  shardings = s.run.batch_shardings(micro=True)
  flat = flat | {'advantages': advantages, 'weights': weights}
  batch = rollout_source.place({k: flat[k][None] for k in shardings}, shardings)
  state, metrics = s.step(s.trainer.fresh(), batch)
  assert float(metrics['loss']) == 0 and float(metrics['grad_norm']) == 0 and bool(metrics['ok'])
  after = tiny_rollouts.host(state.params)
  assert all((before[k] == after[k]).all() for k in before)


def test_a_rollout_without_signal_after_a_good_one_moves_nothing(usual):
  """Adam's momentum would: every completion of the second rollout has the same reward."""
  s, arrays, *_ = usual
  shardings = s.run.batch_shardings(micro=True)
  good = {k: v.reshape(16, -1) for k, v in arrays.items()}
  told = sampled_rows.RolloutBatch(good, np.zeros(16, np.float32), np.ones(16, np.int32), 4)
  advantages, weights, _ = taught(s.run.config, told)
  flat = good | {'advantages': advantages, 'weights': weights}
  place = lambda x: rollout_source.place({k: x[k][None] for k in shardings}, shardings)  # noqa: E731
  state, _ = s.step(s.trainer.fresh(), place(good))
  before = [np.array(x).tobytes() for x in jax.tree.leaves((state.params, state.opt))]
  state, metrics = s.step(state, place(flat))
  assert not metrics['has_signal'] and int(metrics['no_signal']) == 1
  after = [np.array(x).tobytes() for x in jax.tree.leaves((state.params, state.opt))]
  assert before == after


@pytest.mark.parametrize(
  ('settings', 'advantage', 'gap', 'expected'),
  [
    ({'grpo.advantage': 'reinforce_pp'}, 0.0, None, False),
    ({'grpo.advantage': 'reinforce_pp'}, 1e-30, None, True),
    ({'policy.kl': 'reward', 'policy.kl_coef': 0.5}, 0.0, None, False),
    ({'algorithm': 'ppo'}, 0.0, 0.0, False),
    ({'algorithm': 'ppo'}, 0.0, 1e-3, True),  # values have to learn all the same
    ({'policy.kl_coef': 0.1}, 0.0, None, None),  # a loss that is never constant
    ({'policy.entropy_coef': 0.1}, 0.0, None, None),
    ({'algorithm': 'best_of_n'}, 0.0, None, None),  # its weight alone tells
    ({'algorithm': 'online_dpo'}, 0.0, None, None),
  ],
)
def test_when_a_policy_gradient_has_signal(settings, advantage, gap, expected):
  settings = dict(settings)
  c = tiny_rollouts.tiny(settings.pop('algorithm', 'grpo'), **settings)
  weights = np.float32([[0, 1], [1, 0]])
  zeros = np.zeros_like(weights)
  batch = {'weights': weights, 'advantages': advantage * weights, 'sampler_logp': zeros}
  found = functools.partial(signal_of, c)
  if expected is None:
    assert found(batch) is None
    return
  if gap is not None:
    values = np.float32([[7, 2], [3, 4]])
    batch |= {'old_values': values, 'returns': values + np.float32(gap) * weights}
  assert found(batch) == expected
  idle = batch | {'advantages': 1 - weights}  # of tokens that do not count
  assert found(idle) == bool(gap)


class ZeroForward:
  """A model whose numbers are all 0."""

  def logprobs_and_entropy(self, params, batch, temperature):
    zeros = jax.numpy.zeros_like(batch['weights'])
    return zeros, zeros

  def with_score(self):
    return self

  def untrained(self):
    return self

  def with_dropout(self, keys):
    return self

  def find_params(self, params, name):
    return params[name]

  def cross_entropy(self, params, batch, config):
    return jax.numpy.zeros(2)

  def side_logprobs(self, params, batch, segments):
    return [jax.numpy.zeros(len(batch['weights'])) for _ in segments]

  def token_scores(self, params, batch):
    return jax.numpy.zeros_like(batch['weights'])


def signal_of(c, batch):
  """What the loss of an algorithm says of a batch; None where it says nothing."""
  make_loss = importlib.import_module(f'ftjax.algorithms.{c.algorithm}').make_loss
  batch = batch | {'segments': np.ones((2, 2), np.int32), 'values': np.zeros(2, np.float32)}
  batch = {k: jax.numpy.asarray(v) for k, v in batch.items()}
  *_, metrics = make_loss(ZeroForward(), c)({'value': {}, 'reference': {}}, batch, None)
  return bool(metrics[SIGNAL][0]) if SIGNAL in metrics else None


@pytest.mark.parametrize('name', ['grpo', 'dr_grpo', 'rloo', 'reinforce_pp_baseline'])
def test_prompts_of_another_level_do_not_matter(name):
  """Guarantee 6.6: a group's mean is taken off, that of no other."""
  rewards = np.float32([0, 1, 0, 1, 10, 11, 10, 11])
  c = tiny_rollouts.tiny(**{'grpo.advantage': name})
  out, weights, _ = taught(c, sampled(rewards, 4, [3] * 8))
  np.testing.assert_allclose(out[:4], out[4:], atol=1e-6)
  np.testing.assert_allclose(out[:, 0].reshape(2, 4).mean(-1), 0, atol=1e-6)
  assert (out[:, 3:] == 0).all() and (np.sign(out[:4, 0]) == [-1, 1, -1, 1]).all()
  assert weights.sum() == 24


def test_reinforce_pp_needs_no_group():
  c = tiny_rollouts.tiny(**{'grpo.advantage': 'reinforce_pp', 'rollout.group': 1})
  out, weights, _ = taught(c, sampled([0, 1, 1, 0], 1, [3, 3, 3, 3]))
  assert weights.sum() == 12
  np.testing.assert_allclose(out[:, :3], np.outer([-1, 1, 1, -1], [1] * 3) * 11**0.5 / 12**0.5)


def test_long_completions_cost_reward():
  """8 tokens allowed, the last 4 cost: 6 tokens half a point."""
  c = tiny_rollouts.tiny(**{'policy.overlong': 4, 'grpo.advantage': 'dr_grpo'})
  out, _, metrics = taught(c, sampled([1, 1, 1, 1], 4, [4, 6, 8, 2]))
  np.testing.assert_allclose(out[:, 0], [0.375, -0.125, -0.625, 0.375])
  assert metrics['overlong'] == pytest.approx(-0.375)


def test_a_divergence_alone_is_no_signal():
  settings = {'policy.kl': 'reward', 'policy.kl_coef': 0.5}
  s = sampled([1, 1], 2, [2, 2])
  gap = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
  s.arrays.update(old_logp=gap - 1, ref_logp=np.full((2, 8), -1, np.float32))
  out, weights, _ = taught(tiny_rollouts.tiny(**settings), s)
  assert (out == 0).all() and (weights == 0).all()


def test_divergence_off_the_reward():
  """k1 summed over a completion, times the coefficient."""
  settings = {'policy.kl': 'reward', 'policy.kl_coef': 0.5, 'grpo.advantage': 'dr_grpo'}
  s = sampled([1, 0], 2, [2, 2])
  gap = np.zeros((2, 8), np.float32)
  gap[1, :2] = (0.3, 0.1)
  s.arrays.update(old_logp=gap - 1, ref_logp=np.full((2, 8), -1, np.float32))
  out, _, metrics = taught(tiny_rollouts.tiny(**settings), s)
  # 1 and 0 - 0.5 x 0.4, less their mean.
  np.testing.assert_allclose(out[:, 0], [0.6, -0.6], atol=1e-6)
  assert metrics['kl'] == pytest.approx(0.1)


# Arrays.


def test_a_row_is_a_prompt_with_its_completion(usual):
  """Only the completion's tokens count, the stop token among them."""
  s, *_ = usual
  prompts = [s.run.data.prompt(n) for n in range(2)]
  said = [[[7, 8, 9], [5]], [[4], [3, 2]]]
  cs = [
    [Completion(t, -np.arange(1.0, len(t) + 1, dtype=np.float32), False) for t in ts] for ts in said
  ]
  rows = sampled_rows.rows(prompts, cs, 48)
  for i, (prompt, tokens) in enumerate(
    (p, t) for p, ts in zip(prompts, said, strict=True) for t in ts
  ):
    n, m = len(prompt.ids), len(tokens)
    where = np.flatnonzero(rows['weights'][i])
    assert where.tolist() == list(range(n - 1, n + m - 1))
    assert rows['labels'][i, where].tolist() == tokens
    assert rows['tokens'][i, : n + m].tolist() == prompt.ids + tokens
    assert rows['sampler_logp'][i, where].tolist() == [-1, -2, -3][:m]
    assert rows['segments'][i].sum() == n + m


def test_a_reward_counts_for_its_completion_alone(usual):
  """One point more for one completion lowers the sum by its tokens, and by nothing else."""
  s, arrays, *_ = usual
  flat = {k: v.reshape(16, -1).copy() for k, v in arrays.items()}
  total = jitted_loss(s)
  base, row = total(flat), 5
  more = flat['advantages'].copy()
  more[row] += flat['weights'][row]
  tokens = flat['weights'][row].sum()
  assert tokens >= 1
  assert total(flat | {'advantages': more}) - base == pytest.approx(-tokens, abs=1e-4)
  flat['advantages'][row] = 0
  more[row] = 5 * (1 - flat['weights'][row])  # beside its tokens
  assert total(flat | {'advantages': more}) == total(flat)


def jitted_loss(s):
  """(arrays [R, T]) -> the total of the loss at the first weights."""
  shardings = s.run.batch_shardings(micro=False)
  loss, params = jax.jit(grpo.make_loss(s.run.forward, s.run.config)), s.state.parameters()
  place = lambda arrays: rollout_source.place({k: arrays[k] for k in shardings}, shardings)  # noqa: E731
  return lambda arrays: float(loss(params, place(arrays), None)[0])


def test_the_order_of_prompts_does_not_matter(usual):
  s, *_ = usual
  params = s.state.parameters()
  numbers = [4, 5, 6, 7]

  def found(index):
    prompts = [s.run.data.prompt(numbers[i]) for i in index]
    out = s.source.sampler.sample(params, prompts, [numbers[i] for i in index], seed=0, group=4)
    return prompts, out

  _, straight = found([0, 1, 2, 3])
  prompts, turned = found([2, 0, 3, 1])
  for there, here in enumerate([2, 0, 3, 1]):
    ours = [c.tokens for c in turned.completions[there]]
    assert ours == [c.tokens for c in straight.completions[here]]
  losses = []
  for out, index in ((straight, [0, 1, 2, 3]), (turned, [2, 0, 3, 1])):
    prompts = [s.run.data.prompt(numbers[i]) for i in index]
    made, _ = s.source.score(params, prompts, out, None)
    advantages, weights, _ = taught(s.run.config, made)
    arrays = made.arrays | {'advantages': advantages, 'weights': weights}
    losses.append(jitted_loss(s)(arrays))
  assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != 0


def test_accumulated_is_whole(usual, tmp_path):
  _, arrays, *_, metrics = usual
  cut = tiny_rollouts.Steps(tmp_path, **{'policy.kl_coef': 0.1, 'grad_accum': 4})
  shardings = cut.run.batch_shardings(micro=True)
  batch = rollout_source.place({k: arrays[k].reshape(4, 4, -1) for k in shardings}, shardings)
  _, other = cut.step(cut.state, batch)
  assert float(other['loss']) == pytest.approx(metrics['loss'], abs=1e-6)
  assert float(other['grad_norm']) == pytest.approx(metrics['grad_norm'], rel=1e-5)


VARIANTS = {
  'gspo': {'policy.level': 'sequence', 'policy.aggregate': 'sequence', 'policy.clip_high': 4e-4},
  'cispo': {'policy.surrogate': 'cispo', 'policy.clip_high': 4.0},
  'dapo': {'policy.clip_high': 0.28, 'policy.overlong': 2, 'policy.dual_clip': 3.0},
  'dr_grpo': {'grpo.advantage': 'dr_grpo', 'policy.aggregate': 'constant'},
  'rloo': {'grpo.advantage': 'rloo', 'policy.level': 'trajectory', 'policy.aggregate': 'sequence'},
  'corrected': {'policy.correction': 'sequence_mask', 'policy.entropy_coef': 0.01},
}


@pytest.mark.parametrize('name', VARIANTS)
def test_variants_are_settings_of_one_loss(usual, name):
  """On the first update each is a policy gradient: the loss is the weighted mean of -A."""
  s, arrays, *_ = usual
  c = tiny_rollouts.tiny(**VARIANTS[name])
  batch = {k: v.reshape(16, -1) for k, v in arrays.items()}
  shardings = s.run.batch_shardings(micro=False)
  placed = rollout_source.place({k: batch[k] for k in shardings}, shardings)
  params = s.state.parameters()
  total, weight, metrics = jax.jit(grpo.make_loss(s.run.forward, c))(params, placed, None)
  a, w = batch['advantages'], batch['weights']
  tokens = w.sum(-1)
  expected = {
    'token': -(a * w).sum() / w.sum(),
    'sequence': -(a.max(-1) + a.min(-1))[tokens > 0].sum() / (tokens > 0).sum(),
    'constant': -(a * w).sum() / ((tokens > 0).sum() * c.rollout.max_tokens),
  }[c.policy.aggregate]
  found = float(total) / float(weight)
  if name == 'cispo':
    return assert_finite(found)  # its number is -A log p
  if name == 'corrected':
    expected -= 0.01 * float(metrics['entropy'][0]) / float(metrics['entropy'][1])
  assert found == pytest.approx(expected, abs=2e-4)


def assert_finite(x):
  assert np.isfinite(x) and x != 0


def test_minibatches_take_every_row_once_a_pass(twice):
  s, batches = twice
  assert batches[0]['tokens'].shape == (1, 8, 48)
  key = lambda b: [r.tobytes() for r in b['tokens'][0]]  # noqa: E731
  passes = [key(batches[0]) + key(batches[1]), key(batches[2]) + key(batches[3])]
  assert sorted(passes[0]) == sorted(passes[1]) and passes[0] != passes[1]
  assert len(s.rows) == 1 and s.rows[0][0] == 1


# Prompts that teach nothing give way to others.


def test_flat_prompts_are_redrawn_from_those_set_aside(tmp_path):
  """Two redraws: a rollout sets three batches of prompts aside, and the next begins after them. A
  reward that one text in many earns makes most groups flat."""
  settings = {'rollout.redraws': 2, 'rollout.rewards': 'regex:pattern=.{5}'}
  s = tiny_rollouts.Steps(tmp_path, **settings)
  assert s.run.cursor(1) == 12 and s.run.cursor(2) == 24
  plain = tiny_rollouts.Steps(tmp_path / 'plain', **settings | {'rollout.redraws': 0})
  first, other = (tiny_rollouts.host(x.batch()) for x in (plain, s))
  (_, metrics), *_ = s.rows
  flat = [g for g in range(4) if not first['weights'][0, 4 * g : 4 * g + 4].any()]
  assert flat and metrics['redrawn'] >= len(flat) / 4
  same = [
    (first['tokens'][0, 4 * g : 4 * g + 4] == other['tokens'][0, 4 * g : 4 * g + 4]).all()
    for g in range(4)
  ]
  assert same == [g not in flat for g in range(4)]
  left = [g for g in range(4) if not other['weights'][0, 4 * g : 4 * g + 4].any()]
  assert metrics['zero_variance_left'] == len(left)
  starts = {tuple(r[:12]) for n in range(12) for r in [s.run.data.prompt(n).ids]}
  assert all(any(tuple(row[: len(p)]) == p for p in starts) for row in other['tokens'][0])


# The coefficient of the divergence.


def test_the_coefficient_follows_its_target_and_is_saved():
  c = tiny_rollouts.tiny(**{'policy.kl_coef': 0.1, 'policy.kl_target': 0.5})
  batch_builder, s = grpo.GroupAdvantages(c), sampled([1, 0, 1, 0], 4, [2, 2, 2, 2])
  s.arrays.update(sampler_logp=np.zeros((4, 8), np.float32))
  s.arrays.update(ref_logp=np.full((4, 8), -2, np.float32))
  built = batch_builder.build(s)
  assert (built.arrays['kl_coef'] == np.float32(0.1)).all() and built.metrics['kl'] == 2
  # A fifth of a tenth more.
  assert batch_builder.saved() == {'kl_coef': pytest.approx(0.1 * 1.02), 'kl_begun': 0.1}
  again = grpo.GroupAdvantages(c)
  again.restore(batch_builder.saved())
  assert (again.build(s).arrays['kl_coef'] == np.float32(0.1 * 1.02)).all()
  assert grpo.GroupAdvantages(tiny_rollouts.tiny(**{'policy.kl_coef': 0.1})).saved() == {}
  saved = batch_builder.saved()
  c.policy.kl_coef = 0.3  # changed for the resume
  other = grpo.GroupAdvantages(c)
  other.restore(saved)
  assert (other.build(s).arrays['kl_coef'] == np.float32(0.3)).all()


# Stops.


def test_stop_texts_may_begin_within_a_token(usual):
  s, *_ = usual
  tokenizer = s.run.model.tokenizer
  ended = stops(('\n\n', 'END'), tokenizer)
  for text, told in (('a\n', False), ('a\n\n', True), ('the EN', False), ('x END', True)):
    assert ended(tokenizer.encode(text)) == told, text
  assert stops((), tokenizer) is None


def test_rollout_statistics_separate_right_from_wrong_answers():
  one = lambda n, cut: Completion([1] * n, np.zeros(n), cut)  # noqa: E731
  found = Rollout([[one(2, False), one(4, True)], [one(6, True), one(6, True)]], {})
  out = sampled_rows.rollout_statistics(np.float32([1, 0, 0, 0]), found)
  assert out['zero_variance_groups'] == 0.5 and out['truncated'] == 0.75 and out['length'] == 4.5
  assert out['length/better'] == 2 and out['length/worse'] == pytest.approx(16 / 3)


# Configs.


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    ({'rollout.rewards': ''}, 'rollout.rewards is empty'),
    ({'rollout.temperature': 0.0}, 'equal completions give no signal'),
    ({'rollout.group': 1}, 'expected at least 2'),
    ({'rollout.max_tokens': 48}, 'no room for a prompt'),
    ({'rollout.minibatches': 3}, 'must divide the 16 rows'),
    ({'grad_accum': 3}, 'must divide rows per update=16'),
    (
      {'policy.correction': 'token_mask', 'rollout.top_p': 0.9},
      'a sampler that can choose every token',
    ),
    ({'policy.correction': 'token_mask', 'policy.correction_low': 1.5}, 'must hold 1'),
    ({'policy.dual_clip': 1.1}, 'policy.dual_clip'),
    ({'policy.surrogate': 'reinforce', 'rollout.updates': 2}, 'first update alone'),
    ({'policy.overlong': 9}, 'policy.overlong=9'),
    ({'policy.level': 'trajectory'}, 'length squared'),
    ({'rollout.redraws': 1, 'grpo.advantage': 'reinforce_pp'}, 'by their outcome'),
    ({'checkpoint.best_metric': 'eval/reward'}, 'best_mode=max'),
    ({'data.eval_fraction': 0.1}, 'cannot split prompts'),
    ({'data.on_overlength': 'truncate_left'}, 'prompts are not truncated'),
    ({'rollout.stop': ('a', '')}, 'expected a tuple of texts'),
  ],
)
def test_settings_that_cannot_be(settings, told):
  with pytest.raises(ConfigError, match=told):
    tiny_rollouts.tiny(**settings)


def test_a_missing_column_is_reported_before_training(tmp_path):
  run = tiny_rollouts.start(tmp_path, **{'rollout.rewards': 'exact:column=gold'})
  with pytest.raises(ConfigError, match='asks for gold, which the data lacks'):
    rollout_source.RolloutSource(run, grpo.GroupAdvantages(run.config))


def source_of(tmp_path, train='', evaluation='', **settings):
  for key, rows in (('train', train), ('eval', evaluation)):
    if rows:
      (tmp_path / f'{key}.jsonl').write_text(rows)
      settings[f'data.{key}'] = str(tmp_path / f'{key}.jsonl')
  run = tiny_rollouts.start(tmp_path, **settings)
  return rollout_source.RolloutSource(run, grpo.GroupAdvantages(run.config))


ROWS = '{"prompt": "1 + 1 =", "answer": "2"}\n' * 4


@pytest.mark.parametrize(
  ('train', 'evaluation', 'error', 'told'),
  [
    ('{"prompt": "1 + 1 =", "answer": ["2"]}\n', '', DataError, r'train\.jsonl:1: math'),
    (ROWS + '{"prompt": "1 + 2 ="}\n', '', DataError, r"train\.jsonl:5: math.*no column 'answer'"),
    (ROWS, '{"prompt": "a", "answer": null}\n', DataError, r'eval\.jsonl:1: math.* got None'),
    (ROWS, '{"prompt": "a", "gold": "2"}\n', ConfigError, r'eval\.jsonl has the columns: gold'),
    (ROWS, '{"prompt": "a"}\n', ConfigError, r'eval\.jsonl has the columns: none'),
  ],
)
def test_answers_that_cannot_be_compared_are_found_before_training(
  tmp_path, train, evaluation, error, told
):
  with pytest.raises(error, match=told):
    settings = {'rollout.rewards': 'math:symbolic=off', 'batch_size': 1}
    source_of(tmp_path, train, evaluation, **settings)


def test_a_reward_that_always_raises_ends_the_run(tmp_path, monkeypatch, caplog):
  (tmp_path / 'raising_rewards.py').write_text('def raises(completions): raise RuntimeError(12)')
  monkeypatch.syspath_prepend(str(tmp_path))
  settings = {'rollout.rewards': 'raising_rewards:raises', 'rollout.max_failed': 2}
  s = tiny_rollouts.Steps(tmp_path, **settings)
  with contextlib.closing(s.source):
    s.batch(0)
    with pytest.raises(CheckError, match='raises failed for every completion of 2 rollouts'):
      s.batch(1)
  assert sum('RuntimeError: 12' in r.getMessage() for r in caplog.records) == 1


def test_a_completion_without_a_reward_gets_the_mean_of_its_group():
  nan = np.nan
  filled = sampled_rows.fill_unscored(
    np.float32([1, nan, 0, 1, nan, nan, nan, nan, 0, 0, nan, 1]), 3
  )
  np.testing.assert_allclose(filled, [1, 2 / 3, 0, 1, 0, 0, 0, 0, 0, 0, 1 / 3, 1], rtol=1e-6)
  out, *_ = taught(tiny_rollouts.tiny(), sampled(filled[:4], 4, [3] * 4))
  assert out[1, 0] == pytest.approx(0, abs=1e-6) and out[0, 0] > 0 > out[2, 0]


def test_a_special_token_as_stop_text_stops_on_the_device(tmp_path):
  with contextlib.closing(
    source_of(tmp_path, **{'rollout.stop': ('<|im_start|>', '\n')})
  ) as source:
    [start] = source.run.model.tokenizer.encode('<|im_start|>')
    assert start in source.sampler.stop_ids and source.sampler.ended([5, 6, start])


def test_a_stop_that_cannot_occur_is_refused_at_the_start(tmp_path):
  with pytest.raises(ConfigError, match=r'rollout\.stop.*cannot occur'):
    source_of(tmp_path, **{'rollout.stop': ('a', 'x' * 500)})


def damage(path, how):
  data = path.read_bytes()
  path.write_bytes(
    {'empty': b'', 'cut': data[: len(data) // 2], 'text': b'not a zip'}.get(how, data)
  )
  if how == 'a byte':
    at = len(data) // 3
    path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
  if how == 'missing':
    np.savez_compressed(path, tokens=np.zeros(3))


@pytest.mark.parametrize('how', ['empty', 'cut', 'text', 'a byte', 'missing', 'gone'])
def test_a_damaged_rollout_is_reported_with_its_file(tmp_path, how):
  kept = RolloutFiles(str(tmp_path), 2)
  kept.cut(-1)
  arrays = {
    'tokens': np.arange(600).reshape(2, 300),
    'weights': np.random.default_rng(0).random(99),
  }
  kept.write_arrays(0, arrays)
  found = kept.read_arrays(0, arrays)
  assert all((found[k] == arrays[k]).all() for k in arrays)
  path = tmp_path / 'rollouts' / '0.npz'
  damage(path, how) if how != 'gone' else path.unlink()
  with pytest.raises(DataError, match=r'rollouts/0\.npz is (damaged|missing).*earlier one'):
    kept.read_arrays(0, arrays)


def test_a_damaged_rollout_is_made_anew_at_its_start(twice):
  s, batches = twice
  path = s.source.files._path(0)
  with open(path, 'wb') as file:
    file.write(b'damaged')
  s.source._held = None
  with pytest.raises(DataError, match=r'0\.npz is damaged'):
    s.source.take(s.state, 1)
  for step in range(2):
    again = tiny_rollouts.host(s.source.take(s.state, step))
    assert all((again[k] == batches[step][k]).all() for k in again)
    s.source._held = None  # the next step reads the file that the first has written


# Runs of a user.


@pytest.mark.full
def test_the_reward_of_the_shipped_tiny_run_rises(tmp_path):
  """The first 12 of its 24 rollouts, by a fixed seed: from about -0.98 to above -0.6."""
  code, told = tiny_run.run(
    'train', ['--config=tiny_grpo', f'--workdir={tmp_path}', '--config.steps=12']
  )
  assert code == 0, told
  rewards = [
    row['reward'] for k, row in tiny_rollouts.rollouts(tmp_path).items() if isinstance(k, int)
  ]
  assert len(rewards) == 12 and rewards[0] < -0.9 and min(rewards[-3:]) > -0.6


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('reference')
  code, told = tiny_run.run('train', tiny_rollouts.arguments(workdir), share_cache=False)
  assert code == 0, told
  assert set(tiny_rollouts.rollouts(workdir)) == {'0.jsonl', '1.jsonl', 1, 5}
  return workdir


@pytest.mark.full
def test_killed_between_two_updates_on_a_rollout(reference, tmp_path):
  """The same prompts, completions, losses and exported bits. Guarantees 1.1 and 1.12."""
  tiny_run.share_programs(reference, tmp_path)
  process = tiny_run.launch('train', tiny_rollouts.arguments(tmp_path), tmp_path / 'log')
  assert tiny_run.kill_when(process, lambda: (tmp_path / 'checkpoints' / '2').exists())
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert max(steps) < 8
  code, told = tiny_run.run('train', tiny_rollouts.arguments(tmp_path))
  assert code == 0 and f'resuming after step {max(steps)} of 8' in told, told
  assert tiny_run.differences(tmp_path, reference) == []
  assert tiny_rollouts.rollouts(tmp_path) == tiny_rollouts.rollouts(reference)
