"""What ftjax returns on the inputs of trl_losses.py, by the names of from_trl.py."""

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.losses import (
  advantages,
  distillation,
  masked,
  mismatch,
  policy,
  preference,
  preference_table,
  reward_model,
)
from ftjax.losses.policy import PolicyLossConfig
from ftjax.losses.preference import Settings


def pairs(x: dict[str, jax.Array]) -> tuple[preference.Pairs, preference.Pairs]:
  """The pairs with the likelihood term of CPO (answers) and with that of ORPO (prompts too)."""
  logp = jax.nn.log_softmax(x['pair_logits'], axis=-1)[:, :-1]
  logp = jnp.take_along_axis(logp, x['pair_ids'][:, 1:, None], axis=-1)[..., 0]
  answer, real = x['pair_answer'][:, 1:], x['pair_real'][:, 1:]
  count = len(logp) // 2
  summed, ref, tokens = (logp * answer).sum(-1), (x['pair_ref'] * answer).sum(-1), answer.sum(-1)
  chosen_real = real[:count].sum(-1)
  whole = (logp * real).sum(-1)[:count]

  def made(nll):
    split = [part for a in (summed, ref, tokens) for part in (a[:count], a[count:])]
    return preference.Pairs(*split, chosen_nll=nll)

  return (
    # TRL's mean over the tokens of the batch; ftjax trains on nll_per_pair.
    made(-summed[:count] / tokens[:count].mean()),
    made(-whole / chosen_real.mean()),
  )


def jsd(x: dict[str, jax.Array], name: str) -> jax.Array:
  flat = (a.reshape(-1, a.shape[-1]) for a in jnp.split(x['pair_logits'], 2))
  terms = distillation.Distillation(name, 0.3, 1.7)
  return distillation.divergence_and_gradient(*flat, terms, None)[0].sum()


def preferences(x: dict[str, jax.Array]) -> dict:
  answers, prompts_too = pairs(x)
  ones = jnp.ones_like(answers.chosen)

  def each(name, settings, batch=answers):
    return preference_table.LOSSES[name].function(batch, settings)

  def mean(name, settings, batch=answers, weights=ones):
    return masked.divide(
      *preference.loss(preference_table.LOSSES[name], batch, weights, settings)[:2]
    )

  near = answers._replace(ref_chosen=0.9 * answers.chosen, ref_rejected=0.9 * answers.rejected)
  rows = jnp.ones_like(x['kto_ref'])
  z = preference.kto_z(
    *preference.kto_reference_point(x['kto_other'].sum(-1), x['kto_ref_other'], rows)
  )
  singles = preference.Singles(x['kto_logp'].sum(-1), x['kto_ref'], x['kto_good'], z)
  rewards = x['chosen_reward'], x['rejected_reward'], ones
  kto_settings = Settings(beta=0.1, desirable=1.3, undesirable=0.7)
  margin = reward_model.bradley_terry(*rewards, margin=x['reward_margin'], centring=0.01)
  return {
    'sigmoid': each('sigmoid', Settings(beta=0.1)),
    'sigmoid_norm': each('sigmoid_norm', Settings(beta=2.0)),
    'ipo': each('ipo', Settings(beta=0.4)),
    'hinge': each('hinge', Settings(beta=0.3)),
    'robust': each('robust', Settings(beta=0.1, label_smoothing=0.2)),
    'exo': each('exo', Settings(beta=0.1, label_smoothing=0.1)),
    'discopop': each('discopop', Settings(beta=0.1, tau=0.2)),
    'nca': each('nca', Settings(beta=0.1)),
    'sppo': each('sppo', Settings(beta=0.4)),
    'apo_zero': each('apo_zero', Settings(beta=0.1)),
    'apo_down': each('apo_down', Settings(beta=0.1)),
    'aot': mean('aot', Settings(beta=0.1, label_smoothing=0.1))[None],
    'aot_unpaired': mean('aot_unpaired', Settings(beta=0.1, label_smoothing=0.1))[None],
    'bco': mean('bco', Settings(beta=0.1)) / 2,  # of two completions
    **{
      f'{loss}_{name}': each(
        loss, Settings(0.1, divergence=name, divergence_alpha=0.3, tau=0.2), near
      )
      for loss in ('sigmoid', 'sigmoid_norm', 'hinge', 'ipo', 'discopop')
      for name in ('forward_kl', 'js', 'alpha')
    },
    **{f'jsd_{name}': jsd(x, name) for name in distillation.DIVERGENCES},
    'cpo': mean('cpo', Settings(beta=0.1)),
    'cpo_smoothed': mean('cpo', Settings(beta=0.1, label_smoothing=0.1)),
    'cpo_nll': mean('cpo', Settings(beta=0.1, nll_coef=0.7)),
    'simpo': mean('simpo', Settings(beta=2.0, gamma=0.5)),
    'orpo': mean('orpo', Settings(beta=0.2), prompts_too),
    'kto': mean('kto', kto_settings, singles, rows),
    'bradley_terry': masked.divide(*reward_model.bradley_terry(*rewards)[:2]),
    'bradley_terry_margin': masked.divide(*margin[:2]),
  }


OBJECTIVES = {
  'grpo': PolicyLossConfig(clip_high=0.28, aggregate='sequence'),
  'bnpo': PolicyLossConfig(clip_high=0.28),
  'dr_grpo': PolicyLossConfig(clip_high=0.28, aggregate='constant', constant=12),
  'dapo': PolicyLossConfig(clip_high=0.28),
  'cispo': PolicyLossConfig(surrogate='cispo', clip_high=0.2),
  'two_sided': PolicyLossConfig(clip_high=0.28, dual_clip=1.5),
  'gspo': PolicyLossConfig(level='sequence', clip_low=0.05, clip_high=0.06, aggregate='sequence'),
  'kl': PolicyLossConfig(clip_high=0.28, kl='k3_is', kl_coef=0.3),
  'kl_plain': PolicyLossConfig(clip_high=0.28, kl='k3', kl_coef=0.3),
  'kl_gspo': PolicyLossConfig(
    level='sequence', clip_high=0.28, kl='k3_is', kl_coef=0.3, aggregate='sequence'
  ),
  'entropy': PolicyLossConfig(clip_high=0.28, entropy_coef=0.1),
  # RLOO's loss is per completion: the same number at each of its tokens has it as its mean.
  'rloo': PolicyLossConfig(level='trajectory', clip_high=0.28, aggregate='sequence'),
}


def policies(x: dict[str, jax.Array]) -> dict:
  out = {}
  for name, objective in OBJECTIVES.items():

    def mean(logp, objective=objective):
      rollout = policy.Rollout(
        logp=logp,
        old_logp=x['old_logp'],
        ref_logp=x['ref_logp'],
        entropy=x['entropy'],
        correction=jnp.ones_like(logp),
        advantages=x['advantages'][:, None],
        weights=x['weights'],
      )
      return masked.divide(*policy.loss(rollout, objective)[:2])

    out[f'policy_{name}'], out[f'policy_{name}_grad'] = jax.jit(jax.value_and_grad(mean))(x['logp'])
  return out


def outputs(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """All numbers, by the names that from_trl.py uses."""
  x = {name: jnp.asarray(a) for name, a in inputs.items()}
  rewards, weights = x['group_rewards'], x['weights']
  scorable = ~jnp.isnan(rewards)
  gae = advantages.gae(x['token_rewards'], x['values'], weights, gamma=0.97, lam=0.9)

  def value(values):
    return masked.divide(*policy.value_loss(values, x['old_values'], gae[1], weights, 0.2)[:2])

  value, value_grad = jax.jit(jax.value_and_grad(value))(x['values'])
  out = jax.jit(preferences)(x) | policies(x)
  out |= {
    'overlong': advantages.overlong_penalty(x['lengths'], 100, 20),
    'advantages_grpo': advantages.grpo(rewards, scorable).advantages,
    'advantages_dr_grpo': advantages.dr_grpo(rewards, scorable).advantages,
    'advantages_rloo': advantages.rloo(rewards, scorable).advantages,
    'gae': gae[0],
    'gae_returns': gae[1],
    'whiten': masked.whiten(x['values'], weights),
    'whiten_keeps_mean': masked.whiten(x['values'], weights, shift=False),
    'value_loss': value,
    'value_loss_grad': value_grad,
  }
  for how in mismatch.CORRECTIONS:
    out[f'correction_{how}'] = mismatch.correct(
      x['old_logp'], x['sampler_logp'], weights, how=how, low=0.5, high=2.0
    )[0]
  return {name: np.asarray(a) for name, a in out.items()}
