"""The models of parity/t5_cases.py in ftjax: architectures from the config.json that transformers
wrote, weights drawn by the names of its tensors, rows of encoder and decoder as batches.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from parity import t5_cases as cases
from parity.family_cases import draw
from tiny_model import all_logits, place, tokens_at

from ftjax.families import table, tensor_map
from ftjax.hf import layout, safetensors
from ftjax.hf.tensor_source import TensorInfo
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import trees


@functools.cache
def golden(name):
  """{array: value} that transformers gave for a case."""
  with np.load(cases.FOLDER / f'{name}.npz') as found:
    return dict(found)


@functools.cache
def config(name):
  """The config.json of a case as transformers wrote it, with its own head: transformers 5 writes
  that all heads are the embedding.
  """
  from ftjax.families import t5

  found = json.loads(str(golden(name)['config']))
  return t5.with_head(found, 'lm_head.weight' not in golden(name)['names'])


@functools.cache
def architecture(name):
  return table.architecture(config(name))


def shapes(name):
  """{tensor: its shape} in the files that transformers wrote."""
  found = golden(name)
  sizes = (tuple(map(int, text.split())) for text in found['shapes'])
  return dict(zip(found['names'].tolist(), sizes, strict=True))


def host_params(name, arch):
  """{leaf: float32 array} of a case, with rows of 0 where its vocabulary is padded."""
  bindings = layout.bindings(arch)
  leaves = {n: np.zeros(s, np.float32) for n, s in tensor_map.leaf_shapes(bindings).items()}
  for b in bindings:
    index = tuple(slice(0, n) for n in b.shape)
    block = draw(cases.CASES[name], b.hf, b.hf_shape)[b.source_slices(index)[0]]
    leaves[b.leaf][b.at] = b.from_source(block, index)
  wanted = {n: p.shape for n, p in kinds.declared(arch).items()}
  return {
    n: np.pad(x, np.subtract(wanted[n], x.shape)[:, None] * [0, 1]) for n, x in leaves.items()
  }


def params(name, arch=None):
  """The same on the current mesh, as a nested dict."""
  arch = arch or architecture(name)
  declared = kinds.declared(arch)
  found = {n: place(x, *declared[n].axes) for n, x in sorted(host_params(name, arch).items())}
  return trees.unflatten(found)


def write_folder(name, folder):
  """A HF folder of a case as transformers wrote it; returns the bytes of each tensor in it."""
  folder.mkdir()
  (folder / 'config.json').write_text(str(golden(name)['config']))
  found = shapes(name)
  info = {n: TensorInfo(s, np.dtype(np.float32)) for n, s in found.items()}
  safetensors.write_folder(folder, info, lambda n: draw(cases.CASES[name], n, found[n]))
  return {n: draw(cases.CASES[name], n, s).tobytes() for n, s in found.items()}


def batch(source, source_segments, labels, segments):
  """Placed arrays as data/batches.py makes them: the decoder reads START and the labels before."""
  where, read = tokens_at(segments), tokens_at(source_segments)
  positions = np.asarray(where.positions)
  tokens = np.where(positions == 0, cases.START, np.roll(labels, 1, 1))
  arrays = {'tokens': tokens, 'labels': labels, 'weights': np.float32(segments > 0)}
  found = {n: place(a, 'batch', 'seq') for n, a in arrays.items()}
  return found | {
    'segments': where.segments,
    'positions': where.positions,
    'source_tokens': place(source, 'batch', 'seq'),
    'source_segments': read.segments,
    'source_positions': read.positions,
  }


def rows():
  """(source, its segments, labels, their segments) of the compared rows."""
  parts = []
  for lengths, width, seed in (
    (cases.SOURCE_LENGTHS, cases.SOURCE, 0),
    (cases.TARGET_LENGTHS, cases.TARGET, 1),
  ):
    inside = np.arange(width)[None] < np.array(lengths)[:, None]
    parts += [cases.rows(lengths, width, seed), inside.astype(np.int32)]
  return parts


@functools.partial(jax.jit, static_argnums=0)
def _logits(arch, params, batch):
  return all_logits(arch, params, Forward(arch, jnp.float32).hidden_states(params, batch))


def logits(name, batch, arch=None):
  """float32[B, T, V], all of them: what the product never makes."""
  arch = arch or architecture(name)
  return np.asarray(_logits(arch, params(name, arch), batch))


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss_and_gradient(arch, params, batch, remat='none'):
  """The loss of a batch, summed over its weights, and its gradient."""

  def total(params):
    return Forward(arch, jnp.float32, remat).cross_entropy(params, batch, LossConfig())[0]

  return jax.value_and_grad(total)(params)


def padded(arch, multiple):
  """The architecture with its vocabulary padded."""
  return dataclasses.replace(arch, vocab_multiple=multiple)
