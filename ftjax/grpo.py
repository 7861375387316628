"""GRPO and its kin, top to bottom: completions -> rewards -> advantages -> loss -> step -> run.

One loss with settings: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++ are rows of the table
in docs/grpo.md. Completions, rewards and resuming between updates are episodes.py's; the formulas
are in losses/policy.py, losses/advantages.py and losses/mismatch.py."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax import episodes, experiment, fit
from ftjax.episodes import Sampled
from ftjax.losses import advantages, mismatch, policy
from ftjax.models.architecture import Architecture


def objective(c: ml_collections.ConfigDict) -> policy.Objective:
  """The loss of a config."""
  in_loss = c.grpo.kl != 'reward'
  return policy.Objective(
    surrogate=c.grpo.surrogate,
    level=c.grpo.level,
    clip_low=c.grpo.clip_low,
    clip_high=c.grpo.clip_high,
    dual_clip=c.grpo.dual_clip,
    kl=c.grpo.kl if in_loss else 'k3',
    kl_coef=c.grpo.kl_coef if in_loss else 0.0,
    entropy_coef=c.grpo.entropy_coef,
    aggregate=c.grpo.aggregate,
    constant=c.rollout.max_tokens,
  )


def make_loss(arch: Architecture, c: ml_collections.ConfigDict):
  """loss(params, batch, keys) -> (total, weight, metrics) of rows of one completion each.

  For the first update on a rollout the old log-probs are this pass's own: the ratio is 1, whatever
  the sampler's rounding. With more updates the batch brings them.
  """
  read = functools.partial(
    episodes.readout,
    arch,
    temperature=c.rollout.temperature,
    dtype=jnp.dtype(c.model.compute_dtype),
    remat=c.remat,
  )
  goal, how = objective(c), c.grpo.correction
  bounds = dict(low=c.grpo.correction_low, high=c.grpo.correction_high)

  def loss(params, batch, keys):
    weights = batch['weights']
    logp, entropy = read(params, batch)
    old_logp = batch.get('old_logp', jax.lax.stop_gradient(logp))
    correction, more = mismatch.correct(
      old_logp,
      batch['sampler_logp'],
      weights,
      how='token_truncate' if how == 'none' else how,
      **bounds,
    )
    if how == 'none':  # measured all the same
      correction = jnp.ones_like(correction)
      more = {k: more[k] for k in ('mismatch/abs_diff', 'mismatch/kl')}
    rollout = policy.Rollout(
      logp=logp,
      old_logp=old_logp,
      ref_logp=batch.get('ref_logp', jnp.zeros_like(logp)),
      entropy=entropy,
      correction=correction,
      advantages=batch['advantages'],
      weights=weights,
    )
    total, weight, metrics = policy.loss(rollout, goal)
    counted = jax.lax.stop_gradient(entropy).sum(), (weights != 0).sum().astype(jnp.float32)
    return total, weight, metrics | more | {'entropy': counted}

  return loss


_RELATIVE = {
  'grpo': advantages.grpo,
  'dr_grpo': advantages.dr_grpo,
  'rloo': advantages.rloo,
  'reinforce_pp_baseline': advantages.reinforce_pp_baseline,
}


def make_teach(c: ml_collections.ConfigDict) -> Callable[[Sampled], tuple]:
  """episodes.Teach of a config: advantages of every token; groups without a lesson get weight 0."""
  g = c.grpo
  in_reward = bool(g.kl_coef) and g.kl == 'reward'
  cost = jax.jit(policy.kl_rewards)
  last, whiten = jax.jit(advantages.at_last_token), jax.jit(advantages.reinforce_pp)
  relative = jax.jit(_RELATIVE.get(g.advantage, advantages.dr_grpo))

  def teach(s: Sampled) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    a, weights, metrics = s.arrays, s.arrays['weights'], {}
    rewards = s.rewards
    if g.overlong:
      penalty = advantages.overlong_penalty(s.lengths, c.rollout.max_tokens, g.overlong)
      rewards = rewards + np.asarray(penalty)
      metrics['overlong'] = float(np.mean(penalty))
    paid = np.zeros_like(weights)  # for being far from the reference, by token
    if in_reward:
      paid = np.asarray(cost(a['old_logp'], a['ref_logp'], weights))
      metrics['kl'] = float(paid.sum() / weights.sum())
      paid = np.float32(g.kl_coef) * paid
    if g.advantage == 'reinforce_pp':
      out = np.asarray(whiten(np.asarray(last(rewards, weights)) - paid, weights))
      return out, weights, metrics
    rewards = (rewards - paid.sum(-1)).reshape(-1, s.group)
    found = relative(rewards, np.ones(rewards.shape, bool))
    out = np.asarray(found.advantages).reshape(-1, 1) * weights
    lesson = np.repeat(np.asarray(found.has_lesson), s.group)[:, None]
    return out, weights * lesson, metrics

  return teach


def run(c: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs a config to its end: train, export, compare with the base."""
  r = experiment.start(c, workdir)
  with episodes.Episodes(r, make_teach(c)) as source:
    fit.fit(r, make_loss(r.arch, c), source.evaluate, source)
