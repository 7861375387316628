"""Deals rows to folds, by scikit-learn: each row is in one fold of each repeat."""

import warnings
from collections.abc import Sequence

import numpy as np

from ftjax.runtime.errors import ConfigError


def deal(
  count: int,
  *,
  folds: int,
  repeats: int,
  seed: int,
  labels: Sequence[str] | None = None,
  groups: Sequence[str] | None = None,
) -> np.ndarray:
  """Returns the fold of each row in each repeat: int64[repeats, count].

  Without groups the folds are those of RepeatedStratifiedKFold, or of RepeatedKFold without labels;
  with groups those of StratifiedGroupKFold or GroupKFold, shuffled, the seed of a repeat being seed
  + repeat.

  Args:
    count: of the rows.
    folds: of a repeat.
    repeats: times that the rows are dealt.
    seed: of the shuffling.
    labels: of the rows, of which each fold has equal shares.
    groups: of the rows: those of one group are in one fold.

  Raises:
    ConfigError: fewer rows, groups or rows of every label than folds; scikit-learn is missing.
  """
  try:
    from sklearn import model_selection
  except ImportError as error:
    raise ConfigError(
      "study.kind=kfold needs scikit-learn: pip install '.[eval]' in the checkout of ftjax"
    ) from error
  least = count if groups is None else len(set(groups))
  if folds > least:
    what = 'rows' if groups is None else 'groups of rows'
    raise ConfigError(f'study.folds={folds}, but data.train has only {least} {what}')
  nothing, out = np.zeros(count), np.full((repeats, count), -1, np.int64)
  if groups is None:
    kind = (
      model_selection.RepeatedKFold if labels is None else model_selection.RepeatedStratifiedKFold
    )
    found = kind(n_splits=folds, n_repeats=repeats, random_state=seed)
    parts = list(_split(found, nothing, labels, None))
  else:
    kind = model_selection.GroupKFold if labels is None else model_selection.StratifiedGroupKFold
    parts = []
    for repeat in range(repeats):
      found = kind(n_splits=folds, shuffle=True, random_state=seed + repeat)
      parts += _split(found, nothing, labels, groups)
  for number, (_, held_out) in enumerate(parts):
    repeat, fold = divmod(number, folds)
    out[repeat, held_out] = fold
  return out


def _split(splitter, rows, labels, groups):
  with warnings.catch_warnings():
    # A class with fewer rows than folds: some folds have none of it, which the table shows.
    warnings.simplefilter('ignore', UserWarning)
    try:
      return list(splitter.split(rows, labels, groups))
    except ValueError as error:
      raise ConfigError(f'study.folds={splitter}: {error}; give fewer folds') from error
