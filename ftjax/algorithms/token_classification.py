"""Classification of words, such as named entities: a label for the first sub-word of each.

Evaluation rows are scored by entity where the labels are 'O', 'B-X' and 'I-X', as conlleval and
seqeval do, and by label otherwise."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.evaluation.metrics import tags as entities
from ftjax.evaluation.statistics import intervals
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses import classification as losses
from ftjax.losses import masked
from ftjax.models.forward import Forward
from ftjax.training.step import LossFn


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum over labeled tokens, weight, metrics as sums)."""

  def loss(params, batch, keys):
    logits = forward.with_dropout(keys).label_logits(params, batch)
    total, weight = losses.single_label(logits, batch['labels'], batch['weights'])
    right = (jax.lax.stop_gradient(logits).argmax(-1) == batch['labels']).astype(jnp.float32)
    present = (batch['weights'] > 0).astype(jnp.float32)
    return total, weight, {'accuracy': masked.mean(right, present)}

  return loss


def make_measure(forward: Forward) -> Callable[[dict, dict], dict[str, jax.Array]]:
  """Returns the jitted (params, batch) -> what is scored: the loss of each token in nats, float32,
  and int32 predictions, labels, segments: each [B, T]; the segment is 0 where there is no label.
  """
  forward = forward.without_remat()

  @jax.jit
  def measure(params, batch):
    logits, labels = forward.label_logits(params, batch), batch['labels']
    logp = jax.nn.log_softmax(logits)
    found = {
      'loss': -(logp * jax.nn.one_hot(labels, logits.shape[-1])).sum(-1),
      'guessed': logits.argmax(-1).astype(jnp.int32),
      'labels': labels,
      'segments': jnp.where(batch['weights'] > 0, batch['segments'], 0),
      'positions': batch['positions'],
    }
    return {name: jax.sharding.reshard(x, jax.P()) for name, x in found.items()}

  return measure


def _documents(found: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
  """Returns the values of the labeled tokens of each text of a batch, in order: {name: [n]}."""
  out = []
  for row in range(len(found['segments'])):
    values = {name: x[row] for name, x in found.items()}
    for segment in range(1, int(values['segments'].max(initial=0)) + 1):
      # On a mesh that splits rows their tokens have another order.
      places = np.flatnonzero(values['segments'] == segment)
      places = places[np.argsort(values['positions'][places], kind='stable')]
      out.append({name: x[places] for name, x in values.items()})
  return [one for one in out if len(one['labels'])]


def is_bio(names: Sequence[str]) -> bool:
  """Returns whether labels are 'O', 'B-X' and 'I-X'."""
  rest = [n for n in names if n != 'O']
  return len(rest) < len(names) and all(n[:2] in ('B-', 'I-') and n[2:] for n in rest)


def scores(
  texts: Sequence[tuple[Sequence[int], Sequence[int]]], names: Sequence[str]
) -> dict[str, float]:
  """Returns precision, recall and F1 over texts of (numbers of the labels, guessed ones).

  Of entities where the names are BIO tags (micro means, NaN without any entity), else the macro F1
  of the labels that occur.
  """
  if is_bio(names):
    right = given = guessed = 0
    for labels, found in texts:
      theirs = {*entities.tag_spans([names[i] for i in labels])}
      ours = {*entities.tag_spans([names[i] for i in found])}
      right, given, guessed = right + len(theirs & ours), given + len(theirs), guessed + len(ours)
    return {
      'precision': right / guessed if guessed else math.nan,
      'recall': right / given if given else math.nan,
      'f1': 2 * right / (given + guessed) if given + guessed else math.nan,
    }
  numbers = np.arange(len(names))
  labels, found = (np.concatenate([np.asarray(t[i]) for t in texts])[:, None] for i in (0, 1))
  right = ((labels == numbers) & (found == numbers)).sum(0)
  both = (labels == numbers).sum(0) + (found == numbers).sum(0)
  return {'f1': float((2 * right[both > 0] / both[both > 0]).mean())}


def evaluate(
  measure: Callable, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, float] | None:
  """Returns, over the evaluation rows, the loss (nats per labeled token), accuracy of labels with
  its 95 % interval (Wilson, tokens taken as independent), and `scores`; empty without rows, None
  when cancelled.
  """
  texts, total, right = [], 0.0, 0
  for batch in run.eval_batches():
    if is_cancelled():
      return None
    for one in _documents({k: np.asarray(v) for k, v in measure(params, batch).items()}):
      total += float(one['loss'].astype(np.float64).sum())
      right += int((one['labels'] == one['guessed']).sum())
      texts.append((one['labels'], one['guessed']))
  if not texts:
    return {}
  count = sum(len(labels) for labels, _ in texts)
  low, high = intervals.wilson(right, count)
  shown = {'loss': total / count, 'accuracy': right / count, 'texts': len(texts)}
  shown |= {'accuracy_low': low, 'accuracy_high': high}
  return shown | scores(texts, run.config.token_classification.labels)


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run."""
  measured = functools.partial(evaluate, make_measure(run.forward), run)
  return fit.Parts(make_loss(run.forward, run.config), measured)
