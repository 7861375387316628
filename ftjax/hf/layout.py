"""Which HF tensor is which parameter, as one table a family; used in one direction to import, in
the other to export.

A row names a HF tensor and our leaf and gives both layouts in axis letters: `'NH D' -> 'DNH'` says
that HF stores a matrix [N*H, D] and we an array [D, N, H]. `{l}` marks a tensor that each layer
has; those are stacked along a leading axis L at the place `Architecture.layer_slots` gives. A new
family is a new table here.
"""

import dataclasses
import math
import re

import numpy as np

from ftjax.hf.tensor_source import Index, TensorInfo, TensorSource
from ftjax.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Row:
  """One HF tensor and one leaf.

  `hf_axes` has a word for each axis of HF's, its letters merged; `axes` a letter for each of ours.
  """

  hf: str
  hf_axes: str
  leaf: str
  axes: str
  # What a model must have to have it: 'untied' a head of its own, 'score' is a reward model's,
  # 'bias' one on queries, keys and values.
  needs: str = ''


_DECODER = (
  Row('model.embed_tokens.weight', 'V D', 'embed/w', 'VD'),
  Row('model.layers.{l}.input_layernorm.weight', 'D', 'attn_norm/scale', 'D'),
  Row('model.layers.{l}.self_attn.q_proj.weight', 'NH D', 'attn/q/w', 'DNH'),
  Row('model.layers.{l}.self_attn.k_proj.weight', 'KH D', 'attn/k/w', 'DKH'),
  Row('model.layers.{l}.self_attn.v_proj.weight', 'KH D', 'attn/v/w', 'DKH'),
  Row('model.layers.{l}.self_attn.q_proj.bias', 'NH', 'attn/q/b', 'NH', needs='bias'),
  Row('model.layers.{l}.self_attn.k_proj.bias', 'KH', 'attn/k/b', 'KH', needs='bias'),
  Row('model.layers.{l}.self_attn.v_proj.bias', 'KH', 'attn/v/b', 'KH', needs='bias'),
  Row('model.layers.{l}.self_attn.o_proj.weight', 'D NH', 'attn/o/w', 'NHD'),
  Row('model.layers.{l}.post_attention_layernorm.weight', 'D', 'mlp_norm/scale', 'D'),
  Row('model.layers.{l}.mlp.gate_proj.weight', 'F D', 'mlp/gate/w', 'DF'),
  Row('model.layers.{l}.mlp.up_proj.weight', 'F D', 'mlp/up/w', 'DF'),
  Row('model.layers.{l}.mlp.down_proj.weight', 'D F', 'mlp/down/w', 'FD'),
  Row('model.norm.weight', 'D', 'final_norm/scale', 'D'),
  Row('lm_head.weight', 'V D', 'head/w', 'VD', needs='untied'),
  Row('score.weight', 'R D', 'score/w', 'RD', needs='score'),
)

# Qwen2's tensors are Llama's and three biases a layer.
FAMILIES = {'llama': _DECODER, 'qwen2': _DECODER}

# Tensors that older exports hold and nothing computes with: rotary frequencies follow from
# config.json.
_FREQUENCIES = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
UNUSED = {'llama': _FREQUENCIES, 'qwen2': _FREQUENCIES}

# Of a tied model, files may repeat the first as the second.
_EMBED_AND_HEAD = ('model.embed_tokens.weight', 'lm_head.weight')
TIED = {'llama': _EMBED_AND_HEAD, 'qwen2': _EMBED_AND_HEAD}


@dataclasses.dataclass(frozen=True)
class Binding:
  """A HF tensor and the place it fills: `leaf` as a whole, or its index `layer` along L."""

  hf: str
  hf_shape: tuple[int, ...]
  leaf: str
  layer: int | None
  shape: tuple[int, ...]  # without L
  row: Row
  sizes: tuple[int, ...]  # of each letter of row.hf_axes, in that order


def sizes(arch: Architecture) -> dict[str, int]:
  """The number behind each axis letter."""
  return {
    'V': arch.vocab_size,
    'D': arch.model_dim,
    'N': arch.num_heads,
    'K': arch.num_kv_heads,
    'H': arch.head_dim,
    'F': arch.ffn_dim,
    'R': arch.num_labels,
  }


def bindings(arch: Architecture) -> list[Binding]:
  """Every HF tensor of a model with the leaf it fills, in the order of the table."""
  size, slots = sizes(arch), arch.layer_slots()
  has = {
    '': True,
    'untied': not (arch.tied or arch.num_labels),
    'score': bool(arch.num_labels),
    'bias': arch.qkv_bias,
  }
  rows = [row for row in FAMILIES[arch.family] if has[row.needs]]
  per_layer = [row for row in rows if '{l}' in row.hf]
  out = []
  for row in rows:
    if row not in per_layer:
      out.append(_bind(row, row.hf, row.leaf, None, size))
    elif row is per_layer[0]:
      for layer, (slot, index) in enumerate(slots):
        out += [_bind(r, r.hf.format(l=layer), f'{slot}/{r.leaf}', index, size) for r in per_layer]
  return out


def _bind(row: Row, hf: str, leaf: str, layer: int | None, size: dict[str, int]) -> Binding:
  words = row.hf_axes.split()
  return Binding(
    hf=hf,
    hf_shape=tuple(math.prod(size[a] for a in word) for word in words),
    leaf=leaf,
    layer=layer,
    shape=tuple(size[a] for a in row.axes),
    row=row,
    sizes=tuple(size[a] for word in words for a in word),
  )


def leaf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
  """{leaf name: shape}, stacked leaves with their leading L."""
  shapes: dict[str, tuple[int, ...]] = {}
  for b in bindings(arch):
    stacked = 0 if b.layer is None else max(b.layer + 1, shapes.get(b.leaf, (0,))[0])
    shapes[b.leaf] = b.shape if b.layer is None else (stacked, *b.shape)
  return shapes


def read(source: TensorSource, binding: Binding, index: Index) -> np.ndarray:
  """Reads the part of a leaf (without L) that `index` selects, in our layout and the stored dtype.

  Only rows of the file that hold something of it are read; where two of our axes are merged in one
  of HF's, the smallest range that covers them is read and cut.
  """
  letters = [a for word in binding.row.hf_axes.split() for a in word]
  size = dict(zip(letters, binding.sizes, strict=True))
  want = {a: range(*s.indices(size[a])) for a, s in zip(binding.row.axes, index, strict=True)}
  hf_index, shape, cut = [], [], []
  for word in binding.row.hf_axes.split():
    first, *inner = word
    rest = math.prod(size[a] for a in inner)
    hf_index.append(slice(want[first].start * rest, want[first].stop * rest))
    shape += [len(want[first]), *(size[a] for a in inner)]
    cut += [slice(None), *(slice(want[a].start, want[a].stop) for a in inner)]
  value = source.read(binding.hf, tuple(hf_index)).reshape(shape)[tuple(cut)]
  return value.transpose([letters.index(a) for a in binding.row.axes])


def to_hf(binding: Binding, value: np.ndarray) -> np.ndarray:
  """Our layout → HF's, without L: the inverse of a whole `read`."""
  letters = [a for word in binding.row.hf_axes.split() for a in word]
  return value.transpose([binding.row.axes.index(a) for a in letters]).reshape(binding.hf_shape)


def hf_tensors(arch: Architecture, dtype: np.dtype) -> dict[str, TensorInfo]:
  """What a HF folder of this model holds."""
  return {b.hf: TensorInfo(b.hf_shape, np.dtype(dtype)) for b in bindings(arch)}
