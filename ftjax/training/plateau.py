"""The plateau rule: the learning rate falls when the watched metric has stopped improving.

As torch.optim.lr_scheduler.ReduceLROnPlateau with threshold=0 and cooldown=0, but the rule makes a
factor of the schedule's rate. The factor is in the optimizer's state: it is saved with it, and runs
without the rule have none. The loop changes it between steps."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Plateau:
  """The rule in numbers.

  Attributes:
    factor: what the learning rate is multiplied by, in (0, 1).
    patience: evaluations without a better metric after which it falls, and after as many again;
      torch counts one more than its own patience.
    floor: smallest product of all factors, in [0, 1).
  """

  factor: float
  patience: int
  floor: float

  def next_scale(self, scale: float) -> float:
    """Returns the product of factors after one more fall, in float32; `scale` where that is not
    above the floor.
    """
    return min(scale, float(np.float32(max(scale * self.factor, self.floor))))


class LrScale(NamedTuple):
  """The state of `scale_updates`. lr_scale float32[]: the factor."""

  lr_scale: jax.Array


def scale_updates() -> optax.GradientTransformation:
  """Returns the last part of an optimizer: updates are multiplied by the factor in its state, 1 at
  first.

  All that comes before is proportional to the learning rate, which is multiplied in last: so this
  is an update with another rate. Weight decay is scaled with it, moments are not.
  """

  def update(updates, state, params=None):
    del params
    return jax.tree.map(lambda u: u * state.lr_scale.astype(u.dtype), updates), state

  return optax.GradientTransformation(lambda params: LrScale(jnp.ones((), jnp.float32)), update)


def _is_scale(node) -> bool:
  return isinstance(node, LrScale)


def find_scale(opt: optax.OptState) -> jax.Array | None:
  """Returns the factor float32[] in an optimizer's state; None without `scale_updates`."""
  found = [x for x in jax.tree.leaves(opt, is_leaf=_is_scale) if _is_scale(x)]
  return found[0].lr_scale if found else None


def with_scale(opt: optax.OptState, value: float) -> optax.OptState:
  """Returns an optimizer's state with another factor, on the devices of the old one."""
  content = np.float32(value)

  def one(node):
    if not _is_scale(node):
      return node
    where = node.lr_scale.sharding
    return LrScale(jax.make_array_from_callback((), where, lambda _: content))

  return jax.tree.map(one, opt, is_leaf=_is_scale)
