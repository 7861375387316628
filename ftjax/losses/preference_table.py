"""The losses of preference tuning, one row each: a new loss is a function of a batch and
`Settings`, and one row of `LOSSES`.

Policy log-ratios are r = log pi(y|x) - log pi_ref(y|x); w is the chosen completion, l the rejected
one, |y| a number of tokens, s the logistic function, P the pairs and N the labeled completions of a
step. All losses are to be minimized, and all functions are jnp.

Losses with a `divergence` compare d = f'(exp r) in place of r, f being the generator of an
f-divergence of the policy from the reference (Wang et al. 2023, "Beyond reverse KL"): the default,
'reverse_kl', is d = r.
"""

import math

import jax
import jax.numpy as jnp

from ftjax.losses import masked
from ftjax.losses.preference import Pairs, Row, Settings, Singles, per_token

_LARGEST = 40.0  # exponents are cut there: the square of the result is a float32 still


def _soft(x: jax.Array, smoothing: float) -> jax.Array:
  """Computes -(1 - e) log s(x) - e log s(-x)."""
  # softplus(-x) = -log s(x).
  return (1 - smoothing) * jax.nn.softplus(-x) + smoothing * jax.nn.softplus(x)


def _ratios(p: Pairs) -> tuple[jax.Array, jax.Array]:
  return p.chosen - p.ref_chosen, p.rejected - p.ref_rejected


def _exp(x: jax.Array) -> jax.Array:
  return jnp.exp(jnp.minimum(x, _LARGEST))


def _alpha(r: jax.Array, c: Settings) -> jax.Array:
  """Computes (t^(a-1) - 1) / (a-1) of t = exp r."""
  order = c.divergence_alpha - 1
  return r if abs(order) < 1e-6 else (_exp(order * r) - 1) / order


# f'(t) as a function of log t = r, less its value at t = 1: no constant changes a loss.
DIVERGENCES = {
  'reverse_kl': lambda r, c: r,
  'forward_kl': lambda r, c: 1 - _exp(-r),
  'js': lambda r, c: math.log(2) - jax.nn.softplus(-r),
  'alpha': _alpha,
}


def _scores(p: Pairs, c: Settings) -> tuple[jax.Array, jax.Array]:
  """Computes (d_w, d_l)."""
  derivative = DIVERGENCES[c.divergence]
  chosen, rejected = _ratios(p)
  return derivative(chosen, c), derivative(rejected, c)


def _gap(p: Pairs, c: Settings) -> jax.Array:
  """Computes d_w - d_l, in an order that gives exactly 0 where policy and reference are equal."""
  chosen, rejected = _scores(p, c)
  return chosen - rejected


def _mean_gap(p: Pairs, c: Settings) -> jax.Array:
  """Computes d_w / |w| - d_l / |l|."""
  chosen, rejected = _scores(p, c)
  return per_token(chosen, p.chosen_tokens) - per_token(rejected, p.rejected_tokens)


def _of_same_rank(x: jax.Array, other: jax.Array, weights: jax.Array | float) -> jax.Array:
  """Returns for each number of x [P] the number of `other` [P] with the same rank in its order.

  weights: 0 for padding, whose result is 0.
  """
  counts = jnp.broadcast_to(weights, x.shape) != 0
  rank = jnp.argsort(jnp.argsort(jnp.where(counts, x, jnp.inf)))
  return jnp.where(counts, jnp.sort(jnp.where(counts, other, jnp.inf))[rank], 0.0)


def _sigmoid(p: Pairs, c: Settings) -> jax.Array:
  return _soft(c.beta * _gap(p, c), c.label_smoothing)


def _sigmoid_norm(p: Pairs, c: Settings) -> jax.Array:
  return jax.nn.softplus(-c.beta * _mean_gap(p, c))


def _ipo(p: Pairs, c: Settings) -> jax.Array:
  return jnp.square(_mean_gap(p, c) - 1 / (2 * c.beta))


def _hinge(p: Pairs, c: Settings) -> jax.Array:
  return jax.nn.relu(1 - c.beta * _gap(p, c))


def _robust(p: Pairs, c: Settings) -> jax.Array:
  e, x = c.label_smoothing, c.beta * _gap(p, c)
  return ((1 - e) * jax.nn.softplus(-x) - e * jax.nn.softplus(x)) / (1 - 2 * e)


def _exo(p: Pairs, c: Settings) -> jax.Array:
  e, x = c.label_smoothing, c.beta * _gap(p, c)
  chosen = jax.nn.sigmoid(x) * (-jax.nn.softplus(-x) - jnp.log1p(-e))
  return chosen + jax.nn.sigmoid(-x) * (-jax.nn.softplus(x) - jnp.log(e))


def _discopop(p: Pairs, c: Settings) -> jax.Array:
  x = c.beta * _gap(p, c)
  # s(x / tau) exp(-x) as one exponential: each by itself would overflow.
  growing = _exp(-x - jax.nn.softplus(-x / c.tau))
  return jax.nn.softplus(-x) * jax.nn.sigmoid(-x / c.tau) + growing


def _nca(p: Pairs, c: Settings) -> jax.Array:
  chosen, rejected = _ratio_rewards(p, c)
  both = jax.nn.softplus(chosen) + jax.nn.softplus(rejected)
  return jax.nn.softplus(-chosen) + 0.5 * both


def _sppo(p: Pairs, c: Settings) -> jax.Array:
  chosen, rejected = _ratios(p)
  return jnp.square(chosen - 0.5 / c.beta) + jnp.square(rejected + 0.5 / c.beta)


def _apo_zero(p: Pairs, c: Settings) -> jax.Array:
  chosen, rejected = _ratio_rewards(p, c)
  return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def _apo_down(p: Pairs, c: Settings) -> jax.Array:
  chosen, rejected = _ratio_rewards(p, c)
  return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def _bco(p: Pairs, c: Settings) -> jax.Array:
  chosen, rejected = _ratio_rewards(p, c)
  weights = jnp.broadcast_to(p.weights, chosen.shape)
  shift = masked.divide(*masked.mean((chosen + rejected) / 2, weights))
  shift = jax.lax.stop_gradient(shift)
  return jax.nn.softplus(shift - chosen) + jax.nn.softplus(rejected - shift)


def _aot(p: Pairs, c: Settings) -> jax.Array:
  ours, theirs = p.chosen - p.rejected, p.ref_chosen - p.ref_rejected
  return _soft(c.beta * (ours - _of_same_rank(ours, theirs, p.weights)), c.label_smoothing)


def _aot_unpaired(p: Pairs, c: Settings) -> jax.Array:
  chosen, rejected = _ratios(p)
  gap = chosen - _of_same_rank(chosen, rejected, p.weights)
  return _soft(c.beta * gap, c.label_smoothing)


def _simpo(p: Pairs, c: Settings) -> jax.Array:
  chosen, rejected = _mean_rewards(p, c)
  return _soft(chosen - rejected - c.gamma, c.label_smoothing) + c.nll_coef * p.chosen_nll


def _cpo(p: Pairs, c: Settings) -> jax.Array:
  return _soft(c.beta * (p.chosen - p.rejected), c.label_smoothing) + c.nll_coef * p.chosen_nll


def _log_odds(mean_logp: jax.Array) -> jax.Array:
  """Computes log(q / (1 - q)) of q = exp(mean_logp) <= 1; finite at q = 1 and for an empty
  completion."""
  x = jnp.minimum(mean_logp, -1e-6)
  small = x < -0.6931471805599453  # log(1 - e^x) cancels on either side of log 1/2
  low, high = jnp.where(small, x, -1.0), jnp.where(small, -0.5, x)
  return x - jnp.where(small, jnp.log1p(-jnp.exp(low)), jnp.log(-jnp.expm1(high)))


def _orpo(p: Pairs, c: Settings) -> jax.Array:
  chosen, rejected = (
    _log_odds(per_token(p.chosen, p.chosen_tokens)),
    _log_odds(per_token(p.rejected, p.rejected_tokens)),
  )
  return p.chosen_nll + c.beta * jax.nn.softplus(rejected - chosen)


def _kto(rows: Singles, c: Settings) -> jax.Array:
  x = c.beta * (rows.logp - rows.ref_logp - jax.lax.stop_gradient(rows.z))
  # 1 - s(x) = s(-x).
  return jnp.where(
    rows.is_desirable, c.desirable * jax.nn.sigmoid(-x), c.undesirable * jax.nn.sigmoid(x)
  )


def _ratio_rewards(p: Pairs, c: Settings) -> tuple[jax.Array, jax.Array]:
  chosen, rejected = _ratios(p)
  return c.beta * chosen, c.beta * rejected


def _sum_rewards(p: Pairs, c: Settings) -> tuple[jax.Array, jax.Array]:
  return c.beta * p.chosen, c.beta * p.rejected


def _mean_rewards(p: Pairs, c: Settings) -> tuple[jax.Array, jax.Array]:
  return (
    c.beta * per_token(p.chosen, p.chosen_tokens),
    c.beta * per_token(p.rejected, p.rejected_tokens),
  )


def _kto_rewards(rows: Singles, c: Settings) -> jax.Array:
  return c.beta * (rows.logp - rows.ref_logp)


def _of_ratios(function, formula: str, paper: str, whole_step: bool = False) -> Row:
  """Returns the row of a loss of pairs whose rewards are beta r."""
  return Row(function, _ratio_rewards, True, True, formula, paper, whole_step)


# function, implicit reward, needs a reference, paired, formula, paper and implementations that
# agree, whether it needs the whole step.
LOSSES = {
  'sigmoid': _of_ratios(
    _sigmoid,
    '-(1-e) log s(beta (d_w - d_l)) - e log s(-beta (d_w - d_l)), e = label_smoothing',
    'DPO, Rafailov et al. 2023, eq. 7; e > 0: conservative DPO, Mitchell 2023. With e = 0 it is '
    "TRL's 'sigmoid'; e > 0 is its CPO trainer's form (its DPO trainer ignores e here).",
  ),
  'sigmoid_norm': _of_ratios(
    _sigmoid_norm,
    '-log s(beta (d_w / |w| - d_l / |l|))',
    "Length-normalized DPO, Lambert et al. 2024 (Tulu 3), section 5. TRL's 'sigmoid_norm'.",
  ),
  'ipo': _of_ratios(
    _ipo,
    '(d_w / |w| - d_l / |l| - 1 / (2 beta))^2',
    "IPO, Azar et al. 2023, eq. 17, with the means over tokens that TRL's 'ipo' takes; the paper's "
    'formula has sums. beta is its tau.',
  ),
  'hinge': _of_ratios(
    _hinge,
    'max(0, 1 - beta (d_w - d_l))',
    "SLiC-HF, Zhao et al. 2023, in the normalized form of RSO, Liu et al. 2023. TRL's 'hinge'.",
  ),
  'robust': _of_ratios(
    _robust,
    '(-(1-e) log s(beta (d_w - d_l)) + e log s(-beta (d_w - d_l))) / (1 - 2 e)',
    'Robust DPO, Chowdhury et al. 2024: unbiased under labels flipped with probability e = '
    "label_smoothing. TRL's 'robust'.",
  ),
  'exo': _of_ratios(
    _exo,
    'KL(q || (1-e, e)), q = (s(x), s(-x)), x = beta (d_w - d_l), e = label_smoothing > 0',
    "EXO, Ji et al. 2024, eq. 16, for two completions. TRL's 'exo_pair'.",
  ),
  'discopop': _of_ratios(
    _discopop,
    '-log s(x) s(-x / tau) + exp(-x) s(x / tau), x = beta (d_w - d_l)',
    "DiscoPOP, Lu et al. 2024, eq. 5. TRL's 'discopop' (its discopop_tau is tau).",
  ),
  'nca': _of_ratios(
    _nca,
    '-log s(beta r_w) - log s(-beta r_w) / 2 - log s(-beta r_l) / 2',
    "NCA, Chen et al. 2024, for two completions. TRL's 'nca_pair'.",
  ),
  'sppo': _of_ratios(
    _sppo,
    '(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2',
    'SPPO, Wu et al. 2024, eq. 4.7, with probabilities 1 and 0 of winning; 1 / beta is its eta. '
    "TRL's 'sppo_hard'.",
  ),
  'apo_zero': _of_ratios(
    _apo_zero,
    '1 - s(beta r_w) + s(beta r_l)',
    "APO, D'Oosterlinck et al. 2024, eq. 7: for chosen completions that are better than the "
    "model's own. TRL's 'apo_zero'.",
  ),
  'apo_down': _of_ratios(
    _apo_down,
    's(beta r_w) + 1 - s(beta (r_w - r_l))',
    "APO, D'Oosterlinck et al. 2024, eq. 8: for chosen completions that are worse than the "
    "model's own; both likelihoods fall. TRL's 'apo_down'.",
  ),
  'bco': _of_ratios(
    _bco,
    '-log s(beta r_w - m) - log s(m - beta r_l), m: mean of beta r over the completions of a step',
    "BCO, Jung et al. 2024, with the step's mean in place of a moving one and without the "
    "classifier of prompts: the first step of TRL 1.9's BCO trainer. TRL's 'bco_pair' has m = 0.",
    whole_step=True,
  ),
  'aot': _of_ratios(
    _aot,
    "-(1-e) log s(x) - e log s(-x), x = beta times the i-th smallest of the policy's log pi(w) - "
    "log pi(l) less the i-th smallest of the reference's",
    "AOT, Melnyk et al. 2024, paired: one distribution dominates another. TRL's 'aot'.",
    whole_step=True,
  ),
  'aot_unpaired': _of_ratios(
    _aot_unpaired,
    '-(1-e) log s(x) - e log s(-x), x = beta times the i-th smallest r_w less that of r_l',
    "AOT, Melnyk et al. 2024, unpaired. TRL's 'aot_unpaired'.",
    whole_step=True,
  ),
  'simpo': Row(
    _simpo,
    _mean_rewards,
    False,
    True,
    '-log s(beta log pi(w) / |w| - beta log pi(l) / |l| - gamma) + nll_coef nll, smoothed by e',
    "SimPO, Meng et al. 2024, eq. 6. TRL's CPO trainer with 'simpo' (its simpo_gamma is gamma), "
    'but for nll: nll_per_pair.',
  ),
  'cpo': Row(
    _cpo,
    _sum_rewards,
    False,
    True,
    '-log s(beta (log pi(w) - log pi(l))) + nll_coef nll, smoothed by e',
    "CPO, Xu et al. 2024. TRL's CPO trainer with 'sigmoid' and cpo_alpha = nll_coef, but "
    'for nll: nll_per_pair.',
  ),
  'orpo': Row(
    _orpo,
    _mean_rewards,
    False,
    True,
    'nll - beta log s(log odds(w) - log odds(l)), odds(y) = q / (1 - q), q = pi(y)^(1 / |y|)',
    "ORPO, Hong et al. 2024, eq. 6 and 7; beta is its lambda. TRL's ORPO trainer, but for nll: "
    'nll_per_pair.',
  ),
  'kto': Row(
    _kto,
    _kto_rewards,
    True,
    False,
    'desirable (1 - s(beta (r - z))) or undesirable (1 - s(beta (z - r))), by the label',
    "KTO, Ethayarajh et al. 2024, eq. 7. TRL's KTO trainer, 'kto'.",
    whole_step=True,
  ),
}
