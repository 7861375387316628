"""MiniLM's released weights (make minilm) against transformers on real sentences: tokens, states
and mean embeddings, packed and padded.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import place, tokens_at

from ftjax.experiment import weights
from ftjax.experiment.model import open_model
from ftjax.families import table
from ftjax.hf import load
from ftjax.models.forward import Forward

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'minilm.npz'
FOLDER = pathlib.Path('.cache/minilm')

pytestmark = [
  pytest.mark.full,
  pytest.mark.skipif(not FOLDER.is_dir(), reason='needs .cache/minilm: make minilm'),
]


@functools.cache
def golden():
  with np.load(GOLDEN) as found:
    return dict(found)


def rows():
  """(tokens, segments) int32[B, T]: the texts packed one after the other into rows of 128."""
  found, out = golden(), []
  for ids, length in zip(found['ids'], found['lengths'], strict=True):
    if not out or sum(map(len, out[-1])) + length > 128:
      out.append([])
    out[-1].append(ids[:length])
  tokens, segments = np.zeros((2, len(out), 128), np.int32)
  for r, texts in enumerate(out):
    count = sum(map(len, texts))
    tokens[r, :count] = np.concatenate(texts)
    segments[r, :count] = np.repeat(np.arange(len(texts)) + 1, [len(t) for t in texts])
  return tokens, segments


@functools.partial(jax.jit, static_argnums=(0, 3))
def embed(arch, params, batch, count):
  forward = Forward(arch, jnp.float32)
  states = forward.hidden_states(params, batch)
  return states, *forward.sequence_states(params, batch, count, 'mean')


def test_tokens_states_and_embeddings_are_those_of_transformers():
  found = golden()
  model = open_model(str(FOLDER), {}, 0, encoders=True)
  own = model.tokenizer
  for text, ids, length in zip(found['texts'], found['ids'], found['lengths'], strict=True):
    assert [*own.prefix_ids, *own.encode(str(text)), *own.suffix_ids] == ids[:length].tolist()
  arch = table.architecture(load.read_config(FOLDER))
  params = weights.load(str(FOLDER), arch, jax.sharding.get_mesh(), 'float32', 0, '')
  tokens, segments = rows()
  where = tokens_at(segments)
  batch = {'tokens': place(tokens, 'batch', 'seq')}
  batch |= {'segments': where.segments, 'positions': where.positions}
  states, embeddings, there = map(np.asarray, embed(arch, params, batch, int(segments.max())))
  np.testing.assert_allclose(states[0, : len(found['states'])], found['states'], atol=2e-5)
  packed = embeddings[there]
  assert packed.shape == found['embeddings'].shape
  print(f'largest difference of an embedding: {np.abs(packed - found["embeddings"]).max():.1e}')
  np.testing.assert_allclose(packed, found['embeddings'], atol=1e-5)
