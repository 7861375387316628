"""Extracts the final answer of a completion: the text after the reasoning, inside the answer tags.

Every built-in verifier of answers begins here, so that a completion which exploits the layout is
rejected in one place. A prompt may end inside a tag (`<think>`): then the completion is read as if
it began with that tag. All rules are linear in the length of the text.
"""

import json
import re
from typing import Any

# A longer completion is rejected unread; 64k tokens rarely reach it.
MAX_CHARS = 200_000
# <pad>, </s>, <|im_end|>
MARK = re.compile(r'<[^<>\s]{1,60}>')

# Tags around reasoning, as models and prompts use them: the answer is the text after the closing
# tag.
_THOUGHTS = (
  ('<think>', '</think>'),
  ('<thinking>', '</thinking>'),
  ('<thought>', '</thought>'),
  ('<reasoning>', '</reasoning>'),
  ('<seed:think>', '</seed:think>'),
  ('[THINK]', '[/THINK]'),
  ('<|START_THINKING|>', '<|END_THINKING|>'),
)
# gpt-oss names the channel of each message; the answer is in the channel `final`.
_FINAL = re.compile(r'<\|channel\|>final[^<>]{0,60}<\|message\|>')
_CHANNEL = '<|channel|>'
_ANSWER, _END_ANSWER = '<answer>', '</answer>'
# Such tags contain an answer, not reasoning.
_ANSWERS = frozenset({'answer', 'solution', 'response', 'output', 'result', 'final'})

_TAIL_CHARS = 2000
_TAG = re.compile(
  r'<(?P<end>/)?(?P<name>[A-Za-z][\w:.-]{0,40})>|\[(?P<end2>/)?(?P<name2>THINK)\]'
  r'|<\|(?P<end3>END|START)_(?P<name3>THINKING)\|>|(?P<channel><\|channel\|>)'
)
# Turns of a chat template: text after the last of them belongs to the assistant.
_TURN = re.compile(
  r'<\|(?!channel\|>|message\|>|(?:START|END)_THINKING)[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>'
  r'|\[/?(?:INST|SYSTEM_PROMPT)\]|<(?:start|end)_of_turn>|</?s>|<[be]os>'
  r'|</?(?:assistant|user|system|model|bot|human|gpt|ai)>'
)


def opened(prompt: str) -> str:
  r"""Returns the end of a prompt from the first tag on that it opens and does not close, such as
  '<think>\n'; '' if it opens none.

  If the prompt has turns of a chat template, all tags after the last turn count, also with words
  after them (`<think>\nOkay`). In plain text only tags at the end count: instructions may mention
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
  """Returns the text that is compared with the gold answer, stripped; None if there is none.

  Reasoning ends at `</think>` or a similar tag. It may begin at the end of the prompt, and so may
  the answer's tag. One pair of `<answer>` tags contains the answer. None is returned for blank
  completions and those longer than MAX_CHARS, for reasoning that is blank or not closed, for tags
  that are unclosed, repeated or out of order, and for text that consists of tags only.
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
      if outside.strip() or not has_text(thought):
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
  """Returns the pairs of tags around reasoning; a tag that the prompt opens is one of them unless
  its name is that of an answer.
  """
  names = [m['name'] for m in _TAG.finditer(begun) if m['name'] and not m['end']]
  found = [(f'<{n}>', f'</{n}>') for n in names if n not in _ANSWERS]
  return (*(pair for pair in found if pair not in _THOUGHTS), *_THOUGHTS)


def _without_answer_tags(text: str, begun: str) -> str:
  """Returns the text inside of a tag like <solution> that the prompt opened."""
  for m in _TAG.finditer(begun):
    name = m['name']
    if name in _ANSWERS and text.lstrip().startswith(m.group()):
      text = text.lstrip()[len(m.group()) :].partition(f'</{name}>')[0]
  return text


def has_text(text: str) -> bool:
  """Returns whether a text has a letter or digit outside of marks like <pad>, </s> and
  <|im_end|>."""
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
