"""Describes rotary embeddings as data: base, scaling rule, and what turns; rope.py computes them.

This file imports no jax.
"""

import dataclasses

from ftjax.runtime.errors import DataError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The `llama3` rule: long wavelengths slowed by `factor`, short ones kept, a ramp between."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_len: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """The `linear` rule: all frequencies are divided by `factor` (Chen et al. 2023)."""

  factor: float


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
  """The `dynamic` rule: beyond original_len the base grows with the length of the document
  ("NTK-aware" scaling, appendix B.2 of Peng et al. 2023).
  """

  factor: float
  original_len: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """The `yarn` rule (Peng et al. 2023): pairs that turn less than beta_slow times in original_len
  tokens are slowed by `factor`, those that turn more than beta_fast times are kept, and a ramp over
  the pairs lies between. truncate: the ramp begins and ends at whole pairs. attention_factor:
  multiplies the rotated part of queries and keys.
  """

  factor: float
  original_len: int
  attention_factor: float
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongScaling:
  """The `longrope` rule (Ding et al. 2024): the frequency of each pair is divided by its number in
  short_factors, and by that in long_factors in documents longer than original_len.
  attention_factor: multiplies the rotated part of queries and keys.
  """

  short_factors: tuple[float, ...]
  long_factors: tuple[float, ...]
  original_len: int
  attention_factor: float


@dataclasses.dataclass(frozen=True)
class ProportionalScaling:
  """The `proportional` rule (Gemma 4): the frequencies are those of the whole head, only the first
  Rope.fraction of the pairs turn, and all frequencies are divided by `factor`.
  """

  factor: float = 1.0


Scaling = (
  RopeScaling | LinearScaling | DynamicScaling | YarnScaling | LongScaling | ProportionalScaling
)


@dataclasses.dataclass(frozen=True)
class QueryScaling:
  """Queries are multiplied by 1 + beta log(1 + floor(position / original_len)) after the rotation
  (Llama 4, Ministral 3).
  """

  beta: float
  original_len: int


@dataclasses.dataclass(frozen=True)
class Rope:
  """A rotary embedding.

  theta: base of its frequencies. scaling: how they differ from the plain ones. fraction: share of
  the head that is rotated, its first coordinates. query: a factor of the queries.
  """

  theta: float = 10000.0
  scaling: Scaling | None = None
  fraction: float = 1.0
  query: QueryScaling | None = None

  @property
  def uses_length(self) -> bool:
    """Whether the frequencies depend on the length of the document."""
    return isinstance(self.scaling, DynamicScaling | LongScaling)

  def size(self, head_dim: int) -> int:
    """Returns the number of rotary coordinates that the frequencies are made for."""
    whole = isinstance(self.scaling, ProportionalScaling)
    return head_dim if whole else int(head_dim * self.fraction)

  def check(self, head_dim: int) -> None:
    """Raises DataError where the rule does not fit a head of this size."""
    size, rule = self.size(head_dim), self.scaling
    if not 0 < self.fraction <= 1 or size < 2 or size % 2:
      raise DataError(
        f'config.json: partial_rotary_factor={self.fraction} rotates {size} of {head_dim=} '
        'coordinates; expected an even number, at least 2'
      )
    if isinstance(rule, DynamicScaling) and size == 2:
      raise DataError("config.json: rope_type='dynamic' is not defined for 2 rotary coordinates")
    if isinstance(rule, LongScaling):
      for name, factors in (('short', rule.short_factors), ('long', rule.long_factors)):
        if len(factors) != size // 2:
          raise DataError(
            f'config.json: {name}_factor has {len(factors)} numbers; expected {size // 2}, one for '
            f'each pair of the {size} rotary coordinates'
          )
