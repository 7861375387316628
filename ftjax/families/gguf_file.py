"""The header of a GGUF file, with typed values of its metadata."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ftjax.families import hf_config
from ftjax.runtime.errors import DataError


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """The header of a GGUF file.

  place: its path, for messages. arch: value of general.architecture. values: of the metadata.
  shapes: of the tensors, rows first, by their names in the file. rope: divisors of rotary
  frequencies, those of gguf_rope.TENSORS that it has.
  """

  place: str
  arch: str
  values: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]
  rope: Mapping[str, np.ndarray]

  def key(self, name: str) -> str:
    """Returns the metadata key of a setting of the architecture: 'llama.block_count'."""
    return f'{self.arch}.{name}'

  def has(self, name: str) -> bool:
    """Returns whether the file states a setting of the architecture."""
    return self.key(name) in self.values

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a setting of the architecture as it is, or `default`."""
    return self.values[self.key(name)] if self.has(name) else default

  def _stated(self, name: str, default: Any) -> Any:
    if default is None and not self.has(name):
      raise DataError(f'{self.place}: metadata {self.key(name)} is missing')
    return self.get(name, default)

  def count(self, name: str, default: int | None = None, least: int = 1) -> int:
    """Returns a setting that must be a whole number, positive or not below `least`; without a
    default it is required.
    """
    value = self._stated(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
      kind = 'positive whole number' if least == 1 else f'whole number from {least} on'
      raise DataError(f'{self.place}: metadata {self.key(name)} is {value!r}; a {kind} is expected')
    if name == 'block_count' and value > hf_config.MOST_LAYERS:  # a list of layers is made of it
      raise DataError(
        f'{self.place}: metadata {self.key(name)} is {value}; expected at most '
        f'{hf_config.MOST_LAYERS}'
      )
    return value

  def number(self, name: str, default: float | None = None) -> float:
    """Returns a setting that must be positive, in its shortest float32 spelling."""
    value = self._stated(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
      raise DataError(
        f'{self.place}: metadata {self.key(name)} is {value!r}; a positive number is expected'
      )
    return shortest(value)

  def head_dim(self) -> int:
    """Returns the width of a head."""
    for name in ('attention.key_length', 'rope.dimension_count'):
      if self.has(name):
        return self.count(name)
    return self.count('embedding_length') // self.count('attention.head_count')

  def theta(self) -> float:
    """Returns the base of the rotary frequencies."""
    return self.number('rope.freq_base', 10000.0)


def shortest(value: float) -> float:
  """Returns a float32 constant in its shortest spelling: 1e-05 for 9.999999747378752e-06."""
  return float(str(np.float32(value)))
