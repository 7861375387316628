"""Builds SVG elements and the ticks of axes. Colors are CSS classes of page.css, so that one
drawing serves light, dark and print.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from ftjax.reporting.figures import clean

MAX_TICKS = 6


def tag(name: str, *content: str | Markup, **attributes: str | float | None) -> Markup:
  """Returns an element. Text is escaped, Markup is not.

  Args:
    name: of the element.
    content: elements and texts in it.
    attributes: `_` in a name becomes '-', a trailing one is dropped (class_); None: left out.
  """
  parts = [
    f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
    for key, value in attributes.items()
    if value is not None
  ]
  inside = ''.join(c if isinstance(c, Markup) else escape(clean(c)) for c in content)
  return Markup(f'<{name}{"".join(parts)}>{inside}</{name}>')


def _value(value: str | float) -> str:
  if isinstance(value, float):
    return coordinate(value)
  return str(escape(clean(value)) if isinstance(value, str) else value)


def coordinate(value: float) -> str:
  """Returns a number of pixels with at most one decimal."""
  return f'{value:.1f}'.removesuffix('.0')


def join(parts: Sequence[Markup]) -> Markup:
  """Returns elements one after the other."""
  return Markup('').join(parts)


def drawing(
  width: int, height: int, name: str, description: str, *content: Markup, **attributes: str | None
) -> Markup:
  """Returns a drawing that a screen reader reads as one image.

  Args:
    width, height: pixels of the view box.
    name: of the image.
    description: in a sentence or two, what the image shows.
    content: elements.
    attributes: of the svg element.
  """
  return tag(
    'svg',
    tag('title', name),
    tag('desc', description),
    *content,
    viewBox=f'0 0 {width} {height}',
    role='img',
    aria_label=f'{name}. {description}',
    **attributes,
  )


def linear_ticks(low: float, high: float, most: int = MAX_TICKS) -> list[float]:
  """Returns round numbers in [low, high], 1, 2 or 5 times a power of ten apart; `low` alone where
  the two are equal.
  """
  if not high - low > 1e-300:
    return [low]
  raw = (high - low) / most
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
  first = math.ceil(low / step - 1e-9)
  count = math.floor(high / step + 1e-9) - first + 1
  return [(first + i) * step for i in range(max(0, count))]


def log_ticks(low: float, high: float, most: int = MAX_TICKS) -> list[float]:
  """Returns powers of ten in [low, high], with 2 and 5 times them where there are few; 0 < low."""
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  stride = max(1, math.ceil((last - first) / most))
  tens = [10.0**e for e in range(first, last + 1, stride)]
  found = [t for t in tens if low * 0.999 <= t <= high * 1.001]
  if len(found) >= 3:
    return found
  found = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
  found = [t for t in found if low * 0.999 <= t <= high * 1.001]
  return found if len(found) >= 2 else linear_ticks(low, high, most)


def tick_label(value: float) -> str:
  """Returns the number at a tick: 0.002, 250, 10k, 1.5M, 1e-05."""
  size = abs(value)
  if size < 1e-12:
    return '0'
  for limit, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
    if limit <= size < 1e15:
      divisor = {'T': 1e12, 'G': 1e9, 'M': 1e6, 'k': 1e3}[letter]
      return f'{value / divisor:.4g}{letter}'
  return f'{value:.4g}' if 1e-3 <= size < 1e15 else f'{value:.1e}'.replace('.0e', 'e')
