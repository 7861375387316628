"""T5 (Raffel et al. 2020), v1.1 and FLAN-T5, mT5 (Xue et al. 2021): encoder-decoders with RMSNorm
before each branch, relative positions as numbers that are added to the scores, and scores that are
not divided by sqrt(head_dim).

v1.0 has ReLU, and a head that is the embedding, whose inputs are scaled by d_model**-0.5; the
others have a gated GELU and a head of their own.
"""

import re
from collections.abc import Mapping
from typing import Any

from ftjax.families import decoder, label_head
from ftjax.families.family import Family
from ftjax.families.hf_config import HfConfig
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import (
  Architecture,
  AttentionSpec,
  BlockSpec,
  GatedMlpSpec,
  MlpSpec,
  Norm,
)
from ftjax.models.mixer_spec import RelativeBias
from ftjax.runtime.errors import DataError

TIED_KEY, SCALED_KEY = 'tie_word_embeddings', 'scale_decoder_outputs'
HEAD = 'lm_head.weight'
_BUCKETS, _LONGEST = 'relative_attention_num_buckets', 'relative_attention_max_distance'
_MLP_KEY = 'feed_forward_proj'
# n_positions is the length of the rows of the pretraining, and no limit.
KEYS = frozenset((
  *('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_layers', 'num_decoder_layers', 'num_heads'),
  *(_BUCKETS, _LONGEST, 'layer_norm_epsilon', _MLP_KEY, 'dense_act_fn', 'is_gated_act'),
  *('is_encoder_decoder', 'is_decoder', TIED_KEY, SCALED_KEY, 'initializer_factor', 'n_positions'),
))  # fmt: skip
# Distances beyond the last bucket are alike: there is no longest row.
MAX_LEN = 1 << 20


def _in_encoder(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec.cross is None


def _in_decoder(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec.cross is not None


def _sizes(arch: Architecture, spec: BlockSpec | None) -> dict[str, int]:
  """Returns the sizes of axis letters; P: rows of the tables of relative positions."""
  mixer = arch.layers()[0].mixer
  out = {'V': arch.vocab_size, 'D': arch.model_dim, 'P': mixer.relative.buckets}
  out |= {'N': mixer.num_heads, 'K': mixer.num_kv_heads, 'H': mixer.head_dim}
  return out | ({} if spec is None else {'F': spec.mlp.ffn_dim})


def _attention(hf: str, leaf: str, needs) -> tuple[Row, ...]:
  """Returns the rows of an attention and of the norm before it.

  hf: of its layer. leaf: 'attn' or 'cross'.
  """
  module = 'SelfAttention' if leaf == 'attn' else 'EncDecAttention'
  return (
    Row(f'{hf}.layer_norm.weight', 'D', f'{leaf}_norm/scale', 'D', needs),
    Row(f'{hf}.{module}.q.weight', 'NH D', f'{leaf}/q/w', 'DNH', needs),
    Row(f'{hf}.{module}.k.weight', 'KH D', f'{leaf}/k/w', 'DKH', needs),
    Row(f'{hf}.{module}.v.weight', 'KH D', f'{leaf}/v/w', 'DKH', needs),
    Row(f'{hf}.{module}.o.weight', 'D NH', f'{leaf}/o/w', 'NHD', needs),
  )


def _mlp(hf: str, needs) -> tuple[Row, ...]:
  """Returns the rows of an MLP, with and without a gate, and of the norm before it."""

  def gated(arch, spec):
    return needs(arch, spec) and isinstance(spec.mlp, GatedMlpSpec)

  def plain(arch, spec):
    return needs(arch, spec) and isinstance(spec.mlp, MlpSpec)

  return (
    Row(f'{hf}.layer_norm.weight', 'D', 'mlp_norm/scale', 'D', needs),
    Row(f'{hf}.DenseReluDense.wi_0.weight', 'F D', 'mlp/gate/w', 'DF', gated),
    Row(f'{hf}.DenseReluDense.wi_1.weight', 'F D', 'mlp/up/w', 'DF', gated),
    Row(f'{hf}.DenseReluDense.wi.weight', 'F D', 'mlp/up/w', 'DF', plain),
    Row(f'{hf}.DenseReluDense.wo.weight', 'D F', 'mlp/down/w', 'FD', needs),
  )


_BIAS = 'block.0.layer.0.SelfAttention.relative_attention_bias.weight'
_ENCODER, _DECODER = ('encoder.block.{l}.layer.', 'decoder.block.{l}.layer.')
ROWS = (
  Row('shared.weight', 'V D', 'embed/w', 'VD'),
  Row(f'encoder.{_BIAS}', 'P N', 'relative_bias/encoder', 'PN'),
  Row(f'decoder.{_BIAS}', 'P N', 'relative_bias/decoder', 'PN'),
  *_attention(f'{_ENCODER}0', 'attn', _in_encoder),
  *_mlp(f'{_ENCODER}1', _in_encoder),
  *_attention(f'{_DECODER}0', 'attn', _in_decoder),
  *_attention(f'{_DECODER}1', 'cross', _in_decoder),
  *_mlp(f'{_DECODER}2', _in_decoder),
  Row('encoder.final_layer_norm.weight', 'D', 'encoder_norm/scale', 'D'),
  Row('decoder.final_layer_norm.weight', 'D', 'final_norm/scale', 'D'),
  Row(HEAD, 'V D', 'head/w', 'VD', decoder.untied),
)


def is_scaled(config: Mapping[str, Any]) -> bool:
  """Returns whether the inputs of the head are scaled by d_model**-0.5: in T5 by its own key, or
  where tie_word_embeddings is not false; in mT5 never.
  """
  if config.get('model_type') != 't5':
    return False
  own = config.get(SCALED_KEY)
  return config.get(TIED_KEY) is not False if own is None else bool(own)


def with_head(config: Mapping[str, Any], is_tied: bool) -> dict[str, Any]:
  """Returns a config.json whose keys say whether the head is the embedding, and that the scale of
  its inputs is what it was. transformers 5 writes that all heads are the embedding.
  """
  if bool(config.get(TIED_KEY, True)) == is_tied:
    return dict(config)
  scaled = {SCALED_KEY: is_scaled(config)} if config.get('model_type') == 't5' else {}
  return dict(config) | {TIED_KEY: is_tied} | scaled


def _mlp_spec(c: HfConfig) -> GatedMlpSpec | MlpSpec:
  """Returns the MLP of feed_forward_proj: 'relu', 'gated-gelu', 'gated-silu', ..."""
  text = c.text(_MLP_KEY, of_class=True)
  gate, _, name = text.rpartition('-') if isinstance(text, str) else ('?', '', '')
  # T5's own program computes this one by the approximation.
  name = 'gelu_new' if text == 'gated-gelu' else name
  if gate not in ('', 'gated') or name not in decoder.ACTIVATIONS:
    known = ', '.join(decoder.ACTIVATIONS)
    raise DataError(
      f'config.json: {_MLP_KEY}={text!r} is not supported; expected ACTIVATION or '
      f'gated-ACTIVATION with one of {known}'
    )
  for key, expected in (('dense_act_fn', name), ('is_gated_act', bool(gate))):
    if c.get(key) not in (None, expected):
      raise DataError(
        f'config.json: {key}={c.get(key)!r} is not that of {_MLP_KEY}={text!r}; expected '
        f'{expected!r}'
      )
  spec = GatedMlpSpec if gate else MlpSpec
  return spec(c.size('d_ff'), decoder.ACTIVATIONS[name])


def _read(c: HfConfig, family: str) -> Architecture:
  decoder.check_flag(c, 'is_encoder_decoder', True, of_class=False)
  decoder.check_flag(c, 'is_decoder', False, of_class=False)
  if label_head.task(c):
    raise DataError(
      f'config.json: architectures={label_head.classes(c)}: a T5 with labels is not computed here; '
      'expected the class ...ForConditionalGeneration'
    )
  heads, head_dim = c.size('num_heads'), c.size('d_kv')
  buckets, longest = c.size(_BUCKETS), c.size(_LONGEST)
  norm, mlp = Norm(c.number('layer_norm_epsilon', of_class=True)), _mlp_spec(c)

  def attention(name: str, causal: bool) -> AttentionSpec:
    relative = RelativeBias(name, buckets, longest) if name else None
    return AttentionSpec(
      heads, heads, head_dim, rope=None, scale=1.0, causal=causal, relative=relative
    )

  encoder = BlockSpec(attention('encoder', False), mlp, norm)
  writer = BlockSpec(attention('decoder', True), mlp, norm, cross=attention('', False))
  layers = c.size('num_layers')
  dim = c.size('d_model')
  return Architecture(
    family=family,
    vocab_size=c.size('vocab_size'),
    model_dim=dim,
    stacks=(((encoder,), layers), ((writer,), c.count('num_decoder_layers', layers))),
    final_norm=norm,
    tied=c.flag(TIED_KEY, True),
    max_len=MAX_LEN,
    kind='encoder_decoder',
    logit_scale=dim**-0.5 if is_scaled(c.content) else 1.0,
    encoder_stacks=1,
  )


def _write(arch: Architecture, model_type: str) -> dict[str, Any]:
  (encoder,), layers = arch.stacks[0]
  _, decoder_layers = arch.stacks[1]
  is_gated = isinstance(encoder.mlp, GatedMlpSpec)
  name = decoder.activation_name(encoder.mlp.activation, 'gelu_new')
  own = 'gelu' if is_gated and name == 'gelu_new' else name
  scaled = {SCALED_KEY: arch.logit_scale != 1.0} if model_type == 't5' else {}
  return {
    'architectures': [f'{"MT5" if model_type == "mt5" else "T5"}ForConditionalGeneration'],
    'model_type': model_type,
    'vocab_size': arch.vocab_size,
    'd_model': arch.model_dim,
    'd_kv': encoder.mixer.head_dim,
    'd_ff': encoder.mlp.ffn_dim,
    'num_layers': layers,
    'num_decoder_layers': decoder_layers,
    'num_heads': encoder.mixer.num_heads,
    _BUCKETS: encoder.mixer.relative.buckets,
    _LONGEST: encoder.mixer.relative.longest,
    'layer_norm_epsilon': encoder.norm.eps,
    _MLP_KEY: f'gated-{own}' if is_gated else own,
    'dropout_rate': 0.0,
    'is_encoder_decoder': True,
    'tie_word_embeddings': arch.tied,
    'decoder_start_token_id': 0,
    'pad_token_id': 0,
  } | scaled


def _family(model_type: str, hf_class: str) -> Family:
  return Family(
    model_types=(model_type,),
    hf_class=hf_class,
    keys=KEYS,
    read=_read,
    write=lambda arch: _write(arch, model_type),
    rows=ROWS,
    # Copies of the embedding, and a table that T5's first files have and nothing computes with.
    unused=re.compile(
      r'(encoder|decoder)\.embed_tokens\.weight'
      r'|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight'
    ),
    tied=('shared.weight', HEAD),
    sizes=_sizes,
    tasks=(),
  )


T5, MT5 = _family('t5', 'T5'), _family('mt5', 'MT5')
