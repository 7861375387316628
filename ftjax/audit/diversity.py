"""How different the rows of a set are: distinct n-grams, and coverage of an embedding space."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.audit.finding import Finding
from ftjax.audit.rows import Row, found
from ftjax.evaluation import ngrams

_WORDS = 50_000  # of the answers, the first ones: distinct-n falls with the length of the sample
_LOW = 0.15  # distinct-2 below which answers resemble each other
_MOST = 2000  # rows of a similarity matrix

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> float[n, D]


def distinct(texts: Sequence[str], size: int) -> float:
  """Returns distinct-n: different n-grams over all n-grams of the first 50,000 words (Li et al.
  2016, "A Diversity-Promoting Objective Function", section 5.1); 0 without any.
  """
  grams: set[tuple[str, ...]] = set()
  total = words = 0
  for text in texts:
    found_words = ngrams.words(text)
    words += len(found_words)
    runs = list(zip(*(found_words[k:] for k in range(size)), strict=False))
    grams.update(runs)
    total += len(runs)
    if words >= _WORDS:
      break
  return len(grams) / total if total else 0.0


def openings(texts: Sequence[str], size: int = 3) -> tuple[str, float]:
  """Returns the most frequent first words of texts, and the share of the texts that have them."""
  firsts = [' '.join(ngrams.words(text)[:size]) for text in texts]
  if not firsts:
    return '', 0.0
  text, number = Counter(firsts).most_common(1)[0]
  return text, number / len(firsts)


def coverage(embeddings: np.ndarray) -> dict[str, float]:
  """Computes how much of the space of their embeddings rows cover.

  Args:
    embeddings: float[n, D]; of more than 2,000 rows, evenly spread ones are taken.

  Returns:
    effective: the Vendi score (Friedman and Dieng 2023, TMLR), exp of the entropy of the
    eigenvalues of K / n with K the cosine similarities: the number of rows if all are orthogonal,
    1 if all are equal. nearest: mean cosine similarity to the most similar other row.

  Raises:
    ValueError: no matrix of finite numbers.
  """
  x = np.asarray(embeddings, np.float64)
  if x.ndim != 2 or not np.isfinite(x).all():
    raise ValueError(f'coverage: embeddings {x.shape}; expected finite float[n, D]')
  x = x[:: -(-len(x) // _MOST)] if len(x) else x
  if len(x) < 2:
    return {'effective': float(len(x)), 'nearest': 0.0}
  x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  similarity = x @ x.T
  values = np.clip(np.linalg.eigvalsh(similarity / len(x)), 0, None)
  values = values[values > 1e-12] / values.sum()
  np.fill_diagonal(similarity, -1.0)
  nearest = float(similarity.max(1).mean())
  return {'effective': float(np.exp(-(values * np.log(values)).sum())), 'nearest': nearest}


def of_rows(
  rows: Sequence[Row], has_labels: bool, embed: Embed | None = None
) -> tuple[list[Finding], dict[str, float | str]]:
  """Computes the diversity of rows; finds sets whose answers resemble each other.

  Args:
    rows: of the training data.
    has_labels: whether answers are labels, which are meant to be equal.
    embed: gives embeddings of texts, such as those of an encoder; None: no coverage.
  """
  questions = [row.question for row in rows if row.question]
  answers = [row.answer for row in rows if row.answer]
  first, share = openings(answers)
  facts: dict[str, float | str] = {
    'question_distinct_1': distinct(questions, 1), 'question_distinct_2': distinct(questions, 2),
    'answer_distinct_1': distinct(answers, 1), 'answer_distinct_2': distinct(answers, 2),
    'answer_opening': first, 'answer_opening_share': share,
  }  # fmt: skip
  if embed is not None:
    texts = [row.content for row in rows if row.content] or answers
    spread = texts[:: max(1, -(-len(texts) // _MOST))]
    facts |= {f'coverage_{k}': v for k, v in coverage(embed(spread)).items()}
    facts['coverage_rows'] = len(spread)
  out = []
  total = sum(len(ngrams.words(text)) for text in answers[:1000])
  if not has_labels and len(answers) >= 50 and total >= 500 and facts['answer_distinct_2'] < _LOW:
    detail = f'distinct-2 is {facts["answer_distinct_2"]:.2f}; {share:.0%} begin with {first!r}'
    out.append(found('low_diversity', rows, 0, rows[0].answer, detail))
  return out, facts
