"""Describes a decoder, an encoder or an encoder-decoder as data: sizes, constants, and a block spec
for each kind of layer.

A model is a list of stacks, `((pattern, repeats), ...)`: a pattern is a tuple of block specs, and a
stack scans over its repeats. Llama-style models are one stack of one spec. Parameter names follow:
`stack{i}/block{j}/...`, each leaf with a leading axis L = repeats.

The kind of a mixer or of an MLP is the class of its spec; block.py maps the class to the
module that computes it. A new kind is a new spec class and one row there. The defaults of all
fields are Llama's. families/ makes architectures from a config.json. This file imports no jax:
converting a file needs it, and should start quickly.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ftjax.models.mixer_spec import AttentionSpec, DeltaNetSpec, DisentangledSpec, Norm
from ftjax.runtime.errors import DataError


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

  norm_placement: 'before' a branch, 'after' it (on its output, before the residual addition),
  'both', or 'residual', on the sum with the residual stream (BERT). residual_scale: factor of the
  output of a branch (Granite). mixer_norm: False: none before the mixer (ModernBERT's first layer,
  whose input is normalized already). cross: attention to the states of an encoder, a branch after
  the mixer, with a norm before it; None: there is none.
  """

  mixer: AttentionSpec | DeltaNetSpec | DisentangledSpec
  mlp: GatedMlpSpec | MlpSpec | MoeSpec
  norm: Norm = Norm()  # noqa: RUF009 - frozen
  norm_placement: str = 'before'
  residual_scale: float = 1.0
  mixer_norm: bool = True
  cross: AttentionSpec | None = None


@dataclasses.dataclass(frozen=True)
class LogitSpec:
  """How logits follow from the product of hidden states and head weights: `scale * product`; with
  a soft cap c, `c tanh(scale * product / c)` (Gemma 2, 2024, section 2).

  vocab: the ids from it on are padding: their logits are -inf. None: there is no padding.
  """

  vocab: int | None = None
  scale: float = 1.0
  soft_cap: float | None = None


POOLS = ('first', 'last', 'mean', 'each')


@dataclasses.dataclass(frozen=True)
class ScoreHead:
  """What maps hidden states to the numbers of labels: w drop(norm(activation(dense x))) + b.

  pool: whose states are read, the 'first' or 'last' token of a sequence, the 'mean' of its tokens,
  or 'each' token. dense: there is a map to the same width, with `activation`, a name in
  mlp.ACTIVATIONS, and its own bias where dense_bias. norm: after the activation. bias: b.
  """

  pool: str = 'last'
  dense: bool = False
  activation: str = 'tanh'
  dense_bias: bool = True
  norm: Norm | None = None
  bias: bool = False

  def __post_init__(self):
    if self.pool not in POOLS:
      raise ValueError(f'pool={self.pool!r}; expected {", ".join(POOLS)}')


@dataclasses.dataclass(frozen=True)
class MaskedHead:
  """What a masked language model computes before its head, norm(activation(dense x)), and the bias
  of its logits (Devlin et al. 2019, "BERT").

  activation: a name in mlp.ACTIVATIONS. dense_bias: of the map. bias: of the logits.
  """

  norm: Norm
  activation: str = 'gelu'
  dense_bias: bool = True
  bias: bool = True


# What labels are given to: a sequence, each token, or the first and last token of an answer.
TASKS = ('sequence', 'token', 'span')


@dataclasses.dataclass(frozen=True)
class AdaptedMap:
  """The low-rank adapter of one linear map, in all layers of its stack.

  name: `stack{i}/block{j}/attn/q`, or `head` or `masked/dense`, which count as one layer. ranks: of
  each layer; 0: the layer has no adapter. scales: factors of the product of each layer, alpha /
  rank for LoRA.
  """

  name: str
  ranks: tuple[int, ...]
  scales: tuple[float, ...]

  @property
  def is_stacked(self) -> bool:
    """Whether the leaves have an L axis; those around the blocks have none."""
    return self.name.startswith('stack')


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
  numbers of a label head, which stands in place of the vocabulary's; 0: a language model; 1 may be
  a reward model. labels: their names, () for transformers' LABEL_0, LABEL_1, ... and for one.
  label_task: what they are given to, one of TASKS. score_head: the label head. kind: the model
  kind, a name in kinds.py or 'package.module:KIND'. vocab_multiple: the tables of the vocabulary
  are padded to a multiple of it in memory, and never in files. adapter: what is trained, where the
  rest is frozen. base: how that rest is held, 'bfloat16', 'float32', 'int8' or 'nf4'; '': in the
  dtype of all parameters. block: most inputs that share a scale in nf4. embed_scale: factor of the
  embeddings. logit_scale, logit_soft_cap: see LogitSpec. learned_positions: rows of a table of
  positions that is added to the embeddings; 0: there is none. position_offset: row of position 0
  (RoBERTa: 2). token_types: rows of a table of token types that is added too; 0: there is none.
  encoder_stacks: how many of the stacks, the first ones, are those of the encoder of an
  encoder-decoder; it has a last norm of its own, like final_norm.
  relative_positions: rows of the table of DisentangledSpec; 0: there is none. relative_norm: of
  that table. embed_norm: of the sum of embeddings; None: none. final_norm: after the last block;
  None: none. masked_head: of a masked language model; None without.
  """

  family: str
  vocab_size: int
  model_dim: int
  stacks: tuple[tuple[tuple[BlockSpec, ...], int], ...]
  final_norm: Norm | None
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
  position_offset: int = 0
  token_types: int = 0
  relative_positions: int = 0
  relative_norm: Norm | None = None
  embed_norm: Norm | None = None
  masked_head: MaskedHead | None = None
  score_head: ScoreHead = ScoreHead()
  label_task: str = 'sequence'
  labels: tuple[str, ...] = ()
  encoder_stacks: int = 0

  @property
  def task(self) -> str:
    """Returns what labels are given to, one of TASKS; '' for a language model."""
    return self.label_task if self.num_labels else ''

  @property
  def is_encoder(self) -> bool:
    """Whether a token attends to later ones, so that no text can be generated."""
    return self.kind == 'encoder'

  @property
  def is_encoder_decoder(self) -> bool:
    """Whether an encoder reads the prompt, and a decoder writes what follows."""
    return self.encoder_stacks > 0

  def side(self, is_encoder: bool) -> list[int]:
    """Returns the numbers of the stacks of the encoder, or of the decoder."""
    whole = range(len(self.stacks))
    return [*(whole[: self.encoder_stacks] if is_encoder else whole[self.encoder_stacks :])]

  def layer_numbers(self) -> list[int]:
    """Returns the number of each layer, which counts anew in the decoder of an encoder-decoder."""
    sizes = [len(pattern) * repeats for pattern, repeats in self.stacks]
    first = sum(sizes[: self.encoder_stacks])
    return [*range(first), *range(sum(sizes) - first)]

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
    return dataclasses.replace(self.without_head(), num_labels=1, adapter=adapter)

  def with_head_of(self, other: 'Architecture') -> 'Architecture':
    """Returns this model with what computes logits or labels in another one."""
    return dataclasses.replace(
      self,
      num_labels=other.num_labels,
      masked_head=other.masked_head,
      score_head=other.score_head,
      label_task=other.label_task,
      labels=other.labels,
    )

  def without_head(self) -> 'Architecture':
    """Returns the model without what computes logits or labels: two models are alike in this where
    the weights of one may start the other.
    """
    return dataclasses.replace(
      self,
      num_labels=0,
      masked_head=None,
      score_head=ScoreHead(),
      label_task='sequence',
      labels=(),
    )

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
