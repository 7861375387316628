"""Scores of the vectors of texts: whether an anchor's positive is found among all texts, and how
cosines agree with given scores.
"""

import math

import numpy as np

from ftjax.evaluation.statistics import intervals

_BLOCK = 1024  # anchors compared at once
_DEPTH = 10


def ranks(
  queries: np.ndarray, texts: np.ndarray, relevant: np.ndarray, ignored: np.ndarray
) -> np.ndarray:
  """Returns the rank of the nearest relevant text of each query, int64[Q] from 1, by cosine. A text
  that is as near and not relevant counts as nearer.

  Args:
    queries, texts: float[Q, D], float[C, D] of length 1.
    relevant: bool[Q, C], at least one of each query.
    ignored: bool[Q, C], texts that do not count.
  """
  cosines = queries.astype(np.float32) @ texts.astype(np.float32).T
  best = np.where(relevant, cosines, -np.inf).max(-1, keepdims=True)
  return 1 + ((cosines >= best) & ~relevant & ~ignored).sum(-1)


def of_groups(vectors: np.ndarray, ids: np.ndarray, there: np.ndarray) -> dict[str, float]:
  """Returns recall at 1, with its 95 % interval (Wilson), and at 10, and the mean reciprocal rank
  of positives among all different positives and negatives; of each different anchor.

  Relevant for an anchor are the positives of all groups with an equal anchor. A text that is equal
  to the anchor does not count unless it is one of them.

  Args:
    vectors: float32[N, K, D] of length 1: anchor, positive, negatives.
    ids: float32[N, K, 2], equal for equal texts.
    there: bool[N, K].
  """
  size = vectors.shape[1]
  keys = ids.reshape(-1, 2).astype(np.float64) @ np.array([2.0**24, 1.0])
  keys = keys.reshape(len(vectors), size)
  anchors, first = np.unique(keys[:, 0], return_index=True)
  where = np.argwhere(there[:, 1:]) + np.array([0, 1])
  text_keys, chosen = np.unique(keys[tuple(where.T)], return_index=True)
  texts = vectors[tuple(where[chosen].T)]
  rows, columns = np.searchsorted(anchors, keys[:, 0]), np.searchsorted(text_keys, keys[:, 1])
  found = []
  for start in range(0, len(anchors), _BLOCK):
    some = slice(start, start + _BLOCK)
    ignored = anchors[some, None] == text_keys[None]
    relevant = np.zeros(ignored.shape, bool)
    inside = (rows >= start) & (rows < start + _BLOCK)
    relevant[rows[inside] - start, columns[inside]] = True
    found.append(ranks(vectors[first[some], 0], texts, relevant, ignored))
  return _scores(np.concatenate(found)) | {'candidates': len(text_keys)}


def _scores(found: np.ndarray) -> dict[str, float]:
  count = int((found == 1).sum())
  low, high = intervals.wilson(count, len(found))
  return {
    'recall_at_1': count / len(found),
    'recall_at_1_low': low,
    'recall_at_1_high': high,
    f'recall_at_{_DEPTH}': float((found <= _DEPTH).mean()),
    'mrr': float((1 / found).mean()),
    'queries': len(found),
  }


def correlations(cosines: np.ndarray, scores: np.ndarray) -> dict[str, float]:
  """Returns Spearman's and Pearson's correlation, float[N] each; NaN where one is constant."""
  from scipy import stats  # slow to import

  if len({*cosines.tolist()}) < 2 or len({*scores.tolist()}) < 2:
    return {'spearman': math.nan, 'pearson': math.nan}
  return {
    'spearman': float(stats.spearmanr(cosines, scores).statistic),
    'pearson': float(stats.pearsonr(cosines, scores).statistic),
  }
