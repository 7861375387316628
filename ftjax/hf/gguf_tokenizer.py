"""Builds a HF tokenizer (tokenizer.json and its companions) from the metadata of a GGUF file.

`gpt2` vocabularies are byte-level BPE with merges in the file and a pre-tokenizer named by
`tokenizer.ggml.pre`; `llama` vocabularies are SentencePiece BPE, whose merges are implied by the
scores. Other kinds are refused.
"""

import json
from typing import Any

from ftjax.hf.gguf import GGUFSource
from ftjax.runtime.errors import DataError

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r'\p{N}{1,3}', r'\p{N}')


def _pre_tokenizer(pre: str, place: str):
  """Returns the pre-tokenizer that `tokenizer.ggml.pre` names."""
  from tokenizers import Regex, pre_tokenizers

  def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
      [pre_tokenizers.Split(Regex(pattern), behavior='isolated'), byte_level]
    )

  gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  match pre:
    case 'gpt-2' | 'default':
      return gpt2
    case 'smollm':
      return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    case 'llama-bpe':
      return split(_LLAMA3_SPLIT)
    case 'qwen2':
      return split(_QWEN2_SPLIT)
  raise DataError(
    f'{place}: tokenizer.ggml.pre={pre!r} is not supported; supported: smollm, llama-bpe, gpt-2, '
    'default, qwen2. '
    'Use the HF folder of this model'
  )


def _byte_level(source: GGUFSource, tokens: list[str]):
  from tokenizers import Tokenizer, decoders, models

  pre = source.field('tokenizer.ggml.pre', 'default')
  merges = [tuple(merge.split(' ')) for merge in source.need('tokenizer.ggml.merges')]
  vocab = {token: i for i, token in enumerate(tokens)}
  # Llama 3's own tokenizer takes a word that is a token whole, whatever the merges say.
  bpe = models.BPE(
    vocab=vocab,
    merges=merges,
    fuse_unk=False,
    byte_fallback=False,
    ignore_merges=pre == 'llama-bpe',
  )
  tokenizer = Tokenizer(bpe)
  tokenizer.pre_tokenizer = _pre_tokenizer(pre, source.place)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(source: GGUFSource, tokens: list[str]):
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  vocab = {token: i for i, token in enumerate(tokens)}
  stated = source.field('tokenizer.ggml.merges')
  if stated is not None:
    merges = [tuple(merge.split(' ')) for merge in stated]
  else:
    merges = implied_merges(tokens, source.need('tokenizer.ggml.scores'))
  unk = source.field('tokenizer.ggml.unknown_token_id')
  bpe = models.BPE(
    vocab=vocab,
    merges=merges,
    unk_token=None if unk is None else tokens[unk],
    fuse_unk=True,
    byte_fallback=True,
  )
  tokenizer = Tokenizer(bpe)
  prefix = bool(source.field('tokenizer.ggml.add_space_prefix', True))
  scheme = 'first' if prefix else 'never'
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    replacement='▁', prepend_scheme=scheme, split=False
  )
  steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence(
    [*steps, decoders.Strip(content=' ', left=1)] if prefix else steps
  )
  return tokenizer


def implied_merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
  """Returns the BPE merges that a SentencePiece vocabulary implies: all splits of a token in two,
  best score first.

  Among equal scores the longer left, then the longer right half comes first, then the order of the
  tokens: the order in which transformers derives them.
  """
  ids = {token: i for i, token in enumerate(tokens)}
  rows = []
  for token, score in zip(tokens, scores, strict=True):
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    rows += sorted(
      ((score, left, right) for left, right in cuts if left in ids and right in ids),
      key=lambda row: (ids[row[1]], ids[row[2]]),
    )
  rows.sort(key=lambda row: (row[0], len(row[1]), len(row[2])), reverse=True)
  return [(left, right) for _, left, right in rows]


def build(source: GGUFSource):
  """Returns the `tokenizers.Tokenizer` of a GGUF file.

  Raises:
    DataError: a kind of vocabulary or pre-tokenizer that is not supported.
  """
  from tokenizers import AddedToken

  tokens = source.need('tokenizer.ggml.tokens')
  kind = source.field('tokenizer.ggml.model')
  makers = {'gpt2': _byte_level, 'llama': _sentencepiece}
  if kind not in makers:
    raise DataError(
      f'{source.place}: tokenizer.ggml.model={kind!r} is not supported; supported: '
      f'{", ".join(makers)}'
    )
  if len(set(tokens)) != len(tokens):
    raise DataError(f'{source.place}: tokenizer.ggml.tokens holds a token twice')
  tokenizer = makers[kind](source, tokens)
  types = source.field('tokenizer.ggml.token_type', [])
  for token, token_type in zip(tokens, types, strict=False):
    if token_type == _CONTROL:
      tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    elif token_type == _USER_DEFINED:
      tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
  if processor := _post_processor(source, tokens):
    tokenizer.post_processor = processor
  return tokenizer


def _adds_bos(source: GGUFSource) -> bool:
  # Files without the flag: llama.cpp adds BOS to SentencePiece vocabularies and to Llama 3's, to no
  # other.
  default = (
    source.field('tokenizer.ggml.model') == 'llama'
    or source.field('tokenizer.ggml.pre') == 'llama-bpe'
  )
  return bool(source.field('tokenizer.ggml.add_bos_token', default))


def _post_processor(source: GGUFSource, tokens: list[str]):
  from tokenizers import processors

  bos = source.field('tokenizer.ggml.bos_token_id') if _adds_bos(source) else None
  eos = (
    source.field('tokenizer.ggml.eos_token_id')
    if source.field('tokenizer.ggml.add_eos_token', False)
    else None
  )
  if bos is None and eos is None:
    return None

  def around(piece: str, number: int) -> list[str]:
    before = [] if bos is None else [f'{tokens[bos]}:{number}']
    after = [] if eos is None else [f'{tokens[eos]}:{number}']
    return [*before, f'{piece}:{number}', *after]

  special = [(tokens[i], i) for i in dict.fromkeys([bos, eos]) if i is not None]
  pair = around('$A', 0) + around('$B', 1)
  return processors.TemplateProcessing(single=around('$A', 0), pair=pair, special_tokens=special)


def files(source: GGUFSource) -> dict[str, bytes]:
  """Returns tokenizer.json, tokenizer_config.json and generation_config.json, as in a HF folder."""
  try:
    tokenizer = build(source)
  except DataError:
    raise
  except Exception as error:  # what tokenizers raises has no kind of its own
    raise DataError(
      f'{source.place}: its tokenizer cannot be built ({type(error).__name__}: {error}). Use the '
      'HF folder of this model'
    ) from error
  tokens = source.need('tokenizer.ggml.tokens')
  ids = {
    'bos_token': source.field('tokenizer.ggml.bos_token_id'),
    'eos_token': source.field('tokenizer.ggml.eos_token_id'),
    'unk_token': source.field('tokenizer.ggml.unknown_token_id'),
    'pad_token': source.field('tokenizer.ggml.padding_token_id'),
  }
  config: dict[str, Any] = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'add_bos_token': _adds_bos(source),
    'add_eos_token': bool(source.field('tokenizer.ggml.add_eos_token', False)),
    'clean_up_tokenization_spaces': False,
    'model_max_length': int(source.need('llama.context_length')),
  }
  config |= {name: tokens[i] for name, i in ids.items() if i is not None}
  if template := source.field('tokenizer.chat_template'):
    config['chat_template'] = template
  # An end-of-turn token stops generation as the end of text does.
  stops = [
    i for i in (ids['eos_token'], source.field('tokenizer.ggml.eot_token_id')) if i is not None
  ]
  stops = list(dict.fromkeys(int(i) for i in stops))
  generation: dict[str, Any] = {}
  if ids['bos_token'] is not None:
    generation['bos_token_id'] = int(ids['bos_token'])
  if stops:
    generation['eos_token_id'] = stops[0] if len(stops) == 1 else stops
  if ids['pad_token'] is not None:
    generation['pad_token_id'] = int(ids['pad_token'])
  return {
    'tokenizer.json': tokenizer.to_str(pretty=True).encode() + b'\n',
    'tokenizer_config.json': dump_json(config),
    'generation_config.json': dump_json(generation),
  }


def dump_json(value: Any) -> bytes:
  """Returns a JSON file as HF writes them: indented by 2, non-ASCII as it is."""
  return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()
