"""What of a completion may count as its answer: the text after the thought, inside the answer tags.

Every built-in verifier of answers begins here, so that a completion which games the layout is
refused in one place. A prompt may end inside a tag (`<think>`): then the completion is read as if
it had begun with that tag. All rules are linear in the length of the text.
"""

import json
import re
from typing import Any

# A longer completion is refused unread; 64k tokens seldom reach it.
MAX_CHARS = 200_000
# <pad>, </s>, <|im_end|>
MARK = re.compile(r'<[^<>\s]{1,60}>')

# Thoughts as models and prompts mark them: the text behind the closing mark is the answer.
_THOUGHTS = (
  ('<think>', '</think>'),
  ('<thinking>', '</thinking>'),
  ('<thought>', '</thought>'),
  ('<reasoning>', '</reasoning>'),
  ('<seed:think>', '</seed:think>'),
  ('[THINK]', '[/THINK]'),
  ('<|START_THINKING|>', '<|END_THINKING|>'),
)
# gpt-oss names the channel of each message; the answer stands in the channel `final`.
_FINAL = re.compile(r'<\|channel\|>final[^<>]{0,60}<\|message\|>')
_CHANNEL = '<|channel|>'
_ANSWER, _END_ANSWER = '<answer>', '</answer>'
# What such a tag holds is an answer and no thought.
_ANSWERS = frozenset({'answer', 'solution', 'response', 'output', 'result', 'final'})

_TAIL_CHARS = 2000
_TAG = re.compile(
  r'<(?P<end>/)?(?P<name>[A-Za-z][\w:.-]{0,40})>|\[(?P<end2>/)?(?P<name2>THINK)\]'
  r'|<\|(?P<end3>END|START)_(?P<name3>THINKING)\|>|(?P<channel><\|channel\|>)'
)
# Turns of a chat template: what stands behind the last of them belongs to the assistant.
_TURN = re.compile(
  r'<\|(?!channel\|>|message\|>|(?:START|END)_THINKING)[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>'
  r'|\[/?(?:INST|SYSTEM_PROMPT)\]|<(?:start|end)_of_turn>|</?s>|<[be]os>'
  r'|</?(?:assistant|user|system|model|bot|human|gpt|ai)>'
)


def opened(prompt: str) -> str:
  r"""Returns the end of a prompt from the first tag on that it opens and does not close:
  '<think>\n' of a prompt that ends so; '' where it opens none.

  Where the prompt shows the turns of a template, tags behind the last turn count, also with words
  behind them (`<think>\nOkay`). In plain text only tags at the very end do: instructions may name
  others.
  """
  tail = prompt[-_TAIL_CHARS:]
  turns = list(_TURN.finditer(tail))
  if turns:
    tail = tail[turns[-1].end() :]
  else:
    marks = list(_TAG.finditer(tail))
    at = len(tail.rstrip())
    while marks and marks[-1].end() == at and not _closes(marks[-1]):
      at = len(tail[: marks.pop().start()].rstrip())
    tail = tail[at:].lstrip()
  unclosed: list[tuple[str, int]] = []
  for m in _TAG.finditer(tail):
    name = m['name'] or m['name2'] or m['name3'] or _CHANNEL
    if not _closes(m):
      unclosed.append((name, m.start()))
    elif any(name == n for n, _ in unclosed):
      while unclosed.pop()[0] != name:
        pass
  return tail[unclosed[0][1] :] if unclosed else ''


def _closes(m: re.Match) -> bool:
  return bool(m['end'] or m['end2'] or m['end3'] == 'END')


def final_answer(completion: str, prompt: str = '') -> str | None:
  """Returns the text that is compared with the gold answer, stripped; None where there is none.

  A thought ends at `</think>` or its kin; it may have begun at the end of the prompt, and so may
  the answer's tag. One pair of `<answer>` tags holds the answer. None: blank or longer than
  MAX_CHARS, a thought that is blank or never ends, tags that are unclosed, repeated or out of
  order, or nothing but tags.
  """
  if len(completion) > MAX_CHARS:
    return None
  begun = opened(prompt)
  text = begun + completion
  if _CHANNEL in text:
    *_, last = _FINAL.split(text)
    return last.strip() or None if _FINAL.search(text) and _CHANNEL not in last else None
  for start, end in _marks(begun):
    if start in text or end in text:
      before, _, after = text.partition(end)
      count = before.count(start)
      if text.count(end) != 1 or count > 1 or start in after:
        return None
      outside, _, thought = before.partition(start) if count else ('', '', before)
      if outside.strip() or not says_something(thought):
        return None
      text = after
  if _ANSWER in text or _END_ANSWER in text:
    if text.count(_ANSWER) != 1 or text.count(_END_ANSWER) != 1:
      return None
    _, _, rest = text.partition(_ANSWER)
    text, closed, _ = rest.partition(_END_ANSWER)
    if not closed:
      return None
  return _without_answer_tags(text, begun).strip() or None


def _marks(begun: str) -> tuple[tuple[str, str], ...]:
  """Returns the marks around thoughts; a tag that the prompt opens is one unless its name says that
  it holds an answer.
  """
  names = [m['name'] for m in _TAG.finditer(begun) if m['name'] and not m['end']]
  found = [(f'<{n}>', f'</{n}>') for n in names if n not in _ANSWERS]
  return (*(pair for pair in found if pair not in _THOUGHTS), *_THOUGHTS)


def _without_answer_tags(text: str, begun: str) -> str:
  """Returns the inside of a tag like <solution> that the prompt opened."""
  for m in _TAG.finditer(begun):
    name = m['name']
    if name in _ANSWERS and text.lstrip().startswith(m.group()):
      text = text.lstrip()[len(m.group()) :].partition(f'</{name}>')[0]
  return text


def says_something(text: str) -> bool:
  """Whether a letter or digit stands outside of marks like <pad>, </s> and <|im_end|>."""
  return any(char.isalnum() for char in MARK.sub('', text))


def gold_text(value: Any, column: str) -> str:
  """Returns a gold answer from a data row as text: numbers as JSON writes them.

  Raises:
    ValueError: blank, or neither text nor number.
  """
  if isinstance(value, str) and value.strip():
    return value.strip()
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return json.dumps(value)
  raise ValueError(f'column {column!r}: expected a text or a number, got {value!r}')
