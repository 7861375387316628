"""Checks of the section lora."""

import math
from typing import Any

import ml_collections

from ftjax.config import algorithms
from ftjax.config.keys import default
from ftjax.config.section import flat
from ftjax.runtime.errors import ConfigError


def check(c: ml_collections.ConfigDict) -> None:
  """Checks the section lora, and what may not stand beside it.

  Raises:
    ConfigError: naming the key.
  """
  lora = c.lora
  if lora.rank < 0:
    raise ConfigError(f'lora.rank={lora.rank}; expected at least 1, or 0 for no adapter')
  if not lora.rank:
    _check_unset(c)
    return
  for key in ('alpha', 'b_lr_ratio', 'merge_kl'):
    if lora[key] <= 0:
      raise ConfigError(f'lora.{key}={lora[key]}; expected a positive number')
  if not 0 <= lora.dropout < 1:
    raise ConfigError(f'lora.dropout={lora.dropout}; expected at least 0 and less than 1')
  if lora.dropout and algorithms.of(c).on_rollouts:
    raise ConfigError(
      f'lora.dropout={lora.dropout} with algorithm={c.algorithm}: the log-probs of a rollout would '
      'be of another model than the one that sampled it; leave lora.dropout at 0'
    )
  if lora.block < 2 or lora.block & (lora.block - 1):
    raise ConfigError(f'lora.block={lora.block}; expected a power of two, at least 2')
  if lora.block != flat(default())['lora.block'] and lora.base != 'nf4':
    raise ConfigError(f'lora.block={lora.block} does nothing with lora.base={lora.base}')
  if lora.merge_kl != flat(default())['lora.merge_kl'] and not lora.merge:
    raise ConfigError(f'lora.merge_kl={lora.merge_kl} does nothing with lora.merge=False')
  for key, least in (('rank_pattern', 0), ('alpha_pattern', None)):
    for row in lora[key]:
      _check_row(f'lora.{key}', row, least)
  if c.model.param_dtype != flat(default())['model.param_dtype']:
    raise ConfigError(
      f'model.param_dtype={c.model.param_dtype} does nothing with lora.rank={lora.rank}: the base '
      'is held as lora.base, the adapter in float32'
    )


def _check_unset(c: ml_collections.ConfigDict) -> None:
  """Refuses settings of an adapter where there is none."""
  values, usual = flat(c), flat(default())
  for key in values:
    if key.startswith('lora.') and values[key] != usual[key]:
      raise ConfigError(
        f'{key}={values[key]} does nothing with lora.rank=0: set lora.rank, or leave {key} out'
      )


def _check_row(key: str, row: Any, least: int | None) -> None:
  """Checks a pair (regex, number); least: the smallest integer allowed, None for any positive
  number.
  """
  if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
    raise ConfigError(f'{key}: {row!r} is not a row; expected pairs (regex, number)')
  value = row[1]
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if least is None:
    if not (is_number and math.isfinite(value) and value > 0):
      raise ConfigError(f'{key}: {row!r}; expected a positive number')
  elif not (is_number and isinstance(value, int) and value >= least):
    raise ConfigError(f'{key}: {row!r}; expected a whole number, at least {least}')
