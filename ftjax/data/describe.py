"""Batches and corpora as text for people: a table of tokens with their masks, and counts."""

from collections.abc import Sequence

import numpy as np

from ftjax.data.batches import Batch
from ftjax.data.cache import Corpus
from ftjax.data.prompts import Prompt, Prompts
from ftjax.data.schedule import Mixture
from ftjax.data.tokenizer import Tokenizer


def table(batch: Batch, tokenizer: Tokenizer, rows: Sequence[int]) -> str:
  """token | supervised | segment | position of some rows of a batch; padding is counted, not shown.

  `supervised` marks a token that some earlier position is trained to predict, so it stands beside
  the token itself, one place after its weight in the batch.
  """
  lines = []
  for row in rows:
    segments = batch['segments'][row]
    used = int((segments > 0).sum())
    supervised = np.concatenate([[False], batch['weights'][row, :-1] > 0])
    lines += [f'row {row}: {used} tokens, {len(segments) - used} padding']
    lines += [f'{"id":>8}  {"token":<24} {"supervised":<10} {"segment":>7} {"position":>8}']
    for t in range(used):
      token = int(batch['tokens'][row, t])
      text = repr(tokenizer.token(token))
      text = text if len(text) <= 24 else text[:21] + '...'
      mark = 'yes' if supervised[t] else '.'
      place = f'{int(segments[t]):>7} {int(batch["positions"][row, t]):>8}'
      lines.append(f'{token:>8}  {text:<24} {mark:<10} {place}')
  return '\n'.join(lines)


def _percentiles(lengths: np.ndarray) -> str:
  found = np.percentile(lengths, [0, 50, 90, 99, 100]).astype(int)
  names = ('shortest', 'median', '90 %', '99 %', 'longest')
  return ', '.join(f'{n} {v}' for n, v in zip(names, found.tolist(), strict=True))


def summary(corpora: Sequence[Corpus], mixture: Mixture) -> str:
  """Per source: examples, tokens, lengths, share supervised, what was dropped; then the mixture."""
  lines = []
  for corpus, schedule, quota in zip(corpora, mixture.sources, mixture.quotas, strict=True):
    counts = corpus.counts
    share = corpus.supervised / corpus.tokens
    lines += [
      f'{corpus.name}: {len(corpus):,} examples of {counts.rows:,} rows read',
      f'  {corpus.tokens:,} tokens, {corpus.supervised:,} supervised ({share:.1%})',
      f'  lengths: {_percentiles(corpus.lengths)}',
      f'  over seq_len: {counts.dropped:,} dropped, {counts.truncated:,} truncated, '
      f'{counts.unsupervised:,} dropped as nothing supervised was left',
      f'  {schedule.rows_per_epoch:,} rows an epoch, {schedule.fill:.1%} full; '
      f'{quota / sum(mixture.quotas):.1%} of the rows of the mixture',
    ]
    if counts.straddled:
      lines.append(f'  {counts.straddled:,} tokens on a border of prompt and answer')
  lines.append(f'mixture: {mixture.rows_per_epoch:,} rows an epoch')
  return '\n'.join(lines)


def prompts(sources: Sequence[Prompts], first: Sequence[Prompt], tokenizer: Tokenizer) -> str:
  """Counts, lengths and columns of prompts to sample from, and the first ones as the model reads
  them."""
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
