"""Alters the questions of training rows: words left out, words swapped, typing errors, other prompt
templates. Answers stay as they are.

Each alteration is a function of the text and of random bits keyed by (seed, number of the copy,
text), so that the altered rows, and with them the order of the data, do not depend on anything
else. Only training sources are altered: experiment/data.py opens evaluation data without. Word
dropout and swaps are those of EDA (Wei and Zou 2019, EMNLP), without its synonyms.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.data.formats import Chat, Completion, Example
from ftjax.runtime.errors import ConfigError

PLACE = '{prompt}'  # of the question, in a template


class _Chance:
  """Random numbers keyed by a text; NumPy guarantees Philox's raw bits across versions."""

  def __init__(self, *names: str | int):
    key = hashlib.sha256('/'.join(map(str, names)).encode(errors='surrogatepass')).digest()[:16]
    self._bits = np.random.Philox(key=np.frombuffer(key, '<u8').astype(np.uint64))

  def shares(self, count: int) -> np.ndarray:
    """Returns float64[count] in [0, 1)."""
    return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

  def below(self, limit: int) -> int:
    """Returns a whole number in [0, limit)."""
    return min(int(self.shares(1)[0] * limit), limit - 1)


def _split(text: str) -> list[str]:
  """Returns the words of a text at odd places, and the white space between them at even ones."""
  return re.split(r'(\S+)', text)


def word_dropout(text: str, rate: float, chance: _Chance) -> str:
  """Leaves out each word with probability `rate`, with the white space after it; never all."""
  parts = _split(text)
  count = len(parts) // 2
  kept = chance.shares(count) >= rate
  if not count or kept.all():
    return text
  if not kept.any():
    kept[chance.below(count)] = True
  pieces = [parts[0], *(parts[2 * k + 1] + parts[2 * k + 2] for k in np.flatnonzero(kept))]
  return ''.join(pieces).rstrip(' ') if not parts[-1] else ''.join(pieces)


def swap(text: str, rate: float, chance: _Chance) -> str:
  """Swaps each word with the next one with probability `rate`; no word moves twice."""
  parts = _split(text)
  count = len(parts) // 2
  is_moved = chance.shares(max(count - 1, 0)) < rate
  k = 0
  while k < count - 1:
    if is_moved[k]:
      parts[2 * k + 1], parts[2 * k + 3] = parts[2 * k + 3], parts[2 * k + 1]
      k += 1
    k += 1
  return ''.join(parts)


def noise(text: str, rate: float, chance: _Chance) -> str:
  """Makes a typing error at each letter with probability `rate`: the letter is left out, doubled,
  or swapped with the next one.
  """
  shares, kinds = chance.shares(len(text)), chance.shares(len(text))
  out: list[str] = []
  k = 0
  while k < len(text):
    letter = text[k]
    if shares[k] >= rate or not letter.isalpha():
      out.append(letter)
    elif kinds[k] < 1 / 3:
      pass
    elif kinds[k] < 2 / 3 or k + 1 == len(text) or not text[k + 1].isalpha():
      out.append(letter * 2)
    else:
      out.append(text[k + 1] + letter)
      k += 1
    k += 1
  made = ''.join(out)
  return made if made.strip() else text


# By the names of config/choices.AUGMENTATIONS; `template` alone has no rate.
BY_RATE: dict[str, Callable[[str, float, _Chance], str]] = {
  'word_dropout': word_dropout,
  'swap': swap,
  'noise': noise,
}
TEMPLATE = 'template'


def alter(text: str, number: int, names: Sequence[str], templates: Sequence[str], seed: int) -> str:
  """Returns copy `number` of a text, altered in the order of `names`.

  Args:
    text: a question.
    number: of the copy, from 0.
    names: entries of data.augment, 'name@rate' or 'template'.
    templates: texts with PLACE.
    seed: of the run.
  """
  out = text
  for name in names:
    kind, _, rate = name.partition('@')
    chance = _Chance('augment', seed, number, name, text)
    if kind == TEMPLATE:
      out = templates[chance.below(len(templates))].replace(PLACE, out)
    else:
      out = BY_RATE[kind](out, float(rate), chance)
  return out


def copy(
  example: Example, number: int, names: Sequence[str], templates: Sequence[str], seed: int
) -> Example:
  """Returns copy `number` of an example: of a conversation its last user message is altered, of a
  completion its prompt; see `alter`.

  Raises:
    ConfigError: a document, or a conversation without a user message.
  """
  settings = (number, names, templates, seed)
  if isinstance(example, Completion):
    return dataclasses.replace(example, prompt=alter(example.prompt, *settings))
  if isinstance(example, Chat):
    messages = list(example.messages)
    for k in reversed(range(len(messages))):
      if messages[k]['role'] == 'user':
        messages[k] = messages[k] | {'content': alter(messages[k]['content'], *settings)}
        return dataclasses.replace(example, messages=tuple(messages))
  raise ConfigError(
    'data.augment alters the question of a row, and this one has none; leave data.augment out'
  )
