"""ModernBERT (Warner et al. 2024): rotary positions, LayerNorms without biases before the branches,
GELU-gated MLPs, and a window in two of three layers.
"""

import re
from typing import Any

from ftjax.families import decoder, encoder, hf_rope, layer_types
from ftjax.families.family import Family
from ftjax.families.hf_config import HfConfig
from ftjax.families.label_head import is_task
from ftjax.families.layer_types import FULL, SLIDING
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import (
  Architecture,
  AttentionSpec,
  BlockSpec,
  GatedMlpSpec,
  MaskedHead,
  Norm,
  ScoreHead,
)
from ftjax.models.rope_spec import Rope
from ftjax.runtime.errors import DataError

EVERY, WINDOW = 'global_attn_every_n_layers', 'local_attention'
KEYS = frozenset((
  *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads'),
  *('hidden_activation', 'max_position_embeddings', 'norm_eps', 'norm_bias', 'attention_bias'),
  *('layer_types', 'rope_parameters', 'global_rope_theta', 'local_rope_theta', WINDOW, 'mlp_bias'),
  *('decoder_bias', 'classifier_pooling', 'classifier_bias', 'classifier_activation', EVERY),
  *('tie_word_embeddings', 'is_decoder', 'add_cross_attention', 'position_embedding_type'),
  # They change no number: how transformers computes, and initializes.
  *('deterministic_flash_attn', 'sparse_prediction', 'sparse_pred_ignore_index'),
  *('initializer_cutoff_factor', 'reference_compile', 'repad_logits_with_grad'),
  *('layer_norm_eps', 'cls_token_id'),
))  # fmt: skip


def _norm_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  del spec
  return arch.final_norm.bias


def _own_norm(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec.mixer_norm


def _own_norm_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  return spec.mixer_norm and _norm_bias(arch, spec)


def _attention_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec.mixer.qkv_bias


def _mlp_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec.mlp.bias


def _labels_dense(arch: Architecture, spec: BlockSpec | None) -> bool:
  del spec
  return bool(arch.num_labels)


def _labels_dense_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  return _labels_dense(arch, spec) and arch.score_head.dense_bias


def _labels_norm_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  return _labels_dense(arch, spec) and arch.score_head.norm.bias


def _masked_dense_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  return encoder.needs_masked(arch, spec) and arch.masked_head.dense_bias


def _masked_norm_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  return encoder.needs_masked(arch, spec) and arch.masked_head.norm.bias


def _logit_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  return encoder.needs_masked(arch, spec) and arch.masked_head.bias


_LAYER = 'model.layers.{l}.'
_QKV = f'{_LAYER}attn.Wqkv'
_ROWS = (
  Row('model.embeddings.tok_embeddings.weight', 'V D', 'embed/w', 'VD'),
  Row('model.embeddings.norm.weight', 'D', 'embed_norm/scale', 'D'),
  Row('model.embeddings.norm.bias', 'D', 'embed_norm/b', 'D', _norm_bias),
  Row(f'{_LAYER}attn_norm.weight', 'D', 'attn_norm/scale', 'D', _own_norm),
  Row(f'{_LAYER}attn_norm.bias', 'D', 'attn_norm/b', 'D', _own_norm_bias),
  Row(f'{_QKV}.weight', '[NH] D', 'attn/q/w', 'DNH'),
  Row(f'{_QKV}.weight', '[KH] D', 'attn/k/w', 'DKH'),
  Row(f'{_QKV}.weight', '[KH] D', 'attn/v/w', 'DKH'),
  Row(f'{_QKV}.bias', '[NH]', 'attn/q/b', 'NH', _attention_bias),
  Row(f'{_QKV}.bias', '[KH]', 'attn/k/b', 'KH', _attention_bias),
  Row(f'{_QKV}.bias', '[KH]', 'attn/v/b', 'KH', _attention_bias),
  Row(f'{_LAYER}attn.Wo.weight', 'D NH', 'attn/o/w', 'NHD'),
  Row(f'{_LAYER}attn.Wo.bias', 'D', 'attn/o/b', 'D', _attention_bias),
  Row(f'{_LAYER}mlp_norm.weight', 'D', 'mlp_norm/scale', 'D'),
  Row(f'{_LAYER}mlp_norm.bias', 'D', 'mlp_norm/b', 'D', _norm_bias),
  # The first part is what the activation is of.
  Row(f'{_LAYER}mlp.Wi.weight', '[F] D', 'mlp/gate/w', 'DF'),
  Row(f'{_LAYER}mlp.Wi.weight', '[F] D', 'mlp/up/w', 'DF'),
  Row(f'{_LAYER}mlp.Wi.bias', '[F]', 'mlp/gate/b', 'F', _mlp_bias),
  Row(f'{_LAYER}mlp.Wi.bias', '[F]', 'mlp/up/b', 'F', _mlp_bias),
  Row(f'{_LAYER}mlp.Wo.weight', 'D F', 'mlp/down/w', 'FD'),
  Row(f'{_LAYER}mlp.Wo.bias', 'D', 'mlp/down/b', 'D', _mlp_bias),
  Row('model.final_norm.weight', 'D', 'final_norm/scale', 'D'),
  Row('model.final_norm.bias', 'D', 'final_norm/b', 'D', _norm_bias),
  Row('head.dense.weight', 'C D', 'masked/dense/w', 'DC', encoder.needs_masked),
  Row('head.dense.bias', 'C', 'masked/dense/b', 'C', _masked_dense_bias),
  Row('head.norm.weight', 'D', 'masked/norm/scale', 'D', encoder.needs_masked),
  Row('head.norm.bias', 'D', 'masked/norm/b', 'D', _masked_norm_bias),
  Row('decoder.weight', 'V D', 'head/w', 'VD', encoder.needs_table),
  Row('decoder.bias', 'V', 'masked/b', 'V', _logit_bias),
  Row('head.dense.weight', 'C D', 'score/dense/w', 'DC', _labels_dense),
  Row('head.dense.bias', 'C', 'score/dense/b', 'C', _labels_dense_bias),
  Row('head.norm.weight', 'D', 'score/norm/scale', 'D', _labels_dense),
  Row('head.norm.bias', 'D', 'score/norm/b', 'D', _labels_norm_bias),
  Row('classifier.weight', 'R D', 'score/w', 'RD', is_task('sequence', 'token', 'span')),
  Row('classifier.bias', 'R', 'score/b', 'R', is_task('sequence', 'token', 'span')),
)


def _norm(c: HfConfig) -> Norm:
  bias = c.flag('norm_bias', of_class=True)
  return Norm(c.number('norm_eps', of_class=True), kind='layer', bias=bias)


def _ropes(c: HfConfig) -> dict[str, Rope]:
  """Returns the rotary embedding of each layer type; older files have a base for each."""
  old = {FULL: 'global_rope_theta', SLIDING: 'local_rope_theta'}
  usual = {FULL: 160_000.0, SLIDING: 10_000.0}
  if c.mapping('rope_parameters'):
    given = {kind: key for kind, key in old.items() if c.get(key) is not None}
    found = hf_rope.read_by_layer_type(c, '')
    for kind, key in given.items():
      if found[kind].theta != c.number(key):
        raise DataError(
          f'config.json: {key}={c.get(key)} and rope_parameters.{kind} has '
          f'rope_theta={found[kind].theta}; delete the wrong one'
        )
    return found
  return {kind: Rope(c.number(key, usual[kind])) for kind, key in old.items()}


def _window(c: HfConfig, types: tuple[str, ...]) -> int | None:
  """Returns the tokens that a query sees on one side, itself among them."""
  whole = c.count(WINDOW, of_class=True, least=2)
  return whole // 2 + 1 if SLIDING in types else None


def _read(c: HfConfig, family: str) -> Architecture:
  encoder.check(c)
  dim, heads = c.size('hidden_size'), c.size('num_attention_heads')
  size = encoder.head_dim(dim, heads, ('hidden_size', 'num_attention_heads'))
  every, layers = c.count(EVERY, 3), c.size('num_hidden_layers')
  types = layer_types.read(c, [SLIDING if i % every else FULL for i in range(layers)])
  ropes, window, norm = _ropes(c), _window(c, types), _norm(c)
  bias = c.flag('attention_bias', of_class=True)
  activation = decoder.read_activation(c, 'hidden_activation')
  mlp = GatedMlpSpec(
    c.size('intermediate_size'), activation, bias=c.flag('mlp_bias', of_class=True)
  )
  blocks = []
  for i, kind in enumerate(types):
    mixer = AttentionSpec(
      num_heads=heads,
      num_kv_heads=heads,
      head_dim=size,
      rope=ropes[kind],
      qkv_bias=bias,
      out_bias=bias,
      window=window if kind == SLIDING else None,
      causal=False,
    )
    blocks.append(BlockSpec(mixer, mlp, norm, mixer_norm=i > 0))
  masked = _masked_head(c, norm)
  return Architecture(
    family=family,
    vocab_size=c.size('vocab_size'),
    model_dim=dim,
    stacks=layer_types.stacks(blocks),
    final_norm=norm,
    tied=c.flag('tie_word_embeddings', of_class=True),
    max_len=c.count('max_position_embeddings', of_class=True),
    kind='encoder',
    embed_norm=norm,
    masked_head=masked,
  )


def _masked_head(c: HfConfig, norm: Norm) -> MaskedHead | None:
  if not encoder.is_masked(c):
    return None
  return MaskedHead(
    norm,
    decoder.read_activation(c, 'classifier_activation'),
    dense_bias=c.flag('classifier_bias', of_class=True),
    bias=c.flag('decoder_bias', of_class=True),
  )


def _score_head(c: HfConfig, task: str) -> ScoreHead:
  """Returns the label head: a map and a norm before the labels, for each task."""
  kind = c.text('classifier_pooling', of_class=True)
  if kind not in ('cls', 'mean'):
    raise DataError(f"config.json: classifier_pooling={kind!r}; expected 'cls' or 'mean'")
  return ScoreHead(
    pool={'cls': 'first', 'mean': 'mean'}[kind] if task == 'sequence' else 'each',
    dense=True,
    activation=decoder.read_activation(c, 'classifier_activation'),
    dense_bias=c.flag('classifier_bias', of_class=True),
    norm=_norm(c),
    bias=True,
  )


def _write_head(arch: Architecture) -> dict[str, Any]:
  head = arch.score_head if arch.num_labels else arch.masked_head
  if head is None:
    return {}
  out = {
    'classifier_activation': decoder.activation_name(head.activation, 'gelu_new'),
    'classifier_bias': head.dense_bias,
  }
  if arch.num_labels:
    return out | {'classifier_pooling': 'mean' if head.pool == 'mean' else 'cls'}
  return out | {'decoder_bias': head.bias}


def _write(arch: Architecture) -> dict[str, Any]:
  block, types = arch.layers()[0], layer_types.of(arch)
  found = {kind: b.mixer.rope for kind, b in zip(types, arch.layers(), strict=True)}
  usual = Rope(next(iter(found.values())).theta)  # of a type that no layer has
  ropes = {kind: found.get(kind, usual) for kind in (FULL, SLIDING)}
  window = layer_types.window(arch)
  return {
    'architectures': [encoder.hf_class(arch, 'ModernBert')],
    'model_type': 'modernbert',
    'vocab_size': arch.vocab_size,
    'hidden_size': arch.model_dim,
    'intermediate_size': block.mlp.ffn_dim,
    'num_hidden_layers': arch.num_layers,
    'num_attention_heads': block.mixer.num_heads,
    'hidden_activation': decoder.activation_name(block.mlp.activation, 'gelu_new'),
    'max_position_embeddings': arch.max_len,
    'norm_eps': arch.final_norm.eps,
    'norm_bias': arch.final_norm.bias,
    'attention_bias': block.mixer.qkv_bias,
    'mlp_bias': block.mlp.bias,
    'layer_types': types,
    'tie_word_embeddings': arch.tied,
    'initializer_range': 0.02,
    # Transformers' class has ids beyond a small vocabulary.
    **decoder.NO_TOKENS,
    'cls_token_id': None,
    'sep_token_id': None,
    **({} if window is None else {WINDOW: 2 * (window - 1)}),
    **hf_rope.write_by_layer_type(ropes, arch.max_len, ''),
  } | _write_head(arch)


MODERNBERT = Family(
  model_types=('modernbert',),
  hf_class='ModernBert',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=_ROWS,
  unused=re.compile(r'model\.rotary_emb\..*'),
  tied=('model.embeddings.tok_embeddings.weight', 'decoder.weight'),
  prefix='model.',
  score_head=_score_head,
  heads=re.compile(r'(head|decoder|classifier)\..*'),
)
