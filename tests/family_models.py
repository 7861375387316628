"""The models of parity/family_cases.py in ftjax: architectures from the config.json that
transformers wrote, weights drawn by the names of its tensors.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import family_cases as cases
from tiny_model import place, tokens_at

from ftjax.families import table, tensor_map
from ftjax.hf import layout, safetensors
from ftjax.hf.tensor_source import TensorInfo
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models import kinds
from ftjax.models.architecture import AttentionSpec
from ftjax.models.forward import Forward
from ftjax.runtime import trees

# What takes a second or more a case is tested every day on these, which differ most: plain; learned
# positions and LayerNorm; caps, windows and norms on both sides; experts; delta nets. On the others
# it is in make test-all.
EVERY_DAY = ('llama', 'gpt2', 'gemma2', 'qwen3_moe', 'qwen3_5', 'modernbert')


def parametrize(every_day=EVERY_DAY, names=tuple(cases.CASES)):
  """Marks a test of some cases, `full` for those that are not of every day."""
  marks = {n: [] if n in every_day else [pytest.mark.full] for n in names}
  return pytest.mark.parametrize('name', [pytest.param(n, marks=m) for n, m in marks.items()])


@functools.cache
def golden(name):
  """{array: value} that transformers gave for a case."""
  with np.load(cases.FOLDER / f'{name}.npz') as found:
    return dict(found)


def config(name):
  """The config.json of a case as transformers wrote it."""
  return json.loads(str(golden(name)['config']))


@functools.cache
def architecture(name):
  return table.architecture(config(name))


def shapes(name):
  """{tensor: its shape} in the files that transformers wrote."""
  found = golden(name)
  sizes = (tuple(map(int, text.split())) for text in found['shapes'])
  return dict(zip(found['names'].tolist(), sizes, strict=True))


@functools.cache
def tensor(name, hf, shape):
  """The values of a tensor in a case's files, float32."""
  return cases.draw((cases.CASES | cases.LABELED)[name], hf, shape)


def host_params(name, arch):
  """{leaf: float32 array} of a plain architecture of a case's family, with rows of 0 where its
  vocabulary is padded.
  """
  bindings = layout.bindings(arch)
  leaves = {n: np.zeros(s, np.float32) for n, s in tensor_map.leaf_shapes(bindings).items()}
  for b in bindings:
    index = tuple(slice(0, n) for n in b.shape)
    block = tensor(name, b.hf, b.hf_shape)[b.source_slices(index)[0]]
    leaves[b.leaf][b.at] = b.from_source(block, index)
  declared = kinds.declared(arch)
  return {n: np.pad(x, _missing(x, declared[n].shape)) for n, x in leaves.items()}


def _missing(x, shape):
  return [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]


def params(name, arch):
  """The same on the current mesh, as a nested dict."""
  declared = kinds.declared(arch)
  found = {n: place(x, *declared[n].axes) for n, x in sorted(host_params(name, arch).items())}
  return trees.unflatten(found)


def idle(arch):
  """The leaves whose gradient is 0 but for rounding: without a rotary embedding a bias of the keys
  adds the same number to all scores of a query, and so does DeBERTa's of the keys of positions.
  """
  blocks = [(slot, b.mixer) for slot, b, _ in arch.blocks()]
  plain = [s for s, m in blocks if isinstance(m, AttentionSpec) and m.rope is None]
  found = [f'{slot}/attn/k/b' for slot in plain] + [f'{s}/attn/pos_k/b' for s, _ in blocks]
  return {n for n in found if n in kinds.declared(arch)}


def cut(arch, count):
  """The architecture of the first `count` layers."""
  stacks, left = [], count
  for pattern, repeats in arch.stacks:
    whole, rest = divmod(min(left, len(pattern) * repeats), len(pattern))
    left -= whole * len(pattern) + rest
    stacks += [(pattern, whole)] * bool(whole) + [(pattern[:rest], 1)] * bool(rest)
  return dataclasses.replace(arch, stacks=tuple(stacks))


def write_folder(name, folder):
  """A HF folder of a case; returns the bytes of each tensor in it."""
  folder.mkdir()
  (folder / 'config.json').write_text(str(golden(name)['config']))
  found = shapes(name)
  info = {n: TensorInfo(s, np.dtype(np.float32)) for n, s in found.items()}
  safetensors.write_folder(folder, info, lambda n: tensor(name, n, found[n]))
  return {n: tensor(name, n, s).tobytes() for n, s in found.items()}


def of_case(name, tokens, segments=None, weights=None):
  """`batch` of a case's rows; of an encoder the labels are the tokens themselves, and there are
  token types where the model has them.
  """
  case = (cases.CASES | cases.LABELED)[name]
  if not case.head:
    return batch(tokens, segments, weights)
  segments = np.ones_like(tokens) if segments is None else segments
  weights = segments > 0 if weights is None else weights
  found = batch(tokens, segments, weights) | {'labels': place(tokens, 'batch', 'seq')}
  types = cases.token_types(case)
  if types is None:
    return found
  return found | {'token_types': place(types[: len(tokens)], 'batch', 'seq')}


def batch(tokens, segments=None, weights=None):
  """Placed arrays of rows int32[B, T] as data/batches.py makes them. The labels are the next
  tokens, with weight 1 inside a segment unless `weights` are given.
  """
  segments = np.ones_like(tokens) if segments is None else segments
  following = np.roll(segments, -1, 1)
  following[:, -1] = 0
  if weights is None:
    weights = (segments > 0) & (following == segments)
  arrays = tokens, np.roll(tokens, -1, 1), np.float32(weights)
  names = ('tokens', 'labels', 'weights')
  found = {n: place(a, 'batch', 'seq') for n, a in zip(names, arrays, strict=True)}
  where = tokens_at(segments)
  return found | {'segments': where.segments, 'positions': where.positions}


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss_and_gradient(arch, params, batch, remat='none'):
  """The loss of a batch, summed over its weights, and its gradient."""

  def total(params):
    return Forward(arch, jnp.float32, remat).cross_entropy(params, batch, LossConfig())[0]

  return jax.value_and_grad(total)(params)
