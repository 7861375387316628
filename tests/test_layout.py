"""The table of names is a bijection: every leaf filled once, export the inverse of import."""

import dataclasses

import numpy as np
import pytest
from tiny_model import decoder, with_mixer

from ftjax.families import llama
from ftjax.hf import layout
from ftjax.hf.tensor_source import full_index
from ftjax.models import counts

ARCH = decoder(
  vocab_size=11,
  model_dim=6,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=2,
  ffn_dim=10,
  tied=False,
  max_len=32,
)
QWEN2 = with_mixer(dataclasses.replace(ARCH, family='qwen2'), qkv_bias=True)


class Memory:
  """A tensor source of arrays, which notes how many numbers were read."""

  place = 'memory'

  def __init__(self, values):
    self.values, self.count = values, 0
    self.tensors = {k: layout.TensorInfo(v.shape, v.dtype) for k, v in values.items()}

  def read(self, name, index=None):
    part = self.values[name][full_index(self.values[name].shape, index)].copy()
    self.count += part.size
    return part


def source(arch=ARCH):
  rng = np.random.default_rng(1)
  shapes = {b.hf: b.hf_shape for b in layout.bindings(arch)}
  return Memory({name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})


def whole(binding):
  return (slice(None),) * len(binding.shape)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('arch', [ARCH, QWEN2])
def test_every_parameter_is_counted_once(arch, tied):
  arch = dataclasses.replace(arch, tied=tied)
  assert sum(np.prod(s) for s in layout.leaf_shapes(arch).values()) == counts.num_params(arch)
  assert sum(np.prod(b.hf_shape) for b in layout.bindings(arch)) == counts.num_params(arch)
  assert len({b.hf for b in layout.bindings(arch)}) == len(layout.bindings(arch))
  places = [(b.leaf, b.at) for b in layout.bindings(arch)]
  assert len(set(places)) == len(places)
  assert ('head/w' in layout.leaf_shapes(arch)) == (not tied)


def test_the_leaves_by_hand():
  block = 'stack0/block0/'
  assert layout.leaf_shapes(ARCH) == {
    'embed/w': (11, 6),
    'final_norm/scale': (6,),
    'head/w': (11, 6),
    block + 'attn_norm/scale': (3, 6),
    block + 'attn/q/w': (3, 6, 4, 2),
    block + 'attn/k/w': (3, 6, 2, 2),
    block + 'attn/v/w': (3, 6, 2, 2),
    block + 'attn/o/w': (3, 4, 2, 6),
    block + 'mlp_norm/scale': (3, 6),
    block + 'mlp/gate/w': (3, 6, 10),
    block + 'mlp/up/w': (3, 6, 10),
    block + 'mlp/down/w': (3, 10, 6),
  }


def test_qwen2_has_three_leaves_more():
  block = 'stack0/block0/'
  more = layout.leaf_shapes(QWEN2).items() - layout.leaf_shapes(ARCH).items()
  assert dict(more) == {
    block + 'attn/q/b': (3, 4, 2),
    block + 'attn/k/b': (3, 2, 2),
    block + 'attn/v/b': (3, 2, 2),
  }


def test_layers_follow_layer_slots():
  (q,) = [b for b in layout.bindings(ARCH) if b.hf == 'model.layers.2.self_attn.q_proj.weight']
  assert (q.leaf, q.at) == ('stack0/block0/attn/q/w', (2,))


def test_layout_by_hand():
  s = source()
  by_name = {b.hf: b for b in layout.bindings(ARCH)}
  q = by_name['model.layers.0.self_attn.q_proj.weight']
  stored = s.values[q.hf]  # [N*H, D]
  got = layout.read(s, q, whole(q))  # [D, N, H]
  assert got[5, 1, 1] == stored[1 * 2 + 1, 5]
  o = by_name['model.layers.1.self_attn.o_proj.weight']
  assert layout.read(s, o, whole(o))[1, 1, 5] == s.values[o.hf][5, 1 * 2 + 1]
  down = by_name['model.layers.1.mlp.down_proj.weight']
  np.testing.assert_array_equal(layout.read(s, down, whole(down)), s.values[down.hf].T)


def test_a_bias_by_hand():
  s = source(QWEN2)
  by_name = {b.hf: b for b in layout.bindings(QWEN2)}
  q = by_name['model.layers.1.self_attn.q_proj.bias']
  assert (q.hf_shape, q.leaf, q.at) == ((8,), 'stack0/block0/attn/q/b', (1,))
  assert layout.read(s, q, whole(q))[3, 1] == s.values[q.hf][3 * 2 + 1]
  s.count = 0
  layout.read(s, q, (slice(1, 3), slice(0, 1)))
  assert s.count == 2 * 2, 'heads 1 and 2 alone are read'


@pytest.mark.parametrize('arch', [ARCH, QWEN2])
def test_export_is_the_inverse_of_import(arch):
  s = source(arch)
  for b in layout.bindings(arch):
    value = layout.read(s, b, whole(b))
    assert value.shape == b.shape
    np.testing.assert_array_equal(b.to_hf(value), s.values[b.hf])


@pytest.mark.parametrize('arch', [ARCH, QWEN2])
def test_a_part_equals_the_part_of_the_whole(arch):
  s, rng = source(arch), np.random.default_rng(2)
  for b in layout.bindings(arch):
    full = layout.read(s, b, whole(b))
    for _ in range(20):
      ends = [sorted(rng.integers(0, n + 1, 2)) for n in b.shape]
      index = tuple(slice(int(i), int(j)) for i, j in ends)
      np.testing.assert_array_equal(layout.read(s, b, index), full[index])


def test_a_shard_of_heads_reads_only_its_rows():
  s = source()
  (q,) = [b for b in layout.bindings(ARCH) if b.hf == 'model.layers.0.self_attn.q_proj.weight']
  layout.read(s, q, (slice(0, 3), slice(2, 4), slice(None)))
  assert s.count == 3 * 2 * 2


def test_unused_tensors_are_listed_exactly():
  unused = llama.LLAMA.unused
  assert unused.fullmatch('model.layers.11.self_attn.rotary_emb.inv_freq')
  assert unused.fullmatch('model.rotary_emb.inv_freq')
  assert not unused.fullmatch('model.layers.0.self_attn.q_proj.bias')
  assert not unused.fullmatch('xmodel.rotary_emb.inv_freq')
