"""Makes a tokenizer.json of vocabularies in other formats: SentencePiece models, tiktoken files,
vocab.json with merges.txt.

transformers converts them, as `AutoTokenizer` does for everybody else, so the ids are those that a
model was trained with. It is imported when such files are read. Code that a model folder brings
along is never run, and torch is not imported.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ftjax.runtime import transformers_library
from ftjax.runtime.errors import DataError, RunError, caught

# What the library reads vocabularies, and the class of the tokenizer, from.
_VOCABULARIES = ('.model', '.tiktoken', 'vocab.json', 'vocab.txt')
_OTHERS = (
  'merges.txt',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'config.json',
)
_SPECIAL = ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token')


def is_convertible(files: Mapping[str, bytes]) -> bool:
  """Returns whether files without tokenizer.json hold a vocabulary that may be converted."""
  return any(name.endswith(_VOCABULARIES) for name in files)


def convert(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
  """Returns the files with a tokenizer.json, and with the special tokens that no file names.

  Args:
    files: of a HF folder, by name.
    name: of the folder, for messages.

  Raises:
    DataError: transformers cannot read them, or has no fast tokenizer for them.
  """
  reader = transformers_library.load('AutoTokenizer').AutoTokenizer
  with tempfile.TemporaryDirectory(prefix='ftjax-tokenizer-') as folder:
    for file, content in files.items():
      if '/' not in file and (file.endswith(_VOCABULARIES) or file in _OTHERS):
        (Path(folder) / file).write_bytes(content)
    made = []
    # The library raises many kinds of errors for broken and unknown files.
    error = caught(
      lambda: made.append(
        reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
      )
    )
  if isinstance(error, RunError):  # a stop that came in between
    raise error
  if error:
    reason = (str(error).replace(folder, name).splitlines() or [''])[0][:300]
    raise DataError(
      f'{name}: there is no tokenizer.json, and transformers cannot make one of '
      f'{_vocabularies(files)}: {type(error).__name__}: {reason}'
    ) from error
  [found] = made
  if not found.is_fast:
    raise DataError(
      f'{name}: there is no tokenizer.json, and transformers has none for {type(found).__name__}'
    )
  named = {key: str(getattr(found, key)) for key in _SPECIAL if getattr(found, key) is not None}
  config, special = (
    json.loads(files.get(file, b'{}'))
    for file in ('tokenizer_config.json', 'special_tokens_map.json')
  )
  special |= {key: text for key, text in named.items() if not (config | special).get(key)}
  return dict(files) | {
    'tokenizer.json': found.backend_tokenizer.to_str().encode(),
    'special_tokens_map.json': json.dumps(special).encode(),
  }


def _vocabularies(files: Mapping[str, bytes]) -> str:
  return ', '.join(sorted(name for name in files if name.endswith(_VOCABULARIES)))
