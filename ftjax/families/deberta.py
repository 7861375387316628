"""DeBERTa v2 and v3 (He et al. 2021, 2023): BERT's block with disentangled attention, whose table
of relative positions all layers share.

Read are models as DeBERTa-v3 is: without a convolution beside the first layer, and with embeddings
of the model's width.
"""

import re
from typing import Any

from ftjax.families import decoder, encoder
from ftjax.families.encoder import norm_rows
from ftjax.families.family import Family
from ftjax.families.hf_config import HfConfig
from ftjax.families.label_head import is_task, linear
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import (
  Architecture,
  BlockSpec,
  DisentangledSpec,
  MlpSpec,
  Norm,
  ScoreHead,
)
from ftjax.runtime.errors import DataError

BUCKETS, LONGEST = 'position_buckets', 'max_relative_positions'
KEYS = encoder.KEYS | {
  *('relative_attention', BUCKETS, LONGEST, 'norm_rel_ebd', 'share_att_key', 'pos_att_type'),
  *('position_biased_input', 'pooler_hidden_act', 'pooler_hidden_size', 'legacy'),
  *('conv_kernel_size', 'embedding_size', 'attention_head_size'),
}


def _own_keys(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return not spec.mixer.shares_maps and spec.mixer.has_c2p


def _own_queries(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return not spec.mixer.shares_maps and spec.mixer.has_p2c


def _positions(arch: Architecture, spec: BlockSpec | None) -> bool:
  del spec
  return bool(arch.learned_positions)


def _relative_norm(arch: Architecture, spec: BlockSpec | None) -> bool:
  del spec
  return arch.relative_norm is not None


def _sizes(arch: Architecture, spec: BlockSpec | None) -> dict[str, int]:
  """Returns the sizes of axis letters; Q: rows of the table of relative positions."""
  out = {'V': arch.vocab_size, 'D': arch.model_dim, 'C': arch.model_dim, 'R': arch.num_labels}
  out |= {'P': arch.learned_positions, 'S': arch.token_types, 'Q': arch.relative_positions}
  if spec is None:
    return out
  heads = spec.mixer.num_heads
  return out | {'N': heads, 'K': heads, 'H': spec.mixer.head_dim, 'F': spec.mlp.ffn_dim}


_EMBEDDINGS = 'deberta.embeddings.'
_LAYER = 'deberta.encoder.layer.{l}.'
_SELF = f'{_LAYER}attention.self.'
_ROWS = (
  Row(f'{_EMBEDDINGS}word_embeddings.weight', 'V D', 'embed/w', 'VD'),
  Row(f'{_EMBEDDINGS}position_embeddings.weight', 'P D', 'positions/w', 'PD', _positions),
  Row(
    *(f'{_EMBEDDINGS}token_type_embeddings.weight', 'S D', 'token_types/w', 'SD'),
    encoder.needs_types,
  ),
  *norm_rows(f'{_EMBEDDINGS}LayerNorm', 'embed_norm'),
  Row('deberta.encoder.rel_embeddings.weight', 'Q D', 'relative/w', 'QD'),
  *norm_rows('deberta.encoder.LayerNorm', 'relative/norm', _relative_norm),
  *encoder.layer_rows(
    (
      (f'{_SELF}query_proj', 'attn/q'),
      (f'{_SELF}key_proj', 'attn/k'),
      (f'{_SELF}value_proj', 'attn/v'),
      (f'{_LAYER}attention.output.dense', 'attn/o'),
      (f'{_LAYER}intermediate.dense', 'mlp/up'),
      (f'{_LAYER}output.dense', 'mlp/down'),
    ),
    (
      (f'{_LAYER}attention.output.LayerNorm', 'attn_out_norm'),
      (f'{_LAYER}output.LayerNorm', 'mlp_out_norm'),
    ),
  ),
  Row(f'{_SELF}pos_key_proj.weight', 'KH D', 'attn/pos_k/w', 'DKH', _own_keys),
  Row(f'{_SELF}pos_key_proj.bias', 'KH', 'attn/pos_k/b', 'KH', _own_keys),
  Row(f'{_SELF}pos_query_proj.weight', 'KH D', 'attn/pos_q/w', 'DKH', _own_queries),
  Row(f'{_SELF}pos_query_proj.bias', 'KH', 'attn/pos_q/b', 'KH', _own_queries),
  *encoder.masked_rows(
    'cls.predictions.transform.dense',
    'cls.predictions.transform.LayerNorm',
    'cls.predictions.bias',
    'cls.predictions.decoder',
  ),
  *linear('pooler.dense', 'score/dense', 'CD', is_task('sequence')),
  *linear('classifier', 'score', 'RD', is_task('sequence', 'token')),
  *linear('qa_outputs', 'score', 'RD', is_task('span')),
)


def _terms(c: HfConfig) -> tuple[str, ...]:
  """Returns the terms in pos_att_type, a list or a text such as 'p2c|c2p'."""
  found = c.get('pos_att_type') or []
  found = found.lower().split('|') if isinstance(found, str) else found
  if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
    raise DataError(f"config.json: pos_att_type={found!r}; expected a list of 'c2p', 'p2c'")
  terms = tuple(t.strip() for t in found)
  if other := [t for t in terms if t not in ('c2p', 'p2c')]:
    raise DataError(f"config.json: pos_att_type has {other[0]!r}; expected 'c2p' or 'p2c'")
  return terms


def _check(c: HfConfig, dim: int, heads: int) -> None:
  encoder.check(c)
  decoder.check_flag(c, 'relative_attention', True, of_class=True)
  encoder.head_dim(dim, heads, ('hidden_size', 'num_attention_heads'))
  for key, expected in (('embedding_size', dim), ('pooler_hidden_size', dim)):
    if c.get(key) not in (None, expected):
      raise DataError(f'config.json: {key}={c.get(key)!r} is not supported; expected {expected}')
  if c.get('attention_head_size') not in (None, dim // heads):
    raise DataError(
      f'config.json: attention_head_size={c.get("attention_head_size")!r} is not supported; '
      f'expected {dim // heads}'
    )
  if c.count('conv_kernel_size', 0, least=0):
    raise DataError(
      f'config.json: conv_kernel_size={c.get("conv_kernel_size")}: a convolution beside the first '
      'layer, as DeBERTa-v2-xlarge has one, is not computed here'
    )
  if encoder.is_masked(c) and not c.flag('legacy', of_class=True):
    raise DataError(
      'config.json: legacy=false: the head of this masked language model is not computed here; a '
      'model with labels made from this folder is (its head is another one)'
    )


def _read_mixer(c: HfConfig, dim: int, heads: int) -> DisentangledSpec:
  longest, buckets = (c.get(key) for key in (LONGEST, BUCKETS))
  for key, value in ((LONGEST, longest), (BUCKETS, buckets)):
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
      raise DataError(f'config.json: {key}={value!r}; expected a whole number')
  if longest is None or longest < 1:
    longest = c.count('max_position_embeddings', of_class=True)
  has_buckets = buckets is not None and buckets > 0
  span = buckets if has_buckets else longest
  if has_buckets and (span < 4 or longest - 1 <= span // 2):
    raise DataError(
      f'config.json: {BUCKETS}={span} and {LONGEST}={longest}; expected at least 4 buckets, and '
      'more positions than half of them'
    )
  terms = _terms(c)
  return DisentangledSpec(
    num_heads=heads,
    head_dim=dim // heads,
    span=span,
    longest=longest if has_buckets else 0,
    has_c2p='c2p' in terms,
    has_p2c='p2c' in terms,
    shares_maps=c.flag('share_att_key', False),
  )


def _read(c: HfConfig, family: str) -> Architecture:
  dim, heads = c.size('hidden_size'), c.size('num_attention_heads')
  _check(c, dim, heads)
  norm = Norm(c.number('layer_norm_eps', of_class=True), kind='layer', bias=True)
  mixer, activation = _read_mixer(c, dim, heads), decoder.read_activation(c)
  mlp = MlpSpec(c.size('intermediate_size'), activation, bias=True)
  block = BlockSpec(mixer, mlp, norm, norm_placement='residual')
  kind = c.text('norm_rel_ebd', 'none')
  if kind not in ('none', 'layer_norm'):
    raise DataError(f"config.json: norm_rel_ebd={kind!r}; expected 'none' or 'layer_norm'")
  longest = c.count('max_position_embeddings', of_class=True)
  return Architecture(
    family=family,
    vocab_size=c.size('vocab_size'),
    model_dim=dim,
    stacks=(((block,), c.size('num_hidden_layers')),),
    final_norm=None,
    tied=c.flag('tie_word_embeddings', of_class=True),
    max_len=longest,
    kind='encoder',
    learned_positions=longest if c.flag('position_biased_input', of_class=True) else 0,
    token_types=c.count('type_vocab_size', of_class=True, least=0),
    relative_positions=2 * mixer.span,
    relative_norm=norm if kind == 'layer_norm' else None,
    embed_norm=norm,
    masked_head=encoder.masked_head(c, norm, activation),
  )


def _score_head(c: HfConfig, task: str) -> ScoreHead:
  return encoder.score_head(task, decoder.read_activation(c, 'pooler_hidden_act'))


def _write(arch: Architecture) -> dict[str, Any]:
  mixer = arch.layers()[0].mixer
  written = encoder.write_bert(arch, 'DebertaV2', 'deberta-v2')
  terms = (('c2p', mixer.has_c2p), ('p2c', mixer.has_p2c))
  written |= {
    'max_position_embeddings': arch.max_len,
    'relative_attention': True,
    LONGEST: mixer.longest or mixer.span,
    'norm_rel_ebd': 'none' if arch.relative_norm is None else 'layer_norm',
    'share_att_key': mixer.shares_maps,
    'pos_att_type': [name for name, wanted in terms if wanted],
    'position_biased_input': bool(arch.learned_positions),
    'pooler_dropout': 0.0,
  }
  if mixer.longest:
    written[BUCKETS] = mixer.span
  if arch.score_head.dense:
    written['pooler_hidden_act'] = decoder.activation_name(arch.score_head.activation, 'gelu_new')
  return written


DEBERTA = Family(
  model_types=('deberta-v2',),
  hf_class='DebertaV2',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=_ROWS,
  sizes=_sizes,
  # There are two biases, one of which is computed with.
  unused=re.compile(
    r'cls\.predictions\.(decoder\.)?bias|deberta\.embeddings\.(position_ids|position_embeddings\.\w+)'
  ),
  tied=('deberta.embeddings.word_embeddings.weight', 'cls.predictions.decoder.weight'),
  prefix='deberta.',
  score_head=_score_head,
  heads=re.compile(r'(cls|lm_predictions|mask_predictions|pooler|classifier|qa_outputs)\..*'),
)
