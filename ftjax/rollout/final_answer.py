"""What of a completion may count as its answer: the text after the thought, inside the answer tags.

Every built-in verifier of answers begins here, so that a completion which games the layout is
refused in one place. All rules are linear in the length of the text.
"""

import json
import re
from typing import Any

# A longer completion is refused unread; 64k tokens seldom reach it.
MAX_CHARS = 200_000
# <pad>, </s>, <|im_end|>
MARK = re.compile(r'<[^<>\s]{1,60}>')

_THINK, _END_THINK = '<think>', '</think>'
_ANSWER, _END_ANSWER = '<answer>', '</answer>'


def final_answer(completion: str) -> str | None:
  """The text that is compared with the gold answer, stripped; None where there is none to pay for.

  A thought ends at `</think>`; it may have begun in the prompt. One pair of `<answer>` tags holds
  the answer. None: blank or longer than MAX_CHARS, a thought that is blank or never ends, tags that
  are unclosed, repeated or out of order, or nothing but tags.
  """
  if len(completion) > MAX_CHARS:
    return None
  text = completion
  if _THINK in text or _END_THINK in text:
    before, _, after = text.partition(_END_THINK)
    opened = before.count(_THINK)
    if text.count(_END_THINK) != 1 or opened > 1 or _THINK in after:
      return None
    outside, _, thought = before.partition(_THINK) if opened else ('', '', before)
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
  return text.strip() or None


def says_something(text: str) -> bool:
  """Whether a letter or digit stands outside of marks like <pad>, </s> and <|im_end|>."""
  return any(char.isalnum() for char in MARK.sub('', text))


def gold_text(value: Any, column: str) -> str:
  """A gold answer from a data row as text: numbers as JSON writes them.

  Raises:
    ValueError: blank, or neither text nor number.
  """
  if isinstance(value, str) and value.strip():
    return value.strip()
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return json.dumps(value)
  raise ValueError(f'column {column!r}: expected a text or a number, got {value!r}')
