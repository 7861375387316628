"""Span corruption, T5's pretraining (Raffel et al. 2020, section 3.1.4): spans of a document are
replaced by sentinels, and the decoder writes the spans, each after its sentinel.

  Thank you for inviting me to your party last week
  source: Thank you <0> me to your party <1> week EOS
  target: <0> for inviting <1> last EOS

How many tokens are noise, and in how many spans, follows from the length of a document alone, so
that rows can be packed before it is drawn. The spans follow from (seed, document, epoch): the order
of the data stays a pure function, and every epoch has other spans.

Lengths and spans are those of `random_spans_noise_mask` in google-research/text-to-text-transfer-
transformer, t5/data/preprocessors.py: a document begins with a span that is kept and ends with one
that is noise.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad, Example, Text
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Corruption:
  """Settings. density: share of the tokens that are noise. mean_length: of a span of noise.
  sentinels: ids, the first one of the first span. eos_id: ends both sides. seed: of the spans.
  """

  density: float
  mean_length: float
  sentinels: tuple[int, ...]
  eos_id: int
  seed: int


def sentinels(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the ids of <extra_id_0>, <extra_id_1>, ... of a vocabulary; mT5 writes them with
  SentencePiece's space.

  Raises:
    DataError: there are none.
  """
  found: list[int] = []
  while True:
    name = f'<extra_id_{len(found)}>'
    own = [i for i in map(tokenizer.find, (name, f'\u2581{name}')) if i is not None]
    if not own:
      break
    found.append(own[0])
  if not found:
    raise DataError(
      f'{tokenizer.name}: no token <extra_id_0> in the vocabulary, which span corruption puts in '
      'place of a span; add some, model.add_special_tokens=("<extra_id_0>", "<extra_id_1>", ...)'
    )
  return tuple(found)


def _counts(length: np.ndarray | int, how: Corruption) -> tuple[np.ndarray, np.ndarray]:
  """Returns (tokens that are noise, spans of them) of documents of `length` tokens, int64."""
  length = np.asarray(length, np.int64)
  # Rounded as numpy rounds, half to even, of float32 products as in T5's program.
  noise = np.round(length.astype(np.float32) * np.float32(how.density)).astype(np.int64)
  noise = np.clip(noise, 1, np.maximum(length - 1, 1))
  spans = np.round(noise.astype(np.float32) / np.float32(how.mean_length)).astype(np.int64)
  return noise, np.clip(spans, 1, np.maximum(np.minimum(noise, length - noise), 1))


def lengths(length: np.ndarray | int, how: Corruption) -> tuple[np.ndarray, np.ndarray]:
  """Returns the tokens of (source, target) of documents of `length` tokens, with EOS."""
  noise, spans = _counts(length, how)
  return np.asarray(length) - noise + spans + 1, noise + spans + 1


@functools.cache
def longest(how: Corruption, source_len: int, seq_len: int) -> int:
  """Returns the tokens of the longest document whose source has at most `source_len` tokens and its
  target `seq_len`, and which needs no more sentinels than there are.

  Raises:
    ConfigError: no document fits.
  """
  sizes = np.arange(2, 2 * (source_len + seq_len) + 2)
  source, target = lengths(sizes, how)
  fits = (
    (source <= source_len) & (target <= seq_len) & (_counts(sizes, how)[1] <= len(how.sentinels))
  )
  # Of rising lengths the first that does not fit ends the search: rounding makes steps.
  count = len(fits) if fits.all() else int(fits.argmin())
  if not count:
    raise ConfigError(
      f'seq2seq.source_len={source_len}, seq_len={seq_len}: too short for a corrupted document'
    )
  return int(sizes[count - 1])


def encode(rows: Sequence[Example], tokenizer: Tokenizer, most: int) -> list[list[Encoded] | Bad]:
  """Tokenizes documents: per row its pieces of at most `most` tokens, or Bad. A piece of one token,
  of which nothing could be kept, is left out where it is not the only one.
  """
  texts = [r.text if isinstance(r, Text) else None for r in rows]
  found = iter(tokenizer.encode_batch([t for t in texts if t is not None]))
  out: list[list[Encoded] | Bad] = []
  for text in texts:
    if text is None:
      out.append(Bad('no document: span corruption reads rows with a column "text", or lines'))
      continue
    ids = next(found)
    pieces = [ids[i : i + most] for i in range(0, len(ids), most)]
    pieces = [p for p in pieces if len(p) > 1]
    if not pieces:
      out.append(Bad(f'a document of {len(ids)} tokens; expected at least 2'))
      continue
    out.append([Encoded(p, np.arange(len(p)) > 0, False) for p in pieces])
  return out


def _segments(total: int, count: int, bits: np.ndarray) -> np.ndarray:
  """Returns `count` positive lengths, int64, that sum to `total`; every such division is as likely.

  bits: uint64[total - 1], whose `count - 1` smallest mark where a segment ends.
  """
  ends = np.sort(np.argsort(bits, kind='stable')[: count - 1]) + 1
  return np.diff(np.concatenate([[0], ends, [total]]))


def noise_mask(length: int, how: Corruption, *names: str | int) -> np.ndarray:
  """Returns bool[length], True for noise; random bits are keyed by the seed and `names`."""
  noise, spans = (int(x) for x in _counts(length, how))
  text = '/'.join(map(str, ('spans', how.seed, *names))).encode()
  key = np.frombuffer(hashlib.sha256(text).digest()[:16], '<u8').astype(np.uint64)
  bits = np.random.Philox(key=key).random_raw(max(length - 2, 1))
  kept = length - noise
  parts = (
    _segments(noise, spans, bits[: noise - 1]),
    _segments(kept, spans, bits[noise - 1 : length - 2]),
  )
  sizes = np.stack(parts[::-1], 1).reshape(-1)
  return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)


def apply(
  tokens: np.ndarray, is_noise: np.ndarray, how: Corruption
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (source, target) of a document, int32, for the tokens that are noise."""
  begins = is_noise & ~np.concatenate([[False], is_noise[:-1]])
  marks = np.asarray(how.sentinels[: begins.sum()], np.int32)
  source = np.array(tokens, np.int32)
  source[begins] = marks
  source = source[~is_noise | begins]
  target = np.insert(tokens[is_noise], np.flatnonzero(begins[is_noise]), marks)
  return tuple(np.append(side, how.eos_id).astype(np.int32) for side in (source, target))


def corrupt(
  tokens: np.ndarray, how: Corruption, fingerprint: str, epoch: int, i: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (source, target) of document i of a corpus in an epoch."""
  return apply(tokens, noise_mask(len(tokens), how, fingerprint, epoch, i), how)
