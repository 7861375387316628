"""Losses of reward models, and how well a trained one is calibrated. P pairs, N scored completions.

The losses are jnp and elementwise; `calibration_error` is numpy on the host."""

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.losses import masked
from ftjax.losses.preference import reward_metrics


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
  metrics = reward_metrics(*jax.lax.stop_gradient((chosen, rejected)), weights)
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
