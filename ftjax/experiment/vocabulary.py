"""What a config changes of a model's vocabulary: new tokens and how their rows start, padding for
sharding, another chat template."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ftjax.data import new_tokens
from ftjax.data.tokenizer import Tokenizer
from ftjax.hf import load
from ftjax.hf.gguf_tokenizer import dump_json
from ftjax.hf.new_rows import NewRows
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files as files_lib

# Keys of a config whose values a resume must find unchanged.
FIXED = (
  'model.add_tokens',
  'model.add_special_tokens',
  'model.init_tokens',
  'model.vocab_multiple',
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The keys of a config that change a model's vocabulary; the defaults change nothing.

  plain, special: texts of new tokens. means: {new token: the text whose tokens' mean it starts as}.
  multiple: of the rows of the tables. template: a file with a chat template, '' for the model's.
  """

  plain: tuple[str, ...] = ()
  special: tuple[str, ...] = ()
  means: Mapping[str, str] = dataclasses.field(default_factory=dict)
  multiple: int = 1
  template: str = ''

  def apply(
    self, files: Mapping[str, bytes], config: Mapping[str, Any], name: str
  ) -> tuple[dict[str, bytes], dict[str, Any], Tokenizer, NewRows | None]:
    """Returns (tokenizer files, config.json, tokenizer, new rows) of a model with these changes.

    Args:
      files, config: the model's, as `load.tokenizer_files` and `load.read_config` gave them.
      name: of the model, for messages.

    Raises:
      ConfigError, DataError: a token that cannot be added, or a template that cannot be read.
    """
    files, config = dict(files), dict(config)
    if self.template:
      files = _with_template(files, self.template)
    texts = (*self.plain, *self.special)
    if not texts:
      return files, config, Tokenizer(files, name), None
    old = Tokenizer(files, name)
    files, tokenizer = new_tokens.extend(files, self.plain, self.special, name)
    if not isinstance(config.get('vocab_size'), int):
      raise DataError(f'{name}: config.json has no vocab_size, so that no tokens can be added')
    size = max(config['vocab_size'], tokenizer.vocab_size)
    if size != config['vocab_size']:
      config['vocab_size'] = size
      files['config.json'] = dump_json(config)
    means = tuple(tuple(old.encode(self.means[t])) if t in self.means else () for t in texts)
    return files, config, tokenizer, NewRows(texts, old.vocab_size, means, size)


def of(values: Mapping[str, Any]) -> Vocabulary:
  """Returns what a config changes.

  Args:
    values: of a flat config, or of one that was saved as JSON, perhaps before these keys existed.
  """
  return Vocabulary(
    tuple(values.get('model.add_tokens', ())),
    tuple(values.get('model.add_special_tokens', ())),
    {token: text for token, text in values.get('model.init_tokens', ())},
    values.get('model.vocab_multiple', 1),
    values.get('data.chat_template', ''),
  )


def _with_template(files: dict[str, bytes], path: str) -> dict[str, bytes]:
  """Returns the files with the chat template of a file in place of their own."""
  key = f'data.chat_template={path}'
  try:
    text = files_lib.read_text(path)
  except OSError as error:
    raise DataError(f'{key}: {error.strerror or error}') from error
  except UnicodeDecodeError as error:
    raise DataError(f'{key}: not UTF-8 at byte {error.start}') from error
  if not text.strip():
    raise DataError(f'{key}: the file is empty; expected a chat template')
  # Two templates in one folder would contradict each other.
  out = {n: x for n, x in files.items() if n != 'chat_template.json'}
  config = json.loads(files.get('tokenizer_config.json', b'{}'))
  if 'chat_template' in config:
    out['tokenizer_config.json'] = dump_json(
      {k: v for k, v in config.items() if k != 'chat_template'}
    )
  return out | {'chat_template.jinja': text.encode()}


def missing_rows(source: str, held: int, wanted: int, rows: NewRows | None) -> NewRows | None:
  """Returns the new rows that the files of `source` lack; None where they have all of them.

  Args:
    source: HF folder or GGUF file that weights are loaded from: the model itself, or the export of
      an earlier run, which may have the new tokens.
    held, wanted: size of the vocabulary of `source`, and of the model.
    rows: new rows of the model.

  Raises:
    ConfigError: `source` has another vocabulary.
  """
  if rows is None:
    if held != wanted:
      raise ConfigError(
        f'{source} has a vocabulary of {held}, model.path one of {wanted}: give its new '
        'tokens in model.add_tokens and model.add_special_tokens, or its folder as model.path'
      )
    return None
  tokenizer = Tokenizer(load.tokenizer_files(source), source)
  found = [tokenizer.find(text) for text in rows.texts]
  if found == list(rows.ids):
    return None
  if tokenizer.vocab_size == rows.first and not any(i is not None for i in found):
    return rows
  known = {t: i for t, i in zip(rows.texts, found, strict=True) if i is not None}
  raise ConfigError(
    f'{source} has {tokenizer.vocab_size} tokens, of the new ones {known}; expected none of them '
    f'and {rows.first} tokens, or all of them from id {rows.first} on: give the tokens of that run '
    'in model.add_tokens and model.add_special_tokens'
  )
