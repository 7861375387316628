"""The rows of data.train as a study deals them to its runs: read whole, written in parts."""

import collections
import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from ftjax.data import prompt_rows, sources, synthetic
from ftjax.data.formats import PROMPT_KEYS, Bad
from ftjax.data.sources import Spec
from ftjax.evaluation import kinds
from ftjax.evaluation.kind import CHOOSE, READ, Kind
from ftjax.evaluation.rows import read_choices
from ftjax.runtime.errors import DataError
from ftjax.storage import files

log = logging.getLogger(__name__)

_MOST_CHOICES = 50  # different answers that may be the choices of a task
_ANSWERS = ('completion', 'output')  # columns beside a prompt


@dataclasses.dataclass(frozen=True)
class TrainRow:
  """A row of data.train: its source's number, its place in a file, and its columns."""

  source: int
  place: str
  columns: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainRows:
  """All rows of data.train, in order, and the sources that they are of."""

  specs: tuple[Spec, ...]
  rows: tuple[TrainRow, ...]

  def write(self, folder: str, chosen: Iterable[int], has_weights: bool) -> tuple[str, ...]:
    """Writes some rows into a folder, a file for each source that has any, in their order.

    Returns:
      the entries of data.train or data.eval that read them.
    """
    files.makedirs(folder)
    by_source: dict[int, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for number in sorted(chosen):
      by_source[self.rows[number].source].append(self.rows[number].columns)
    out = []
    for source, found in sorted(by_source.items()):
      path = files.join(folder, f'source{source}.jsonl')
      write_lines(path, found)
      spec = self.specs[source]
      form = 'text' if spec.format == 'lines' else spec.format
      weight = f'@{spec.weight:g}' if spec.weight is not None and has_weights else ''
      out.append(path + (f'::{form}' if form else '') + weight)
    return tuple(out)

  def field(self, name: str) -> list[str | None]:
    """Returns a column of all rows as text, None where a row lacks it."""
    values = [row.columns.get(name) for row in self.rows]
    return [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]

  def answers(self) -> list[str | None]:
    """Returns the answer of each row: what the assistant writes last; None where there is none."""
    return [_answer(row.columns, self.specs[row.source].format) for row in self.rows]

  def copies(self, groups: Sequence[str]) -> int:
    """Returns how many rows equal another one that is in another group."""
    seen: dict[str, set[str]] = collections.defaultdict(set)
    for row, group in zip(self.rows, groups, strict=True):
      seen[json.dumps(row.columns, sort_keys=True, default=str)].add(group)
    return sum(len(own) - 1 for own in seen.values())

  def groups(self, name: str) -> list[str] | None:
    """Returns the group of each row by a column: a row without it is one of its own; None where no
    row has it.
    """
    found = self.field(name) if name else [None] * len(self.rows)
    if all(value is None for value in found):
      return None
    return [f'row {i}' if value is None else f'of {value}' for i, value in enumerate(found)]


def write_lines(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes rows as JSON lines; values that JSON does not have, such as dates, as text."""
  lines = [json.dumps(dict(row), ensure_ascii=False, default=str) + '\n' for row in rows]
  files.write_text(path, ''.join(lines))


def read(c: ml_collections.ConfigDict, cache: str) -> TrainRows:
  """Reads data.train whole.

  Args:
    c: the config.
    cache: folder of synthetic rows.

  Raises:
    DataError: a row that cannot be read, unless data.on_bad_row is 'drop'; or no rows.
  """
  specs = [synthetic.resolve(spec, cache) for spec in sources.parse_specs(c.data.train)]
  out: list[TrainRow] = []
  for number, spec in enumerate(specs):
    names = sources.source_names(spec)
    for file, line, row in sources.scan(spec):
      place = f'{names[file]}:{line}'
      if not isinstance(row, Bad):
        out.append(TrainRow(number, place, row))
      elif c.data.on_bad_row == 'drop':
        log.warning('%s is left out: %s', place, row.reason)
      else:
        raise DataError(f'{place}: {row.reason} (data.on_bad_row=error)')
  if not out:
    raise DataError(f'data.train={c.data.train!r} has no rows')
  return TrainRows(tuple(specs), tuple(out))


def _answer(row: Mapping[str, Any], form: str | None) -> str | None:
  try:
    return prompt_rows.read_prompt(row, True, form).answer
  except ValueError:
    return None


def task_rows(rows: TrainRows, kind_name: str, answers: Sequence[str | None]) -> list[dict]:
  """Returns the rows of data.train as rows of a task of that kind, with their numbers as ids.

  The last turn of the assistant becomes the answer. For a kind of choices without columns of its
  own the choices are all answers there are.

  Args:
    rows: all of them.
    kind_name: as in eval.tasks.
    answers: of the rows.

  Raises:
    DataError: a row without what the kind needs.
  """
  kind = kinds.find(kind_name)
  known = sorted({a for a in answers if a is not None})
  out = []
  for number, (row, answer) in enumerate(zip(rows.rows, answers, strict=True)):
    own = dict(row.columns) | {'id': str(number)}
    if kind.respond != READ and 'chosen' not in own:
      own = _without_answer(own, rows.specs[row.source].format)
    if reads_choices(kind) and 'choices' not in own:
      if not 2 <= len(known) <= _MOST_CHOICES:
        raise DataError(
          f'{row.place}: no "choices", and the rows have {len(known)} different answers; a task of '
          f'the kind {kind_name} needs 2 to {_MOST_CHOICES}: give the rows "choices" and "label", '
          'or name another kind in eval.tasks'
        )
      own |= {'choices': known, 'label': answer}
    elif not {'answer', 'answers', 'choices', 'chosen'} & set(own) and answer is not None:
      own['answer'] = answer
    out.append(own)
  return out


def reads_choices(kind: Kind) -> bool:
  """Returns whether rows of a kind have the columns "choices" and "label"."""
  return kind.choices is read_choices or (kind.choices is None and kind.respond == CHOOSE)


def _without_answer(row: dict[str, Any], form: str | None) -> dict[str, Any]:
  """Returns a row with one prompt, without the last turn of the assistant."""
  try:
    key = prompt_rows.prompt_key(row, form)
    ends = prompt_rows.ends_with_assistant(row, form)
  except ValueError:
    return row
  others = {*_ANSWERS, *PROMPT_KEYS.values()} - {key}
  kept = {k: v for k, v in row.items() if k not in others}
  return kept | {key: row[key][:-1]} if ends else kept
