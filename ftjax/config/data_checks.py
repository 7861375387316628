"""Checks of the keys of data that change which rows are trained on, and how much they count."""

import ml_collections

from ftjax.config import algorithms, choices
from ftjax.config.keys import default
from ftjax.runtime.errors import ConfigError

_PLACE = '{prompt}'


def check(c: ml_collections.ConfigDict) -> None:
  """Checks data.augment with its templates, and data.mix_temperature.

  Raises:
    ConfigError: naming the key.
  """
  d = c.data
  if d.mix_temperature < 1:
    raise ConfigError(f'data.mix_temperature={d.mix_temperature}; expected at least 1')
  preferences = algorithms.of(c).example(c) in ('pair', 'label', 'score')
  if d.curriculum == 'difficulty' and preferences:
    raise ConfigError(
      f'data.curriculum=difficulty with algorithm={c.algorithm}: only rows of supervised runs '
      'have a difficulty; set data.curriculum to length or none'
    )
  if d.curriculum == 'difficulty' and algorithms.of(c).on_rollouts:
    raise ConfigError('data.curriculum=difficulty: prompts have none; set it to length or none')
  if d.on_audit == 'error' and not d.audit:
    raise ConfigError(
      'data.on_audit=error does nothing with data.audit=0: set how many rows are looked at'
    )
  _check_augment(d.augment)
  if not d.augment:
    for key in ('augment_copies', 'augment_templates'):
      if d[key] != default().data[key]:
        raise ConfigError(f'data.{key}={d[key]} does nothing without data.augment: set it')
  if isinstance(d.augment_templates, str):
    raise ConfigError(f'data.augment_templates={d.augment_templates!r}; expected a tuple of texts')
  for text in d.augment_templates:
    if not isinstance(text, str) or text.count(_PLACE) != 1:
      raise ConfigError(
        f'data.augment_templates: {text!r}; expected a text with {_PLACE} once, such as '
        f"'Please answer: {_PLACE}'"
      )
  if ('template' in d.augment) != bool(d.augment_templates):
    raise ConfigError(
      "data.augment='template' and data.augment_templates belong together: set both or neither"
    )


def _check_augment(names) -> None:
  if isinstance(names, str):
    raise ConfigError(f"data.augment={names!r}; expected a tuple such as ('word_dropout@0.1',)")
  expected = [f'{n}@RATE' if rate else n for n, rate in choices.AUGMENTATIONS.items()]
  for name in names:
    kind, at, rate = str(name).partition('@')
    has_rate = choices.AUGMENTATIONS.get(kind)
    if has_rate is None or bool(at) != has_rate:
      raise ConfigError(f'data.augment: {name!r}; expected some of {", ".join(expected)}')
    if has_rate and not _is_share(rate):
      raise ConfigError(f'data.augment: {name!r}: the rate is {rate!r}; expected one in (0, 1)')
  if len({str(name).partition('@')[0] for name in names}) < len(names):
    raise ConfigError(f'data.augment={tuple(names)}; expected each name once')


def _is_share(text: str) -> bool:
  try:
    return 0 < float(text) < 1
  except ValueError:
    return False
