"""What a model is asked and what counts as right: `eval.tasks` read into rows.

A task is named in the config as 'name=kind:path', for example
'sentiment=choice:.cache/sentiment/test.jsonl'. The file holds one JSON object a line:

  choice   {"messages": [...], "choices": ["yes", "no"], "label": "yes"}   label: or its index
  match    {"messages": [...], "answer": "Paris"}
  math, math_strict   {"messages": [...], "answer": "18"}   or a rationale that ends in "#### 18"

`"prompt": "..."` may stand in place of messages, and `"id"` names a row (else its line does).
run.py asks the model; statistics.py and report.py compare two of them.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.evaluation.metrics import normalized_match
from ftjax.rollout.math_answers import Math
from ftjax.runtime import files
from ftjax.runtime.errors import ConfigError, DataError

# Raise it when the same file and the same model would get another score: cached results then miss.
VERSION = 1

# choice: the choice with the largest log-probability of its tokens and the stop token after the
#   prompt. The others: greedy generation; match: equal to the answer after `metrics.normalize`;
#   math, math_strict: by the rewards of that name, without symbols, so the same on every machine.
KINDS = ('choice', 'match', 'math', 'math_strict')
_MATH = {'math': Math(symbolic='off'), 'math_strict': Math('strict', symbolic='off')}

_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')
_ROLES = ('system', 'user', 'assistant', 'tool')
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Row:
  """One question. Exactly one of messages and prompt is given.

  Attributes:
    id: unique in the task.
    place: file:line, for messages.
    messages: a conversation that the assistant answers next.
    prompt: plain text that the model goes on with.
    choices: of a choice row, else empty.
    answer: the right text; of a choice row, the right choice.
  """

  id: str
  place: str
  messages: tuple[Mapping[str, Any], ...] | None
  prompt: str | None
  choices: tuple[str, ...]
  answer: str

  @property
  def label(self) -> int:
    """Index of the right choice."""
    return self.choices.index(self.answer)


@dataclasses.dataclass(frozen=True)
class Task:
  """A named file of rows.

  Attributes:
    digest: sha256 of the file.
    classes: the choices, sorted, where every row offers the same ones; else None: precision, recall
      and F1 then mean nothing.
  """

  name: str
  kind: str
  path: str
  rows: tuple[Row, ...]
  digest: str
  classes: tuple[str, ...] | None


def is_right(kind: str, row: Row, said: str) -> bool:
  """Whether a text that a model said counts, in a task of any kind but choice."""
  if kind == 'match':
    return normalized_match(row.answer, said)
  asked = row.prompt if row.messages is None else row.messages[-1]['content']
  return _MATH[kind].score(said, asked, row.answer) == 1


def parse_spec(spec: str) -> tuple[str, str, str]:
  """'name=kind:path' -> (name, kind, path).

  Raises:
    ConfigError: another shape or kind, or a name that is no file name.
  """
  name, equals, rest = spec.partition('=')
  kind, colon, path = rest.partition(':')
  if not (equals and colon and path.strip() and _NAME.fullmatch(name.strip())):
    raise ConfigError(
      f'eval.tasks: got {spec!r}, expected name=kind:path like sentiment=choice:data/test.jsonl, '
      'the name of letters, digits and _ . -'
    )
  if kind.strip() not in KINDS:
    raise ConfigError(f'eval.tasks: {spec!r} has the kind {kind!r}, expected one of {KINDS}')
  return name.strip(), kind.strip(), path.strip()


def load_tasks(specs: Sequence[str]) -> tuple[Task, ...]:
  """All tasks of `eval.tasks`.

  Raises:
    ConfigError: a bad spec, or a name given twice.
    DataError: a file that cannot be used; names file and line.
  """
  parsed = [parse_spec(s) for s in specs]
  names = [name for name, _, _ in parsed]
  if twice := sorted({n for n in names if names.count(n) > 1}):
    raise ConfigError(f'eval.tasks: {twice} named twice; a name is a file of eval/')
  return tuple(load_task(*p) for p in parsed)


def load_task(name: str, kind: str, path: str) -> Task:
  """One task, every row checked before any is used.

  Raises:
    DataError: no such file, no rows, or bad rows: the first few with file, line and reason.
  """
  try:
    data = files.read_bytes(path)
  except OSError as e:
    raise DataError(f'{path}: {e.strerror} (eval.tasks, task {name!r})') from e
  rows, bad, lines = [], [], {}
  for number, line in enumerate(data.removeprefix(b'\xef\xbb\xbf').split(b'\n'), 1):
    if not line.strip():
      continue
    place = f'{path}:{number}'
    try:
      row = _read_row(line, kind, number, place)
      if row.id in lines:
        raise ValueError(f'id {row.id!r} stands on line {lines[row.id]} too')
    except ValueError as e:
      bad.append(f'{place}: {e}')
      continue
    lines[row.id] = number
    rows.append(row)
  if bad:
    more = f'\n... and {len(bad) - _SHOWN} more bad rows' if len(bad) > _SHOWN else ''
    raise DataError('\n'.join(bad[:_SHOWN]) + more)
  if not rows:
    raise DataError(f'{path}: no rows (eval.tasks, task {name!r})')
  offered = {tuple(sorted(r.choices)) for r in rows}
  classes = next(iter(offered)) if kind == 'choice' and len(offered) == 1 else None
  return Task(name, kind, path, tuple(rows), hashlib.sha256(data).hexdigest(), classes)


def _read_row(line: bytes, kind: str, number: int, place: str) -> Row:
  """Raises ValueError with the reason; json's and UTF-8's errors are ValueErrors too."""
  row = json.loads(line.decode('utf-8'))
  if not isinstance(row, dict):
    raise ValueError(f'expected an object, got {type(row).__name__}')
  given = [k for k in ('messages', 'prompt') if row.get(k) is not None]
  if len(given) != 1:
    raise ValueError(f'expected one of "messages" and "prompt", got {given or "neither"}')
  messages = _read_messages(row['messages']) if given == ['messages'] else None
  prompt = _read_text(row, 'prompt') if given == ['prompt'] else None
  choices, answer = _read_choices(row) if kind == 'choice' else ((), _read_text(row, 'answer'))
  if kind in _MATH:
    _MATH[kind].score('', '', answer)  # refuses an answer that nothing can equal
  name = row.get('id', number)
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise ValueError(f'"id": expected text or a whole number, got {name!r}')
  return Row(str(name), place, messages, prompt, choices, answer)


def _read_text(row: Mapping[str, Any], key: str) -> str:
  value = row.get(key)
  if not isinstance(value, str) or not value.strip():
    got = 'nothing' if value is None else repr(value)
    raise ValueError(f'"{key}": expected text that is not empty, got {got}')
  return value


def _read_messages(value: Any) -> tuple[Mapping[str, Any], ...]:
  if not isinstance(value, list) or not value:
    raise ValueError(f'"messages": expected a list that is not empty, got {str(value)[:60]!r}')
  for i, message in enumerate(value):
    if not isinstance(message, dict) or not isinstance(message.get('content'), str):
      raise ValueError(f'"messages"[{i}]: expected {{"role": .., "content": text}}')
    if message.get('role') not in _ROLES:
      raise ValueError(f'"messages"[{i}]: role {message.get("role")!r}, expected one of {_ROLES}')
  if value[-1]['role'] == 'assistant':
    raise ValueError('"messages" ends with the assistant; the model is to answer: leave it out')
  return tuple(value)


def _read_choices(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  choices, label = row.get('choices'), row.get('label')
  is_texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
  if not is_texts or len(choices) < 2 or len(set(choices)) < len(choices):
    raise ValueError(f'"choices": expected two or more different texts, got {choices!r}')
  if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
    label = choices[label]
  if label not in choices:
    raise ValueError(f'"label": expected one of {choices} or its index, got {label!r}')
  return tuple(choices), label
