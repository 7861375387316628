"""One row of a task, read from a row of its source."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.data import messages, prompt_rows
from ftjax.data.formats import PROMPT_KEYS, Chat


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a task.

  Attributes:
    id: unique in the task.
    place: file:line, for messages.
    asked: a conversation that the assistant answers next, or plain text that the model continues;
      None where the choices are whole texts.
    choices: the responses, or whole texts, whose log-probabilities are asked for; empty where the
      model writes a completion.
    answers: the right texts, any of which will do; of a row with choices the right choice.
    columns: of the source, those that the kind names in `reads`.
    group: of rows that resemble each other, such as questions on one text: their results are a
      cluster. '' where a row is by itself.
  """

  id: str
  place: str
  asked: Chat | str | None
  choices: tuple[str, ...] = ()
  answers: tuple[str, ...] = ()
  columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  group: str = ''

  @property
  def answer(self) -> str:
    """Returns the first right text, '' where there is none."""
    return self.answers[0] if self.answers else ''

  @property
  def question(self) -> str:
    """Returns the prompt as a reader would see it: the text, or the last user message."""
    if self.asked is None or isinstance(self.asked, str):
      return self.asked or ''
    content = self.asked.messages[-1].get('content', '')
    return content if isinstance(content, str) else str(content)


def clusters(rows: Sequence[Row]) -> dict[str, int]:
  """Returns the number of the cluster of each row, by id: 0, 1, ... in the order of the rows."""
  keys = {row.id: (row.group, '' if row.group else row.id) for row in rows}
  number = {key: i for i, key in enumerate(dict.fromkeys(keys.values()))}
  return {row_id: number[key] for row_id, key in keys.items()}


def read_group(row: Mapping[str, Any]) -> str:
  """Returns the column "group", '' where there is none. Raises ValueError where it is no name."""
  value = row.get('group')
  if value is None:
    return ''
  if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
    raise ValueError(f'"group": expected text that is not empty, or a whole number, got {value!r}')
  return str(value)


def read_asked(row: Mapping[str, Any], form: str | None) -> tuple[Chat | str, set[str]]:
  """Returns (the prompt of a row, the columns that it was read from).

  Args:
    row: {column: value}.
    form: the format that the source names, or None.

  Raises:
    ValueError: no prompt, several, or one that the assistant has answered.
  """
  given = [k for k in PROMPT_KEYS.values() if row.get(k) is not None]
  if form is None and len(given) != 1:
    raise ValueError(f'expected one of "messages" and "prompt", got {given or "neither"}')
  if prompt_rows.ends_with_assistant(row, form):
    key = prompt_rows.prompt_key(row, form)
    raise ValueError(f'"{key}" ends with the assistant; the model is to answer: leave it out')
  found = prompt_rows.read_prompt(row, True, form)
  if isinstance(found.asked, str) and not found.asked.strip():
    read_text(row, 'prompt')
  return found.asked, set(found.read)


def read_text(row: Mapping[str, Any], key: str) -> str:
  """Returns a column's text. Raises ValueError where it is empty, or no text."""
  value = row.get(key)
  if not isinstance(value, str) or not value.strip():
    got = 'nothing' if value is None else repr(value)
    raise ValueError(f'"{key}": expected text that is not empty, got {got}')
  return value


def read_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the right texts: those of "answers", a list, else "answer".

  Raises:
    ValueError: neither or both are there, or an answer is no text or empty.
  """
  if row.get('answers') is None:
    return (read_text(row, 'answer'),)
  if row.get('answer') is not None:
    raise ValueError('expected one of "answer" and "answers", got both')
  answers = row['answers']
  if isinstance(answers, str):  # of CSV
    answers = messages.parse_json(answers, 'answers', 'a list of texts')
  if not isinstance(answers, list) or not answers:
    raise ValueError(f'"answers": expected a list of texts, got {answers!r}')
  return tuple(read_text({'answers': a}, 'answers') for a in answers)


def read_choices(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  """Returns (the choices, the right one) of the columns "choices" and "label".

  Raises:
    ValueError: fewer than two, equal ones, or a label that is none of them.
  """
  choices, label = row.get('choices'), row.get('label')
  if isinstance(choices, str):  # of CSV
    choices = messages.parse_json(choices, 'choices', 'a list of texts')
    if isinstance(label, str) and label not in choices and label.isdigit():
      label = int(label)
  if not _are_texts(choices) or len(choices) < 2 or len(set(choices)) < len(choices):
    raise ValueError(f'"choices": expected two or more different texts, got {choices!r}')
  if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
    label = choices[label]
  if label not in choices:
    raise ValueError(f'"label": expected one of {choices} or its index, got {label!r}')
  return tuple(choices), label


def read_pair(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  """Returns ((chosen, rejected), chosen) of a preference row. Raises ValueError."""
  chosen, rejected = read_text(row, 'chosen'), read_text(row, 'rejected')
  if chosen == rejected:
    raise ValueError('"chosen" and "rejected" are equal')
  return (chosen, rejected), chosen


def _are_texts(value: Any) -> bool:
  is_list = isinstance(value, Sequence) and not isinstance(value, str)
  return is_list and all(isinstance(c, str) and c.strip() for c in value)
