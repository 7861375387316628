"""Losses of preference tuning: pairs (DPO and variants), labeled completions (KTO), reward models.

Axes: P pairs, N labeled completions. Log-probabilities are natural, summed over the tokens of a
completion. All functions are jnp and elementwise, except `calibration_error`, which is numpy on the
host.
`LOSSES` is the table: a new loss is a function of a batch and `Settings`, and one row.

Policy log-ratios are r = log pi(y|x) - log pi_ref(y|x); w is the chosen completion, l the
rejected one, |y| a number of tokens, s the logistic function. All losses are to be minimized.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.losses import masked


@dataclasses.dataclass(frozen=True)
class Settings:
  """Coefficients. Each loss reads those that its formula in `LOSSES` names.

  beta: strength of the regularization to the reference (temperature of the implicit reward).
  label_smoothing: assumed share e of flipped labels, in [0, 0.5).
  gamma: target margin of SimPO, in units of the reward (the paper's gamma, not gamma / beta).
  nll_coef: weight of the NLL of the chosen completion in CPO and SimPO.
  desirable, undesirable: weights of desirable and undesirable completions in KTO.
  """

  beta: float = 0.1
  label_smoothing: float = 0.0
  gamma: float = 0.0
  nll_coef: float = 0.0
  desirable: float = 1.0
  undesirable: float = 1.0

  def __post_init__(self):
    if not 0.0 <= self.label_smoothing < 0.5:
      raise ValueError(
        f'label_smoothing is {self.label_smoothing}; it is the share of flipped labels and must be '
        'at least 0 and below 0.5'
      )
    if self.beta <= 0:
      raise ValueError(f'beta is {self.beta}; it must be above 0')


class Pairs(NamedTuple):
  """Pairs of completions of one prompt; all float32[P], log-probs in nats summed over tokens.

  Losses without a reference do not read ref_*: pass zeros. `chosen_nll` is read by losses with a
  likelihood term: see `nll_per_pair`; pass zeros elsewhere.
  """

  chosen: jax.Array
  rejected: jax.Array
  ref_chosen: jax.Array
  ref_rejected: jax.Array
  chosen_tokens: jax.Array
  rejected_tokens: jax.Array
  chosen_nll: jax.Array


class Singles(NamedTuple):
  """Completions labeled desirable or not. z is of the whole step: see `kto_reference_point`."""

  logp: jax.Array  # float32[N], nats, summed over tokens
  ref_logp: jax.Array  # float32[N]
  is_desirable: jax.Array  # bool[N]
  z: jax.Array  # float32[], nats


class Row(NamedTuple):
  """A loss: its function, the inputs it needs, its formula and source."""

  function: Callable[[Any, Settings], jax.Array]  # (Pairs or Singles, Settings) -> float32[P or N]
  reward: Callable[[Any, Settings], Any]  # -> implicit rewards (chosen, rejected), or float32[N]
  needs_reference: bool
  paired: bool
  formula: str
  paper: str


def _per_token(logp: jax.Array, tokens: jax.Array) -> jax.Array:
  return logp / jnp.maximum(tokens, 1.0)


def nll_per_pair(chosen: jax.Array, chosen_tokens: jax.Array) -> jax.Array:
  """Returns float32[P]: -log pi(w|x) / |w|; every pair has the same weight (ORPO, Hong et al. 2024,
  eq. 2).

  TRL's CPO and ORPO trainers take the mean over the tokens of a batch instead, where long
  completions weigh more (ORPO's includes the tokens of the prompt).
  """
  return -_per_token(chosen, chosen_tokens)


def _soft(x: jax.Array, smoothing: float) -> jax.Array:
  """Computes -(1 - e) log s(x) - e log s(-x)."""
  # softplus(-x) = -log s(x).
  return (1 - smoothing) * jax.nn.softplus(-x) + smoothing * jax.nn.softplus(x)


def _ratios(p: Pairs) -> tuple[jax.Array, jax.Array]:
  return p.chosen - p.ref_chosen, p.rejected - p.ref_rejected


def _gap(p: Pairs) -> jax.Array:
  """Computes r_w - r_l, in an order that gives exactly 0 where policy and reference are equal."""
  chosen, rejected = _ratios(p)
  return chosen - rejected


def _mean_gap(p: Pairs) -> jax.Array:
  """Computes r_w / |w| - r_l / |l|."""
  chosen, rejected = _ratios(p)
  return _per_token(chosen, p.chosen_tokens) - _per_token(rejected, p.rejected_tokens)


def _sigmoid(p: Pairs, c: Settings) -> jax.Array:
  return _soft(c.beta * _gap(p), c.label_smoothing)


def _sigmoid_norm(p: Pairs, c: Settings) -> jax.Array:
  return jax.nn.softplus(-c.beta * _mean_gap(p))


def _ipo(p: Pairs, c: Settings) -> jax.Array:
  return jnp.square(_mean_gap(p) - 1 / (2 * c.beta))


def _hinge(p: Pairs, c: Settings) -> jax.Array:
  return jax.nn.relu(1 - c.beta * _gap(p))


def _robust(p: Pairs, c: Settings) -> jax.Array:
  e, x = c.label_smoothing, c.beta * _gap(p)
  return ((1 - e) * jax.nn.softplus(-x) - e * jax.nn.softplus(x)) / (1 - 2 * e)


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
    _log_odds(_per_token(p.chosen, p.chosen_tokens)),
    _log_odds(_per_token(p.rejected, p.rejected_tokens)),
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
    c.beta * _per_token(p.chosen, p.chosen_tokens),
    c.beta * _per_token(p.rejected, p.rejected_tokens),
  )


def _kto_rewards(rows: Singles, c: Settings) -> jax.Array:
  return c.beta * (rows.logp - rows.ref_logp)


# function, implicit reward, needs a reference, paired, formula, paper and implementations that
# agree.
LOSSES = {
  'sigmoid': Row(
    _sigmoid,
    _ratio_rewards,
    True,
    True,
    '-(1-e) log s(beta (r_w - r_l)) - e log s(-beta (r_w - r_l)), e = label_smoothing',
    'DPO, Rafailov et al. 2023, eq. 7; e > 0: conservative DPO, Mitchell 2023. With e = 0 it is '
    "TRL's 'sigmoid'; e > 0 is its CPO trainer's form (its DPO trainer ignores e here).",
  ),
  'sigmoid_norm': Row(
    _sigmoid_norm,
    _ratio_rewards,
    True,
    True,
    '-log s(beta (r_w / |w| - r_l / |l|))',
    "Length-normalized DPO, Lambert et al. 2024 (Tulu 3), section 5. TRL's 'sigmoid_norm'.",
  ),
  'ipo': Row(
    _ipo,
    _ratio_rewards,
    True,
    True,
    '(r_w / |w| - r_l / |l| - 1 / (2 beta))^2',
    "IPO, Azar et al. 2023, eq. 17, with the means over tokens that TRL's 'ipo' takes; the paper's "
    'formula has sums. beta is its tau.',
  ),
  'hinge': Row(
    _hinge,
    _ratio_rewards,
    True,
    True,
    'max(0, 1 - beta (r_w - r_l))',
    "SLiC-HF, Zhao et al. 2023, in the normalized form of RSO, Liu et al. 2023. TRL's 'hinge'.",
  ),
  'robust': Row(
    _robust,
    _ratio_rewards,
    True,
    True,
    '(-(1-e) log s(beta (r_w - r_l)) + e log s(-beta (r_w - r_l))) / (1 - 2 e)',
    'Robust DPO, Chowdhury et al. 2024: unbiased under labels flipped with probability e = '
    "label_smoothing. TRL's 'robust'.",
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
  ),
}


def kto_reference_point(
  logp: jax.Array, ref_logp: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes the sums of KTO's z: the log-ratio of prompts with completions of other prompts.

  z = max(0, total / weight) over the whole step, by a pass without gradient before the step; it
  estimates the KL divergence of policy from reference (Ethayarajh et al. 2024, section 4.2). TRL
  shifts the completions of a micro-batch by one and takes the mean over that micro-batch.

  Args:
    logp: float32[N], log pi(y'|x) in nats.
    ref_logp: float32[N], the reference's.
    weights: float32[N], 0 for padding.

  Returns:
    (total float32[], weight float32[]), to be summed over the step and passed to `kto_z`.
  """
  logp, ref_logp = masked.keep(logp, weights), masked.keep(ref_logp, weights)
  return masked.mean(jax.lax.stop_gradient(logp - ref_logp), weights)


def kto_z(total: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns float32[], nats: z of a step's sums."""
  return jnp.maximum(masked.divide(total, weight), 0.0)


def _clean(batch: Pairs | Singles, weights: jax.Array) -> Pairs | Singles:
  """Returns the batch with zeros in place of padding, so that no padding reaches a gradient."""
  return type(batch)(*(masked.keep(a, weights) if a.ndim else a for a in batch))


def loss(
  row: Row, batch: Pairs | Singles, weights: jax.Array, settings: Settings
) -> tuple[jax.Array, jax.Array, dict[str, masked.Pair]]:
  """Computes the summed loss of a micro-batch, the number of its pairs or completions, and metrics.

  Args:
    row: of LOSSES, or one like them.
    batch: Pairs for a paired loss, else Singles.
    weights: float32[P or N], 0 for padding.
    settings: coefficients.

  Returns:
    (total float32[] in nats, weight float32[], {metric: (total, weight)}). Metrics are
    rewards/chosen, rewards/rejected and, for pairs, rewards/margin and rewards/accuracy: the share
    of pairs whose chosen completion has the larger implicit reward; equal rewards count as wrong,
    so it is 0 where policy and reference are equal.
  """
  batch = _clean(batch, weights)
  total, weight = masked.mean(row.function(batch, settings), weights)
  rewards = jax.lax.stop_gradient(row.reward(batch, settings))
  if row.paired:
    return total, weight, _reward_metrics(*rewards, weights)
  good = jnp.where(batch.is_desirable, weights, 0.0)
  metrics = {
    'rewards/chosen': masked.mean(rewards, good),
    'rewards/rejected': masked.mean(rewards, weights - good),
    'kto_z': (jax.lax.stop_gradient(batch.z) * weight, weight),
  }
  return total, weight, metrics


def _reward_metrics(
  chosen: jax.Array, rejected: jax.Array, weights: jax.Array
) -> dict[str, masked.Pair]:
  return {
    'rewards/chosen': masked.mean(chosen, weights),
    'rewards/rejected': masked.mean(rejected, weights),
    'rewards/margin': masked.mean(chosen - rejected, weights),
    'rewards/accuracy': masked.mean((chosen > rejected).astype(jnp.float32), weights),
  }


def bradley_terry(
  chosen: jax.Array,
  rejected: jax.Array,
  weights: jax.Array,
  *,
  margin: jax.Array | float = 0.0,
  centring: float = 0.0,
) -> tuple[jax.Array, jax.Array, dict[str, masked.Pair]]:
  """Computes the loss of a reward model on pairs: -log s(R_w - R_l - margin) + centring (R_w +
  R_l)^2.

  Margin: Llama 2, Touvron et al. 2023, eq. 2. Centring: Eisenstein et al. 2023; pairs
  determine only the difference of two rewards, this term keeps their mean near 0. TRL's
  RewardTrainer agrees (center_rewards_coefficient).

  Args:
    chosen, rejected: float32[P], rewards.
    weights: float32[P], 0 for padding.
    margin: float32[P] or a number.
    centring: coefficient, 0.01 in TRL's documentation; 0 does not constrain the mean.

  Returns:
    (total float32[], weight float32[], {metric: (total, weight)}).
  """
  chosen, rejected = masked.keep(chosen, weights), masked.keep(rejected, weights)
  if isinstance(margin, jax.Array):
    margin = masked.keep(margin, weights)
  losses = jax.nn.softplus(-(chosen - rejected - margin))
  losses = losses + centring * jnp.square(chosen + rejected)
  metrics = _reward_metrics(*jax.lax.stop_gradient((chosen, rejected)), weights)
  return *masked.mean(losses, weights), metrics


def reward_regression(
  predicted: jax.Array, target: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, masked.Pair]]:
  """Computes the squared error of a reward model on scored completions: (predicted - target)^2,
  each float32[N].

  TRL has no such trainer; transformers' sequence classification with one label agrees.

  Returns:
    (total float32[], weight float32[], {'error/absolute': (total, weight)}).
  """
  error = masked.keep(predicted, weights) - masked.keep(target, weights)
  absolute = masked.mean(jnp.abs(jax.lax.stop_gradient(error)), weights)
  return *masked.mean(jnp.square(error), weights), {'error/absolute': absolute}


def calibration_error(margins: np.ndarray, bins: int = 10) -> float:
  """Computes the expected calibration error of a reward model on labeled pairs. Host side, numpy
  float64.

  The model gives its preferred completion the probability p = s(|margin|) >= 1/2 and is right where
  the margin is positive (equal rewards are half right). Pairs are sorted by p into equal bins of
  [1/2, 1]; the error is the sum over bins of (share of pairs) * |share right - mean p|: 0 for equal
  rewards everywhere, near 1 for a model that is confidently wrong. (Guo et al. 2017, section 2.)

  Args:
    margins: float[P], reward of the chosen completion minus that of the rejected one.
    bins: number of bins.

  Raises:
    ValueError: without pairs.
  """
  margins = np.asarray(margins, np.float64)
  if not margins.size:
    raise ValueError('calibration error of no pairs; give at least one margin')
  p = 1 / (1 + np.exp(-np.abs(margins)))
  right = np.where(margins == 0, 0.5, margins > 0)
  at = np.minimum(((p - 0.5) * 2 * bins).astype(int), bins - 1)
  gap = np.bincount(at, right - p, bins)
  return float(np.abs(gap).sum() / margins.size)
