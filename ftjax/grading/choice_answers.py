"""Grades answers to multiple-choice questions: finds the one letter that a completion commits
to."""

import dataclasses
import itertools
import re
from typing import Any

from ftjax.grading.final_answer import final_answer, gold_text
from ftjax.grading.latex import normalize
from ftjax.runtime.errors import ConfigError

# Most statements of its choice in one completion.
_MAX_STATEMENTS = 3
# Removed around a letter: \(B\), \textbf{(B)}.
_DELIMITERS = re.compile(r'\\[()\[\]]')
_STYLED = re.compile(r'\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf)\s?\{([^{}]{1,60})\}')
# Directly after a letter; and the beginning of a sentence after the last statement that names
# another letter.
_DENIED = re.compile(
  r'[)\]*"`]{0,3}\s(?:is|was|seems|looks|cannot|can)\s?(?:wrong|incorrect|false|not\b|n[\'\u2019]t)'
)
_TAKEN_BACK = re.compile(
  r'(?m)(?:^|[.!?;])\s*((?i:wait|actually|sorry|correction|scratch that|on second thought'
  r'|never ?mind|i mean|my mistake)\b|(?i:no)[,.!:;])'
)


@dataclasses.dataclass(frozen=True)
class Choice:
  """Reward 1 if the completion commits to the gold letter and to no other, else 0.

  Attributes:
    letters: the options, in order.
    column: of the gold answers: a letter, or its index from 0.
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

  def check(self, gold: Any) -> None:
    """Raises ValueError for a gold answer that is none of the options."""
    self._gold(gold)

  def score(self, completion: str, gold: Any, prompt: str = '') -> float:
    """Returns the reward; raises ValueError for a gold answer that is none of the options."""
    wanted = self._gold(gold)
    text = final_answer(completion, prompt)
    return float(text is not None and committed_letter(text, self.letters) == wanted)

  def _gold(self, value: Any) -> str:
    text = normalize(gold_text(value, self.column)).strip('()')
    if text.isascii() and text.isdigit() and int(text) < len(self.letters):
      return self.letters[int(text)]
    if text not in self.letters or len(text) != 1:
      raise ValueError(f'column {self.column!r}: {value!r} is none of the letters {self.letters}')
    return text


def committed_letter(text: str, letters: str) -> str | None:
  r"""Returns the letter that a text commits to; None for none, several, or too many repeats.

  Recognized are 'answer is (B)', 'Answer: B', 'Option B is correct', \boxed{B}; without them a text
  that begins with its letter: 'B', '(B)', '**B**', 'B. Paris', if no other line begins with one.
  Letters are capitals. A statement that is corrected afterwards does not count.
  """
  one, text = f'[{letters}]', _STYLED.sub(r'\1', _DELIMITERS.sub('', text))
  marked = rf'[\s(\[*$"\'`{{]{{0,5}}({one})(?![\w\'\u2019])'
  states = r'(?:\b[Aa]nswer|\bANSWER|\b[Cc]hoice|\b[Oo]ption)\b(?:\*\*)?\s?(?:is\b\s?:?|:|=)'
  states += rf'\s{{0,3}}(?:\*\*)?\s?(?:[Oo]ption\s|[Cc]hoice\s)?{marked}'
  # 'Is option A correct?' is asked on the way to an answer that is marked as one.
  correct = rf'\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s{marked}[)\]*"`]{{0,3}}\sis\s(?:the\s)?'
  correct += r'(?:correct|right)\b'
  boxed = rf'\\boxed\s?\{{{marked}'
  found = [m for pattern in (states, boxed) for m in re.finditer(pattern, text)]
  found = found or list(re.finditer(correct, text))
  if not found:
    starts = list(
      re.finditer(rf'(?m)^[\s(\[*$"\'`{{]{{0,5}}({one})(?=[\s)\].:,*$"\'`}}/|;]|$)', text)
    )
    # 'A dog ...' begins with an article, 'A. dog' with a letter.
    if len(starts) != 1 or text[: starts[0].start()].strip():
      return None
    rest = text[starts[0].end() :]
    if rest.strip() and not re.match(r'[)\].:*$"\'`}]', rest):
      return None
    found = starts
  given = {m.group(1) for m in found}
  if len(given) > 1 or len(found) > _MAX_STATEMENTS:
    return None
  if any(_continues(text[m.end() : m.end() + 100], one) for m in found):
    return None
  if any(_DENIED.match(text, m.end()) for m in found):
    return None
  letter = given.pop()
  rest = text[max(m.end() for m in found) :]
  return None if _is_taken_back(rest, letters.replace(letter, '')) else letter


def _is_taken_back(rest: str, others: str) -> bool:
  """Returns whether a sentence begins like a correction and names another letter: 'Wait, no. A.'"""
  letter = rf'[(\[*$"\'`]{{0,3}}[{others}](?![\w\'\u2019])'
  small = r'(?:no|it is|it\'s|it should be|the answer is|option|choice)'
  direct = rf'[\s,.:;!-]{{0,4}}(?:{small}[\s,.:;!]{{0,3}}){{0,2}}{letter}'
  later = rf'[^\n]{{0,80}}?\s{letter}(?!\s[a-z])'
  for m in itertools.islice(_TAKEN_BACK.finditer(rest), 20):
    after = rest[m.end() : m.end() + 100]
    # 'No, because ...' may be the option's own text.
    if re.match(direct, after) or (m[1][:2].lower() != 'no' and re.match(later, after)):
      return True
  return False


def _continues(rest: str, one: str) -> bool:
  """Returns whether another letter follows as a further guess: 'B, C', 'B C', 'B (or maybe C)'. A
  letter before a lower-case word is an article: 'B. A dog'."""
  letter = rf'[(\[*$"\'`]{{0,3}}{one}(?![\w\'\u2019])(?!\s[a-z])'
  listed = rf'[\s)\]*$"\'`}}.:,/|;&]{{0,9}}{letter}'
  joined = rf'.*?\b(?:or|and|OR|AND|maybe|possibly)\s{letter}'
  return bool(re.match(listed, rest) or re.match(joined, rest))
