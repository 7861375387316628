"""Process reward models: whether each step of a solution is right (Lightman et al. 2023).

A label head of two labels on every token; the loss and the score of a step are those of the last
token of its separator. Rows are those of data/step_rows.py."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.data.step_rows import WHOLE
from ftjax.evaluation.statistics import intervals
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses import process_reward
from ftjax.models.forward import Forward
from ftjax.training.step import LossFn


def _values(batch: dict) -> jax.Array:
  """Returns the probability that the step that ends at a token is right, float32[B, T]."""
  return batch['labels'].astype(jnp.float32) / WHOLE


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum over steps, their number, metrics as sums)."""
  del c

  def loss(params, batch, keys):
    logits = forward.with_dropout(keys).label_logits(params, batch)
    (total, weight), right = process_reward.step_cross_entropy(
      logits, _values(batch), batch['weights']
    )
    return total, weight, {'accuracy': jax.lax.stop_gradient(right)}

  return loss


def make_measure(forward: Forward) -> Callable[[dict, dict], dict[str, jax.Array]]:
  """Returns the jitted (params, batch) -> float32[B, T] each: `logit`, of right minus wrong, and
  `value`; int32[B, T] `segment`, 0 where no step ends, and `position`.
  """
  forward = forward.without_remat()

  @jax.jit
  def measure(params, batch):
    logits = forward.label_logits(params, batch)
    found = {
      'logit': logits[..., 1] - logits[..., 0],
      'value': _values(batch),
      'segment': jnp.where(batch['weights'] > 0, batch['segments'], 0),
      'position': batch['positions'],
    }
    return {name: jax.sharding.reshard(x, jax.P()) for name, x in found.items()}

  return measure


def solutions(found: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns (logits, values) of the steps of each solution of a batch, in their order."""
  out = []
  for row in range(len(found['segment'])):
    one = {name: x[row] for name, x in found.items()}
    for segment in range(1, int(one['segment'].max(initial=0)) + 1):
      places = np.flatnonzero(one['segment'] == segment)
      if len(places):
        # On a mesh that splits rows their tokens have another order.
        places = places[np.argsort(one['position'][places], kind='stable')]
        out.append((one['logit'][places], one['value'][places]))
  return out


def first_wrong(is_right: np.ndarray) -> int:
  """Returns the number of the first wrong step, -1 where all are right; is_right: bool[steps]."""
  wrong = np.flatnonzero(~is_right)
  return int(wrong[0]) if len(wrong) else -1


def scores(found: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
  """Returns, over solutions, the loss in nats per step, the accuracy of steps with its 95 %
  interval (Wilson, steps taken as independent), and `first_error`: the share of solutions whose
  first wrong step, or that there is none, is found (ProcessBench, Zheng et al. 2024).
  """
  logits, values = (np.concatenate(x).astype(np.float64) for x in zip(*found, strict=True))
  losses = np.logaddexp(0, logits) - values * logits
  right = int(((logits >= 0) == (values >= 0.5)).sum())
  low, high = intervals.wilson(right, len(logits))
  exact = [first_wrong(x >= 0) == first_wrong(y >= 0.5) for x, y in found]
  return {
    'loss': float(losses.mean()),
    'accuracy': right / len(logits),
    'accuracy_low': low,
    'accuracy_high': high,
    'first_error': float(np.mean(exact)),
    'steps': len(logits),
    'solutions': len(found),
  }


def evaluate(
  measure: Callable, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, float] | None:
  """Returns `scores` of the evaluation rows; empty without rows, None when cancelled."""
  found = []
  for batch in run.eval_batches():
    if is_cancelled():
      return None
    found += solutions({k: np.asarray(v) for k, v in measure(params, batch).items()})
  return scores(found) if found else {}


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run."""
  measured = functools.partial(evaluate, make_measure(run.forward), run)
  return fit.Parts(make_loss(run.forward, run.config), measured)
