"""The rates of dropout of a run: those of the config, or of an encoder's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from ftjax.config.model_checks import RATE_OF_MODEL
from ftjax.families import dropout
from ftjax.models.architecture import Architecture
from ftjax.models.dropout import Rates
from ftjax.runtime.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Dropped:
  """inner: rates inside the model. classifier: rate before the last map of a label head."""

  inner: Rates
  classifier: float

  def summary(self) -> str:
    """Returns the rates that are not 0, 'attention 0.1, classifier 0.1'; '' for none."""
    found = dataclasses.asdict(self.inner) | {'classifier': self.classifier}
    return ', '.join(f'{place} {rate:g}' for place, rate in found.items() if rate)


def find(c: ml_collections.ConfigDict, arch: Architecture, config: Mapping[str, Any]) -> Dropped:
  """Returns the rates that a run trains with.

  Args:
    c: the config, whose section model.dropout is read.
    arch: of the model.
    config: its config.json; empty where none was read.

  Raises:
    ConfigError: a rate for a label head of a model without one.
  """
  given = c.model.dropout
  own = dropout.rates(config, arch.task) if arch.is_encoder else dict.fromkeys(given, 0.0)
  found = {k: own[k] if given[k] == RATE_OF_MODEL else given[k] for k in given}
  if given.classifier > 0 and not arch.num_labels:
    raise ConfigError(
      f'model.dropout.classifier={given.classifier}: algorithm={c.algorithm} trains a language '
      f'model, which has no label head; leave it at {RATE_OF_MODEL:g}'
    )
  if given.attention > 0 and arch.is_encoder_decoder:
    raise ConfigError(
      f'model.dropout.attention={given.attention}: attention with relative positions and cross '
      'attention have no dropout; leave it at -1, and set model.dropout.residual'
    )
  return Dropped(
    Rates(**{k: v for k, v in found.items() if k != 'classifier'}), found['classifier']
  )


def check(c: ml_collections.ConfigDict, arch: Architecture, config: Mapping[str, Any]) -> None:
  """Refuses rates that do not fit the model, and R-Drop without dropout; arguments: of `find`.

  Raises:
    ConfigError: naming the key.
  """
  found = find(c, arch, config)
  drops = found.inner or found.classifier or (arch.adapter is not None and arch.adapter.dropout)
  if c.loss.r_drop and not drops:
    raise ConfigError(
      f'loss.r_drop={c.loss.r_drop} compares two passes with other dropout masks, and nothing is '
      'dropped: set a rate, for example model.dropout.residual=0.1 (or lora.dropout)'
    )
