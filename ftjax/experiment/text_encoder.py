"""Embeddings of texts by any model folder, for figures on a set of texts: the mean of the hidden
states of a text's tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.experiment import weights
from ftjax.experiment.model import open_model
from ftjax.models.forward import Forward
from ftjax.runtime import sharding

_LONGEST = 256  # tokens of a text that are read
_STEP = 64  # lengths are padded to a multiple of it
_ROWS = 32


class TextEncoder:
  """A model that gives embeddings, on the first device.

  Args:
    path: of the model: a Hugging Face folder, or org/name on the hub; usually an encoder.
    family: value of model.family.

  Raises:
    ConfigError, DataError: no model that can be read.
  """

  def __init__(self, path: str, family: str = ''):
    model = open_model(path, {}, 0, family=family, encoders=True)
    self._tokenizer, arch = model.tokenizer, model.arch
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    jax.set_mesh(mesh)
    self._params = weights.load(path, arch, mesh, 'float32', 0, family)
    self._longest = min(_LONGEST, arch.max_len)
    forward = Forward(arch, jnp.dtype('float32'))

    @jax.jit
    def embed(params, batch):
      return forward.sequence_states(params, batch, 1, 'mean')[0][:, 0]

    self._embed = embed

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the embeddings of texts, float32[n, D]. Only the first 256 tokens of a text count."""
    ids = [self._ids(text) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = [order[i : i + _ROWS] for i in range(0, len(order), _ROWS)]
    out: list[np.ndarray | None] = [None] * len(ids)
    for part in parts:
      found = np.asarray(self._embed(self._params, self._batch([ids[i] for i in part])))
      for i, row in zip(part, found, strict=False):
        out[i] = row
    return np.stack(out) if out else np.zeros((0, 0), np.float32)

  def _ids(self, text: str) -> list[int]:
    own = self._tokenizer
    room = self._longest - len(own.prefix_ids) - len(own.suffix_ids)
    return [*own.prefix_ids, *own.encode(text)[:room], *own.suffix_ids] or [0]

  def _batch(self, ids: Sequence[Sequence[int]]) -> dict[str, jax.Array]:
    length = min(-(-max(map(len, ids)) // _STEP) * _STEP, self._longest)
    tokens, segments = np.zeros((2, _ROWS, length), np.int32)
    for row, own in enumerate(ids):
      tokens[row, : len(own)], segments[row, : len(own)] = own, 1
    positions = np.where(segments > 0, np.arange(length, dtype=np.int32), 0)
    arrays = {'tokens': tokens, 'segments': segments, 'positions': positions}
    mesh = jax.sharding.get_mesh()
    return {k: sharding.put(mesh, v, 'batch', 'seq') for k, v in arrays.items()}
