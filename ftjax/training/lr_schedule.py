"""Learning-rate schedules: functions of the update number k, counted from 0.

As in optax and HF, update k uses lr(k): with warm-up the first update has rate 0, and the end value
is reached after the last update, at k = steps."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from ftjax.runtime.errors import ConfigError

NAMES = ('constant', 'linear', 'cosine', 'wsd', 'inverse_sqrt')


def make_schedule(
  name: str, lr: float, steps: int, *, warmup_steps: int, end_fraction: float, decay_steps: int
) -> Callable:
  """A schedule int -> float32.

  Args:
    name: one of NAMES. 'linear' and 'cosine' fall to lr * end_fraction at `steps`; 'wsd' (warm-up,
      stable, decay; Hu et al. 2024) holds lr and falls linearly over the last `decay_steps`;
      'inverse_sqrt' is lr * sqrt(warmup / k) after warm-up.
    lr: peak rate.
    steps: updates in all.
    warmup_steps: updates of linear rise from 0.
    end_fraction: end value as a share of lr.
    decay_steps: for 'wsd'.

  Raises:
    ConfigError: an unknown name, or phases longer than the run.
  """
  if name not in NAMES:
    raise ConfigError(f'optim.schedule={name!r}; expected one of {NAMES}')
  if not 0 <= warmup_steps <= steps or (
    name == 'wsd' and not 0 < decay_steps <= steps - warmup_steps
  ):
    raise ConfigError(
      f'optim.warmup_steps={warmup_steps}, optim.decay_steps={decay_steps} do not fit '
      f'in {steps} steps'
    )
  if name == 'inverse_sqrt':
    knee = max(warmup_steps, 1)
    return lambda k: (
      lr * jnp.minimum(k / knee if warmup_steps else 1.0, jnp.sqrt(knee / jnp.maximum(k, knee)))
    )
  rest, end = steps - warmup_steps, lr * end_fraction
  body = {
    'constant': lambda: [optax.constant_schedule(lr)],
    'linear': lambda: [optax.linear_schedule(lr, end, max(rest, 1))],
    'cosine': lambda: [optax.cosine_decay_schedule(lr, max(rest, 1), end_fraction)],
    'wsd': lambda: [optax.constant_schedule(lr), optax.linear_schedule(lr, end, decay_steps)],
  }[name]()
  parts, borders = body, [steps - decay_steps] if name == 'wsd' else []
  if warmup_steps:
    parts, borders = (
      [optax.linear_schedule(0.0, lr, warmup_steps), *parts],
      [warmup_steps, *borders],
    )
  return optax.join_schedules(parts, borders)
