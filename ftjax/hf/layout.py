"""Moves values between HF tensors and leaves, as a family's tensor map binds them."""

from collections.abc import Mapping

import numpy as np

from ftjax.families import table, tensor_map
from ftjax.families.tensor_map import Binding
from ftjax.hf.tensor_source import Index, TensorInfo, TensorSource
from ftjax.models.architecture import Architecture


def bindings(arch: Architecture) -> list[Binding]:
  """Returns every HF tensor of a model, or part of one, with the place that it fills."""
  return table.of(arch).bindings(arch)


def leaf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
  """Returns {leaf name: shape} of the leaves that model files hold."""
  return tensor_map.leaf_shapes(bindings(arch))


def read(source: TensorSource, binding: Binding, index: Index) -> np.ndarray:
  """Reads the part of a binding's place that `index` selects, in the leaf's layout and the stored
  dtype.

  Only rows of the file that hold something of it are read; where two axes of the leaf are merged in
  one of HF's, the smallest range that covers them is read and cut.
  """
  slices, _, _ = binding.source_slices(index)
  return binding.from_source(source.read(binding.hf, slices), index)


def hf_tensors(arch: Architecture, dtype: np.dtype) -> dict[str, TensorInfo]:
  """Returns the names, shapes and dtypes of the tensors in a HF folder of this model."""
  return {b.hf: TensorInfo(b.hf_shape, np.dtype(dtype)) for b in bindings(arch)}


def by_tensor(arch: Architecture) -> Mapping[str, list[Binding]]:
  """Returns {HF tensor: its bindings, in the order of its parts}."""
  found: dict[str, list[Binding]] = {}
  for b in bindings(arch):
    found.setdefault(b.hf, []).append(b)
  return found
