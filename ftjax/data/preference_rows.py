"""Parses preference data in its published forms: pairs, labeled answers and scored answers.

`labeled_examples.py` tokenizes them. Columns mean the same as in other rows, see formats.py.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ftjax.data import formats
from ftjax.data.formats import SHARED, Chat, Completion, Part, has
from ftjax.data.messages import read_list

SHAPES = ('pair', 'label', 'score')
Answer = Chat | Completion


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to one prompt; `margin`: the reward of the chosen minus that of the rejected."""

  chosen: Answer
  rejected: Answer
  margin: float


@dataclasses.dataclass(frozen=True)
class LabeledExample:
  """An answer and its value: a score, or 1 for good and 0 for bad."""

  answer: Answer
  value: float


def _number(row: Mapping, key: str, usual: float | None = None) -> float:
  """Returns a number of a row, also from its text as in CSV."""
  value = row.get(key)
  value = usual if value is None else value
  if isinstance(value, str):
    with contextlib.suppress(ValueError):  # reported below
      value = float(value)
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise ValueError(f'{key!r} is {value!r}, expected a finite number')
  return float(value)


_LABELS = {'true': 1.0, '1': 1.0, 'false': 0.0, '0': 0.0}


def _label(row: Mapping) -> float:
  """Returns 1 for good, 0 for bad, also from text as in CSV or LLaMA-Factory's column."""
  key = 'label' if has(row, 'label') else 'kto_tag'
  value = row.get(key)
  if isinstance(value, str) and value.strip().lower() in _LABELS:
    return _LABELS[value.strip().lower()]
  if not isinstance(value, bool) and value not in (0, 1):
    raise ValueError(f'{key!r} is {value!r}, expected true (good) or false (bad)')
  return float(value)


_TURN = re.compile(r'\n\n(Human|Assistant):')


def _dialogue(text: str) -> list[dict[str, str]] | None:
  """Returns messages of '\\n\\nHuman: ...\\n\\nAssistant: ...' (HH-RLHF, Bai et al. 2022)."""
  start, *parts = _TURN.split(text)
  if start.strip() or not parts:
    return None
  roles = {'Human': 'user', 'Assistant': 'assistant'}
  turns = zip(parts[::2], parts[1::2], strict=True)
  return [{'role': roles[who], 'content': content.strip()} for who, content in turns]


# Columns in which other data sets have a prompt. A row with one of them has no implicit prompt.
_OTHER_PROMPTS = ('question', 'query', 'problem', 'input', 'context', 'instruction', 'text', 'user')


def _common_beginning(row: Mapping, chosen: str, rejected: str) -> int:
  """Returns the length of the common prefix of two texts, up to the last white space in it.

  This is the prompt of TRL's "implicit prompt" rows, as its `extract_prompt` finds it but never
  with a border inside a word.
  """
  if others := [k for k in (*_OTHER_PROMPTS, *SHARED) if has(row, k)]:
    raise ValueError(
      f"'chosen' and 'rejected' are texts without 'prompt', and the row has {others[0]!r}, which "
      "is not read: rename it to 'prompt', or write the rows as messages"
    )
  end = len(os.path.commonprefix([chosen, rejected]))

  def is_border(i: int) -> bool:
    if i >= min(len(chosen), len(rejected)):
      return False
    return chosen[i - 1].isspace() or (chosen[i].isspace() and rejected[i].isspace())

  while end and not is_border(end):
    end -= 1
  if end and chosen[end - 1] == ' ':
    end -= 1
  if not chosen[:end].strip():
    raise ValueError(
      "'chosen' and 'rejected' are texts without 'prompt': they are no dialogue of '\\n\\nHuman:' "
      "and '\\n\\nAssistant:', and have no common beginning that could be the prompt"
    )
  return end


def _without_prompt(row: Mapping, chosen: Any, rejected: Any) -> tuple[Answer, Answer]:
  """Parses sides that contain their prompt: dialogues, texts or messages with a common prefix."""
  if isinstance(chosen, str) and isinstance(rejected, str):
    dialogues = _dialogue(chosen), _dialogue(rejected)
    if None in dialogues:
      end = _common_beginning(row, chosen, rejected)
      return tuple(
        formats.answered({}, chosen[:end], text[end:], key)
        for key, text in (('chosen', chosen), ('rejected', rejected))
      )
    chosen, rejected = dialogues
  if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected):
    raise ValueError(
      "without 'prompt', 'chosen' and 'rejected' must be two texts or two lists of messages"
    )
  return _whole(row, chosen, 'chosen'), _whole(row, rejected, 'rejected')


def _whole(row: Mapping, messages: list, key: str) -> Answer:
  """Parses a side that is a conversation of its own, with the answer as last message."""
  last = len(messages) - 1
  found = formats.chat(row, [Part(key, messages[:-1]), Part(key, messages[-1:], True, last)])
  return _checked(found, key)


def _checked(answer: Answer, key: str) -> Answer:
  if isinstance(answer, Chat) and answer.messages[-1]['role'] != 'assistant':
    raise ValueError(f'{key!r} ends with a message of {answer.messages[-1]["role"]!r}')
  return answer


def _after(row: Mapping, prompt: Part | str, answer: Any, key: str) -> Answer:
  """Joins a prompt and one answer: a text, a message, or a list that may repeat the prompt."""
  found = _checked(formats.answered(row, prompt, answer, key), key)
  if isinstance(found, Chat) and isinstance(prompt, Part) and isinstance(answer, list):
    n = len(prompt.messages)
    count = len(answer) - (n if len(answer) > n and answer[:n] == list(prompt.messages) else 0)
    if count != 1:
      raise ValueError(
        f'{key!r} has {count} messages after the prompt, expected one answer; messages before the '
        "answer, calls of tools and their results among them, belong into 'prompt' of both sides"
      )
  return found


def _pair_key(row: Mapping) -> str | None:
  """Returns the column with the prompt of a pair; None where the sides contain it."""
  sides = [row.get('chosen'), row.get('rejected')]
  given = [k for k in ('prompt', 'conversations', 'messages', 'instruction') if has(row, k)]
  if 'messages' in given and all(isinstance(s, list) and len(s) > 1 for s in sides):
    given.remove('messages')  # one of the sides again, as in UltraFeedback
  if len(given) > 1:
    raise ValueError(f'the columns {given} all hold a prompt; keep one of them')
  return given[0] if given else None


def _sides(row: Mapping) -> tuple[Any, Any]:
  """Returns (chosen, rejected), also from LLaMA-Factory's `output` list."""
  if has(row, 'chosen') or has(row, 'rejected') or not isinstance(row.get('output'), list):
    found = tuple(row.get(k) for k in ('chosen', 'rejected'))
  else:
    found = tuple(row['output'])
    if len(found) != 2:
      raise ValueError(f"'output' has {len(found)} answers, expected a chosen and a rejected one")
  for key, side in zip(('chosen', 'rejected'), found, strict=True):
    if side is None or side in ([], {}):
      raise ValueError(f'{key!r} is {side!r}, expected an answer')
  return found


def _from_pair(row: Mapping, has_template: bool) -> Pair:
  chosen, rejected = _sides(row)
  key, margin = _pair_key(row), _number(row, 'margin', 0.0)
  if key is None:
    sides = _without_prompt(row, chosen, rejected)
  else:
    rest, prompt = formats.opening(row, key, has_template)
    if isinstance(prompt, Part) and not prompt.messages:
      raise ValueError(f'the list of messages is empty: {key!r}')
    sides = _after(rest, prompt, chosen, 'chosen'), _after(rest, prompt, rejected, 'rejected')
  if isinstance(sides[0], Chat) and sides[0].messages[:-1] != sides[1].messages[:-1]:
    raise ValueError(
      "'chosen' and 'rejected' differ before their last message; both must answer the same prompt"
    )
  return Pair(*sides, margin)


def _single_key(row: Mapping) -> str:
  """Returns the format, one of formats.PROMPT_KEYS, of a row with one answer."""
  for form, keys in (
    ('messages', ('messages',)),
    ('sharegpt', ('conversations',)),
    ('prompt_completion', ('prompt', 'completion')),
    ('alpaca', ('instruction', 'output')),
  ):
    if all(has(row, k) for k in keys):
      return form
  raise ValueError(
    "expected an answer in 'messages', in 'prompt' and 'completion', in 'conversations', or in "
    f"'instruction' and 'output'; got keys {sorted(map(str, row))}"
  )


def _single(row: Mapping, has_template: bool) -> Answer:
  form = _single_key(row)
  key = formats.PROMPT_KEYS[form]
  if form in ('messages', 'sharegpt'):
    return _whole(row, read_list(row, key), key)
  rest, prompt = formats.opening(row, key, has_template)
  name = 'completion' if key == 'prompt' else 'output'
  return _after(rest, prompt, row[name], name)


class _Format(NamedTuple):
  """keys: groups of which a row has one column each. others: further columns that are read."""

  shape: str
  keys: tuple[tuple[str, ...], ...]
  others: tuple[str, ...]
  read: Callable[[Mapping, bool], Pair | LabeledExample]
  algorithm: str


_FORMATS = {
  'preference': _Format(
    'pair',
    (('chosen',), ('rejected',)),
    ('margin',),
    _from_pair,
    "pairs of answers (algorithm='dpo' but for dpo.loss='kto', and 'reward_model')",
  ),
  'labelled': _Format(
    'label',
    (('label', 'kto_tag'),),
    (),
    lambda row, has_template: LabeledExample(_single(row, has_template), _label(row)),
    "answers labeled good or bad (algorithm='dpo' with dpo.loss='kto')",
  ),
  'scored': _Format(
    'score',
    (('score',),),
    (),
    lambda row, has_template: LabeledExample(_single(row, has_template), _number(row, 'score')),
    "answers with a score (algorithm='reward_model' with reward_model.objective='scores')",
  ),
}
FORMATS = tuple(_FORMATS)


def _known_as(row: Mapping) -> str | None:
  """Returns the preference format of a row by its columns, or None."""
  if has(row, 'chosen') and has(row, 'rejected'):
    return 'preference'
  if any(formats.is_bool(row.get(k)) for k in ('label', 'kto_tag')):
    return 'labelled'
  return 'scored' if has(row, 'score') else None


def _lacking(row: Mapping, wanted: str) -> str | None:
  """Returns why a row lacks a column of a format, with the format it may have; else None."""
  form = _FORMATS[wanted]
  if wanted == 'preference' and isinstance(row.get('output'), list) and has(row, 'instruction'):
    return None
  lacking = [group[0] for group in form.keys if not any(k in row for k in group)]
  if not lacking:
    return None
  other = _known_as(row)
  if other == wanted or other is None:
    other = None if not _is_plain(row) else 'plain'
  hint = {
    None: '',
    'plain': "; the row has one answer without label or score, which is for algorithm='sft'",
  } | {n: f'; the row has {f.algorithm}' for n, f in _FORMATS.items()}
  return (
    f'no key {lacking[0]!r}, which {wanted!r} rows have: this run trains on {form.algorithm}; got '
    f'{sorted(map(str, row))}{hint[other]}'
  )


def _is_plain(row: Mapping) -> bool:
  try:
    formats.detect(row)
  except ValueError:
    return False
  return True


def parse(
  row: Mapping, shape: str, form: str | None, has_template: bool = True
) -> Pair | LabeledExample:
  """Parses a raw row into a pair or a labeled or scored answer.

  Args:
    row: the raw row.
    shape: the shape that the algorithm needs, one of SHAPES.
    form: the format in the config, or None.
    has_template: whether the tokenizer has a chat template; see `formats.parse`.

  Raises:
    ValueError: the row is unusable; the message is the reason.
  """
  wanted = next(n for n, f in _FORMATS.items() if f.shape == shape)
  if form not in (None, wanted):
    raise ValueError(f'format {form!r} gives no {shape}; this algorithm reads {wanted!r} rows')
  if reason := _lacking(row, wanted):
    raise ValueError(reason)
  return _FORMATS[wanted].read(row, has_template)


def unread(row: Mapping, shape: str) -> set[str]:
  """Returns the columns of a row for `parse` that are not null and that it does not read."""
  form = next(f for f in _FORMATS.values() if f.shape == shape)
  known = {k for group in form.keys for k in group} | {*form.others, *SHARED}
  if shape == 'pair':
    known |= {_pair_key(row)}
    known |= {'input', 'output', 'history'} if _pair_key(row) == 'instruction' else set()
  else:
    single = _single_key(row)
    known |= {formats.PROMPT_KEYS[single]}
    known |= {'prompt_completion': {'completion'}, 'alpaca': {'input', 'output', 'history'}}.get(
      single, set()
    )
  return {str(k) for k, v in row.items() if v is not None and k not in known}
