"""Learning-rate schedules: functions of the update number k, counted from 0.

As in optax and Hugging Face's Trainer, update k uses lr(k): with warm-up the first update has rate
0, and the end value is reached after the last update, at k = steps."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import optax

from ftjax.runtime import named_object
from ftjax.runtime.errors import ConfigError

Schedule = Callable  # update number -> float32 rate


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """A schedule in numbers.

  Attributes:
    lr: peak rate.
    steps: updates in all.
    warmup_steps: updates of linear rise from 0.
    end_fraction: end value as a share of lr.
    decay_steps: updates of the final decay of 'wsd'.
  """

  lr: float
  steps: int
  warmup_steps: int
  end_fraction: float
  decay_steps: int


def after_warmup(
  config: ScheduleConfig, parts: Sequence[Schedule], borders: Sequence[int] = ()
) -> Schedule:
  """Returns the warm-up, then `parts` one after the other.

  Args:
    config: its lr and warmup_steps make the warm-up.
    parts: schedules, each counting updates from its own beginning.
    borders: updates of the run at which parts 1, 2, ... begin.
  """
  if not config.warmup_steps:
    return optax.join_schedules([*parts], [*borders])
  rise = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
  return optax.join_schedules([rise, *parts], [config.warmup_steps, *borders])


def _rest(config: ScheduleConfig) -> int:
  return max(config.steps - config.warmup_steps, 1)


def _constant(config: ScheduleConfig) -> Schedule:
  return after_warmup(config, [optax.constant_schedule(config.lr)])


def _linear(config: ScheduleConfig) -> Schedule:
  """Falls to lr * end_fraction at `steps`."""
  end = config.lr * config.end_fraction
  return after_warmup(config, [optax.linear_schedule(config.lr, end, _rest(config))])


def _cosine(config: ScheduleConfig) -> Schedule:
  """Falls to lr * end_fraction at `steps`."""
  body = optax.cosine_decay_schedule(config.lr, _rest(config), config.end_fraction)
  return after_warmup(config, [body])


def _wsd(config: ScheduleConfig) -> Schedule:
  """Warm-up, stable, decay (Hu et al. 2024): holds lr, and falls linearly to lr * end_fraction over
  the last decay_steps.
  """
  if not 0 < config.decay_steps <= config.steps - config.warmup_steps:
    raise _no_fit(config)
  end = config.lr * config.end_fraction
  parts = [
    optax.constant_schedule(config.lr),
    optax.linear_schedule(config.lr, end, config.decay_steps),
  ]
  return after_warmup(config, parts, [config.steps - config.decay_steps])


def _inverse_sqrt(config: ScheduleConfig) -> Schedule:
  """lr * sqrt(warmup / k) after the warm-up."""
  lr, is_warmed, knee = config.lr, config.warmup_steps > 0, max(config.warmup_steps, 1)
  return lambda k: (
    lr * jnp.minimum(k / knee if is_warmed else 1.0, jnp.sqrt(knee / jnp.maximum(k, knee)))
  )


# config -> rate of every update. A user's schedule is a function like these.
SCHEDULES = {
  'constant': _constant,
  'linear': _linear,
  'cosine': _cosine,
  'wsd': _wsd,
  'inverse_sqrt': _inverse_sqrt,
}


def _no_fit(config: ScheduleConfig) -> ConfigError:
  return ConfigError(
    f'optim.warmup_steps={config.warmup_steps}, optim.decay_steps={config.decay_steps} do not fit '
    f'in {config.steps} steps'
  )


def make_schedule(name: str, config: ScheduleConfig) -> Schedule:
  """Returns the schedule that a name means, of SCHEDULES or a user's 'module:function'.

  Raises:
    ConfigError: an unknown name, phases longer than the run, or a user's function that returns
      something that cannot be called.
  """
  if name not in SCHEDULES and not named_object.is_named(name):
    raise ConfigError(
      f"optim.schedule={name!r}; expected one of {tuple(SCHEDULES)} or 'module:function'"
    )
  if not 0 <= config.warmup_steps <= config.steps:
    raise _no_fit(config)
  if name in SCHEDULES:
    return SCHEDULES[name](config)
  found = named_object.load('optim.schedule', name)(config)
  if not callable(found):
    raise ConfigError(
      f'optim.schedule={name} returned a {type(found).__name__}; expected a function of the update '
      'number'
    )
  return found
