"""Turns the files of a language model into those of a reward model, transformers'
`AutoModelForSequenceClassification`.

transformers takes the score at the last token that is not `pad_token_id`. If that id also ended a
completion, the score would move to the token before it; so another special token is named."""

from collections.abc import Mapping
from typing import Any

from ftjax.data.tokenizer import Tokenizer
from ftjax.families import table
from ftjax.hf.gguf_tokenizer import dump_json
from ftjax.hf.weight_files import parse_json
from ftjax.runtime.errors import DataError


def describe(
  family: str,
  files: Mapping[str, bytes],
  config: Mapping[str, Any],
  tokenizer: Tokenizer,
  stop_ids: tuple[int, ...],
) -> tuple[dict[str, bytes], dict[str, Any]]:
  """Returns (tokenizer files, config.json) of the reward model made from a language model.

  Args:
    family: name of the model's family.
    files, config: the language model's.
    tokenizer: made from the files.
    stop_ids: tokens that end a completion.

  Raises:
    DataError: no special token is left to pad with.
  """
  named = config.get('pad_token_id')
  candidates = [i for i in (named, tokenizer.pad_id) if i is not None]
  candidates += sorted(tokenizer.special_ids)
  pad = next((i for i in candidates if i not in stop_ids), None)
  if pad is None:
    raise DataError(
      f'{tokenizer.name}: every special token ends a completion; add one to pad with, since a '
      'reward model is read at the last token that is not padding'
    )
  out = dict(config) | {
    'architectures': [table.hf_class(family, 'ForSequenceClassification')],
    'id2label': {'0': 'reward'},
    'label2id': {'reward': 0},
    'problem_type': 'regression',
    'pad_token_id': pad,
  }
  found, text = dict(files), tokenizer.token(pad)
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    content = parse_json(files[name], name) if name in files else None
    if content and (name == 'tokenizer_config.json' or 'pad_token' in content):
      found[name] = dump_json(content | {'pad_token': text})
  return found, out
