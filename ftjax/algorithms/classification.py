"""Classification of texts: one label, several labels, a number, or a score of two texts.

A row holds several texts (data/batches.py); the label head gives each its numbers."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.evaluation.statistics import intervals
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses import classification as losses
from ftjax.losses import masked
from ftjax.models.forward import Forward
from ftjax.training.step import LossFn

# (logits float32[..., R], targets float32[..., numbers], weights float32[...]) -> (total, weight).
_Loss = Callable[[jax.Array, jax.Array, jax.Array], masked.Pair]


def _loss_of(c: ml_collections.ConfigDict) -> _Loss:
  """Returns the loss of the config's objective."""
  section = c.classification
  shared = dict(class_weights=tuple(section.class_weights), focal_gamma=section.focal_gamma)
  if section.objective == 'single':

    def single(logits, targets, weights):
      numbers = targets[..., 0].astype(jnp.int32)
      return losses.single_label(
        logits, numbers, weights, label_smoothing=section.label_smoothing, **shared
      )

    return single
  if section.objective == 'multi':
    return functools.partial(losses.multi_label, **shared)
  if section.objective == 'binary':
    return losses.multi_label
  return lambda logits, targets, weights: losses.squared_error(
    logits[..., 0], targets[..., 0], weights
  )


def _rows(forward: Forward, params: dict, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (logits, targets, weights) of the texts of a batch: float32[B, S, R], [B, S, numbers],
  [B, S].
  """
  weights = batch['document_weights']
  logits = jnp.stack(forward.sequence_logits(params, batch, weights.shape[1]), axis=1)
  return logits, batch['targets'], weights


def _right(c: ml_collections.ConfigDict, logits: jax.Array, targets: jax.Array) -> jax.Array | None:
  """Returns 1 for each text that is labeled right, float32[...]; None of a regression."""
  objective = c.classification.objective
  if objective == 'regression':
    return None
  if objective == 'single':
    return (logits.argmax(-1) == targets[..., 0]).astype(jnp.float32)
  share = 0.5 if objective == 'binary' else c.classification.threshold
  found = logits >= math.log(share / (1 - share))
  return (found == (targets >= 0.5)).all(-1).astype(jnp.float32)


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum over texts, their weight, metrics as sums)."""
  loss_of = _loss_of(c)

  def loss(params, batch, keys):
    logits, targets, weights = _rows(forward.with_dropout(keys), params, batch)
    total, weight = loss_of(logits, targets, weights)
    right = _right(c, jax.lax.stop_gradient(logits), targets)
    present = (weights > 0).astype(jnp.float32)
    return total, weight, {} if right is None else {'accuracy': masked.mean(right, present)}

  return loss


def make_measure(forward: Forward) -> Callable[[dict, dict], dict[str, jax.Array]]:
  """Returns the jitted (params, batch) -> logits, targets and weights of its texts, on every
  device, where every process can read them.
  """
  forward = forward.without_remat()

  @jax.jit
  def measure(params, batch):
    names = ('logits', 'targets', 'weights')
    return {
      name: jax.sharding.reshard(x, jax.P())
      for name, x in zip(names, _rows(forward, params, batch), strict=True)
    }

  return measure


def collect(
  measure: Callable, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, np.ndarray] | None:
  """Returns logits and targets of all evaluation rows in order; empty without rows, None when
  cancelled.
  """
  parts = []
  for batch in run.eval_batches():
    if is_cancelled():
      return None
    found = {k: np.asarray(v) for k, v in measure(params, batch).items()}
    parts.append({k: v[found['weights'] > 0] for k, v in found.items()})
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]} if parts else {}


def _numbers(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
  """Returns Pearson's and Spearman's correlation of predicted with given numbers; NaN where one of
  them is constant.
  """
  from scipy import stats  # slow to import

  found, given = logits[:, 0].astype(np.float64), targets[:, 0].astype(np.float64)
  if len({*found.tolist()}) < 2 or len({*given.tolist()}) < 2:
    return {'pearson': math.nan, 'spearman': math.nan}
  return {
    'pearson': float(stats.pearsonr(found, given).statistic),
    'spearman': float(stats.spearmanr(found, given).statistic),
  }


def _roc_auc(logits: np.ndarray, targets: np.ndarray) -> float:
  """Returns the area under the ROC curve of scores; NaN where all targets are on one side."""
  from scipy import stats  # slow to import

  good, scores = targets[:, 0] >= 0.5, logits[:, 0].astype(np.float64)
  if good.all() or not good.any():
    return math.nan
  ranks, n = stats.rankdata(scores), int(good.sum())
  return float((ranks[good].sum() - n * (n + 1) / 2) / (n * (len(good) - n)))


def _f1(given: np.ndarray, guessed: np.ndarray) -> dict[str, float]:
  """Returns micro and macro F1 of labels, bool[N, R] each; macro over the labels that occur."""
  right, both = (given & guessed).sum(0), given.sum(0) + guessed.sum(0)
  if not both.any():
    return {'micro_f1': math.nan, 'macro_f1': math.nan}
  occurs = both > 0
  return {
    'micro_f1': float(2 * right.sum() / both.sum()),
    'macro_f1': float((2 * right[occurs] / both[occurs]).mean()),
  }


def evaluate(
  measure: Callable, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, float] | None:
  """Returns the loss over the evaluation rows and the scores of the objective: accuracy with its
  95 % interval (Wilson) and F1 of labels, area under the ROC curve of binary scores, correlations
  of numbers.
  """
  found = collect(measure, run, params, is_cancelled)
  if not found:
    return found
  c = run.config
  logits, targets = found['logits'], found['targets']
  # As trained, without what depends on the label or the config: class weights, focus, smoothing.
  plain = c.copy_and_resolve_references()
  with plain.unlocked():
    plain.classification.update(class_weights=(), focal_gamma=0.0, label_smoothing=0.0)
  total, weight = _loss_of(plain)(*map(jnp.asarray, (logits, targets, found['weights'])))
  out, n = {'loss': float(total / weight), 'texts': len(logits)}, len(logits)
  objective = c.classification.objective
  right = _right(c, jnp.asarray(logits), jnp.asarray(targets))
  if right is None:
    return out | _numbers(logits, targets)
  count = int(np.asarray(right).sum())
  low, high = intervals.wilson(count, n)
  out |= {'accuracy': count / n, 'accuracy_low': low, 'accuracy_high': high}
  if objective == 'binary':
    return out | {'roc_auc': _roc_auc(logits, targets)}
  if objective == 'single':  # micro F1 is the accuracy
    numbers = np.arange(logits.shape[1])
    return out | {
      'macro_f1': _f1(targets == numbers, logits.argmax(-1)[:, None] == numbers)['macro_f1']
    }
  share = c.classification.threshold
  return out | _f1(targets >= 0.5, logits >= math.log(share / (1 - share)))


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run."""
  measured = functools.partial(evaluate, make_measure(run.forward), run)
  return fit.Parts(make_loss(run.forward, run.config), measured)
