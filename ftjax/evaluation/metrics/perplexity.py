"""Computes perplexity of texts from sums: nats, tokens and bytes."""

import math

import numpy as np

from ftjax.evaluation.metric import Metric, of_sums, ratio, read_values

_MAX_LOG = math.log(np.finfo(np.float64).max)


def likelihood_values(logp: float, tokens: int, text: str) -> dict[str, tuple[float, ...]]:
  """Returns {'likelihood': (nats, tokens, bytes)} of one text.

  Args:
    logp: log-probability of the text in nats, over `tokens` tokens.

  Raises:
    ValueError: a log-probability that is no finite number, or a negative number of tokens.
  """
  if not math.isfinite(logp) or tokens < 0:
    raise ValueError(f'log-probability {logp} of {tokens} tokens; expected a finite number')
  size = len(text.encode('utf-8', 'surrogatepass'))
  return {'likelihood': (-float(logp), float(tokens), float(size))}


def _exp(nats: np.ndarray) -> np.ndarray:
  """Returns e^nats, NaN where float64 cannot hold it."""
  return np.exp(np.where(nats <= _MAX_LOG, nats, np.nan))


_READ = read_values('likelihood')
# Depends on the tokenizer: comparable between models that share it.
PERPLEXITY = Metric(
  'perplexity',
  'perplexity per token',
  _READ,
  of_sums(lambda sums: _exp(ratio(sums[:, 0], sums[:, 1]))),
  'lower',
  form='number',
)
# The same for every tokenizer.
BITS_PER_BYTE = Metric(
  'bits_per_byte',
  'bits per byte',
  _READ,
  of_sums(lambda sums: ratio(sums[:, 0], sums[:, 2]) / math.log(2)),
  'lower',
  form='number',
)
BYTE_PERPLEXITY = Metric(
  'byte_perplexity',
  'perplexity per byte',
  _READ,
  of_sums(lambda sums: _exp(ratio(sums[:, 0], sums[:, 2]))),
  'lower',
  form='number',
)
METRICS = (PERPLEXITY, BITS_PER_BYTE, BYTE_PERPLEXITY)
