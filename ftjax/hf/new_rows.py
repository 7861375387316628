"""Rows of the vocabulary's tables for tokens that a model's files do not have.

A `GrownSource` presents the files of a model as if they held these rows. Each is the mean of other
rows, computed in float64 from the stored values, on the host: it is the same on every mesh.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax.hf.tensor_source import (
  DerivedSource,
  Index,
  TensorInfo,
  TensorSource,
  full_index,
  row_blocks,
)


@dataclasses.dataclass(frozen=True)
class NewRows:
  """The new tokens of a vocabulary.

  texts: of the tokens; their ids begin at `first`, the size of the old tokenizer. means: for each,
  the ids whose rows it starts as the mean of; () for all ids below `first`. size: of the new
  vocabulary. A model may have had rows at these ids, which no token used: they are replaced.
  """

  texts: tuple[str, ...]
  first: int
  means: tuple[tuple[int, ...], ...]
  size: int

  @property
  def ids(self) -> range:
    """Returns the ids of the new tokens."""
    return range(self.first, self.first + len(self.texts))


class GrownSource(DerivedSource):
  """The tensors of a model with new rows in its tables.

  Args:
    source: of the model's files; bytes read through here count for its fingerprint.
    rows: the new rows.
    tables: names of the tensors whose first axis is the vocabulary; those that are not in the files
      are passed over.
  """

  def __init__(self, source: TensorSource, rows: NewRows, tables: Sequence[str]):
    super().__init__(source)
    self._rows = rows
    self._tables = frozenset(tables)
    self._means: dict[str, np.ndarray] = {}
    for name in tables:
      if name in self.tensors:
        shape, dtype = self.tensors[name]
        # A mean has more digits than a stored bfloat16; the others are exact in float32.
        dtype = np.promote_types(dtype, np.float32)
        self.tensors[name] = TensorInfo((rows.size, *shape[1:]), dtype)

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns the tensor, or the part that a tuple of step-1 slices selects, as a new array."""
    if name not in self._tables:
      return self._source.read(name, index)
    info = self.tensors[name]
    index = full_index(info.shape, index)
    begin, end, _ = index[0].indices(info.shape[0])
    out = np.zeros(
      [len(range(*s.indices(n))) for s, n in zip(index, info.shape, strict=True)], info.dtype
    )
    held = min(end, self._source.tensors[name].shape[0])
    if begin < held:
      out[: held - begin] = self._source.read(name, (slice(begin, held), *index[1:]))
    if name not in self._means:
      self._means[name] = self._mean_rows(name)
    for i, mean in zip(self._rows.ids, self._means[name], strict=True):
      if begin <= i < end:
        out[i - begin] = mean[index[1:]]
    return out

  def _mean_rows(self, name: str) -> np.ndarray:
    """Returns the new rows of a table, float64[new tokens, ...]."""
    whole = None
    if not all(self._rows.means):
      whole = np.zeros(self._source.tensors[name].shape[1:])
      for block in row_blocks(self._source.tensors[name]):
        part = self._source.read(name, (slice(block.start, min(block.stop, self._rows.first)),))
        whole += part.astype(np.float64).sum(0)
        if block.stop >= self._rows.first:
          break
      whole /= self._rows.first
    return np.stack(
      [
        np.mean([self._source.read(name, (slice(i, i + 1),))[0].astype(np.float64) for i in ids], 0)
        if ids
        else whole
        for ids in self._rows.means
      ]
    )
