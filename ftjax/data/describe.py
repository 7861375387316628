"""Formats batches and corpora as text: a table of tokens with their masks, and counts."""

from collections.abc import Sequence

import numpy as np

from ftjax.data.batches import Batch
from ftjax.data.order import Mixture, SourceSchedule
from ftjax.data.prompts import Prompt, Prompts
from ftjax.data.token_cache import Corpus
from ftjax.data.tokenizer import Tokenizer

_BARS = 40  # of a histogram, at most


def table(batch: Batch, tokenizer: Tokenizer, rows: Sequence[int]) -> str:
  """Returns token | supervised | segment | position of rows of a batch; padding is only counted.

  `supervised` marks a token that the position before it is trained to predict: one position after
  its weight in the batch. For an encoder-decoder the tokens that its encoder reads come first
  (source), then those that its decoder writes.
  """
  lines = []
  for row in rows:
    own = {name: array[row] for name, array in batch.items()}
    weights, tokens = own['weights'] > 0, own['tokens']
    marks = np.where(np.concatenate([[False], weights[:-1]]), 'yes', '.')
    if 'source_tokens' in own:
      lines += [f'packed sequence {row}, encoder: {_filling(own["source_segments"])}', _HEAD]
      where = own['source_segments'], own['source_positions']
      lines += _tokens(own['source_tokens'], *where, np.full(len(where[0]), 'source'), tokenizer)
      tokens, marks = own['labels'], np.where(weights, 'yes', '.')
    side = ', decoder' * ('source_tokens' in own)
    lines += [f'packed sequence {row}{side}: {_filling(own["segments"])}', _HEAD]
    lines += _tokens(tokens, own['segments'], own['positions'], marks, tokenizer)
  return '\n'.join(lines)


_HEAD = f'{"id":>8}  {"token":<24} {"supervised":<10} {"segment":>7} {"position":>8}'


def _filling(segments: np.ndarray) -> str:
  used = int((segments > 0).sum())
  return f'{used} tokens, {len(segments) - used} padding'


def _tokens(tokens, segments, positions, marks, tokenizer: Tokenizer) -> list[str]:
  """Returns a line for each token of a row that is no padding."""
  lines = []
  for t in range(int((segments > 0).sum())):
    token = int(tokens[t])
    text = repr(tokenizer.token(token))
    text = text if len(text) <= 24 else text[:21] + '...'
    numbers = f'{int(segments[t]):>7} {int(positions[t]):>8}'
    lines.append(f'{token:>8}  {text:<24} {marks[t]:<10} {numbers}')
  return lines


def _percentiles(lengths: np.ndarray) -> str:
  found = np.percentile(lengths, [0, 50, 90, 99, 100]).astype(int)
  names = ('shortest', 'median', '90 %', '99 %', 'longest')
  return ', '.join(f'{n} {v}' for n, v in zip(names, found.tolist(), strict=True))


def summary(corpora: Sequence[Corpus], mixture: Mixture) -> str:
  """Returns per source its examples, tokens, lengths, supervised share and dropped rows, then the
  mixture.
  """
  lines = []
  for corpus, schedule, quota in zip(corpora, mixture.sources, mixture.quotas, strict=True):
    counts = corpus.counts
    share = corpus.supervised / corpus.tokens
    lines += [
      f'{corpus.name}: {len(corpus):,} examples of {counts.rows:,} rows read',
      f'  {corpus.tokens:,} tokens, {corpus.supervised:,} supervised ({share:.1%})',
      f'  lengths: {_percentiles(corpus.lengths)}',
      f'  over seq_len: {counts.dropped:,} dropped, {counts.truncated:,} truncated, '
      f'{counts.unsupervised:,} dropped as no supervised token was left',
      f'  {_packing(schedule)}; {quota / sum(mixture.quotas):.1%} of the mixture',
    ]
    if counts.boundary_tokens:
      lines.append(f'  {counts.boundary_tokens:,} tokens on a border of prompt and completion')
    if counts.unread_columns:
      lines.append(f'  columns not read: {unread_columns(corpus)}')
    lines += [f'  {line}' for note in corpus.notes() for line in note.splitlines()]
  lines.append(f'mixture: {mixture.rows_per_epoch:,} packed sequences per epoch')
  return '\n'.join(lines)


def _packing(schedule: SourceSchedule) -> str:
  use = f'{schedule.fill:.1%} token utilization ({1 - schedule.fill:.1%} padding)'
  return f'{schedule.rows_per_epoch:,} packed sequences per epoch, {use}'


def opening(corpus: Corpus) -> str:
  """Returns counts of the first rows of a source, those of `token_cache.head`."""
  lines = [
    f'{corpus.name}: first {corpus.counts.rows:,} rows: {len(corpus):,} examples, '
    f'{corpus.tokens:,} tokens, {corpus.supervised / corpus.tokens:.1%} supervised',
    f'  lengths: {_percentiles(corpus.lengths)}',
  ]
  if corpus.counts.unread_columns:
    lines.append(f'  columns not read: {unread_columns(corpus)}')
  return '\n'.join(lines + [f'  {line}' for note in corpus.notes() for line in note.splitlines()])


def unread_columns(corpus: Corpus) -> str:
  """Returns the columns that the row format does not read, with their counts."""
  found = corpus.counts.unread_columns
  return ', '.join(f'{entry["reason"]} ({entry["rows"]:,} rows)' for entry in found)


def prompts(sources: Sequence[Prompts], first: Sequence[Prompt], tokenizer: Tokenizer) -> str:
  """Returns counts, lengths and columns of prompts, and the first prompts with special tokens."""
  lines = []
  for s in sources:
    lengths = np.sort(s.lengths)
    lines.append(
      f'{s.name}: {len(s.rows)} prompts of {lengths[0]} to {lengths[-1]} tokens, half at most '
      f'{lengths[len(lengths) // 2]}; {s.dropped} longer ones dropped; columns: '
      f'{", ".join(s.columns) or "none"}'
    )
  for p in first:
    lines += ['', f'{p.place}: {len(p.ids)} tokens', tokenizer.decode(p.ids, skip_special=False)]
    lines += [f'  {name} = {value!r}' for name, value in p.columns.items()]
  return '\n'.join(lines)


def length_histogram(lengths: Sequence[int] | np.ndarray) -> dict[str, list[int]]:
  """Returns how many examples have how many tokens, as JSON: counts [K] between whole-numbered
  edges [K + 1], K at most 40; the last edge is one more than the largest length. {} for none.

  lengths: int[n].
  """
  lengths = np.asarray(lengths, np.int64)
  if not len(lengths):
    return {}
  low, high = int(lengths.min()), int(lengths.max()) + 1
  width = -(-(high - low) // _BARS)
  edges = np.arange(low, high + width, width)
  return {'edges': edges.tolist(), 'counts': np.histogram(lengths, edges)[0].tolist()}
