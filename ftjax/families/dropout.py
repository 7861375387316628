"""The rates of dropout that a HF config.json names, as transformers trains with them."""

from collections.abc import Mapping
from typing import Any

from ftjax.families import hf_config

# Where dropout is, and the keys that name its rate, by precedence: classes have different ones.
KEYS = {
  'attention': ('attention_probs_dropout_prob', 'attention_dropout', 'attn_pdrop'),
  'residual': ('hidden_dropout_prob', 'resid_pdrop', 'dropout'),
  'embedding': ('hidden_dropout_prob', 'embedding_dropout', 'embd_pdrop', 'dropout'),
}
# Before the last map of a label head, by what labels are given to. BERT's head of span answers has
# none.
_CLASSIFIER = {
  'sequence': ('classifier_dropout', 'cls_dropout', 'seq_classif_dropout', 'hidden_dropout_prob'),
  'token': ('classifier_dropout', 'hidden_dropout_prob', 'dropout'),
  'span': ('qa_dropout',),
  '': (),
}


def rates(config: Mapping[str, Any], task: str) -> dict[str, float]:
  """Returns {attention, residual, embedding, classifier: rate}, 0 where nothing names one.

  A key that is missing or null has the default of transformers' class of this model_type.

  Args:
    config: a config.json that check_names accepted.
    task: what the labels are given to, one of architecture.TASKS; '' without labels.
  """
  own, places = str(config.get('model_type', '')), KEYS | {'classifier': _CLASSIFIER[task]}
  # The classes take a second to import, and a file that transformers wrote has all keys.
  is_whole = all(config.keys() & set(keys) for keys in places.values() if keys)
  usual = {} if is_whole or not own else hf_config.class_defaults(own)

  def find(keys):
    found = {k: config.get(k) if config.get(k) is not None else usual.get(k) for k in keys}
    return next((hf_config.dropout_rate(k, v) for k, v in found.items() if v is not None), 0.0)

  return {place: find(keys) for place, keys in places.items()}
