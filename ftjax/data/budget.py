"""What one rendering of a chat template may spend: steps, characters and list items, seconds.

`chat.py` opens a budget per rendering; every loop turn, call, filter, concatenation and output of a
template charges it.
"""

import contextvars
import time
from typing import Any

_CLOCK_EVERY = 64  # steps between two looks at the clock; a charge over _CLOCK_WORK looks as well
_CLOCK_WORK = 4096


class OverLimit(Exception):
  """A template that wants more than its rendering may spend."""


class Budget:
  """What is left to one rendering.

  Attributes:
    size: characters written so far, kept by the caller.
    places: for every message that is passed to the template, id(message) -> its number.
    marks: (number of a For node in the template, index of the message its turn is for, size at that
      time), in order; only where `places` is not empty.
    index_marks: the same of For nodes that count, with the integer they count.
  """

  __slots__ = ('deadline', 'index_marks', 'limits', 'marks', 'places', 'size', 'steps', 'work')

  def __init__(self, steps: int, work: int, seconds: float):
    self.limits = (steps, work, seconds)
    self.steps, self.work = steps, work
    self.deadline = time.monotonic() + seconds
    self.size = 0
    self.places: dict[int, int] = {}
    self.marks: list[tuple[int, int, int]] = []
    self.index_marks: list[tuple[int, int, int]] = []

  def charge(self, work: int = 0) -> None:
    """Takes one step and `work` characters or items.

    Raises:
      OverLimit: more than there is.
    """
    self.steps -= 1
    self.work -= work
    if self.steps < 0:
      raise OverLimit(f'takes more than {self.limits[0]} steps')
    if self.work < 0:
      raise OverLimit(f'makes more than {self.limits[1]} characters or items')
    late = work > _CLOCK_WORK or not self.steps % _CLOCK_EVERY
    if late and time.monotonic() > self.deadline:
      raise OverLimit(f'takes more than {self.limits[2]} seconds')

  def turn(self, size: int, loop: int, target: Any) -> None:
    """Charges a turn of a For node whose body holds `size` characters of text."""
    self.charge(size)
    if self.places:
      place = self.places.get(id(target))
      if place is not None:
        self.marks.append((loop, place, self.size))
      elif type(target) is int:
        self.index_marks.append((loop, target, self.size))


CURRENT: contextvars.ContextVar[Budget] = contextvars.ContextVar('budget')


def charge_deep(value: Any) -> Any:
  """Charges for a value about to become text or to be walked, and returns it; nested lists charge
  for every path through them."""
  budget = CURRENT.get()
  if type(value) is str:
    budget.charge(len(value))
    return value
  stack = [value]
  while stack:
    item = stack.pop()
    if isinstance(item, str):
      budget.charge(len(item))
    elif isinstance(item, dict):
      budget.charge(len(item))
      stack.extend(item)
      stack.extend(item.values())
    elif isinstance(item, list | tuple):
      budget.charge(len(item))
      stack.extend(item)
    elif isinstance(item, range):
      budget.charge(len(item))
  return value


def charge_shallow(value: Any) -> Any:
  """Charges for the length of a text or collection, and returns it."""
  CURRENT.get().charge(len(value) if isinstance(value, str | list | tuple | range | dict) else 0)
  return value
