"""Rows for an encoder-decoder: what its encoder reads, and what its decoder writes.

A stored example is both, one after the other, with the index of the border. sides.py puts them into
batches.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax.data import source_text
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad, Example
from ftjax.data.tokenizer import Tokenizer


def encode(rows: Sequence[Example], tokenizer: Tokenizer) -> list[list[Encoded] | Bad]:
  """Tokenizes rows: per row a list of one example, whose target is supervised, or Bad.

  Raises:
    DataError: the tokenizer has no EOS.
  """
  stop = source_text.end(tokenizer)
  texts: list[tuple[str, str] | Bad] = []
  for row in rows:
    try:
      texts.append(source_text.read(row, tokenizer))
    except ValueError as error:
      texts.append(Bad(str(error)))
  good = [t for t in texts if not isinstance(t, Bad)]
  prompts = iter(tokenizer.encode_batch([prompt for prompt, _ in good]))
  answers = iter(tokenizer.encode_batch([answer for _, answer in good]))
  out: list[list[Encoded] | Bad] = []
  for text in texts:
    if isinstance(text, Bad):
      out.append(text)
      continue
    source = source_text.ids(next(prompts), tokenizer)
    target = next(answers).tolist()
    target = target if target[-1:] == [stop] else [*target, stop]
    if len(target) < 2:
      out.append(Bad('of the answer nothing but the stop token would be supervised'))
      continue
    tokens = np.array([*source, *target], np.int32)
    supervised = np.arange(len(tokens)) >= len(source)
    out.append([Encoded(tokens, supervised, False, boundary=len(source))])
  return out


def fit(example: Encoded, source_len: int, seq_len: int, on_overlength: str) -> Encoded | None:
  """Applies the over-length policy to each side.

  'truncate_left' keeps the end of a source and 'truncate_right' its beginning, both with its last
  token, which ends it; of a target both keep the beginning.

  Returns:
    the example, a shorter one, or None where it is dropped.

  Raises:
    ValueError: policy 'error' and a longer side.
  """
  source, target = example.tokens[: example.boundary], example.tokens[example.boundary :]
  if len(source) <= source_len and len(target) <= seq_len:
    return example
  if on_overlength == 'drop':
    return None
  if on_overlength == 'error':
    raise ValueError(
      f'{len(source)} tokens for the encoder and {len(target)} for the decoder, more than '
      f'{source_len} (seq2seq.source_len) or {seq_len} (seq_len); raise them, or set '
      "data.on_overlength to 'drop', 'truncate_left' or 'truncate_right'"
    )
  if len(source) > source_len and on_overlength == 'truncate_left':
    source = source[-source_len:]
  elif len(source) > source_len:
    source = np.concatenate([source[: source_len - 1], source[-1:]])
  target = target[:seq_len]
  tokens = np.concatenate([source, target])
  supervised = np.arange(len(tokens)) >= len(source)
  return dataclasses.replace(example, tokens=tokens, supervised=supervised, boundary=len(source))
