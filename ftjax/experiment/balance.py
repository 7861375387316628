"""The load-balance loss of models with experts: added to the loss of any algorithm, with statistics
of the load.

It couples the rows of a step: the shares of the load are those of the whole step, which a pass
without gradient counts first where there are several micro-batches."""

import jax
import jax.numpy as jnp

from ftjax.experiment.run import Run
from ftjax.experiment.size_checks import BALANCE_OF_MODEL
from ftjax.models import routing
from ftjax.models.routing import RouterLog, Routing
from ftjax.runtime.errors import ConfigError
from ftjax.training.step import LOSS_ALONE, CoupledLoss, LossFn


def with_balance(run: Run, loss: LossFn) -> LossFn | CoupledLoss:
  """Returns a loss with the load-balance loss of every pass of the model that has a gradient; the
  loss itself for a model without experts.
  """
  mixtures, own = run.arch.mixtures(), run.config.moe.balance
  if not mixtures:
    return loss
  factor = mixtures[0].balance if own == BALANCE_OF_MODEL else own
  return _coupled(loss, run.router_log, factor)


# Of each pass: (how many tokens chose each expert float32[L, E], tokens float32[L]).
Loads = list[tuple[jax.Array, jax.Array]]


def _loads(found: list[Routing]) -> Loads:
  return jax.lax.stop_gradient([(r.chosen, r.tokens) for r in found])


def _coupled(loss: LossFn, log: RouterLog, factor: float) -> CoupledLoss:
  def run(params, batch, keys):
    log.clear()
    return *loss(params, batch, keys), log.take()

  def sums(params, batch, keys):
    _, weight, _, found = run(params, batch, keys)
    return weight, _loads(found)

  def total(params, batch, keys, whole):
    total, weight, metrics, found = run(params, batch, keys)
    weights, loads = (weight, _loads(found)) if whole is None else whole
    if not found and not factor:
      return total, weight, metrics
    if not found:
      raise ConfigError(
        'the loss of this algorithm makes no pass with run.forward, so the load of the experts '
        'cannot be balanced; set moe.balance=0'
      )
    balance = sum(
      routing.load_balance(chosen, tokens, r.probs)
      for r, (chosen, tokens) in zip(found, loads, strict=True)
    )
    alone = jax.lax.stop_gradient((total, weight))
    # The step divides by the weight of all its rows.
    total = total + factor * balance * jax.lax.stop_gradient(weights)
    # The loads are those of the step, the same in every micro-batch.
    one = jnp.float32(1)
    stats = routing.load_statistics(jnp.concatenate([chosen for chosen, _ in loads]))
    more = {f'moe/{k}': (v, one) for k, v in stats.items()}
    more['moe/balance'] = jax.lax.stop_gradient(balance), _part(found, loads)
    more[LOSS_ALONE] = alone
    return total, weight, metrics | more

  return CoupledLoss(sums, total)


def _part(found: list[Routing], loads: Loads) -> jax.Array:
  """Returns the share of the step's tokens that a micro-batch has."""
  own, whole = sum(r.tokens.sum() for r in found), sum(tokens.sum() for _, tokens in loads)
  return own / jnp.maximum(whole, 1.0)
