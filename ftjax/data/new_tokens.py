"""Adds tokens to the files of a tokenizer, behind its last id.

Only tokenizer.json and the files that list added or special tokens change: tokenizer_config.json,
special_tokens_map.json and added_tokens.json, each where it is there. A new token is matched as it
is written, wherever it stands in a text, before the vocabulary splits the rest.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError

# Keys of tokenizer_config.json and special_tokens_map.json with further special tokens; the second
# is transformers 5's.
_SPECIAL_LISTS = ('additional_special_tokens', 'extra_special_tokens')
_PLAIN_KEY, _SPECIAL_KEY = 'model.add_tokens', 'model.add_special_tokens'


def extend(
  files: Mapping[str, bytes], plain: Sequence[str], special: Sequence[str], name: str
) -> tuple[dict[str, bytes], Tokenizer]:
  """Returns (the files with new tokens, the tokenizer they make).

  Args:
    files: of a HF folder, by name.
    plain: texts of new tokens that are part of decoded text.
    special: texts of new special tokens. The ids are those behind the last one, plain first.
    name: of the folder, for messages.

  Raises:
    ConfigError: a text that is a token already.
    DataError: no tokenizer.json, or a tokenizer that does not read a new token as one.
  """
  if 'tokenizer.json' not in files:
    raise DataError(
      f'{name}: tokens can only be added to a tokenizer.json, and there is none. Make one with '
      'AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)'
    )
  old = Tokenizer(files, name)
  for key, texts in ((_PLAIN_KEY, plain), (_SPECIAL_KEY, special)):
    for text in texts:
      if (found := old.find(text)) is not None:
        raise ConfigError(f'{key}: {text!r} is a token of {name} already, id {found}: leave it out')
  texts = (*plain, *special)
  added = [
    {'id': old.vocab_size + i, 'content': text} | _flags(i >= len(plain))
    for i, text in enumerate(texts)
  ]
  out = dict(files) | _listed(files, added)
  new = Tokenizer(out, name)
  for token in added:
    text, ids = token['content'], new.encode(token['content'])
    if ids != [token['id']]:
      raise DataError(
        f'{name}: its tokenizer reads the new token {text!r} as ids {ids}, expected '
        f'{[token["id"]]}: its vocabulary has gaps or its normalizer changes the text'
      )
  return out, new


def _flags(is_special: bool) -> dict[str, bool]:
  plain = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return plain | {'special': is_special}


def _listed(files: Mapping[str, bytes], added: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
  """Returns the files that list added tokens, with more of them."""
  special = [t['content'] for t in added if t['special']]
  model = json.loads(files['tokenizer.json'])
  model['added_tokens'] = [*(model.get('added_tokens') or []), *added]
  out = {'tokenizer.json': _dump(model)}
  if 'added_tokens.json' in files:
    known = json.loads(files['added_tokens.json'])
    out['added_tokens.json'] = _dump(known | {t['content']: t['id'] for t in added})
  if 'tokenizer_config.json' in files:
    config = json.loads(files['tokenizer_config.json'])
    if 'added_tokens_decoder' in config:
      more = {str(t['id']): {k: v for k, v in t.items() if k != 'id'} for t in added}
      config['added_tokens_decoder'] = (config['added_tokens_decoder'] or {}) | more
    config = _with_special(config, special, needs_list=True)
    out['tokenizer_config.json'] = _dump(config)
  if 'special_tokens_map.json' in files:
    found = json.loads(files['special_tokens_map.json'])
    if (changed := _with_special(found, special, needs_list=False)) != found:
      out['special_tokens_map.json'] = _dump(changed)
  return out


def _with_special(content: dict[str, Any], special: list[str], needs_list: bool) -> dict[str, Any]:
  """Returns the content with more special tokens in its list; `needs_list` makes one."""
  lists = [key for key in _SPECIAL_LISTS if isinstance(content.get(key), list)]
  if not lists and needs_list:
    lists = [_SPECIAL_LISTS[0]]
  return content | {k: [*(content.get(k) or []), *special] for k in lists if special}


def _dump(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()
