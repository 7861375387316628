"""Heads that a model's files do not have, and those that a task does not need.

A file of an encoder holds the head that it was trained with, or none. A `HeadSource` presents it as
if it held the head of another task: tensors that the files lack are drawn from the seed, and those
of other heads are left out.
"""

import logging
import zlib

import numpy as np

from ftjax.families import table
from ftjax.families.tensor_map import Binding
from ftjax.hf.tensor_source import DerivedSource, Index, TensorInfo, TensorSource, full_index
from ftjax.models.architecture import Architecture

log = logging.getLogger(__name__)

# Standard deviation of new matrices, transformers' initializer_range.
_SCALE = 0.02
_PARTS = ('score', 'masked', 'head')
# The last map of a label head: its rows belong to the labels.
_OF_LABELS = ('score/w', 'score/b')


class HeadSource(DerivedSource):
  """The tensors of a model with new ones.

  Args:
    source: of the model's files.
    new: bindings of the tensors to draw.
    left_out: names of tensors that are not presented.
    seed: of the new numbers, which depend on it and on the tensor's name alone.
  """

  def __init__(self, source: TensorSource, new: list[Binding], left_out: list[str], seed: int):
    super().__init__(source)
    self._new, self._seed = {b.hf: b for b in new}, seed
    self.tensors = {n: x for n, x in self.tensors.items() if n not in left_out}
    self.tensors |= {b.hf: TensorInfo(b.hf_shape, np.dtype(np.float32)) for b in new}

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns the tensor, or the part that a tuple of step-1 slices selects, as a new array."""
    if name not in self._new:
      return self._source.read(name, index)
    return self._drawn(self._new[name])[full_index(self.tensors[name].shape, index)].copy()

  def _drawn(self, b: Binding) -> np.ndarray:
    """Returns a whole new tensor: scales of norms are 1 and biases 0."""
    kind = b.leaf.rpartition('/')[2]
    if kind == 'scale':
      return np.ones(b.hf_shape, np.float32)
    if kind == 'b':
      return np.zeros(b.hf_shape, np.float32)
    rng = np.random.default_rng([self._seed, zlib.crc32(b.hf.encode())])
    return (_SCALE * rng.standard_normal(b.hf_shape)).astype(np.float32)


def with_head(
  source: TensorSource, arch: Architecture, head_of: Architecture | None, seed: int
) -> TensorSource:
  """Returns the tensors of a model's files with the head of `arch` and no other; `source` itself
  where a family is strict about heads. New tensors are logged.

  Args:
    source: of the files, under the names of the family's tensor map.
    arch: the model wanted.
    head_of: the model that the files describe, where its head is another one; None: nothing is
      drawn.
    seed: of new tensors.
  """
  family = table.of(arch)
  if family.heads is None:
    return source
  bindings = family.bindings(arch)
  needed, new = {b.hf for b in bindings}, []
  if head_of is not None:
    kept = _labels(head_of) == _labels(arch)
    new = [
      b
      for b in bindings
      if b.leaf.split('/')[0] in _PARTS
      and (b.hf not in source.tensors or (b.leaf in _OF_LABELS and not kept))
    ]
  tied = {family.tied[1]} if arch.tied and not arch.num_labels else set()
  left_out = [
    n for n in source.tensors if n not in needed and n not in tied and family.heads.fullmatch(n)
  ]
  if new:
    log.info(
      '%s has no head of this task: %s drawn from seed %d',
      source.place,
      ', '.join(b.hf for b in new),
      seed,
    )
  return HeadSource(source, new, left_out, seed)


def _labels(arch: Architecture) -> tuple[str, int, tuple[str, ...]]:
  return arch.task, arch.num_labels, arch.labels
