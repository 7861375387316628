"""Rows that are there twice, nearly twice, or in the evaluation data too."""

from collections.abc import Sequence

from ftjax.audit import rows as rows_lib
from ftjax.audit.finding import Finding
from ftjax.audit.rows import Row, found
from ftjax.evaluation import contamination, near_duplicates, ngrams
from ftjax.evaluation.contamination import Item

_MOST_PASSES = 50


def exact(rows: Sequence[Row]) -> list[Finding]:
  """Finds rows whose input and answer an earlier row has; case and white space do not count."""
  first: dict[tuple[str, str], int] = {}
  out = []
  for i, row in enumerate(rows):
    at = first.setdefault((rows_lib.input_key(row), rows_lib.answer_key(row)), i)
    if at != i:
      out.append(found('exact_duplicate', rows, i, row.shown, _as(rows[at])))
  return out


def _as(row: Row) -> str:
  return f'as {row.place}'


def near(rows: Sequence[Row], leave_out: frozenset[int] = frozenset()) -> list[Finding]:
  """Finds rows that have most of their runs of five words in common with an earlier row (MinHash,
  verified); words of a template do not count, and rows of few words are not compared.

  Args:
    rows: of the training data.
    leave_out: indices that are not compared: the exact duplicates.

  Raises:
    ConfigError: datasketch is missing.
  """
  kept = [i for i in range(len(rows)) if i not in leave_out]
  words = [[ngrams.words(text) for text in rows[i].texts] for i in kept]
  out: dict[int, Finding] = {}
  for later, earlier, similarity in near_duplicates.pairs(words):
    i, other = kept[later], rows[kept[earlier]]
    detail = f'{similarity:.0%} {_as(other)}'
    out.setdefault(i, found('near_duplicate', rows, i, rows[i].shown, detail))
  return [out[i] for i in sorted(out)]


def overlap(rows: Sequence[Row], evaluation: Sequence[Row]) -> list[Finding]:
  """Finds all training rows with text of an evaluation row, by the rules of contamination.py.

  Those rules stop at the first training row, so the rest is compared again until none is found:
  without the rows found, the evaluation data are clean.
  """
  if not evaluation:
    return []
  sets: dict[str, list[Item]] = {}  # of each source, since each has a template of its own
  for row in evaluation:
    item = Item(row.place, row.prompt or row.answers, row.answers)
    sets.setdefault(row.source, []).append(item)
  left, out = dict(enumerate(rows)), {}
  for _ in range(_MOST_PASSES):
    training = ((str(i), row.texts) for i, row in left.items())
    reports = contamination.check(sets, training, ()).values()
    new: dict[int, str] = {}
    for f in (f for report in reports for f in report.findings):
      for place in (f.place if f.is_contaminated else '', f.near):
        if place:
          new.setdefault(int(place), f.id)
    if not new:
      break
    for i, place in new.items():
      out[i] = found('eval_overlap', rows, i, rows[i].shown, f'of {place}')
      del left[i]
  return [out[i] for i in sorted(out)]
