"""Answers to multiple-choice questions: the one letter that a completion commits itself to."""

import dataclasses
import re
from typing import Any

from ftjax.rollout.final_answer import final_answer, gold_text
from ftjax.runtime.errors import ConfigError

# So often may one completion state its choice.
_MAX_STATEMENTS = 3


@dataclasses.dataclass(frozen=True)
class Choice:
  """1 where the completion commits itself to the gold letter and to no other.

  Attributes:
    letters: the options, in order.
    column: of the gold: a letter, or the index of one from 0.
  """

  letters: str = 'ABCDEFGHIJ'
  column: str = 'answer'

  def __post_init__(self):
    is_upper = self.letters.isascii() and self.letters.isalpha() and self.letters.isupper()
    if not is_upper or len(set(self.letters)) < max(2, len(self.letters)):
      raise ConfigError(
        f'the reward choice: letters={self.letters!r}; expected different capital letters: ABCD'
      )

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('completions', self.column)

  @property
  def isolated(self) -> bool:
    return False

  def warm(self) -> None:
    """Nothing to import."""

  def score(self, completion: str, gold: Any) -> float:
    """Raises ValueError for a gold that is none of the options."""
    wanted = self._gold(gold)
    text = final_answer(completion)
    return float(text is not None and committed_letter(text, self.letters) == wanted)

  def _gold(self, value: Any) -> str:
    text = gold_text(value, self.column).strip('()')
    if text.isascii() and text.isdigit() and int(text) < len(self.letters):
      return self.letters[int(text)]
    if text not in self.letters or len(text) != 1:
      raise ValueError(f'column {self.column!r}: {value!r} is none of the letters {self.letters}')
    return text


def committed_letter(text: str, letters: str) -> str | None:
  r"""The letter a text commits itself to; None for none, several, or too many repeats.

  Read are 'answer is (B)', 'Answer: B', \boxed{B}; without them a text that begins with its letter:
  'B', '(B)', '**B**', 'B. Paris', where no other line begins with a letter. Letters are capitals.
  """
  one = f'[{letters}]'
  marked = rf'(?:\\(?:text|mathrm)\{{)?[\s(\[*$"\'{{]{{0,5}}({one})(?![\w\'\u2019])'
  says = r'(?:\b[Aa]nswer|\bANSWER|\b[Cc]hoice|\b[Oo]ption)\b(?:\*\*)?\s?(?:is\b|:|=)\s?(?:\*\*)?'
  says += rf'\s?(?:[Oo]ption\s|[Cc]hoice\s)?{marked}'
  found = [*re.finditer(says, text), *re.finditer(rf'\\boxed\s?\{{{marked}', text)]
  if not found:
    starts = list(
      re.finditer(rf'(?m)^[\s(\[*$"\'{{]{{0,5}}({one})(?=[\s)\].:,*$"\'}}/|;]|$)', text)
    )
    # 'A dog ...' begins with an article, 'A. dog' with a letter.
    if len(starts) != 1 or text[: starts[0].start()].strip():
      return None
    rest = text[starts[0].end() :]
    if rest.strip() and not re.match(r'[)\].:*$"\'}]', rest):
      return None
    found = starts
  given = {m.group(1) for m in found}
  if len(given) > 1 or len(found) > _MAX_STATEMENTS:
    return None
  if any(_goes_on(text[m.end() : m.end() + 100], one) for m in found):
    return None
  return given.pop()


def _goes_on(rest: str, one: str) -> bool:
  """Whether another letter follows as a further guess: 'B, C', 'B C', 'B (or maybe C)'. A letter
  before a small word is an article: 'B. A dog'."""
  letter = rf'[(\[*$"\']{{0,3}}{one}(?![\w\'\u2019])(?!\s[a-z])'
  listed = rf'[\s)\]*$"\'}}.:,/|;&]{{0,9}}{letter}'
  joined = rf'.*?\b(?:or|and|OR|AND|maybe|possibly)\s{letter}'
  return bool(re.match(listed, rest) or re.match(joined, rest))
