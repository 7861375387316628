"""What a tensor map can say, on a toy that no shipped family is: fused, split, interleaved,
transposed and per-expert tensors, read whole and in parts, and written back."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny_model import decoder

from ftjax.families import hf_config, llama, tensor_map
from ftjax.families import table as families
from ftjax.families.tensor_map import Row
from ftjax.hf import layout
from ftjax.hf.tensor_source import TensorInfo, full_index
from ftjax.runtime.errors import DataError

ROOT = pathlib.Path(__file__).resolve().parents[1]

ARCH = decoder(
  vocab_size=5, model_dim=6, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2, ffn_dim=8
)
LAYER = 'layers.{l}.'
ROWS = (
  Row('embed', 'V D', 'embed/w', 'VD'),
  # Three parts of different sizes, stacked along rows.
  Row(f'{LAYER}qkv', '[NH] D', 'q/w', 'DNH'),
  Row(f'{LAYER}qkv', '[KH] D', 'k/w', 'DKH'),
  Row(f'{LAYER}qkv', '[KH] D', 'v/w', 'DKH'),
  # The same along columns, not transposed, as GPT-2 stores it.
  Row(f'{LAYER}c_attn', 'D [NH]', 'c_q/w', 'DNH'),
  Row(f'{LAYER}c_attn', 'D [NH]', 'c_k/w', 'DNH'),
  # In each head the query and then its gate, as Qwen3.5 stores it.
  Row(f'{LAYER}q_gate', 'N[H] D', 'gated/w', 'DNH'),
  Row(f'{LAYER}q_gate', 'N[H] D', 'gate/w', 'DNH'),
  # Experts fused, gate and up row by row in turn, as gpt-oss stores it.
  Row(f'{LAYER}gate_up', 'E D F[]', 'experts/gate/w', 'EDF'),
  Row(f'{LAYER}gate_up', 'E D F[]', 'experts/up/w', 'EDF'),
  # A tensor for each expert.
  Row(f'{LAYER}experts.{{e}}.down', 'D F', 'experts/down/w', 'EFD'),
)


def sizes(arch, spec):
  return tensor_map.decoder_sizes(arch, spec) | {'E': 3}


BINDINGS = tensor_map.bindings(ROWS, ARCH, sizes)


class Memory:
  place = 'memory'

  def __init__(self, values):
    self.values = values
    self.tensors = {k: TensorInfo(v.shape, v.dtype) for k, v in values.items()}

  def read(self, name, index=None):
    return self.values[name][full_index(self.values[name].shape, index)].copy()


@pytest.fixture(scope='module')
def source():
  rng = np.random.default_rng(0)
  shapes = {b.hf: b.hf_shape for b in BINDINGS}
  return Memory({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})


def bound(leaf, *at):
  (found,) = [b for b in BINDINGS if (b.leaf, b.at) == (leaf, at)]
  return found


def whole(source, leaf, *at):
  b = bound(leaf, *at)
  return layout.read(source, b, (slice(None),) * len(b.shape))


def test_shapes_by_hand(source):
  first = {n: v.shape for n, v in source.values.items() if '1' not in n}
  assert {n.removeprefix('layers.0.'): shape for n, shape in first.items()} == {
    'embed': (5, 6),
    'qkv': (16, 6),
    'c_attn': (6, 16),
    'q_gate': (16, 6),
    'gate_up': (3, 6, 16),
    'experts.0.down': (6, 8),
    'experts.2.down': (6, 8),
  }
  shapes = tensor_map.leaf_shapes(BINDINGS)
  assert shapes['stack0/block0/v/w'] == (2, 6, 2, 2)
  assert shapes['stack0/block0/experts/down/w'] == (2, 3, 8, 6)
  assert shapes['stack0/block0/experts/up/w'] == (2, 3, 6, 8)


def test_values_by_hand(source):
  block, v = 'stack0/block0/', source.values
  qkv = v['layers.1.qkv']
  np.testing.assert_array_equal(whole(source, f'{block}q/w', 1), qkv[:8].T.reshape(6, 4, 2))
  np.testing.assert_array_equal(whole(source, f'{block}v/w', 1), qkv[12:].T.reshape(6, 2, 2))
  np.testing.assert_array_equal(
    whole(source, f'{block}c_k/w', 0), v['layers.0.c_attn'][:, 8:].reshape(6, 4, 2)
  )
  heads = v['layers.0.q_gate'].reshape(4, 4, 6)
  np.testing.assert_array_equal(whole(source, f'{block}gate/w', 0), heads[:, 2:].transpose(2, 0, 1))
  up = v['layers.0.gate_up'][..., 1::2]
  np.testing.assert_array_equal(whole(source, f'{block}experts/up/w', 0), up)
  down = v['layers.1.experts.2.down']
  np.testing.assert_array_equal(whole(source, f'{block}experts/down/w', 1, 2), down.T)


def test_a_part_equals_the_part_of_the_whole(source):
  rng = np.random.default_rng(1)
  for b in BINDINGS:
    full = layout.read(source, b, (slice(None),) * len(b.shape))
    assert full.shape == b.shape
    for _ in range(10):
      ends = [sorted(rng.integers(0, n + 1, 2)) for n in b.shape]
      index = tuple(slice(int(i), int(j)) for i, j in ends)
      np.testing.assert_array_equal(layout.read(source, b, index), full[index], err_msg=b.leaf)


def test_export_is_the_inverse_of_import(source):
  tensors = {}
  for b in BINDINGS:
    value = layout.read(source, b, (slice(None),) * len(b.shape))
    tensors.setdefault(b.hf, []).append((b, value))
  assert tensors.keys() == source.values.keys()
  for name, parts in tensors.items():
    found = tensor_map.whole_tensor(parts)
    np.testing.assert_array_equal(found, source.values[name], err_msg=name)


def test_a_tensor_of_one_layer_kind_alone():
  """`needs` sees the layer: a pattern may have the tensor in some layers only."""
  (block,) = set(ARCH.layers())
  biased = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, qkv_bias=True))
  arch = dataclasses.replace(ARCH, stacks=(((biased, block), 1),))
  found = [b.hf for b in llama.LLAMA.bindings(arch) if b.hf.endswith('q_proj.bias')]
  assert found == ['model.layers.0.self_attn.q_proj.bias']


# What is built in, against transformers' own config classes.


@pytest.mark.parametrize('name', ['llama', 'qwen2'])
def test_a_config_of_transformers_own_class_is_read(name):
  """Every key that the class writes is known, and its defaults are what is read without them."""
  family = families.FAMILIES[name]
  defaults = dict(hf_config.class_defaults(name))
  assert defaults['model_type'] == name
  full = families.architecture(defaults)
  sizes = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads')
  given = {k: defaults[k] for k in (*sizes, 'intermediate_size', 'model_type')}
  assert families.architecture(given) == full
  written = family.write(full)
  assert families.architecture(written) == full
  from_class = {k for k in defaults if k in family.keys and defaults[k] is not None}
  assert from_class - written.keys() <= {'rope_parameters', 'layer_types', 'max_window_layers'}


def test_model_random_has_the_defaults_of_llamas_class():
  defaults = hf_config.class_defaults('llama')
  theta = defaults['rope_parameters']['rope_theta']
  assert {k: defaults.get(k, theta) for k in llama.DEFAULTS} == llama.DEFAULTS


def test_a_key_without_a_default_anywhere_is_named():
  assert hf_config.class_defaults('nobody') == {}
  with pytest.raises(DataError, match='rms_norm_eps is missing or null'):
    hf_config.HfConfig({'model_type': 'nobody'}).number('rms_norm_eps', of_class=True)


def test_a_complete_config_asks_transformers_nothing():
  code = """
import sys
from ftjax.families import table
from ftjax.experiment.model import random_config
from ftjax.planning import known_models
sizes = {'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 1, 'intermediate_size': 8}
arch = table.architecture(random_config(sizes))
table.architecture(table.config(arch))
for shape in known_models.SHAPES.values():
  table.architecture(shape)
assert 'transformers' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
