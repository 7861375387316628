"""Files whose tensors hold several of those that a family names: presented under these names.

transformers 5 can store the matrices of all experts of a layer as one tensor; see
families/experts.py.
"""

from collections.abc import Mapping

import numpy as np

from ftjax.families import table
from ftjax.families.tensor_map import Binding
from ftjax.hf.tensor_source import DerivedSource, Index, TensorInfo, TensorSource, full_index
from ftjax.models.architecture import Architecture
from ftjax.runtime.errors import DataError


def in_family_form(source: TensorSource, arch: Architecture) -> TensorSource:
  """Returns the tensors of a model under the names that its family writes; `source` itself where
  they have them.

  Raises:
    DataError: some tensors are there in both forms.
  """
  family = table.of(arch)
  if not family.other_rows:
    return source
  own = {b.hf: b for b in family.bindings(arch)}
  found = [b for b in family.other_bindings(arch) if b.hf not in own and b.hf in source.tensors]
  return _ApartSource(source, own, found) if found else source


class _ApartSource(DerivedSource):
  """A source with the tensors of `own` that the tensors of `found` hold.

  Args:
    source: of the files.
    own: the family's bindings, by HF name.
    found: bindings of the other form, of tensors in the files.
  """

  def __init__(self, source: TensorSource, own: Mapping[str, Binding], found: list[Binding]):
    super().__init__(source)
    self._parts: dict[str, tuple[Binding, Binding]] = {}
    for other in found:
      info = source.tensors[other.hf]
      if info.shape != other.hf_shape:
        raise DataError(
          f'{source.place}: {other.hf} is {list(info.shape)}, expected {list(other.hf_shape)} for '
          f'parameter {other.leaf}'
        )
      self.tensors.pop(other.hf, None)
      for name, b in own.items():
        if b.leaf == other.leaf and b.at[: len(other.at)] == other.at:
          if name in source.tensors:
            raise DataError(f'{source.place} has both {name} and {other.hf}; delete one of them')
          self.tensors[name] = TensorInfo(b.hf_shape, info.dtype)
          self._parts[name] = b, other

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns the tensor, or the part that a tuple of step-1 slices selects, as a new array."""
    if name not in self._parts:
      return self._source.read(name, index)
    own, other = self._parts[name]
    index = full_index(own.hf_shape, index)
    # Each axis of these tensors is one axis of the leaf.
    want = dict(zip(own.letters, index, strict=True))
    experts = other.axes[: len(other.axes) - len(own.axes)]
    at = own.at[len(other.at) :]
    want |= {a: slice(i, i + 1) for a, i in zip(experts, at, strict=True)}
    place = tuple(want[a] for a in other.axes)
    block = self._source.read(other.hf, other.source_slices(place)[0])
    value = other.from_source(block, place)[(0,) * len(at)]
    return np.ascontiguousarray(value.transpose([own.axes.index(a) for a in own.letters]))
