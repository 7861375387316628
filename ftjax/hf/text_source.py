"""The tensors of the text model in a multimodal folder; see families/text_part.py."""

import numpy as np

from ftjax.families.text_part import TextPart
from ftjax.hf.tensor_source import Index, TensorSource


class TextSource(TensorSource):
  """The tensors of another source under the text model's names, without those of other parts. The
  fingerprint is that of all stored tensors.

  Raises:
    DataError: two tensors have one name.
  """

  def __init__(self, source: TensorSource, part: TextPart):
    super().__init__()
    self._source, self._names, self.place = source, part.names(source.tensors), source.place
    self.tensors = {name: source.tensors[old] for name, old in self._names.items()}

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    return self._source.read(self._names[name], index)

  def stored(self) -> dict[str, tuple[str, int]]:
    return self._source.stored()

  def read_bytes(self, name: str, begin: int, end: int) -> memoryview:
    return self._source.read_bytes(name, begin, end)

  def hash_reads(self) -> None:
    self._source.hash_reads()

  def fingerprint(self) -> str:
    return self._source.fingerprint()
