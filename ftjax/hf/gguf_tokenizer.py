"""Builds a HF tokenizer (tokenizer.json and its companions) from the metadata of a GGUF file.

`gpt2` vocabularies are byte-level BPE with merges in the file and a pre-tokenizer named by
`tokenizer.ggml.pre`; `llama` vocabularies are SentencePiece BPE, whose merges are implied by the
scores. Other kinds are refused. gguf_vocabulary.py is the way out.
"""

import json
from typing import Any, NamedTuple

from ftjax.hf.gguf import GGUFSource
from ftjax.runtime.errors import DataError

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

STOPS = ('eos', 'eot', 'eom')

_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r'\p{N}{1,3}', r'\p{N}')
# Combining marks belong to words.
_QWEN35_SPLIT = _QWEN2_SPLIT.replace(r'?\p{L}+', r'?[\p{L}\p{M}]+').replace(
  r'[^\s\p{L}\p{N}]', r'[^\s\p{L}\p{M}\p{N}]'
)

# Words by their letters' case: capitals and what follows them (o200k, 2024; Tekken, 2024).
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_FIRST = rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+'
_SECOND = rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*'
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = rf'{_FIRST}{_SHORT}|{_SECOND}{_SHORT}|\p{{N}}{{1,3}}{_REST}'
_TEKKEN_SPLIT = rf'{_FIRST}|{_SECOND}|\p{{N}}{_REST}'


class Splitting(NamedTuple):
  """What a name in `tokenizer.ggml.pre` stands for, in objects of `tokenizers`.

  normalizer: None for none; that of the models' own tokenizers, since llama.cpp applies none.
  ignore_merges: whether a word that is a token is taken whole, whatever the merges say.
  """

  pre_tokenizer: Any
  normalizer: Any = None
  ignore_merges: bool = False


def splittings() -> dict[str, Splitting]:
  """Returns every name in `tokenizer.ggml.pre` that is supported, with its meaning."""
  from tokenizers import Regex, normalizers, pre_tokenizers

  def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
      [pre_tokenizers.Split(Regex(pattern), behavior='isolated'), byte_level]
    )

  gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  digits = pre_tokenizers.Digits(individual_digits=True)
  return {
    'gpt-2': Splitting(gpt2),
    'smollm': Splitting(pre_tokenizers.Sequence([digits, gpt2])),
    'llama-bpe': Splitting(split(_LLAMA3_SPLIT), ignore_merges=True),
    'qwen2': Splitting(split(_QWEN2_SPLIT), normalizers.NFC()),
    'qwen35': Splitting(split(_QWEN35_SPLIT), normalizers.NFC()),
    'dbrx': Splitting(split(_LLAMA3_SPLIT)),  # OLMo 2, Phi-4
    'gpt-4o': Splitting(split(_GPT4O_SPLIT)),  # Phi-4 mini
    'tekken': Splitting(split(_TEKKEN_SPLIT), ignore_merges=True),  # Mistral Nemo and later
    'refact': Splitting(pre_tokenizers.Sequence([digits, gpt2])),  # Granite; as smollm
  }


def _splitting(pre: str, place: str) -> Splitting:
  known = splittings()
  name = 'gpt-2' if pre == 'default' else pre
  if name not in known:
    raise DataError(
      f'{place}: tokenizer.ggml.pre={pre!r} is not supported; supported: {", ".join(known)}, '
      'default. Use the HF folder of this model'
    )
  return known[name]


def _byte_level(source: GGUFSource, tokens: list[str]):
  from tokenizers import Tokenizer, decoders, models

  split = _splitting(source.field('tokenizer.ggml.pre', 'default'), source.place)
  merges = [tuple(merge.split(' ')) for merge in source.need('tokenizer.ggml.merges')]
  bpe = models.BPE(
    vocab=_vocabulary(source, tokens),
    merges=merges,
    fuse_unk=False,
    byte_fallback=False,
    ignore_merges=split.ignore_merges,
  )
  tokenizer = Tokenizer(bpe)
  if split.normalizer is not None and source.normalizes:
    tokenizer.normalizer = split.normalizer
  tokenizer.pre_tokenizer = split.pre_tokenizer
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def filler(token_id: int) -> str:
  """Returns the text that stands for a row of the embedding that is no token."""
  return f'[PAD{token_id}]'


def _vocabulary(source: GGUFSource, tokens: list[str]) -> dict[str, int]:
  types = source.field('tokenizer.ggml.token_type', [])
  unused = {i for i, kind in enumerate(types) if kind == UNUSED}
  return {t: i for i, t in enumerate(tokens) if not (i in unused and t == filler(i))}


def _sentencepiece(source: GGUFSource, tokens: list[str]):
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  stated = source.field('tokenizer.ggml.merges')
  if stated is not None:
    merges = [tuple(merge.split(' ')) for merge in stated]
  else:
    merges = implied_merges(tokens, source.need('tokenizer.ggml.scores'))
  unk = source.field('tokenizer.ggml.unknown_token_id')
  bpe = models.BPE(
    vocab=_vocabulary(source, tokens),
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
    if token_type in (CONTROL, UNKNOWN):
      tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    elif token_type == USER_DEFINED:
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
    'model_max_length': int(source.need(source.key('context_length'))),
  }
  config |= {name: tokens[i] for name, i in ids.items() if i is not None}
  if template := source.field('tokenizer.chat_template'):
    config['chat_template'] = template
  # Tokens that end a turn or a message stop generation as the end of text does.
  stops = [source.field(f'tokenizer.ggml.{kind}_token_id') for kind in STOPS]
  stops = list(dict.fromkeys(int(i) for i in stops if i is not None))
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
