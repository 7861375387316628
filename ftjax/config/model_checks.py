"""Checks of the section model.dropout."""

import ml_collections

from ftjax.config import algorithms
from ftjax.runtime.errors import ConfigError

RATE_OF_MODEL = -1.0  # the rate of an encoder's config.json; 0 in a decoder


def check(c: ml_collections.ConfigDict) -> None:
  """Checks the rates of dropout.

  Raises:
    ConfigError: naming the key.
  """
  for place, rate in c.model.dropout.items():
    if rate != RATE_OF_MODEL and not 0 <= rate < 1:
      raise ConfigError(
        f'model.dropout.{place}={rate}; expected at least 0 and less than 1, or {RATE_OF_MODEL:g} '
        "for that of an encoder's config.json"
      )
    if rate > 0 and algorithms.of(c).on_rollouts:
      raise ConfigError(
        f'model.dropout.{place}={rate} with algorithm={c.algorithm}: the log-probs of a rollout '
        f'would be of another model than the one that sampled it; leave it at {RATE_OF_MODEL:g}'
      )
