"""Few-shot examples: rows with their answers that stand before every prompt of a task."""

import dataclasses
import hashlib
from collections.abc import Sequence

from ftjax.data.formats import Chat
from ftjax.runtime.errors import DataError

_MOST_ANSWERS = 10  # different answers up to which each of them is shown in turn


@dataclasses.dataclass(frozen=True)
class Shots:
  """Prompts with their answers, in the order in which they are shown.

  They are the same for all rows of a task, so that rows stay independent of each other.
  """

  examples: tuple[tuple[Chat | str, str], ...]

  def before(self, asked: Chat | str) -> Chat | str:
    """Returns the prompt with the examples before it: as turns of one conversation, after its
    system message; as paragraphs before a text.

    Raises:
      DataError: the prompt is a text and the examples are conversations, or the reverse.
    """
    if any(isinstance(e, str) != isinstance(asked, str) for e, _ in self.examples):
      raise DataError(
        'eval.shots: the examples are conversations and the prompts are texts, or the reverse; '
        'give rows of the same form in eval.shots_from'
      )
    if isinstance(asked, str):
      texts = [f'{e}{_joint(str(e), a)}{a}' for e, a in self.examples]
      return '\n\n'.join([*texts, asked])
    turns = []
    for example, answer in self.examples:
      own = [m for m in example.messages if m['role'] != 'system']
      turns += [*own, {'role': 'assistant', 'content': answer}]
    system = [m for m in asked.messages if m['role'] == 'system']
    rest = [m for m in asked.messages if m['role'] != 'system']
    return dataclasses.replace(asked, messages=(*system, *turns, *rest))


def _joint(prompt: str, answer: str) -> str:
  """Returns the space between a prompt that ends in none and an answer that begins with none."""
  return '' if prompt[-1:].isspace() or answer[:1].isspace() else ' '


def choose(rows: Sequence[tuple[Chat | str, str]], count: int, seed: int) -> Shots:
  """Returns `count` examples, drawn by hash.

  Where the rows have few different answers, as in classification, these come in turn, so that two
  examples show two classes.

  Raises:
    DataError: fewer rows than `count`.
  """
  if len(rows) < count:
    raise DataError(f'eval.shots={count}: there are {len(rows)} rows to draw examples from')

  def place(item: tuple[int, tuple[Chat | str, str]]) -> bytes:
    return hashlib.sha256(f'{seed}:{item[0]}'.encode()).digest()

  drawn = [row for _, row in sorted(enumerate(rows), key=place)]
  answers = list(dict.fromkeys(answer for _, answer in drawn))
  if len(answers) <= _MOST_ANSWERS:
    turn: dict[str, int] = {}
    keyed = []
    for row in drawn:
      turn[row[1]] = turn.get(row[1], -1) + 1
      keyed.append((turn[row[1]], answers.index(row[1]), row))
    drawn = [row for _, _, row in sorted(keyed, key=lambda k: k[:2])]
  return Shots(tuple(drawn[:count]))
