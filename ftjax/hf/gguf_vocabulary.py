"""Describes a HF tokenizer in the metadata of a GGUF file, as llama.cpp reads it.

Two kinds exist: `gpt2`, byte-level BPE with its merges and the name of its pre-tokenizer, and
`llama`, SentencePiece BPE, whose merges follow from scores. What llama.cpp would not compute in the
same way is refused: a pre-tokenizer without a name, a normalizer, tokens that swallow spaces.
gguf_tokenizer.py is the way in.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ftjax.data.tokenizer import Tokenizer
from ftjax.hf import gguf_tokenizer
from ftjax.hf.gguf_tokenizer import BYTE, CONTROL, NORMAL, STOPS, UNKNOWN, UNUSED, USER_DEFINED
from ftjax.runtime.errors import DataError

log = logging.getLogger(__name__)

_BYTES = frozenset(f'<0x{b:02X}>' for b in range(256))


def metadata(
  tokenizer: Tokenizer, vocab_size: int, config: Mapping[str, Any], *, normalizes: bool
) -> dict[str, Any]:
  """Returns the metadata of a tokenizer.

  Args:
    tokenizer: of the model.
    vocab_size: V, rows of its embedding; rows without a token get an unused one.
    config: the config.json, for a BOS id that the tokenizer does not name.
    normalizes: whether the family's own tokenizers normalize text where llama.cpp does not.

  Raises:
    DataError: llama.cpp has no tokenizer that gives the same ids, more tokens than rows, or no
      token that ends a text.
  """
  content = json.loads(tokenizer.files['tokenizer.json'])
  model = content['model']
  if model.get('type', 'BPE') != 'BPE' or 'merges' not in model:
    raise _refused(tokenizer, f'its model is {model.get("type")}; GGUF is written for BPE')
  for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
    if model.get(key):
      raise _refused(tokenizer, f'{key}={model[key]!r} is not known to llama.cpp')
  tokens, types = _tokens(tokenizer, content, vocab_size)
  if any(step.get('type') == 'ByteLevel' for step in _steps(content.get('pre_tokenizer'))):
    out = _byte_level(tokenizer, content, normalizes)
  else:
    out = _sentencepiece(tokenizer, content, tokens, types)
  out |= {'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': types}
  out |= _ids(tokenizer, config, len(tokens))
  if tokenizer.template is not None:
    out['tokenizer.chat_template'] = tokenizer.template
  return out


def _refused(tokenizer: Tokenizer, reason: str) -> DataError:
  return DataError(
    f'{tokenizer.name}: its tokenizer cannot be written to a GGUF file: {reason}. Export a Hugging '
    'Face folder instead'
  )


def _tokens(
  tokenizer: Tokenizer, content: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
  """Returns texts and types of all V tokens."""
  known = {i: (text, NORMAL) for text, i in content['model']['vocab'].items()}
  for token in content.get('added_tokens') or ():
    for flag in ('lstrip', 'rstrip', 'single_word'):
      if token.get(flag):
        raise _refused(tokenizer, f'{token["content"]!r} has {flag}, which llama.cpp does not know')
    known[token['id']] = token['content'], CONTROL if token['special'] else USER_DEFINED
  if (last := max(known)) >= vocab_size:
    raise DataError(
      f'{tokenizer.name}: token {known[last][0]!r} has id {last}, and the embedding has '
      f'{vocab_size} rows; the tokenizer is of another model'
    )
  filled = [known.get(i, (gguf_tokenizer.filler(i), UNUSED)) for i in range(vocab_size)]
  texts = [text for text, _ in filled]
  if len(set(texts)) != len(texts):
    raise _refused(tokenizer, 'two ids have the same text')
  return texts, [kind for _, kind in filled]


def _steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """Returns the steps of a pre-tokenizer or normalizer, without settings that change no id."""
  if part is None:
    return []
  if part['type'] == 'Sequence':
    inner = part.get('pretokenizers') or part.get('normalizers') or []
    return [step for p in inner for step in _steps(p)]
  step = {k: v for k, v in part.items() if k != 'trim_offsets'}
  if step['type'] == 'ByteLevel':
    step = {'use_regex': True, 'add_prefix_space': True} | step  # defaults of older files
  if step['type'] == 'Split' and step.get('behavior') == 'Removed' and step.get('invert'):
    # Keeping only what matches: the known patterns match everything.
    step |= {'behavior': 'Isolated', 'invert': False}
  return [step]


def _byte_level(
  tokenizer: Tokenizer, content: Mapping[str, Any], normalizes: bool
) -> dict[str, Any]:
  model = content['model']
  merges = [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
  if not merges or any(' ' in piece for pair in merges for piece in pair):
    raise _refused(tokenizer, f'{len(merges)} merges, or merges with spaces')
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': _pre(tokenizer, content, normalizes),
    'tokenizer.ggml.merges': [' '.join(pair) for pair in merges],
  }


def _pre(tokenizer: Tokenizer, content: Mapping[str, Any], normalizes: bool) -> str:
  """Returns llama.cpp's name of a pre-tokenizer."""
  steps, normalizer = _steps(content['pre_tokenizer']), _steps(content.get('normalizer'))
  ignores = bool(content['model'].get('ignore_merges'))
  for name, known in gguf_tokenizer.splittings().items():
    expected = _steps(json.loads(known.pre_tokenizer.__getstate__()))
    if steps != expected or ignores != known.ignore_merges:
      continue
    own = [] if known.normalizer is None else _steps(json.loads(known.normalizer.__getstate__()))
    if not normalizer or (normalizes and normalizer == own):
      return name
  raise _refused(
    tokenizer,
    f'llama.cpp has no name for its pre-tokenizer {json.dumps(steps, ensure_ascii=False)[:300]} '
    f'with normalizer {json.dumps(normalizer)[:100]} and ignore_merges={ignores}; known: '
    f'{", ".join(gguf_tokenizer.splittings())}',
  )


def _sentencepiece(
  tokenizer: Tokenizer, content: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
  """Returns the metadata of a SentencePiece BPE; marks its byte tokens in `types`."""
  model = content['model']
  if not model.get('byte_fallback') or not _BYTES.issubset(tokens):
    raise _refused(
      tokenizer, 'it is neither byte-level BPE nor SentencePiece BPE with a token for every byte'
    )
  for i, token in enumerate(tokens):
    if token in _BYTES:
      types[i] = BYTE
    elif token == model.get('unk_token'):
      types[i] = UNKNOWN
  merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in model['merges']]
  added = {tokens[token['id']] for token in content.get('added_tokens') or ()}
  ranks = _ranks(merges, added)
  scores = [-float(ranks[token]) if token in ranks else 0.0 for token in tokens]
  if gguf_tokenizer.implied_merges(tokens, scores) != merges:
    raise _refused(
      tokenizer, 'its merges are not those of a SentencePiece vocabulary, which scores would give'
    )
  # llama.cpp merges characters that are no tokens too, where others write them as bytes.
  # A space is written as ▁ before that.
  if lone := sorted(set(''.join(map(''.join, merges))) - set(tokens) - {' '}):
    raise _refused(tokenizer, f'the character {lone[0]!r} of a merge is no token of its own')
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.pre': 'default',
    'tokenizer.ggml.scores': scores,
    'tokenizer.ggml.add_space_prefix': _space_prefix(tokenizer, content),
  }


def _ranks(merges: Sequence[tuple[str, ...]], added: Collection[str]) -> dict[str, int]:
  """Returns {token: rank} from the merges that make it; the best rank is 0.

  Tokens whose merges stand mixed had one score (Gemma's). Their order counts in a BPE and not in
  llama.cpp, so all of them but one must be added tokens, which are found before any merge.
  """
  last = {''.join(pair): rank for rank, pair in enumerate(merges)}
  ranks: dict[str, int] = {}
  start, end, alone = 0, -1, True
  for rank, pair in enumerate(merges):
    token = ''.join(pair)
    if rank > end:
      start, alone = rank, True
    end = max(end, last[token])
    if token in ranks:
      continue
    mixed = start != rank and token not in added and not alone
    ranks[token] = rank if mixed else start
    alone = alone and token in added
  return ranks


def _space_prefix(tokenizer: Tokenizer, content: Mapping[str, Any]) -> bool:
  """Returns whether a text gets a space in front."""
  replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
  prepend = {'type': 'Prepend', 'prepend': '▁'}
  steps, normalizer = _steps(content.get('pre_tokenizer')), _steps(content.get('normalizer'))
  if normalizer == [replace]:
    # Splitting at spaces does nothing once they are replaced (Gemma).
    steps = [s for s in steps if (s['type'], s.get('pattern')) != ('Split', {'String': ' '})]
  if not steps and normalizer in ([prepend, replace], [replace]):
    return normalizer[0] == prepend
  if not normalizer and len(steps) == 1 and steps[0]['type'] == 'Metaspace':
    scheme = steps[0].get('prepend_scheme', 'always')
    if steps[0].get('replacement') == '▁' and steps[0].get('split') is False:
      if scheme != 'never':
        log.warning(
          '%s: its tokenizer puts a space before a text that begins with none; llama.cpp puts one '
          'before every text and after every special token. Other texts have the same tokens',
          tokenizer.name,
        )
      return scheme != 'never'
  raise _refused(
    tokenizer,
    f'llama.cpp knows no SentencePiece BPE with pre-tokenizer {json.dumps(steps)[:200]} and '
    f'normalizer {json.dumps(normalizer)[:200]}',
  )


def _ids(tokenizer: Tokenizer, config: Mapping[str, Any], count: int) -> dict[str, Any]:
  """Returns the ids of special tokens, and whether BOS and EOS are added to a text."""
  if not tokenizer.stop_ids:
    raise _refused(tokenizer, 'no eos_token ends a text, and llama.cpp would take token 11 for one')
  bos = tokenizer.bos_id
  if bos is None and isinstance(config.get('bos_token_id'), int):
    bos = config['bos_token_id']
  ids = {'bos': bos} | dict(zip(STOPS, tokenizer.stop_ids, strict=False))
  for key, name in (('unknown', 'unk_token'), ('padding', 'pad_token')):
    if text := tokenizer.special_texts.get(name):
      ids[key] = tokenizer.id_of(text)
  if wrong := {k: i for k, i in ids.items() if i is not None and not 0 <= i < count}:
    raise DataError(f'{tokenizer.name}: special tokens {wrong} are outside of {count} tokens')
  before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
  eos = ids[STOPS[0]]
  if before not in ((), (bos,)) or after not in ((), (eos,)):
    raise _refused(
      tokenizer,
      f'it adds the ids {[*before]} before a text and {[*after]} behind it; llama.cpp adds BOS '
      f'{bos} and EOS {eos} at most',
    )
  out = {f'tokenizer.ggml.{key}_token_id': int(i) for key, i in ids.items() if i is not None}
  return out | {
    'tokenizer.ggml.add_bos_token': bool(before),
    'tokenizer.ggml.add_eos_token': bool(after),
  }
