"""Evaluation tasks: the rows of `eval.tasks`, and which completions count as right.

A task is named in the config as 'name=kind:path', for example
'sentiment=choice:.cache/sentiment/test.jsonl'. The path is any source that data.train could name.
Its rows are:

  choice   {"messages": [...], "choices": ["yes", "no"], "label": "yes"}   label: or its index
  match    {"messages": [...], "answer": "Paris"}
  math, math_strict   {"messages": [...], "answer": "18"}   or a rationale that ends in "#### 18"

`"prompt": "..."` may stand in place of messages, and `"id"` names a row (else its line does). The
columns of the prompt (messages, conversations, system, tools, chat_template_kwargs) mean what they
mean in training rows: data/prompt_rows.py reads both. A kind 'module:OBJECT' is a user's `Kind`.
run.py runs a task on a model; statistics.py and report.py compare the results of two models.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ftjax.data import messages, prompt_rows, sources
from ftjax.data.formats import PROMPT_KEYS, Bad, Chat
from ftjax.evaluation.metrics.answers import normalized_match
from ftjax.grading.math_answers import Math
from ftjax.runtime import named_object
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError

log = logging.getLogger(__name__)

# Raise it when the same file and the same model would get another score: cached results then miss.
VERSION = 2

_SHOWN = 5  # bad rows that are listed
_KNOWN = ('id', 'choices', 'label', 'answer')  # columns besides those of the prompt


def _accept(answer: str) -> None:
  del answer


@dataclasses.dataclass(frozen=True)
class Kind:
  """How the rows of a task are read and what counts as right.

  Attributes:
    is_right: (completion, prompt, answer) -> whether a greedy completion is right. The completion
      has the special tokens that carry content; the prompt is everything that the model read, whose
      end may have opened a thought. None: rows have choices, and the choice with the largest
      log-probability of its tokens and the stop token after the prompt is the prediction.
    read: a row of the source, {column: value} -> a row of the form above. Raises ValueError with
      the reason for a row that cannot be used.
    check_answer: raises ValueError for an answer that no completion could equal.
  """

  is_right: Callable[[str, str, str], bool] | None
  read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda row: row
  check_answer: Callable[[str], None] = _accept


def _math(mode: str) -> Kind:
  """Returns the kind scored by the reward of that mode; without symbolic comparison, so that scores
  are the same on every machine.
  """
  math = Math(mode, symbolic='off')

  def is_right(completion: str, prompt: str, answer: str) -> bool:
    return math.score(completion, prompt, answer) == 1

  def check_answer(answer: str) -> None:
    math.score('', '', answer)

  return Kind(is_right, check_answer=check_answer)


# match: equal to the answer after `answers.normalize`.
KINDS = {
  'choice': Kind(None),
  'match': Kind(lambda completion, prompt, answer: normalized_match(answer, completion)),
  'math': _math('flexible'),
  'math_strict': _math('strict'),
}


def find_kind(name: str) -> Kind:
  """Returns the kind of a name in KINDS, or the user's object 'module:OBJECT'.

  Raises:
    ConfigError: there is none, or it is of another type.
  """
  if name in KINDS:
    return KINDS[name]
  return named_object.instance('eval.tasks', name, Kind)


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a task. Exactly one of messages and prompt is given.

  Attributes:
    id: unique in the task.
    place: file:line, for messages.
    messages: a conversation that the assistant answers next.
    prompt: plain text that the model continues.
    choices: of a choice row, else empty.
    answer: the right text; of a choice row, the right choice.
    tools, template_kwargs: of a conversation, see formats.Chat.
  """

  id: str
  place: str
  messages: tuple[Mapping[str, Any], ...] | None
  prompt: str | None
  choices: tuple[str, ...]
  answer: str
  tools: tuple[dict[str, Any], ...] | None = None
  template_kwargs: Mapping[str, Any] | None = None

  @property
  def asked(self) -> Chat | str:
    """Returns the prompt, for `encode.encode_prompt`."""
    if self.messages is None:
      return self.prompt or ''
    return Chat(
      tuple(dict(m) for m in self.messages), self.tools, template_kwargs=self.template_kwargs
    )

  @property
  def label(self) -> int:
    """Returns the index of the right choice."""
    return self.choices.index(self.answer)


@dataclasses.dataclass(frozen=True)
class Task:
  """A named file of rows.

  Attributes:
    digest: sha256 of the file, or of a source of several.
    classes: the choices, sorted, where every row offers the same ones; else None: precision, recall
      and F1 then mean nothing.
  """

  name: str
  kind: str
  path: str
  rows: tuple[Row, ...]
  digest: str
  classes: tuple[str, ...] | None


def load_tasks(specs: Iterable[tuple[str, str, str]]) -> tuple[Task, ...]:
  """Returns the tasks of (name, kind, path) triples.

  Raises:
    DataError: a file that cannot be used; names file and line.
  """
  return tuple(load_task(*spec) for spec in specs)


def load_task(name: str, kind: str, path: str) -> Task:
  """Returns one task, after checking all of its rows.

  Raises:
    DataError: no such file, no rows, or bad rows: the first few with file, line and reason.
  """
  spec = sources.parse_spec(path)
  if spec.weight is not None:
    raise ConfigError(f'eval.tasks: {path!r} has a weight; leave the @weight out')
  scoring, rows, bad, places, unread = find_kind(kind), [], [], {}, set()
  try:
    names = sources.source_names(spec)
  except DataError as e:
    raise DataError(f'{e} (task {name!r})') from e
  for file, number, found in sources.scan(spec):
    place = f'{names[file]}:{number}'
    usual_id = number if len(names) == 1 else place.rpartition('/')[2]
    try:
      if isinstance(found, Bad):
        raise ValueError(found.reason)
      row, others = _read_row(call(scoring.read, found), scoring, usual_id, place, spec.format)
      if row.id in places:
        raise ValueError(f'id {row.id!r} stands on {places[row.id]} too')
    except ValueError as e:
      bad.append(f'{place}: {e}')
      continue
    places[row.id] = f'line {number}' if len(names) == 1 else place
    unread |= others
    rows.append(row)
  if bad:
    more = f'\n... and {len(bad) - _SHOWN} more bad rows' if len(bad) > _SHOWN else ''
    raise DataError('\n'.join(bad[:_SHOWN]) + more)
  if not rows:
    raise DataError(f'{path}: no rows (eval.tasks, task {name!r})')
  offered = {tuple(sorted(r.choices)) for r in rows}
  classes = next(iter(offered)) if scoring.is_right is None and len(offered) == 1 else None
  if unread:
    log.info('eval.tasks %s: columns not read: %s', name, ', '.join(sorted(unread)))
  content = _digest(spec)
  if kind not in KINDS:
    content = digest([content, named_object.fingerprint(kind)])
  return Task(name, kind, path, tuple(rows), content, classes)


def _digest(spec: sources.Spec) -> str:
  found = sources.list_files(spec)
  if len(found) == 1 and found[0].member is None:
    return hashlib.sha256(found[0].path.read_bytes()).hexdigest()
  return sources.fingerprint(spec)


def call(function: Callable, *arguments: Any) -> Any:
  """Returns the value of a kind's function. Raises ValueError, whatever the function raises."""
  try:
    return function(*arguments)
  except ValueError:
    raise
  except Exception as error:
    raise ValueError(f'{type(error).__name__}: {error}') from error


def _read_row(
  row: Mapping[str, Any], kind: Kind, usual_id: int | str, place: str, form: str | None
) -> tuple[Row, set[str]]:
  """Returns (the row, columns that are not read). Raises ValueError with the reason."""
  given = [k for k in PROMPT_KEYS.values() if row.get(k) is not None]
  if form is None and len(given) != 1:
    raise ValueError(f'expected one of "messages" and "prompt", got {given or "neither"}')
  if prompt_rows.ends_with_assistant(row, form):
    key = prompt_rows.prompt_key(row, form)
    raise ValueError(f'"{key}" ends with the assistant; the model is to answer: leave it out')
  found = prompt_rows.read_prompt(row, True, form)
  if isinstance(found.asked, str) and not found.asked.strip():
    _read_text(row, 'prompt')
  if kind.is_right is None:
    choices, answer = _read_choices(row)
  else:
    choices, answer = (), _read_text(row, 'answer')
    call(kind.check_answer, answer)
  name = row.get('id', usual_id)
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise ValueError(f'"id": expected text or a whole number, got {name!r}')
  unread = {str(k) for k, v in row.items() if v is not None and k not in (*_KNOWN, *found.read)}
  if isinstance(found.asked, str):
    return Row(str(name), place, None, found.asked, choices, answer), unread
  asked = found.asked
  shared = asked.tools, asked.template_kwargs
  return Row(str(name), place, asked.messages, None, choices, answer, *shared), unread


def _read_text(row: Mapping[str, Any], key: str) -> str:
  value = row.get(key)
  if not isinstance(value, str) or not value.strip():
    got = 'nothing' if value is None else repr(value)
    raise ValueError(f'"{key}": expected text that is not empty, got {got}')
  return value


def _read_choices(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  choices, label = row.get('choices'), row.get('label')
  if isinstance(choices, str):  # of CSV
    choices = messages.parse_json(choices, 'choices', 'a list of texts')
    if isinstance(label, str) and label not in choices and label.isdigit():
      label = int(label)
  is_texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
  if not is_texts or len(choices) < 2 or len(set(choices)) < len(choices):
    raise ValueError(f'"choices": expected two or more different texts, got {choices!r}')
  if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
    label = choices[label]
  if label not in choices:
    raise ValueError(f'"label": expected one of {choices} or its index, got {label!r}')
  return tuple(choices), label
