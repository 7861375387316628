"""What the encoders share: attention over the whole text, heads of masked language models and of
labels, and the parts of their config.json that are alike.
"""

from collections.abc import Sequence
from typing import Any

from ftjax.families import decoder, label_head
from ftjax.families.hf_config import HfConfig
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import (
  Architecture,
  AttentionSpec,
  BlockSpec,
  MaskedHead,
  MlpSpec,
  Norm,
  ScoreHead,
)
from ftjax.runtime.errors import DataError

# Classes of transformers with the head of a masked language model.
_MASKED = ('ForMaskedLM', 'ForPreTraining')
KEYS = frozenset((
  *('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size'),
  *('hidden_act', 'max_position_embeddings', 'type_vocab_size', 'layer_norm_eps'),
  *('tie_word_embeddings', 'is_decoder', 'add_cross_attention', 'position_embedding_type'),
))  # fmt: skip


def score_head(task: str, activation: str) -> ScoreHead:
  """Returns the label head of a task: of the first token through a dense map with an activation, or
  of each token.
  """
  if task == 'sequence':
    return ScoreHead(pool='first', dense=True, activation=activation, bias=True)
  return ScoreHead(pool='each', bias=True)


def is_masked(c: HfConfig) -> bool:
  """Returns whether a config.json is of a masked language model; else it has labels, or no head."""
  return any(name.endswith(_MASKED) for name in label_head.classes(c))


def check(c: HfConfig) -> None:
  """Raises DataError where a config.json is of another computation than an encoder's."""
  for key in ('is_decoder', 'add_cross_attention'):
    decoder.check_flag(c, key, False, of_class=False)
  kind = c.get('position_embedding_type')
  if kind not in (None, 'absolute'):
    raise DataError(
      f"config.json: position_embedding_type={kind!r} is not supported; expected 'absolute'"
    )


def head_dim(dim: int, heads: int, names: tuple[str, str]) -> int:
  """Returns the size of a head. Raises DataError where heads do not divide the width.

  names: of both keys.
  """
  if dim % heads:
    raise DataError(f'config.json: {names[0]}={dim} is no multiple of {names[1]}={heads}')
  return dim // heads


def post_norm_block(dim: int, heads: int, ffn: int, activation: str, norm: Norm) -> BlockSpec:
  """Returns BERT's block: norms on the sums with the residual stream, biases everywhere."""
  mixer = AttentionSpec(
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=dim // heads,
    rope=None,
    qkv_bias=True,
    out_bias=True,
    causal=False,
  )
  return BlockSpec(mixer, MlpSpec(ffn, activation, bias=True), norm, norm_placement='residual')


def needs_masked(arch: Architecture, spec: BlockSpec | None) -> bool:
  """Whether a model has the head of a masked language model."""
  del spec
  return arch.masked_head is not None and not arch.num_labels


def needs_table(arch: Architecture, spec: BlockSpec | None) -> bool:
  """Whether that head has a table of its own."""
  return needs_masked(arch, spec) and not arch.tied


def needs_types(arch: Architecture, spec: BlockSpec | None) -> bool:
  """Whether a model has a table of token types."""
  del spec
  return bool(arch.token_types)


def norm_rows(hf: str, leaf: str, needs=None) -> tuple[Row, Row]:
  """Returns the rows of a LayerNorm with a bias."""
  more = () if needs is None else (needs,)
  return (
    Row(f'{hf}.weight', 'D', f'{leaf}/scale', 'D', *more),
    Row(f'{hf}.bias', 'D', f'{leaf}/b', 'D', *more),
  )


def embedding_rows(prefix: str, types: bool = True) -> tuple[Row, ...]:
  """Returns the rows of BERT's embeddings; prefix: what begins their names."""
  table = Row(f'{prefix}token_type_embeddings.weight', 'S D', 'token_types/w', 'SD', needs_types)
  return (
    Row(f'{prefix}word_embeddings.weight', 'V D', 'embed/w', 'VD'),
    Row(f'{prefix}position_embeddings.weight', 'P D', 'positions/w', 'PD'),
    *([table] if types else []),
    *norm_rows(f'{prefix}LayerNorm', 'embed_norm'),
  )


def layer_rows(
  maps: Sequence[tuple[str, str]], norms: Sequence[tuple[str, str]]
) -> tuple[Row, ...]:
  """Returns the rows of BERT's layers.

  maps: (name in the file, leaf) of the maps attn/q, k, v, o and mlp/up, down. norms: the same of
  the norms.
  """
  shapes = {
    'attn/q': ('NH D', 'DNH', 'NH', 'NH'),
    'attn/k': ('KH D', 'DKH', 'KH', 'KH'),
    'attn/v': ('KH D', 'DKH', 'KH', 'KH'),
    'attn/o': ('D NH', 'NHD', 'D', 'D'),
    'mlp/up': ('F D', 'DF', 'F', 'F'),
    'mlp/down': ('D F', 'FD', 'D', 'D'),
  }
  out = []
  for hf, leaf in maps:
    w_hf, w, b_hf, b = shapes[leaf]
    out += [Row(f'{hf}.weight', w_hf, f'{leaf}/w', w), Row(f'{hf}.bias', b_hf, f'{leaf}/b', b)]
  return (*out, *(row for hf, leaf in norms for row in norm_rows(hf, leaf)))


def _needs_tied(arch: Architecture, spec: BlockSpec | None) -> bool:
  return needs_masked(arch, spec) and arch.tied


def masked_rows(dense: str, norm: str, bias: str, decoder: str) -> tuple[Row, ...]:
  """Returns the rows of the head of a masked language model, with the names in the file.

  bias: of the bias where the table is the embedding. decoder: of the map, whose own bias is
  computed with where it has a table of its own.
  """
  return (
    *label_head.linear(dense, 'masked/dense', 'CD', needs_masked),
    *norm_rows(norm, 'masked/norm', needs_masked),
    Row(bias, 'V', 'masked/b', 'V', _needs_tied),
    Row(f'{decoder}.bias', 'V', 'masked/b', 'V', needs_table),
    Row(f'{decoder}.weight', 'V D', 'head/w', 'VD', needs_table),
  )


def masked_head(c: HfConfig, norm: Norm, activation: str) -> MaskedHead | None:
  """Returns BERT's head of a masked language model, None for a model without."""
  return MaskedHead(norm, activation) if is_masked(c) else None


def hf_class(arch: Architecture, prefix: str) -> str:
  """Returns the name of a model's class in transformers; prefix: 'Bert' of BertForMaskedLM."""
  if arch.num_labels:
    return prefix + label_head.CLASSES[arch.task]
  return f'{prefix}ForMaskedLM' if arch.masked_head is not None else f'{prefix}Model'


def write_bert(arch: Architecture, prefix: str, model_type: str) -> dict[str, Any]:
  """Returns a config.json with BERT's keys. prefix: as in `hf_class`."""
  block = arch.layers()[0]
  return {
    'architectures': [hf_class(arch, prefix)],
    'model_type': model_type,
    'vocab_size': arch.vocab_size,
    'hidden_size': arch.model_dim,
    'num_hidden_layers': arch.num_layers,
    'num_attention_heads': block.mixer.num_heads,
    'intermediate_size': block.mlp.ffn_dim,
    'hidden_act': decoder.activation_name(block.mlp.activation, 'gelu_new'),
    'max_position_embeddings': arch.learned_positions,
    'type_vocab_size': arch.token_types,
    'layer_norm_eps': arch.embed_norm.eps,
    'tie_word_embeddings': arch.tied,
    'initializer_range': 0.02,
    'hidden_dropout_prob': 0.0,
    'attention_probs_dropout_prob': 0.0,
  }


def read_bert(c: HfConfig, family: str, offset: int = 0, activation: str = '') -> Architecture:
  """Returns the model of a config.json with BERT's keys.

  Args:
    c: the config.json.
    family: its name.
    offset: row of position 0.
    activation: of the masked head; '': that of the blocks.

  Raises:
    DataError: a value of another type, or a setting that is not computed here.
  """
  check(c)
  dim, heads = c.size('hidden_size'), c.size('num_attention_heads')
  head_dim(dim, heads, ('hidden_size', 'num_attention_heads'))
  norm = Norm(c.number('layer_norm_eps', of_class=True), kind='layer', bias=True)
  own = decoder.read_activation(c)
  block = post_norm_block(dim, heads, c.size('intermediate_size'), own, norm)
  masked = masked_head(c, norm, activation or own)
  positions = c.count('max_position_embeddings', of_class=True)
  if positions <= offset:
    raise DataError(
      f'config.json: max_position_embeddings={positions}; expected more than pad_token_id + 1 = '
      f'{offset}, the row of the first position'
    )
  return Architecture(
    family=family,
    vocab_size=c.size('vocab_size'),
    model_dim=dim,
    stacks=(((block,), c.size('num_hidden_layers')),),
    final_norm=None,
    tied=c.flag('tie_word_embeddings', of_class=True),
    max_len=positions - offset,
    kind='encoder',
    learned_positions=positions,
    position_offset=offset,
    token_types=c.count('type_vocab_size', of_class=True, least=0),
    embed_norm=norm,
    masked_head=masked,
  )
