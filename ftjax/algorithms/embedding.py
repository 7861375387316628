"""Vectors of texts (sentence embeddings): trained by contrast with negatives, by a margin, or by
scores of pairs.

A row of a batch holds several groups of texts, each text a segment of its own (data/batches.py).
The negatives of an anchor are texts of the whole step. Where a step has several micro-batches, a
pass without gradient first makes the vectors of all of them, and each micro-batch has the gradient
of the whole loss by its own vectors (Gao et al. 2021, GradCache): the sum over the micro-batches is
the gradient of the step.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.config import label_algorithms
from ftjax.evaluation.metrics import retrieval
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses import embedding as losses
from ftjax.losses import masked
from ftjax.losses.embedding import Groups
from ftjax.models import score_head
from ftjax.models.forward import Forward
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import spec
from ftjax.training.step import CoupledLoss, LossFn


def _pool(forward: Forward, c: ml_collections.ConfigDict) -> str:
  """Returns what a vector is made of; see score_head.pooled."""
  return c.embedding.pool or score_head.usual_pool(forward.arch)


def _vectors(
  forward: Forward, c: ml_collections.ConfigDict, params: dict, batch: dict
) -> tuple[jax.Array, jax.Array]:
  """Returns the vectors of the texts of a batch, float32[B, E, K, D] of length 1, and whether there
  is such a text, bool[B, E, K].
  """
  rows, groups = batch['document_weights'].shape
  size = label_algorithms.group_size(c)
  pool = _pool(forward, c)
  states, there = forward.sequence_states(params, batch, groups * size, pool)
  return (
    losses.unit(states).reshape(rows, groups, size, -1),
    there.reshape(rows, groups, size),
  )


def _groups(forward: Forward, c: ml_collections.ConfigDict, params: dict, batch: dict) -> Groups:
  vectors, there = _vectors(forward, c, params, batch)
  ids = batch['text_ids'].reshape(*vectors.shape[:3], 2)
  return Groups(vectors, ids, there, batch['document_weights'])


def _whole(x: Groups) -> Groups:
  """Returns the groups on every device."""
  return jax.tree.map(lambda a: jax.sharding.reshard(a, jax.P()), x)


def _losses(c: ml_collections.ConfigDict, own: Groups) -> tuple[jax.Array, losses.Compared]:
  """Returns the loss of each group, float32[B, E], and what was compared."""
  section, everyone = c.embedding, _whole(own)
  found = losses.negatives_of_anchors(own, everyone, section.in_batch)
  if section.objective == 'margin':
    return losses.margin(found, section.margin), found
  out = losses.contrastive(found, section.temperature)
  if section.symmetric:
    back = losses.negatives_of_positives(own, everyone)
    out = (out + losses.contrastive(back, section.temperature)) / 2
  return out, found


def _scored(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns the loss of pairs with scores."""

  def loss(params, batch, keys):
    vectors, _ = _vectors(forward.with_dropout(keys), c, params, batch)
    (total, weight), _ = losses.cosine_error(vectors, batch['targets'], batch['document_weights'])
    return total, weight, {}

  return loss


def _at_rows(x: jax.Array, places: jax.Array) -> jax.Array:
  """Returns the rows of a micro-batch at their places in the step on every device, and zeros.

  x: [M, ...]. places: float32[M, B], 1 where row m of the micro-batch is row b of the step.
  """
  at = places.reshape(*places.shape, *[1] * (x.ndim - 1))
  return jax.sharding.reshard((at * x[:, None].astype(jnp.float32)).sum(0), jax.P())


def _step_groups(own: Groups, batch: dict, rows: int) -> tuple[Groups, jax.Array]:
  """Returns the groups of a micro-batch at their places in a step of `rows` rows, all arrays
  float32, and float32[B], 1 for these rows.
  """
  numbers = jnp.arange(rows, dtype=jnp.float32)
  places = (batch['row_numbers'][:, None] == numbers[None]).astype(jnp.float32)
  vectors = jnp.einsum(
    'MB,MEKD->BEKD', places, own.vectors, precision='highest', out_sharding=jax.P()
  )
  rest = (_at_rows(x, places) for x in (own.ids, own.there, own.weights))
  return Groups(vectors, *rest), jax.sharding.reshard(places.sum(0), jax.P())


def _coupled(forward: Forward, c: ml_collections.ConfigDict, one: LossFn) -> CoupledLoss:
  """Returns the loss of a step with several micro-batches; `one` is that of a step with one."""

  def step_groups(params, batch, keys):
    own = _groups(forward.with_dropout(keys), c, params, batch)
    return _step_groups(own, batch, c.batch_size)

  def sums(params, batch, keys):
    return jax.lax.stop_gradient(step_groups(params, batch, keys)[0])

  def loss(params, batch, keys, whole):
    if whole is None:
      return one(params, batch, keys)
    own, is_own = step_groups(params, batch, keys)
    vectors = jnp.where(is_own[:, None, None, None] > 0, own.vectors, whole.vectors)
    step = Groups(vectors, whole.ids, whole.there > 0, whole.weights)
    values, found = _losses(c, _over_devices(step))
    weights = _over_devices(whole.weights)
    mine = weights * _over_devices(is_own)[:, None]
    total, weight = masked.mean(values, mine)
    every, _ = masked.mean(values, weights)
    # Its value is that of the own rows; its gradient that of all rows by the own vectors.
    total = jax.lax.stop_gradient(total - every) + every
    return total, weight, losses.statistics(found, mine)

  return CoupledLoss(sums, loss)


def _over_devices(x):
  """Returns arrays [B, ...] divided over the devices as the rows of a batch are."""
  return jax.tree.map(lambda a: jax.sharding.reshard(a, spec('batch', *[None] * (a.ndim - 1))), x)


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn | CoupledLoss:
  """Returns loss(params, batch, keys) -> (sum over groups, their weight, metrics as sums).

  Raises:
    ConfigError: a model with experts and several micro-batches.
  """
  if c.embedding.objective == 'cosine':
    return _scored(forward, c)

  def one(params, batch, keys):
    own = _groups(forward.with_dropout(keys), c, params, batch)
    values, found = _losses(c, own)
    total, weight = masked.mean(values, own.weights)
    return total, weight, losses.statistics(found, own.weights)

  if c.grad_accum == 1 or not label_algorithms.couples_rows(c):
    return one
  if forward.arch.mixtures():
    raise ConfigError(
      f'grad_accum={c.grad_accum} with embedding.in_batch=True: the load of experts and the '
      'negatives would both couple the micro-batches of a step; set grad_accum=1'
    )
  return _coupled(forward, c, one)


def make_measure(
  forward: Forward, c: ml_collections.ConfigDict
) -> Callable[[dict, dict], dict[str, jax.Array]]:
  """Returns the jitted (params, batch) -> vectors of its groups, what else they have, and the sums
  of the loss, on every device, where every process can read them.
  """
  forward = forward.without_remat()

  @jax.jit
  def measure(params, batch):
    weights = batch['document_weights']
    if c.embedding.objective == 'cosine':
      vectors, there = _vectors(forward, c, params, batch)
      pair, _ = losses.cosine_error(vectors, batch['targets'], weights)
      more = {'scores': batch['targets']}
    else:
      own = _groups(forward, c, params, batch)
      pair = masked.mean(_losses(c, own)[0], weights)
      vectors, there, more = own.vectors, own.there, {'ids': own.ids}
    found = {'vectors': vectors, 'there': there, 'weights': weights} | more
    found = {name: jax.sharding.reshard(x, jax.P()) for name, x in found.items()}
    return found | {'loss': jnp.stack(pair)}

  return measure


def collect(
  measure: Callable, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, np.ndarray] | None:
  """Returns what `measure` gives for all groups of the evaluation rows in order, [N, K, ...], and
  the sums of the loss; empty without rows, None when cancelled.
  """
  parts, loss = [], np.zeros(2)
  for batch in run.eval_batches():
    if is_cancelled():
      return None
    found = {k: np.asarray(v) for k, v in measure(params, batch).items()}
    loss += found.pop('loss')
    parts.append({k: v[found['weights'] > 0] for k, v in found.items()})
  if not parts:
    return {}
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]} | {'loss': loss}


def evaluate(
  measure: Callable, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, float] | None:
  """Returns the loss, with the negatives of one evaluation batch, and how the positives are found
  among all texts of the evaluation rows; or the correlations of cosines with scores.
  """
  found = collect(measure, run, params, is_cancelled)
  if not found:
    return found
  out = {'loss': float(found['loss'][0] / found['loss'][1]), 'rows': len(found['vectors'])}
  if run.config.embedding.objective == 'cosine':
    cosines = (found['vectors'][:, 0].astype(np.float64) * found['vectors'][:, 1]).sum(-1)
    return out | retrieval.correlations(cosines, found['scores'])
  return out | retrieval.of_groups(found['vectors'], found['ids'], found['there'])


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run."""
  measured = functools.partial(evaluate, make_measure(run.forward, run.config), run)
  return fit.Parts(make_loss(run.forward, run.config), measured)
