"""Counts the used, changed and dropped rows of a source, and refuses sources without examples."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftjax.runtime.errors import DataError

_MIN_SUPERVISED = 0.001  # fraction of tokens below which a mask is an error
_MAX_REASONS = 100  # different reasons that are kept; others are counted together
_MAX_LISTED = 20  # of them in one message
_MAX_PLACES = 3  # first rows listed with each reason
# A row with so many examples is reported: a template that rewrites history makes one example of
# every assistant turn, and their tokens grow with the square of the turns.
MANY_EXAMPLES = 32

_NUMBER = re.compile(r'\d+')
_OTHER = 'other reasons'


class Reasons:
  """Counts refused or dropped rows by reason; reasons that differ only in numbers count as one.

  Memory is bounded: `_MAX_REASONS` reasons with `_MAX_PLACES` places each.
  """

  def __init__(self, found: Iterable[Mapping[str, Any]] = ()):
    """Starts with a result of `as_list`."""
    self._found: dict[str, dict[str, Any]] = {}
    for entry in found:
      self._add(entry['reason'], entry['places'], entry['rows'])

  def add(self, reason: str, place: Sequence[int]) -> None:
    """Counts a row; `place` is (file number, line)."""
    self._add(reason, [list(place)], 1)

  def _add(self, reason: str, places: Sequence[Sequence[int]], rows: int) -> None:
    key = _NUMBER.sub('0', reason)
    if key not in self._found and len(self._found) >= _MAX_REASONS:
      key = reason = _OTHER
    entry = self._found.setdefault(key, {'reason': reason, 'rows': 0, 'places': []})
    entry['rows'] += rows
    entry['places'] += [list(p) for p in places[: _MAX_PLACES - len(entry['places'])]]

  def update(self, other: 'Reasons') -> None:
    """Adds the reasons of later rows."""
    for entry in other.as_list():
      self._add(entry['reason'], entry['places'], entry['rows'])

  def as_list(self) -> list[dict[str, Any]]:
    """Returns [{'reason': text, 'rows': count, 'places': first (file number, line) pairs}]."""
    return list(self._found.values())

  @property
  def rows(self) -> int:
    """The number of rows."""
    return sum(entry['rows'] for entry in self._found.values())


def listing(reasons: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
  """Returns one indented line per reason: its first row, the text, number of rows, other places.

  Args:
    reasons: `Reasons.as_list()`, also as read from JSON.
    names: the source's files.
  """
  lines = []
  for entry in reasons[:_MAX_LISTED]:
    (file, number), *others = entry['places']
    line, more = f'  {names[file]}:{number}: {entry["reason"]}', entry['rows'] - 1
    if more:
      also = [str(n) if f == file else f'{n} of {names[f]}' for f, n in others]
      listed = ', '.join(also) + (', ...' if more > len(others) else '')
      line += f' ({entry["rows"]:,} rows, also line{"s" if more > 1 else ""} {listed})'
    lines.append(line)
  if hidden := reasons[_MAX_LISTED:]:
    rows = sum(entry['rows'] for entry in hidden)
    lines.append(f'  {len(hidden)} further reasons, for {rows:,} rows, are not listed')
  return '\n'.join(lines)


@dataclasses.dataclass
class Counts:
  """Counts of a source's rows. Examples and tokens are those kept.

  `bad_reasons`, `unrendered_fields` and `unread_columns` (those that the row format does not read)
  are lists as of `Reasons.as_list`. `largest` is the row with the most examples, {'place': [file
  number, line], 'examples': n, 'tokens': n}; {} where no row has more than one.
  """

  rows: int = 0
  examples: int = 0
  tokens: int = 0
  supervised: int = 0
  dropped: int = 0  # over seq_len, policy 'drop'
  truncated: int = 0  # over seq_len, shortened and kept
  unsupervised: int = 0  # shortened until nothing supervised was left, and dropped
  chosen_over: int = 0  # of pairs over seq_len: sides longer than half a row
  rejected_over: int = 0
  boundary_tokens: int = 0  # tokens that span the border of prompt and answer
  chat_tokens: int = 0
  chat_supervised: int = 0
  chat_examples: int = 0
  bad: int = 0  # unusable rows, left out by data.on_bad_row='drop'
  identical: int = 0  # pairs whose two sides are the same tokens, left out
  unrendered: int = 0  # rows with content that the template does not render, kept by 'warn'
  bad_reasons: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  unrendered_fields: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  unread_columns: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  largest: dict[str, Any] = dataclasses.field(default_factory=dict)

  def update(self, later: 'Counts') -> None:
    """Adds the counts of later rows."""
    for field in dataclasses.fields(self):
      mine, other = getattr(self, field.name), getattr(later, field.name)
      if isinstance(mine, int):
        setattr(self, field.name, mine + other)
      elif isinstance(mine, list):
        both = Reasons(mine)
        both.update(Reasons(other))
        setattr(self, field.name, both.as_list())
    self.see_row(later.largest)

  def see_row(self, row: dict[str, Any]) -> None:
    """Stores the row with the most examples; the first one of equals."""
    if row.get('examples', 1) > self.largest.get('examples', 1):
      self.largest = row


def notes(name: str, counts: Counts, names: Sequence[str]) -> list[str]:
  """Returns messages about rows that were left out or changed, with reasons and places.

  Args:
    name: the source's name.
    counts: the counts of all its rows.
    names: its files.
  """
  out = []
  if counts.bad:
    out.append(
      f"{name}: data.on_bad_row='drop': {counts.bad:,} of {counts.rows:,} rows left out:\n"
      + listing(counts.bad_reasons, names)
    )
  lost = counts.dropped + counts.unsupervised
  if lost + counts.truncated:
    of = counts.examples + lost
    out.append(
      f'{name}: over seq_len: {lost:,} of {of:,} examples dropped ({lost / of:.1%}), '
      f'{counts.truncated:,} truncated ({counts.truncated / of:.1%}) (data.on_overlength)'
    )
  if counts.chosen_over or counts.rejected_over:
    out.append(
      f'{name}: of pairs over seq_len, {counts.chosen_over:,} chosen and {counts.rejected_over:,} '
      'rejected sides are longer than half of seq_len'
    )
  if counts.identical:
    out.append(
      f'{name}: {counts.identical:,} pairs left out: their chosen and rejected sides have the same '
      'tokens'
    )
  if counts.unrendered:
    out.append(
      f"{name}: data.on_unrendered='warn': {counts.unrendered:,} of {counts.rows:,} rows have "
      'content that the chat template does not render:\n' + listing(counts.unrendered_fields, names)
    )
  if counts.largest.get('examples', 1) >= MANY_EXAMPLES:
    file, line = counts.largest['place']
    out.append(
      f'{name}: the chat template rewrites history, so every assistant turn is an example of its '
      f'own: {names[file]}:{line} became {counts.largest["examples"]:,} examples of '
      f"{counts.largest['tokens']:,} tokens; data.loss_on='completion' trains only the last turn"
    )
  return out


def check(name: str, counts: Counts, loss_on: str) -> None:
  """Raises DataError for a corpus without examples, or whose mask covers nothing or everything."""
  if not counts.rows:
    raise DataError(f'{name}: no row in it')
  if not counts.examples:
    lost = {
      'cannot be used': counts.bad,
      'dropped as longer than seq_len': counts.dropped,
      'without a supervised token after truncation': counts.unsupervised,
      'pairs whose chosen and rejected sides have the same tokens': counts.identical,
    }
    remedy = 'raise seq_len' if counts.dropped + counts.unsupervised else 'look at the data'
    found = ', '.join(f'{n} {what}' for what, n in lost.items() if n)
    raise DataError(f'{name}: none of {counts.rows} rows is left ({found}); {remedy}')
  if counts.supervised < _MIN_SUPERVISED * counts.tokens:
    raise DataError(
      f'{name}: {counts.supervised} of {counts.tokens} tokens are supervised, less than '
      f'{_MIN_SUPERVISED:.1%}; look at the rows with `python -m ftjax.preview`'
    )
  predictable = counts.chat_tokens - counts.chat_examples
  if loss_on == 'assistant' and counts.chat_examples and counts.chat_supervised >= predictable:
    raise DataError(
      f'{name}: every token of the conversations is supervised although data.loss_on is '
      "'assistant'; if that is meant, set data.loss_on='all'"
    )
