"""Describes a decoder as data: sizes, constants, and a block spec for each kind of layer.

A model is a list of stacks, `((pattern, repeats), ...)`: a pattern is a tuple of block specs, and a
stack scans over its repeats. Llama-style models are one stack of one spec. Parameter names follow:
`stack{i}/block{j}/...`, each leaf with a leading axis L = repeats.

The kind of a mixer or of an MLP is the class of its spec; transformer.py maps the class to the
module that computes it. A new kind is a new spec class and one row there. The defaults of all
fields are Llama's. families/ makes architectures from a config.json. This file imports no jax:
converting a file needs it, and should start quickly.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ftjax.models.rope_spec import Rope
from ftjax.runtime.errors import DataError


@dataclasses.dataclass(frozen=True)
class Norm:
  """A normalization.

  eps: added to the mean square. kind: 'rms', or 'layer', which subtracts the mean first. offset:
  the scale is `offset + weight`; with 1 the weight is stored around 0. bias: one is added.
  """

  eps: float = 1e-6
  kind: str = 'rms'
  offset: float = 0.0
  bias: bool = False


@dataclasses.dataclass(frozen=True)
class Kept:
  """An array that a mixer keeps of each sequence from one step of decoding to the next.

  sizes, axes: of the axes after those of layers and batch, and their logical names. dtype: its
  name; '' for the compute dtype. grows: the array has an entry for each token; its axis, 'seq',
  comes before `sizes`. What does not grow is a state, which each token changes.
  """

  sizes: tuple[int, ...]
  axes: tuple[str | None, ...]
  dtype: str = ''
  grows: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """Grouped-query attention.

  rope: None rotates nothing. qkv_bias, out_bias: the projections to queries, keys and values, and
  the output projection, add a bias. window: tokens that a query sees, itself and those just before
  it; None: all. scale: factor of the scores; None: 1 / sqrt(head_dim). soft_cap: largest size of a
  score. qk_norm: normalization of queries and keys before the rotation, of each head, or with
  qk_norm_width='all' of all heads together. gate: the output of each head is multiplied with the
  sigmoid of a projection of the layer's input.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: Rope | None = Rope()  # noqa: RUF009 - frozen
  qkv_bias: bool = False
  out_bias: bool = False
  window: int | None = None
  scale: float | None = None
  soft_cap: float | None = None
  qk_norm: Norm | None = None
  qk_norm_width: str = 'head'
  gate: bool = False

  def __post_init__(self):
    if self.qk_norm_width not in ('head', 'all'):
      raise ValueError(f'qk_norm_width={self.qk_norm_width!r}; expected head or all')
    if self.num_heads % self.num_kv_heads:
      raise DataError(
        f'config.json: num_attention_heads={self.num_heads} is no multiple of '
        f'num_key_value_heads={self.num_kv_heads}'
      )
    if self.rope is not None:
      self.rope.check(self.head_dim)

  @property
  def split_heads(self) -> int:
    """Heads that `mesh.tensor` must divide."""
    return self.num_kv_heads

  @property
  def inner(self) -> int:
    """Numbers of a token between the projections."""
    return (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim

  def kept(self) -> dict[str, Kept]:
    """Returns what decoding keeps: the rotated keys, and the values."""
    entry = Kept((self.num_kv_heads, self.head_dim), ('kv_heads', None), grows=True)
    return {'keys': entry, 'values': entry}


@dataclasses.dataclass(frozen=True)
class DeltaNetSpec:
  """A gated delta net (Yang et al. 2025, "Gated delta networks"): linear attention whose state is
  decayed and corrected at each token; see models/delta_net.py.

  num_key_heads, key_dim: heads of queries and of keys, and their size. num_value_heads, value_dim:
  of values; each key head serves the same number of neighbouring value heads. conv_width: tokens
  that the convolution sees, itself and those just before it. eps: of the norm of a head's output.
  """

  num_key_heads: int
  key_dim: int
  num_value_heads: int
  value_dim: int
  conv_width: int = 4
  eps: float = 1e-6

  def __post_init__(self):
    if self.num_value_heads % self.num_key_heads:
      raise DataError(
        f'config.json: linear_num_value_heads={self.num_value_heads} is no multiple of '
        f'linear_num_key_heads={self.num_key_heads}'
      )

  @property
  def channels(self) -> int:
    """Channels of a key head in the convolution: its query, its key and its values."""
    return 2 * self.key_dim + self.num_value_heads // self.num_key_heads * self.value_dim

  @property
  def split_heads(self) -> int:
    """Heads that `mesh.tensor` must divide."""
    return self.num_key_heads

  @property
  def inner(self) -> int:
    """Numbers of a token between the projections: around the convolution, gate and output."""
    return 2 * self.num_key_heads * self.channels + 2 * self.num_value_heads * self.value_dim

  @property
  def state_size(self) -> int:
    """Numbers of the state of a sequence."""
    return self.num_value_heads * self.key_dim * self.value_dim

  def kept(self) -> dict[str, Kept]:
    """Returns what decoding keeps: the last inputs of the convolution, and the state."""
    return {
      'inputs': Kept(
        (self.conv_width - 1, self.num_key_heads, self.channels), (None, 'kv_heads', None)
      ),
      'state': Kept(
        (self.num_value_heads, self.key_dim, self.value_dim), ('heads', None, None), 'float32'
      ),
    }


@dataclasses.dataclass(frozen=True)
class GatedMlpSpec:
  """down(activation(gate x) * up x). activation: a name in mlp.ACTIVATIONS. bias: the projections
  add one.
  """

  ffn_dim: int
  activation: str = 'silu'
  bias: bool = False


@dataclasses.dataclass(frozen=True)
class MlpSpec:
  """down(activation(up x)). activation, bias: as in GatedMlpSpec."""

  ffn_dim: int
  activation: str = 'silu'
  bias: bool = False


@dataclasses.dataclass(frozen=True)
class MoeSpec:
  """A mixture of experts: sum over the top_k experts of a token of weight * down(activation(gate x)
  * up x), weights from a softmax over all experts (Shazeer et al. 2017; Fedus et al. 2021).

  ffn_dim: of an expert. renormalize: the top_k weights are divided by their sum. balance: factor of
  the load-balance loss that the model's config names.
  """

  num_experts: int
  top_k: int
  ffn_dim: int
  activation: str = 'silu'
  renormalize: bool = True
  balance: float = 0.001

  def __post_init__(self):
    if not 1 <= self.top_k <= self.num_experts:
      raise DataError(
        f'config.json: num_experts_per_tok={self.top_k}; expected 1 to the number of experts, '
        f'{self.num_experts}'
      )


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """One kind of layer: a mixer and an MLP, each a residual branch.

  norm_placement: 'before' a branch, 'after' it (on its output, before the residual addition), or
  'both'. residual_scale: factor of the output of a branch (Granite).
  """

  mixer: AttentionSpec | DeltaNetSpec
  mlp: GatedMlpSpec | MlpSpec | MoeSpec
  norm: Norm = Norm()
  norm_placement: str = 'before'
  residual_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class LogitSpec:
  """How logits follow from the product of hidden states and head weights: `scale * product`; with
  a soft cap c, `c tanh(scale * product / c)` (Gemma 2, 2024, section 2).

  vocab: the ids from it on are padding: their logits are -inf. None: there is no padding.
  """

  vocab: int | None = None
  scale: float = 1.0
  soft_cap: float | None = None


@dataclasses.dataclass(frozen=True)
class AdaptedMap:
  """The low-rank adapter of one linear map, in all layers of its stack.

  name: `stack{i}/block{j}/attn/q`, or `head`, which counts as one layer. ranks: of each layer; 0:
  the layer has no adapter. scales: factors of the product of each layer, alpha / rank for LoRA.
  """

  name: str
  ranks: tuple[int, ...]
  scales: tuple[float, ...]

  @property
  def is_stacked(self) -> bool:
    """Whether the leaves have an L axis; those of the head have none."""
    return self.name != 'head'


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What is trained on top of a frozen base (Hu et al. 2021, "LoRA").

  maps: the linear maps with an adapter. trained: base leaves that are trained whole, as part of the
  adapter. dropout: share of the inputs of the adapters that a training step drops. dora: the
  length of each output's weights is trained apart from their direction (Liu et al. 2024). pissa:
  the adapter starts as the base's principal components, which are subtracted again (Meng et al.
  2024). continued: training starts from the adapter of another run, which is then the reference.
  merged: the dtype of the weights of the model after merging; the model then computes with these
  weights, '' with base and adapter.
  """

  maps: tuple[AdaptedMap, ...] = ()
  trained: tuple[str, ...] = ()
  dropout: float = 0.0
  dora: bool = False
  pissa: bool = False
  continued: bool = False
  merged: str = ''

  def find(self, name: str) -> AdaptedMap | None:
    """Returns the adapter of a linear map; None where it has none."""
    return next((m for m in self.maps if m.name == name), None)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A model in numbers, hashable: a static argument of jitted functions.

  family: a name in families/table.py, or 'package.module:FAMILY'. stacks: see the file's docstring.
  tied: the head is the embedding table. max_len: positions that the model was made for. num_labels:
  1 is a reward model, which has a score in place of the vocabulary's head. kind: the model kind, a
  name in kinds.py or 'package.module:KIND'. vocab_multiple: the tables of the vocabulary are padded
  to a multiple of it in memory, and never in files. adapter: what is trained, where the rest is
  frozen. base: how that rest is held, 'bfloat16', 'float32', 'int8' or 'nf4'; '': in the dtype of
  all parameters. block: most inputs that share a scale in nf4. embed_scale: factor of the
  embeddings. logit_scale, logit_soft_cap: see LogitSpec. learned_positions: rows of a table of
  positions that is added to the embeddings; 0: there is none.
  """

  family: str
  vocab_size: int
  model_dim: int
  stacks: tuple[tuple[tuple[BlockSpec, ...], int], ...]
  final_norm: Norm
  tied: bool
  max_len: int
  num_labels: int = 0
  kind: str = 'decoder'
  vocab_multiple: int = 1
  adapter: Adapter | None = None
  base: str = ''
  block: int = 64
  embed_scale: float = 1.0
  logit_scale: float = 1.0
  logit_soft_cap: float | None = None
  learned_positions: int = 0

  @property
  def logit_spec(self) -> LogitSpec:
    """How the logits follow from the hidden states and the head."""
    return LogitSpec(self.vocab_size, self.logit_scale, self.logit_soft_cap)

  @property
  def vocab_rows(self) -> int:
    """Rows of the embedding and head tables in memory: vocab_size and the padding."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  def plain(self) -> 'Architecture':
    """Returns the model that files hold: without an adapter, its weights as they are stored."""
    return dataclasses.replace(self, adapter=None, base='', block=64)

  def untrained(self) -> 'Architecture':
    """Returns the model that training starts from, on the same base: without the adapters of linear
    maps, unless training continues those of another run.
    """
    if self.adapter is None or self.adapter.continued:
      return self
    return dataclasses.replace(self, adapter=Adapter(trained=self.adapter.trained))

  def with_score(self) -> 'Architecture':
    """Returns the reward or value model of this model: with a score in place of its head."""
    adapter = self.adapter
    if adapter is not None:
      maps = tuple(m for m in adapter.maps if m.is_stacked)
      trained = tuple(n for n in adapter.trained if not n.startswith('head/'))
      adapter = dataclasses.replace(adapter, maps=maps, trained=trained)
    return dataclasses.replace(self, num_labels=1, adapter=adapter)

  def blocks(self) -> Iterator[tuple[str, BlockSpec, int]]:
    """Yields (`stack{i}/block{j}`, spec, repeats)."""
    for i, (pattern, repeats) in enumerate(self.stacks):
      for j, spec in enumerate(pattern):
        yield f'stack{i}/block{j}', spec, repeats

  @property
  def num_layers(self) -> int:
    """Layers in all."""
    return sum(repeats for _, _, repeats in self.blocks())

  def layer_slots(self) -> list[tuple[str, int]]:
    """Returns for each layer its (`stack{i}/block{j}`, index along that leaf's L axis)."""
    slots = []
    for i, (pattern, repeats) in enumerate(self.stacks):
      slots += [(f'stack{i}/block{j}', r) for r in range(repeats) for j in range(len(pattern))]
    return slots

  def mixtures(self) -> list[MoeSpec]:
    """Returns the spec of each layer that has experts, in order."""
    return [spec.mlp for spec in self.layers() if isinstance(spec.mlp, MoeSpec)]

  def layers(self) -> list[BlockSpec]:
    """Returns the spec of each layer, in order."""
    return [spec for pattern, repeats in self.stacks for _ in range(repeats) for spec in pattern]

  def with_blocks(self, change: Callable[[BlockSpec], BlockSpec]) -> 'Architecture':
    """Returns a copy whose block specs are `change(spec)`."""
    stacks = tuple((tuple(map(change, pattern)), repeats) for pattern, repeats in self.stacks)
    return dataclasses.replace(self, stacks=stacks)

  def facts(self) -> dict[str, Any]:
    """Returns the fields as JSON values, for fingerprints. A field that has its default is left
    out: a field that is added later changes no fingerprint of the models that do not set it.
    """
    return _facts(self)


def _facts(value: Any) -> Any:
  if isinstance(value, tuple):
    return [_facts(v) for v in value]
  if not dataclasses.is_dataclass(value):
    return value
  fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
  found = {name: _facts(v) for name, (v, default) in fields.items() if v != default}
  return {'class': type(value).__name__} | found
