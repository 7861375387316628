"""Labels of classification rows: balance, conflicts, likely errors by out-of-fold confidence."""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ftjax.audit import rows as rows_lib
from ftjax.audit.finding import Finding
from ftjax.audit.rows import Row, found
from ftjax.evaluation import ngrams

_MOST_LABELS = 100
_MOST_SHARE = 0.1  # different labels per row of a set with labels
_MOST_WORDS = 6  # of a label that is an answer
_RARE = 10.0  # times fewer rows than the most frequent label
FOLDS = 5

# (texts, labels int[n], classes, folds, seed) -> probabilities float[n, classes], out of fold.
Scorer = Callable[[Sequence[str], np.ndarray, int, int, int], np.ndarray]


def of_rows(rows: Sequence[Row]) -> list[str] | None:
  """Returns the label of each row: the one that it names, or its answer where the answers are few
  and short; None where the rows are not for classification.
  """
  if len(rows) < 2 or any(row.is_pair for row in rows):
    return None
  if all(row.label is not None for row in rows):
    labels = [str(row.label) for row in rows]
  elif all(row.prompt and len(row.answers) == 1 for row in rows):
    labels = [ngrams.whole(row.answer) for row in rows]
    if max(len(text.split()) for text in set(labels)) > _MOST_WORDS:
      return None
  else:
    return None
  different = len(set(labels))
  return labels if different <= min(_MOST_LABELS, max(2, _MOST_SHARE * len(rows))) else None


def balance(labels: Sequence[str]) -> dict[str, int]:
  """Returns {label: rows}, the most frequent first."""
  return dict(Counter(labels).most_common())


def rare(rows: Sequence[Row], labels: Sequence[str]) -> list[Finding]:
  """Finds labels with under a tenth of the rows of the most frequent one, at their first row."""
  counts = balance(labels)
  most = max(counts.values())
  out = []
  for label, number in counts.items():
    if number * _RARE < most:
      detail = f'{number:,} rows, the most frequent label has {most:,}'
      out.append(found('rare_label', rows, labels.index(label), label, detail))
  return out


def conflicts(rows: Sequence[Row], labels: Sequence[str]) -> list[Finding]:
  """Finds all rows with an input that other rows have under another label."""
  by_input: dict[str, dict[str, int]] = {}
  for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
    by_input.setdefault(rows_lib.input_key(row), {}).setdefault(label, i)
  out = []
  for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
    own = by_input[rows_lib.input_key(row)]
    if len(own) > 1:
      other, at = next((name, at) for name, at in own.items() if name != label)
      detail = f'{label!r} here, {other!r} in {rows[at].place}'
      out.append(found('conflicting_labels', rows, i, row.shown, detail))
  return out


def suspects(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
  """Returns the rows whose label is likely wrong, the most likely ones first.

  Confident learning (Northcutt et al. 2021, JAIR 70, the confident joint): the threshold of a class
  is the mean probability of that class over the rows that carry its label. A row is a suspect if
  the likeliest class among those that reach their threshold is not its label. The order is that of
  p(label) - max p(other class).

  Args:
    labels: int[n], the given classes.
    probs: float[n, C], out-of-fold probabilities: of models that were not trained on the row.

  Returns:
    int64[m], indices of rows.

  Raises:
    ValueError: shapes that do not fit, or labels or probabilities out of range.
  """
  labels, probs = np.asarray(labels), np.asarray(probs, np.float64)
  if probs.ndim != 2 or labels.shape != probs.shape[:1]:
    raise ValueError(f'suspects: labels {labels.shape}, probs {probs.shape}; expected [n], [n, C]')
  if not len(labels):
    return np.zeros(0, np.int64)
  if labels.min() < 0 or labels.max() >= probs.shape[1]:
    raise ValueError(f'suspects: labels up to {labels.max()}; expected 0 to {probs.shape[1] - 1}')
  if not np.isfinite(probs).all() or probs.min() < 0 or probs.max() > 1 + 1e-6:
    raise ValueError('suspects: probs hold a number outside of [0, 1]')
  own = probs[np.arange(len(labels)), labels]
  totals = np.bincount(labels, own, minlength=probs.shape[1])
  counts = np.bincount(labels, minlength=probs.shape[1])
  thresholds = np.where(counts > 0, totals / np.maximum(counts, 1), np.inf)
  reaching = np.where(probs >= thresholds, probs, -1.0)
  likeliest = reaching.argmax(1)
  is_suspect = (reaching.max(1) >= 0) & (likeliest != labels)
  others = probs.copy()
  others[np.arange(len(labels)), labels] = -1.0
  margin = own - others.max(1)
  found_rows = np.flatnonzero(is_suspect)
  return found_rows[np.argsort(margin[found_rows], kind='stable')]


def has_scorer() -> bool:
  """Returns whether scikit-learn is installed, which `out_of_fold` needs."""
  return importlib.util.find_spec('sklearn') is not None


def out_of_fold(
  texts: Sequence[str], labels: np.ndarray, classes: int, folds: int, seed: int
) -> np.ndarray:
  """Computes out-of-fold probabilities by logistic regression on TF-IDF of words and pairs of words
  and of parts of words.

  Args:
    texts: inputs of n rows.
    labels: int[n] in [0, classes).
    classes: C. Of a class with fewer rows than folds, some rows have no model that knows it.
    folds: parts; equal texts are in one part, so that no model was trained on the row's text.
    seed: of the division.

  Returns:
    float64[n, C].
  """
  import scipy.sparse
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.linear_model import LogisticRegression
  from sklearn.model_selection import StratifiedGroupKFold

  words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1)
  pieces = TfidfVectorizer(analyzer='char_wb', ngram_range=(2, 5), sublinear_tf=True, min_df=2)
  made = []
  for vectorizer in (words, pieces):
    try:
      made.append(vectorizer.fit_transform(texts))
    except ValueError:  # no word in any text
      continue
  out = np.full((len(texts), classes), 1 / classes)
  if not made:
    return out
  features = scipy.sparse.hstack(made).tocsr()
  number = {text: k for k, text in enumerate(dict.fromkeys(texts))}
  groups = np.array([number[text] for text in texts])
  division = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
  with warnings.catch_warnings():  # of a rare class, some folds have no row
    warnings.simplefilter('ignore', UserWarning)
    parts = list(division.split(features, labels, groups))
  for train, test in parts:
    if len(set(labels[train].tolist())) < 2:
      continue
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features[train], labels[train])
    out[test] = 0.0
    out[np.ix_(test, model.classes_)] = model.predict_proba(features[test])
  return out


_MIN_ROWS = 100  # with labels, below which no model is worth fitting
# Probability of the other label from which a suspect is reported: of a weak model, whose suspects
# are mostly its own errors, this leaves about one right in two; see docs/audit.md.
_LEAST = 0.9
_MIN_ACCURACY_GAIN = 0.1  # above the most frequent label; else its doubts mean nothing


# {place of a row: {label: probability}}, by models that were not trained on the row.
Given = Mapping[str, Mapping[str, float]]


def _of_scorer(rows: Sequence[Row], labels: Sequence[str], scorer: Scorer, seed: int):
  """Returns (indices of all rows, names of the classes, classes int[n], probabilities [n, C])."""
  names = sorted(set(labels))
  numbers = np.array([names.index(label) for label in labels])
  texts = ['\n'.join(row.prompt) or row.answer for row in rows]
  return range(len(rows)), names, numbers, scorer(texts, numbers, len(names), FOLDS, seed)


def _of_given(rows: Sequence[Row], labels: Sequence[str], given: Given):
  """Returns the same of the rows whose place and label `given` has; case and white space of labels
  do not count.
  """
  known = {p: {ngrams.whole(k): v for k, v in own.items()} for p, own in given.items()}
  own = [ngrams.whole(label) for label in labels]
  kept = [i for i, row in enumerate(rows) if own[i] in known.get(row.place, ())]
  names = sorted({name for i in kept for name in known[rows[i].place]})
  numbers = np.array([names.index(own[i]) for i in kept], np.int64)
  probs = [[known[rows[i].place].get(name, 0.0) for name in names] for i in kept]
  return kept, names, numbers, np.asarray(probs, np.float64).reshape(len(kept), len(names))


def errors(
  rows: Sequence[Row],
  labels: Sequence[str],
  scorer: Scorer | None,
  seed: int = 0,
  given: Given | None = None,
) -> tuple[list[Finding], dict[str, float]]:
  """Finds likely label errors: those of `suspects` whose other label has a probability of 0.9.

  Args:
    rows, labels: as of `of_rows`.
    scorer: gives out-of-fold probabilities, such as `out_of_fold`; not called with `given`.
    seed: of the folds.
    given: probabilities from a cross-validation; rows without are not looked at.

  Returns:
    (findings in the order of suspicion; facts: accuracy out of fold, that of the most frequent
    label, the number of all suspects, and with `given` the number of rows). No findings where the
    rows are few, or the model hardly knows more than that label.
  """
  if given is None and (len(rows) < _MIN_ROWS or len(set(labels)) < 2):
    return [], {}
  if given is None:
    kept, names, numbers, probs = _of_scorer(rows, labels, scorer, seed)
  else:
    kept, names, numbers, probs = _of_given(rows, labels, given)
    if len(kept) < _MIN_ROWS or len(set(numbers.tolist())) < 2:
      return [], {}
  accuracy = float((probs.argmax(1) == numbers).mean())
  usual = float(np.bincount(numbers).max()) / len(numbers)
  suspected = suspects(numbers, probs)
  facts = {'accuracy': accuracy, 'most_frequent': usual, 'suspects': len(suspected)}
  facts |= {} if given is None else {'rows': len(numbers)}
  if accuracy < usual + _MIN_ACCURACY_GAIN * (1 - usual):
    return [], facts
  out = []
  for i in suspected.tolist():
    others = np.where(np.arange(len(names)) == numbers[i], -1, probs[i])
    if others.max() < _LEAST:
      continue
    at, other = kept[i], names[int(others.argmax())]
    detail = f'{labels[at]!r} with p={probs[i, numbers[i]]:.2f}; {other!r} is likelier'
    out.append(found('label_error', rows, at, rows[at].shown, detail))
  return out, facts
