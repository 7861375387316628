"""What routers of experts did with the tokens of a batch: the load-balance loss, and statistics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
  """What routers did with the tokens of a batch, padding left out; of one layer, or with a leading
  axis of layers.

  chosen: float32[E], how many tokens chose each expert. probs: float32[E], the sums of their
  probabilities, which have a gradient. tokens: float32[], how many tokens there were. choices:
  int32[B, T, k], the experts of each token, the most probable first.
  """

  chosen: jax.Array
  probs: jax.Array
  tokens: jax.Array
  choices: jax.Array


class RouterLog:
  """Keeps what the routers did in the passes of a loss, while the loss is traced.

  A Forward with a log adds to it; the step takes it when the loss has returned (experiment/
  balance.py). So no algorithm has to know of routers.
  """

  def __init__(self):
    self._found: list[Routing] = []

  def clear(self) -> None:
    """Forgets everything."""
    self._found.clear()

  def add(self, routing: Routing) -> None:
    """Adds the routing of a pass, with its axis of layers."""
    self._found.append(routing)

  def take(self) -> list[Routing]:
    """Returns the routing of each pass since the last `clear`, and forgets it."""
    found = list(self._found)
    self._found.clear()
    return found


def load_balance(chosen: jax.Array, tokens: jax.Array, probs: jax.Array) -> jax.Array:
  """Returns E sum_e f_e P_e, float32[] (Fedus et al. 2021, eq. 4): top_k where all are even.

  f_e: share of the tokens that chose e. P_e: their mean probability of e. Both are means over all
  layers together, as in transformers' load_balancing_loss_func.

  Args:
    chosen: float32[L, E], of all tokens of a step; a constant of the gradient.
    tokens: float32[L], how many these are.
    probs: float32[L, E], sums over some of these tokens; the results of parts add up.
  """
  count = jnp.maximum(tokens.sum(), 1.0)
  shares = jax.lax.stop_gradient(chosen.sum(0) / count)
  return chosen.shape[1] * (shares * (probs.sum(0) / count)).sum()


def load_statistics(chosen: jax.Array) -> dict[str, jax.Array]:
  """Returns how even the load of the experts is, float32[] each, from chosen float32[L, E].

  max_load: the largest load of an expert over the mean one, 1 to E, as a mean over the layers;
  max_load/worst_layer: of the layer where it is largest. entropy: of the load, 0 to 1 (even).
  idle: share of experts that no token chose.
  """
  load = chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1.0)
  experts = load.shape[1]
  largest = experts * load.max(-1)
  logs = jnp.log(jnp.where(load > 0, load, 1.0))
  entropy = -(load * logs).sum(-1) / jnp.log(jnp.maximum(experts, 2))
  return {
    'max_load': largest.mean(),
    'max_load/worst_layer': largest.max(),
    'entropy': entropy.mean(),
    'idle': (chosen == 0).mean(dtype=jnp.float32),
  }
