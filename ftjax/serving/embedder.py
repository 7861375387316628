"""Vectors of texts from one model of sentence embeddings; generate.py --embed is the entry."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data import annotated_rows, embedding_examples
from ftjax.data.embedding_rows import TextGroup
from ftjax.data.formats import Bad
from ftjax.hf import sentence_files
from ftjax.models import score_head
from ftjax.models.forward import Forward
from ftjax.runtime.errors import DataError
from ftjax.serving import loaded_model, text_batches


class Embedder:
  """A model of vectors, with its tokenizer.

  Args:
    path: HF folder, PEFT folder, or workdir[@STEP].
    dtype: compute dtype, by name.
    family: value of model.family.
    base: of an adapter; '': the one that its folder names.
    batch_size: texts that are read together.

  Raises:
    DataError: there is no model.
    ConfigError: it has labels, or its vectors are not computed here.
  """

  def __init__(
    self, path: str, dtype: str = 'float32', family: str = '', base: str = '', batch_size: int = 8
  ):
    own = (dtype, family, base, loaded_model.VECTORS)
    model, self._params = text_batches.open_model(path, *own)
    self._arch, self.tokenizer, self._size = model.arch, model.tokenizer, batch_size
    self.pool = sentence_files.pool_in(model.files) or score_head.usual_pool(model.arch)
    forward = Forward(model.arch, jnp.dtype(dtype))

    @jax.jit
    def vectors(params, batch):
      states = forward.sequence_states(params, batch, 1, self.pool)[0][:, 0].astype(jnp.float32)
      return states / jnp.linalg.norm(states, axis=-1, keepdims=True)

    self._vectors = vectors

  def embed_rows(self, rows: Sequence[tuple[str, dict]]) -> Iterator[dict]:
    """Yields the rows with their vectors of length 1 under 'embedding', a list of D numbers.

    Args:
      rows: (place, row). A row has one of the columns of annotated_rows.SINGLE.

    Raises:
      DataError: a row without a text, or one that is too long, before any is read.
    """
    encoded = [self._encode(place, row) for place, row in rows]
    for start in range(0, len(rows), self._size):
      some = encoded[start : start + self._size]
      batch = text_batches.padded(some, self._size, self._arch.max_len)
      found = np.asarray(self._vectors(self._params, batch))
      for (_, row), vector in zip(rows[start:], found[: len(some)], strict=False):
        yield row | {'embedding': [float(f'{x:.7g}') for x in vector]}

  def _encode(self, place: str, row: Mapping[str, Any]) -> np.ndarray:
    try:
      text = annotated_rows.single_text(row)
    except ValueError as error:
      raise DataError(f'{place}: {error}') from error
    (found,) = embedding_examples.encode([TextGroup((text,))], self.tokenizer)
    if isinstance(found, Bad):
      raise DataError(f'{place}: {found.reason}')
    tokens = found[0].tokens
    text_batches.check_length(tokens, place, self._arch.max_len)
    return tokens
