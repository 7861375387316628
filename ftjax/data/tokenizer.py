"""Presents the files of a HF tokenizer as one object: ids, offsets, special and stop tokens, chat
template, fingerprint.

The `tokenizers` library encodes and decodes. Vocabularies without a tokenizer.json are converted
first, by vocabulary_files.py. chat_template.py renders messages to text; encode.py joins the two.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from ftjax.data import vocabulary_files
from ftjax.runtime.errors import DataError, RunError


def _parse(files: Mapping[str, bytes], name: str) -> dict:
  if name not in files:
    return {}
  try:
    value = json.loads(files[name])
  except ValueError as error:
    raise DataError(f'{name}: not JSON: {error}') from error
  if not isinstance(value, dict):
    raise DataError(f'{name}: expected a JSON object, got {type(value).__name__}')
  return value


def _ids(value) -> list[int]:
  """Returns the ids in `eos_token_id` of a HF file: an int, a list of ints, or absent."""
  return [] if value is None else [int(v) for v in (value if isinstance(value, list) else [value])]


def _start_id(generation: Mapping, architecture: Mapping) -> int | None:
  """Returns what decoder_start_token_id names, or what transformers takes without it."""
  if architecture.get('is_encoder_decoder') is not True:
    return None
  keys = ('decoder_start_token_id', 'pad_token_id')
  found = (places.get(k) for k in keys for places in (generation, architecture))
  return next((int(i) for i in found if i is not None), 0)


def _template(files: Mapping[str, bytes], config: Mapping) -> str | None:
  """Returns the chat template; `chat_template.jinja` wins, as in HF."""
  if 'chat_template.jinja' in files:
    return files['chat_template.jinja'].decode()
  value = config.get('chat_template')
  if isinstance(value, list):
    if not all(isinstance(t, dict) and {'name', 'template'} <= t.keys() for t in value):
      raise DataError(
        'tokenizer_config.json: chat_template is a list; expected objects with name and template'
      )
    named = {t['name']: t['template'] for t in value}
    if 'default' not in named:
      raise DataError(
        f'tokenizer_config.json: chat_template: got templates {sorted(named)}, expected one named '
        "'default'"
      )
    value = named['default']
  if value is not None and not isinstance(value, str):
    raise DataError(f'tokenizer_config.json: chat_template is {value!r:.60}; expected a text')
  return value


def _text(key: str, value: Any) -> str:
  """Returns the text of a special token of a HF file: itself, or an object with its content."""
  text = value.get('content') if isinstance(value, dict) else value
  if not isinstance(text, str):
    raise DataError(f'tokenizer_config.json: {key} is {value!r:.60}; expected the text of a token')
  return text


class Tokenizer:
  """Converts text to ids and back, with the special tokens that the folder's files agree on.

  Attributes:
    name: where the files came from, for messages.
    vocab_size: largest id + 1, added tokens included.
    bos_id, eos_id: ids or None. pad_id: falls back to eos, then to 0 (padding is masked by
      position, never by id).
    stop_ids: eos of the tokenizer, then those of generation_config.json and config.json, each once.
    start_id: of an encoder-decoder, the token that its decoder begins with; None for others.
    special_ids: ids of tokens flagged special, and the stop ids.
    prefix_ids, suffix_ids: ids that the tokenizer's own post-processor puts before a text (usually
      BOS) and behind it.
    is_special: bool[vocab_size], the same by id.
    template: the chat template or None.
    special_texts: texts of the special tokens by the names that templates use, 'pad_token' say;
      those of BOS and EOS are always there, '' where there is none.
    dialects: of the template, filled by dialect.py.
    fingerprint: sha256 hex of tokenizer.json and of everything read from the other files.
    files: as given, with a tokenizer.json; another process makes the same tokenizer of them.

  Raises:
    DataError: no usable vocabulary, or files that contradict each other.
  """

  def __init__(self, files: Mapping[str, bytes], name: str = 'tokenizer'):
    if 'tokenizer.json' not in files and vocabulary_files.is_convertible(files):
      files = vocabulary_files.convert(files, name)
    if 'tokenizer.json' not in files:
      raise DataError(f'{name}: no tokenizer.json; got {sorted(files)}')
    self.name, self.files = name, files
    model = _parse(files, 'tokenizer.json')
    config = _parse(files, 'tokenizer_config.json')
    special = _parse(files, 'special_tokens_map.json')
    generation, architecture = _parse(files, 'generation_config.json'), _parse(files, 'config.json')

    # Truncation and padding saved in the file would silently shorten or fill our rows.
    model['truncation'] = model['padding'] = None
    self.prefix_ids, self.suffix_ids, self._pair = _added(model, name)
    # Without the post-processor nothing is added and byte-level offsets keep their leading space:
    # spans tile the text.
    self._tokens = _load(model | {'post_processor': None}, name)
    self.vocab_size = max(self._tokens.get_vocab(with_added_tokens=True).values()) + 1

    def special_id(key: str) -> int | None:
      value = config.get(f'{key}_token') or special.get(f'{key}_token')
      if value is None:
        return None
      text = _text(f'{key}_token', value)
      found = self._tokens.token_to_id(text)
      if found is None:
        raise DataError(f'{name}: {key}_token {text!r} is not in the vocabulary of tokenizer.json')
      return found

    self.bos_id, self.eos_id, pad = (special_id(k) for k in ('bos', 'eos', 'pad'))
    stops = [] if self.eos_id is None else [self.eos_id]
    stops += _ids(generation.get('eos_token_id')) + _ids(architecture.get('eos_token_id'))
    self.stop_ids = tuple(dict.fromkeys(stops))
    if self.eos_id is None and stops:
      self.eos_id = stops[0]
    self.pad_id = next(i for i in (pad, self.eos_id, 0) if i is not None)
    self.start_id = _start_id(generation, architecture)
    added = self._tokens.get_added_tokens_decoder()
    self.special_ids = frozenset(i for i, t in added.items() if t.special) | set(self.stop_ids)
    self.is_special = np.zeros(self.vocab_size, bool)
    self.is_special[[i for i in self.special_ids if i < self.vocab_size]] = True
    self.template = _template(files, config)
    self.special_texts = {
      name: _text(name, value)
      for name in ('unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token')
      if (value := config.get(name) or special.get(name)) is not None
    } | {'bos_token': self.bos_token, 'eos_token': self.eos_token}
    self.dialects: dict[tuple, Any] = {}
    facts = [self.bos_id, self.eos_id, self.pad_id, self.stop_ids, self.template]
    facts += [] if self.start_id is None else [self.start_id]
    digest = hashlib.sha256(b'ftjax tokenizer 1\n')
    digest.update(hashlib.sha256(files['tokenizer.json']).digest())
    digest.update(json.dumps(facts).encode())
    self.fingerprint = digest.hexdigest()

  def same_tokens(self, other: 'Tokenizer') -> bool:
    """Returns whether every id is the same token in both."""
    return self._tokens.get_vocab() == other._tokens.get_vocab()

  @property
  def bos_token(self) -> str:
    """Returns the text of the BOS token, '' if there is none."""
    return '' if self.bos_id is None else self._tokens.id_to_token(self.bos_id)

  @property
  def eos_token(self) -> str:
    """Returns the text of the EOS token, '' if there is none."""
    return '' if self.eos_id is None else self._tokens.id_to_token(self.eos_id)

  def find(self, text: str) -> int | None:
    """Returns the id of the token that is written like `text`; None where there is none."""
    return self._tokens.token_to_id(text)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without those of the tokenizer's post-processor (BOS)."""
    return self._tokens.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of many texts, int32[n] each, nothing added; runs on all cores."""
    found = self._tokens.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in found]

  def encode_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns the ids of many texts with the characters of each id; runs on all cores.

    Returns:
      per text (ids, starts, ends), int32[n] each: id i stands for `text[starts[i]:ends[i]]`. Ids
      that share a character (bytes of one emoji) have the same span.
    """
    out = []
    for e in self._tokens.encode_batch(list(texts), add_special_tokens=False):
      spans = np.array(e.offsets, np.int32).reshape(-1, 2)
      out.append((np.array(e.ids, np.int32), spans[:, 0], spans[:, 1]))
    return out

  def around(self, parts: Sequence[np.ndarray]) -> tuple[list[tuple[np.ndarray, int]], int]:
    """Returns one text, or two that are read together, with the tokens that the tokenizer's own
    post-processor puts around them.

    Args:
      parts: the ids of one text or of two, nothing added.

    Returns:
      (pieces in their order, each (ids, 0 or 1: the text, -1: added); the index from which tokens
      have token type 1, 0 where none has).
    """
    if len(parts) == 1:
      return [(_array(self.prefix_ids), -1), (parts[0], 0), (_array(self.suffix_ids), -1)], 0
    (prefix, middle, suffix), typed = self._pair
    pieces = [(_array(prefix), -1), (parts[0], 0), (_array(middle), -1), (parts[1], 1)]
    second = 0 if typed is None else len(prefix) + len(parts[0]) + typed
    return [*pieces, (_array(suffix), -1)], second

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Returns the text of ids; special tokens are left out unless `skip_special=False`."""
    return self._tokens.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def id_of(self, token: str) -> int | None:
    """Returns the id of a token by its text in the vocabulary; None where there is none."""
    return self._tokens.token_to_id(token)

  def token(self, token_id: int) -> str:
    """Returns one token's text for display; bytes of half a character show as U+FFFD."""
    return self.decode([token_id], skip_special=False)


def _load(model: Mapping, name: str) -> tokenizers.Tokenizer:
  inner = model.get('model')
  if not isinstance(inner, dict) or not inner.get('vocab'):
    raise DataError(f'{name}: tokenizer.json has no model with a vocabulary; got keys {[*model]}')
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(model))
  except RunError:  # a stop that came in between
    raise
  except Exception as error:  # the library raises nothing narrower
    raise DataError(f'{name}: tokenizer.json cannot be used: {error}') from error


def _array(ids: Sequence[int]) -> np.ndarray:
  return np.array(ids, np.int32)


# Ids before, between and behind two texts; how many of those between have token type 0, or None
# where none has type 1.
_Pair = tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], int | None]


def _pair(whole: tokenizers.Tokenizer) -> _Pair:
  """Returns what the file's post-processor puts around two texts."""
  found = whole.encode('a', 'a', add_special_tokens=True)
  of = found.sequence_ids
  first = [i for i, number in enumerate(of) if number == 0]
  second = [i for i, number in enumerate(of) if number == 1]
  spans = ((0, first[0]), (first[-1] + 1, second[0]), (second[-1] + 1, len(of)))
  typed = next((i for i, kind in enumerate(found.type_ids) if kind == 1), None)
  ids = tuple(tuple(found.ids[start:end]) for start, end in spans)
  return ids, None if typed is None else typed - spans[1][0]


def _added(model: Mapping, name: str) -> tuple[tuple[int, ...], tuple[int, ...], _Pair]:
  """Returns the ids that the file's post-processor puts before a text and behind it, and what it
  puts around two texts.
  """
  if model.get('post_processor') is None:
    return (), (), (((), (), ()), 0)
  whole = _load(model, name)
  bare = whole.encode('a', add_special_tokens=False).ids
  full = whole.encode('a', add_special_tokens=True).ids
  for i in range(len(full) - len(bare) + 1):
    if full[i : i + len(bare)] == bare:
      return tuple(full[:i]), tuple(full[i + len(bare) :]), _pair(whole)
  raise DataError(
    f'{name}: the post-processor of tokenizer.json changes a text instead of adding to it'
  )
