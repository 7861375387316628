"""Weights of examples by the frequency of their label, so that the loss of rare labels counts.

Weights and not resampling: every example still occurs once in an epoch, the order of the data and
the cursor of a run stay what they are, packing included, and no row is repeated or left out. The
mean weight of a source is 1, so that the learning rate keeps its meaning.
"""

import hashlib

import numpy as np

from ftjax.data.token_cache import Corpus
from ftjax.runtime.errors import DataError

_POWERS = {'sqrt': 0.5, 'equal': 1.0}
_MOST_LABELS, _MOST_SHARE = 1000, 0.5  # of a set that has labels: different ones, and per example


def weights(labels: np.ndarray, how: str) -> np.ndarray:
  """Computes n / (count of the label) to the power 1 ('equal') or 1/2 ('sqrt'), scaled to mean 1.

  With 'equal' all labels have the same total weight.

  Args:
    labels: int[n] or any values that can be compared.
    how: 'sqrt' or 'equal'.

  Returns:
    float32[n].
  """
  _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
  raw = (len(labels) / counts[inverse]) ** _POWERS[how]
  return (raw / raw.mean()).astype(np.float32)


def labels_of(corpus: Corpus) -> np.ndarray:
  """Returns a number for the label of each example, int64[n]; equal labels have equal numbers. The
  label of a text without one is its answer, the supervised tokens.
  """
  out = np.zeros(len(corpus), np.int64)
  for i in range(len(corpus)):
    if corpus.shape == 'class':
      own = corpus.labels(i)
      label = np.append(own[own >= 0].astype(np.float64), corpus.value(i))
    else:
      tokens, supervised = corpus.example(i)
      label = tokens[supervised]
    digest = hashlib.blake2b(label.tobytes(), digest_size=8).digest()
    out[i] = int.from_bytes(digest, 'little', signed=True)
  return out


def weigh(corpus: Corpus, how: str) -> None:
  """Multiplies the weights of a corpus with those of its labels, which are its answers.

  Raises:
    DataError: the answers are no labels: there are too many different ones.
  """
  labels = labels_of(corpus)
  different = len(np.unique(labels))
  if different > min(_MOST_LABELS, max(2, _MOST_SHARE * len(corpus))):
    raise DataError(
      f'{corpus.name}: {different:,} different answers in {len(corpus):,} examples are no labels: '
      'data.balance is for classification; set data.balance=none'
    )
  own = weights(labels, how)
  corpus.weights = own if corpus.weights is None else (corpus.weights * own).astype(np.float32)
