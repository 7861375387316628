"""The loss of a step of preference tuning, on pairs or on labeled completions: what goes into the
rows of preference_table.py, and the sums and metrics that come out.

Axes: P pairs, N labeled completions. Log-probabilities are natural, summed over the tokens of a
completion. All functions are jnp."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses import masked


@dataclasses.dataclass(frozen=True)
class Settings:
  """Coefficients. Each loss reads those that its formula in the table names.

  beta: strength of the regularization to the reference (temperature of the implicit reward).
  label_smoothing: assumed share e of flipped labels, in [0, 0.5).
  divergence: 'reverse_kl', 'forward_kl', 'js' or 'alpha', from the reference; see
  preference_table.DIVERGENCES. divergence_alpha: order of 'alpha'; 1 is 'reverse_kl'.
  tau: temperature of DiscoPOP's blend.
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
  divergence: str = 'reverse_kl'
  divergence_alpha: float = 0.5
  tau: float = 0.05

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
  likelihood term: see `nll_per_pair`; pass zeros elsewhere. `weights` is 0 for padding, and is read
  by losses that compare the pairs of a step with each other; `loss` sets it.
  """

  chosen: jax.Array
  rejected: jax.Array
  ref_chosen: jax.Array
  ref_rejected: jax.Array
  chosen_tokens: jax.Array
  rejected_tokens: jax.Array
  chosen_nll: jax.Array
  weights: jax.Array | float = 1.0


class Singles(NamedTuple):
  """Completions labeled desirable or not. z is of the whole step: see `kto_reference_point`."""

  logp: jax.Array  # float32[N], nats, summed over tokens
  ref_logp: jax.Array  # float32[N]
  is_desirable: jax.Array  # bool[N]
  z: jax.Array  # float32[], nats


class Row(NamedTuple):
  """A loss: its function, the inputs it needs, its formula and source.

  whole_step: it compares the pairs or completions of a step with each other, so that a step cannot
  be computed in parts.
  """

  function: Callable[[Any, Settings], jax.Array]  # (Pairs or Singles, Settings) -> float32[P or N]
  reward: Callable[[Any, Settings], Any]  # -> implicit rewards (chosen, rejected), or float32[N]
  needs_reference: bool
  paired: bool
  formula: str
  paper: str
  whole_step: bool = False


def per_token(logp: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns a mean over the tokens of each completion; 0 for one without tokens."""
  return logp / jnp.maximum(tokens, 1.0)


def nll_per_pair(chosen: jax.Array, chosen_tokens: jax.Array) -> jax.Array:
  """Returns float32[P]: -log pi(w|x) / |w|; every pair has the same weight (ORPO, Hong et al. 2024,
  eq. 2).

  TRL's CPO and ORPO trainers take the mean over the tokens of a batch instead, where long
  completions weigh more (ORPO's includes the tokens of the prompt).
  """
  return -per_token(chosen, chosen_tokens)


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
  fields = {k: v for k, v in batch._asdict().items() if k != 'weights'}
  kept = {k: masked.keep(v, weights) if v.ndim else v for k, v in fields.items()}
  return batch._replace(**kept, **({'weights': weights} if isinstance(batch, Pairs) else {}))


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
    return total, weight, reward_metrics(*rewards, weights)
  good = jnp.where(batch.is_desirable, weights, 0.0)
  metrics = {
    'rewards/chosen': masked.mean(rewards, good),
    'rewards/rejected': masked.mean(rewards, weights - good),
    'kto_z': (jax.lax.stop_gradient(batch.z) * weight, weight),
  }
  return total, weight, metrics


def reward_metrics(
  chosen: jax.Array, rejected: jax.Array, weights: jax.Array
) -> dict[str, masked.Pair]:
  """Returns the metrics of pairs with rewards float32[P], as sums; see `loss`."""
  return {
    'rewards/chosen': masked.mean(chosen, weights),
    'rewards/rejected': masked.mean(rejected, weights),
    'rewards/margin': masked.mean(chosen - rejected, weights),
    'rewards/accuracy': masked.mean((chosen > rejected).astype(jnp.float32), weights),
  }
