"""BERT, MiniLM, which is a BERT, and DistilBERT: norms on the sums with the residual stream,
learned positions, and for BERT token types.
"""

import re
from typing import Any

from ftjax.families import decoder, encoder
from ftjax.families.family import Family
from ftjax.families.hf_config import HfConfig
from ftjax.families.label_head import is_task, linear
from ftjax.models.architecture import Architecture, Norm
from ftjax.runtime.errors import DataError

# The keys of a pooler are of Google's own program; transformers reads none of them.
KEYS = encoder.KEYS | {
  *('pooler_fc_size', 'pooler_num_attention_heads', 'pooler_num_fc_layers'),
  *('pooler_size_per_head', 'pooler_type'),
}
_LAYER = 'bert.encoder.layer.{l}.'
MAPS = (
  (f'{_LAYER}attention.self.query', 'attn/q'),
  (f'{_LAYER}attention.self.key', 'attn/k'),
  (f'{_LAYER}attention.self.value', 'attn/v'),
  (f'{_LAYER}attention.output.dense', 'attn/o'),
  (f'{_LAYER}intermediate.dense', 'mlp/up'),
  (f'{_LAYER}output.dense', 'mlp/down'),
)
NORMS = (
  (f'{_LAYER}attention.output.LayerNorm', 'attn_out_norm'),
  (f'{_LAYER}output.LayerNorm', 'mlp_out_norm'),
)
_ROWS = (
  *encoder.embedding_rows('bert.embeddings.'),
  *encoder.layer_rows(MAPS, NORMS),
  *encoder.masked_rows(
    'cls.predictions.transform.dense',
    'cls.predictions.transform.LayerNorm',
    'cls.predictions.bias',
    'cls.predictions.decoder',
  ),
  *linear('bert.pooler.dense', 'score/dense', 'CD', is_task('sequence')),
  *linear('classifier', 'score', 'RD', is_task('sequence', 'token')),
  *linear('qa_outputs', 'score', 'RD', is_task('span')),
)
# Names of the scales and biases of norms in files of TensorFlow's time.
OLD_NORMS = (
  (re.compile(r'LayerNorm\.gamma$'), 'LayerNorm.weight'),
  (re.compile(r'LayerNorm\.beta$'), 'LayerNorm.bias'),
)


def _read(c: HfConfig, family: str) -> Architecture:
  return encoder.read_bert(c, family)


def _write(arch: Architecture) -> dict[str, Any]:
  return encoder.write_bert(arch, 'Bert', 'bert')


BERT = Family(
  model_types=('bert',),
  hf_class='Bert',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=_ROWS,
  # There are two biases, one of which is computed with.
  unused=re.compile(r'cls\.predictions\.(decoder\.)?bias|bert\.embeddings\.position_ids'),
  tied=('bert.embeddings.word_embeddings.weight', 'cls.predictions.decoder.weight'),
  prefix='bert.',
  score_head=lambda c, task: encoder.score_head(task, 'tanh'),
  heads=re.compile(r'cls\..*|bert\.pooler\..*|classifier\..*|qa_outputs\..*'),
  old_names=OLD_NORMS,
)

# DistilBERT (Sanh et al. 2019): BERT without token types and pooler, under other names.

DISTILBERT_KEYS = frozenset((
  *('vocab_size', 'max_position_embeddings', 'sinusoidal_pos_embds', 'n_layers', 'n_heads', 'dim'),
  *('hidden_dim', 'activation', 'tie_word_embeddings', 'tie_weights_'),
))  # fmt: skip
_DISTIL = 'distilbert.transformer.layer.{l}.'
_DISTIL_ROWS = (
  *encoder.embedding_rows('distilbert.embeddings.', types=False),
  *encoder.layer_rows(
    (
      (f'{_DISTIL}attention.q_lin', 'attn/q'),
      (f'{_DISTIL}attention.k_lin', 'attn/k'),
      (f'{_DISTIL}attention.v_lin', 'attn/v'),
      (f'{_DISTIL}attention.out_lin', 'attn/o'),
      (f'{_DISTIL}ffn.lin1', 'mlp/up'),
      (f'{_DISTIL}ffn.lin2', 'mlp/down'),
    ),
    (
      (f'{_DISTIL}sa_layer_norm', 'attn_out_norm'),
      (f'{_DISTIL}output_layer_norm', 'mlp_out_norm'),
    ),
  ),
  *encoder.masked_rows(
    'vocab_transform', 'vocab_layer_norm', 'vocab_projector.bias', 'vocab_projector'
  ),
  *linear('pre_classifier', 'score/dense', 'CD', is_task('sequence')),
  *linear('classifier', 'score', 'RD', is_task('sequence', 'token')),
  *linear('qa_outputs', 'score', 'RD', is_task('span')),
)
_EPS = 1e-12  # of the class; no key states it


def _read_distilbert(c: HfConfig, family: str) -> Architecture:
  if c.flag('tie_weights_', True) is not True:
    raise DataError('config.json: tie_weights_=false is not supported; use tie_word_embeddings')
  c.flag('sinusoidal_pos_embds', of_class=True)  # how the table was initialized
  dim, heads = c.size('dim'), c.size('n_heads')
  encoder.head_dim(dim, heads, ('dim', 'n_heads'))
  norm = Norm(_EPS, kind='layer', bias=True)
  activation = decoder.read_activation(c, 'activation')
  block = encoder.post_norm_block(dim, heads, c.size('hidden_dim'), activation, norm)
  masked = encoder.masked_head(c, norm, activation)
  positions = c.count('max_position_embeddings', of_class=True)
  return Architecture(
    family=family,
    vocab_size=c.size('vocab_size'),
    model_dim=dim,
    stacks=(((block,), c.size('n_layers')),),
    final_norm=None,
    tied=c.flag('tie_word_embeddings', of_class=True),
    max_len=positions,
    kind='encoder',
    learned_positions=positions,
    embed_norm=norm,
    masked_head=masked,
  )


def _write_distilbert(arch: Architecture) -> dict[str, Any]:
  block = arch.layers()[0]
  return {
    'architectures': [encoder.hf_class(arch, 'DistilBert')],
    'model_type': 'distilbert',
    'vocab_size': arch.vocab_size,
    'max_position_embeddings': arch.learned_positions,
    'n_layers': arch.num_layers,
    'n_heads': block.mixer.num_heads,
    'dim': arch.model_dim,
    'hidden_dim': block.mlp.ffn_dim,
    'activation': decoder.activation_name(block.mlp.activation, 'gelu_new'),
    'tie_word_embeddings': arch.tied,
    'initializer_range': 0.02,
    **dict.fromkeys(('dropout', 'attention_dropout', 'qa_dropout', 'seq_classif_dropout'), 0.0),
  }


DISTILBERT = Family(
  model_types=('distilbert',),
  hf_class='DistilBert',
  keys=DISTILBERT_KEYS,
  read=_read_distilbert,
  write=_write_distilbert,
  rows=_DISTIL_ROWS,
  unused=re.compile(r'distilbert\.embeddings\.position_ids'),
  tied=('distilbert.embeddings.word_embeddings.weight', 'vocab_projector.weight'),
  prefix='distilbert.',
  score_head=lambda c, task: encoder.score_head(task, 'relu'),
  heads=re.compile(
    r'vocab_(transform|layer_norm|projector)\..*|(pre_)?classifier\..*|qa_outputs\..*'
  ),
  old_names=OLD_NORMS,
)
