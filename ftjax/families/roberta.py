"""RoBERTa and XLM-R: BERT whose positions begin behind the id of padding, with other heads.

transformers counts the positions of tokens that are not `pad_token_id`. Here they count within a
document, whatever its ids are: a text that holds the token of padding has other positions there.
"""

import dataclasses
import re
from typing import Any

from ftjax.families import encoder
from ftjax.families.bert import MAPS, NORMS
from ftjax.families.family import Family
from ftjax.families.hf_config import HfConfig
from ftjax.families.label_head import is_task, linear
from ftjax.models.architecture import Architecture


def _renamed(names: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
  return tuple((hf.replace('bert.', 'roberta.', 1), leaf) for hf, leaf in names)


_ROWS = (
  *encoder.embedding_rows('roberta.embeddings.'),
  *encoder.layer_rows(_renamed(MAPS), _renamed(NORMS)),
  *encoder.masked_rows('lm_head.dense', 'lm_head.layer_norm', 'lm_head.bias', 'lm_head.decoder'),
  *linear('classifier.dense', 'score/dense', 'CD', is_task('sequence')),
  *linear('classifier.out_proj', 'score', 'RD', is_task('sequence')),
  *linear('classifier', 'score', 'RD', is_task('token')),
  *linear('qa_outputs', 'score', 'RD', is_task('span')),
)


def _read(c: HfConfig, family: str) -> Architecture:
  # The head has the exact GELU, whatever the blocks have.
  offset = c.count('pad_token_id', of_class=True, least=0) + 1
  return encoder.read_bert(c, family, offset=offset, activation='gelu')


def _write(arch: Architecture) -> dict[str, Any]:
  written = encoder.write_bert(arch, 'Roberta', 'roberta')
  return written | {'pad_token_id': arch.position_offset - 1}


def _write_xlm(arch: Architecture) -> dict[str, Any]:
  own = {'architectures': [encoder.hf_class(arch, 'XLMRoberta')], 'model_type': 'xlm-roberta'}
  return _write(arch) | own


ROBERTA = Family(
  model_types=('roberta',),
  hf_class='Roberta',
  keys=encoder.KEYS | {'pad_token_id'},
  read=_read,
  write=_write,
  rows=_ROWS,
  # There are two biases, one of which is computed with.
  unused=re.compile(r'lm_head\.(decoder\.)?bias|roberta\.embeddings\.position_ids'),
  tied=('roberta.embeddings.word_embeddings.weight', 'lm_head.decoder.weight'),
  prefix='roberta.',
  score_head=lambda c, task: encoder.score_head(task, 'tanh'),
  heads=re.compile(r'lm_head\..*|roberta\.pooler\..*|classifier\..*|qa_outputs\..*'),
)
XLM_ROBERTA = dataclasses.replace(
  ROBERTA, model_types=('xlm-roberta',), hf_class='XLMRoberta', write=_write_xlm
)
