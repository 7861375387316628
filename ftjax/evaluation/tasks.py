"""Evaluation tasks: a kind of task on the rows of a file.

A task is named in the config as 'name=kind:path', for example
'sentiment=choice:.cache/sentiment/test.jsonl'. The path is any source that data.train could name;
kinds.py has the kinds and the columns of their rows. The columns of the prompt (messages,
conversations, system, tools, chat_template_kwargs) mean what they mean in training rows.
run.py runs a task on a model; comparison.py compares the results of several models.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ftjax.data import sources
from ftjax.data.formats import Bad
from ftjax.evaluation import function_kinds, kinds, rows, verbatim
from ftjax.evaluation.kind import CHOOSE, COMPLETE, READ, Kind
from ftjax.evaluation.metric import Metric
from ftjax.evaluation.metrics import diversity
from ftjax.evaluation.rows import Row
from ftjax.evaluation.safety_kinds import SAFETY_KINDS
from ftjax.runtime import named_object
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError, StoppedEarly

log = logging.getLogger(__name__)

# Raise it when the same file and the same model would get another score: cached results then miss.
VERSION = 4

_SHOWN = 5  # bad rows that are listed
_KNOWN = (
  'id',
  'group',
  'choices',
  'label',
  'answer',
  'answers',
)  # columns besides those of the prompt


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of task on a named file of rows.

  Attributes:
    name: of its files and metrics.
    kind_name: in the config.
    path: of the source.
    digest: sha256 of the file, or of a source of several.
    classes: the choices, sorted, where every row offers the same ones; else (): precision, recall
      and F1 then mean nothing.
    group: 'task', 'safety' or 'general': where reports show it.
  """

  name: str
  kind_name: str
  path: str
  rows: tuple[Row, ...]
  digest: str
  classes: tuple[str, ...] = ()
  group: str = 'task'

  @property
  def kind(self) -> Kind:
    """Returns how its rows are scored."""
    return kinds.find(self.kind_name)

  @property
  def metrics(self) -> tuple[Metric, ...]:
    """Returns the figures of its results; the first decides."""
    return self.kind.metrics + (self.kind.class_metrics if self.classes else ())

  @property
  def details(self) -> tuple[Metric, ...]:
    """Returns further figures, which reports show beneath."""
    kind, more = self.kind, ()
    if kind.respond == COMPLETE:
      more = (
        *(diversity.TOKENS, diversity.TRUNCATED, diversity.REPETITION, diversity.DISTINCT_2),
        verbatim.COPIED,
      )
    return kind.details + (kind.class_details if self.classes else ()) + more

  def first(self, count: int, seed: int) -> 'Task':
    """Returns the task on `count` of its rows, chosen by hash: a prefix of one order, whatever the
    count, that does not depend on the order of the file.
    """
    if count >= len(self.rows):
      return self

    def place(row: Row) -> bytes:
      return hashlib.sha256(f'{seed}:{row.id}'.encode()).digest()

    chosen = {row.id for row in sorted(self.rows, key=place)[:count]}
    kept = tuple(row for row in self.rows if row.id in chosen)
    return dataclasses.replace(self, rows=kept, digest=digest([self.digest, seed, count]))


def load_tasks(specs: Iterable[tuple[str, str, str]]) -> tuple[Task, ...]:
  """Returns the tasks of (name, kind, path) triples.

  Raises:
    DataError: a file that cannot be used; names file and line.
  """
  return tuple(load_task(*spec) for spec in specs)


def load_task(name: str, kind_name: str, path: str) -> Task:
  """Returns one task, after checking all of its rows.

  Raises:
    DataError: no such file, no rows, or bad rows: the first few with file, line and reason.
  """
  spec = sources.parse_spec(path)
  if spec.weight is not None:
    raise ConfigError(f'eval.tasks: {path!r} has a weight; leave the @weight out')
  kind = kinds.find(kind_name)
  found = read_rows(spec, kind, f'task {name!r}')
  if not found:
    raise DataError(f'{path}: no rows (eval.tasks, task {name!r})')
  offered = {tuple(sorted(r.choices)) for r in found}
  is_classified = bool(kind.class_metrics) and len(offered) == 1 and len(found[0].choices) > 1
  content = _digest(spec)
  own = kind_name.removeprefix(function_kinds.JUDGE).removeprefix(function_kinds.REWARD)
  if named_object.is_named(own):
    content = digest([content, named_object.fingerprint(own)])
  classes = next(iter(offered)) if is_classified else ()
  group = 'safety' if kind_name in SAFETY_KINDS else 'task'
  return Task(name, kind_name, path, found, content, classes, group)


def read_rows(spec: sources.Spec, kind: Kind, what: str) -> tuple[Row, ...]:
  """Returns the rows of a source.

  Args:
    spec: of the source.
    kind: of its rows.
    what: whose rows they are, for messages.

  Raises:
    DataError: no such file, or bad rows: the first few with file, line and reason.
  """
  out, bad, places, unread = [], [], {}, set()
  try:
    names = sources.source_names(spec)
  except DataError as e:
    raise DataError(f'{e} ({what})') from e
  for file, number, found in sources.scan(spec):
    place = f'{names[file]}:{number}'
    usual_id = number if len(names) == 1 else place.rpartition('/')[2]
    try:
      if isinstance(found, Bad):
        raise ValueError(found.reason)
      row, others = _read_row(call(kind.read, found), kind, usual_id, place, spec.format)
      if row.id in places:
        raise ValueError(f'id {row.id!r} stands on {places[row.id]} too')
    except ValueError as e:
      bad.append(f'{place}: {e}')
      continue
    places[row.id] = f'line {number}' if len(names) == 1 else place
    unread |= others
    out.append(row)
  if bad:
    more = f'\n... and {len(bad) - _SHOWN} more bad rows' if len(bad) > _SHOWN else ''
    raise DataError('\n'.join(bad[:_SHOWN]) + more)
  if unread:
    log.info('eval.tasks, %s: columns not read: %s', what, ', '.join(sorted(unread)))
  return tuple(out)


def _digest(spec: sources.Spec) -> str:
  found = sources.list_files(spec)
  if len(found) == 1 and found[0].member is None:
    return hashlib.sha256(found[0].path.read_bytes()).hexdigest()
  return sources.fingerprint(spec)


def call(function: Callable, *arguments: Any) -> Any:
  """Returns the value of a kind's function. Raises ValueError, whatever the function raises;
  StoppedEarly where the run is stopped during the call.
  """
  try:
    return function(*arguments)
  except (ValueError, StoppedEarly):
    raise
  except Exception as error:
    raise ValueError(f'{type(error).__name__}: {error}') from error


def _choices(reader: Callable, row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  choices, right = reader(row)
  choices = tuple(choices)
  if not choices or not all(isinstance(text, str) for text in (*choices, right)):
    raise ValueError(f"the kind's choices returned {(choices, right)!r}; expected texts and a text")
  return choices, right


def _read_row(
  row: Mapping[str, Any], kind: Kind, usual_id: int | str, place: str, form: str | None
) -> tuple[Row, set[str]]:
  """Returns (the row, columns that are not read). Raises ValueError with the reason."""
  if not isinstance(row, Mapping):
    raise ValueError(f"the kind's read returned {row!r}; expected {{column: value}}")
  asked, read = (None, set()) if kind.respond == READ else rows.read_asked(row, form)
  choices: tuple[str, ...] = ()
  answers: tuple[str, ...] = ()
  reader = rows.read_choices if kind.choices is None and kind.respond == CHOOSE else kind.choices
  if reader is not None:
    choices, right = call(_choices, reader, row)
    answers = (right,) if right else ()
  elif kind.has_answer:
    answers = rows.read_answers(row)
  name = row.get('id', usual_id)
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise ValueError(f'"id": expected text or a whole number, got {name!r}')
  kept = tuple(row) if kind.reads_all else ('source', *kind.reads)
  columns = {k: row[k] for k in kept if row.get(k) is not None}
  out = Row(str(name), place, asked, choices, answers, columns, rows.read_group(row))
  call(kind.check, out)
  known = {*_KNOWN, *kept, *read}
  return out, {str(k) for k, v in row.items() if v is not None and k not in known}
