"""Draws scores over a number, such as rows or a learning rate: points, lines and a band, as SVG."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from ftjax.reporting import svg
from ftjax.reporting.figures import is_finite, number

WIDTH, HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 30


@dataclasses.dataclass(frozen=True)
class Line:
  """A curve: x and y of the same length; points without a line where it is not `is_joined`.

  low, high: ends of an interval of each point; () for none.
  """

  x: Sequence[float]
  y: Sequence[float]
  is_joined: bool = True
  low: Sequence[float] = ()
  high: Sequence[float] = ()

  def points(self) -> list[tuple[float, float]]:
    """Returns the points with finite coordinates."""
    return [(a, b) for a, b in zip(self.x, self.y, strict=True) if is_finite(a) and is_finite(b)]

  def ends(self) -> list[tuple[float, float, float]]:
    """Returns (x, low, high) of the points whose interval is known."""
    found = zip(self.x, self.low, self.high, strict=False)
    return [(x, a, b) for x, a, b in found if all(map(is_finite, (x, a, b)))]


def draw(name: str, lines: Mapping[str, Line], log_x: bool = False) -> Markup:
  """Returns the lines as one drawing; empty where no point can be drawn.

  Args:
    name: of the drawing.
    lines: by their names.
    log_x: a logarithmic axis of x, which is then above 0.
  """
  xs = [x for line in lines.values() for x, _ in line.points()]
  ys = [y for line in lines.values() for _, y in line.points()]
  ys += [y for line in lines.values() for _, *own in line.ends() for y in own]
  if not xs or (log_x and min(xs) <= 0):
    return Markup('')
  to_x = _scale(min(xs), max(xs), _LEFT + 8, WIDTH - _RIGHT - 8, log_x)
  room = (max(ys) - min(ys)) * 0.08 or abs(ys[0]) * 0.1 or 1.0
  low, high = min(ys) - room, max(ys) + room
  to_y = _scale(low, high, HEIGHT - _BOTTOM, _TOP, False)
  content = _axes(to_x, to_y, (min(xs), max(xs)), (low, high), log_x)
  words = []
  for i, (label, line) in enumerate(lines.items()):
    content += _drawn(line, to_x, to_y, f's{i % 8}')
    shown = [f'{number(y)} at {svg.tick_label(x)}' for x, y in line.points()[:12]]
    words.append(f'{label}: {", ".join(shown)}')
  return svg.drawing(WIDTH, HEIGHT, name, '; '.join(words), *content, class_='chart')


def _scale(
  low: float, high: float, first: float, last: float, is_log: bool
) -> Callable[[float], float]:
  """Returns the function from a value to its pixel."""
  a, b = (math.log(low), math.log(high)) if is_log else (low, high)

  def place(value: float) -> float:
    v = math.log(value) if is_log else value
    return (first + last) / 2 if a == b else first + (v - a) / (b - a) * (last - first)

  return place


def _axes(to_x, to_y, x, y, log_x) -> list[Markup]:
  out = []
  for value in svg.linear_ticks(*y, 5):
    at = to_y(value)
    out.append(svg.tag('line', class_='grid', x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at))
    label = svg.tick_label(value)
    out.append(svg.tag('text', label, class_='tick end', x=_LEFT - 6, y=at + 4))
  for value in svg.log_ticks(*x) if log_x else svg.linear_ticks(*x, 5):
    label = svg.tick_label(value)
    out.append(svg.tag('text', label, class_='tick middle', x=float(to_x(value)), y=HEIGHT - 10))
  return out


def _drawn(line: Line, to_x, to_y, color: str) -> list[Markup]:
  out = []
  for x, low, high in line.ends():
    at = float(to_x(x))
    ends = dict(y1=float(to_y(low)), y2=float(to_y(high)))
    out.append(svg.tag('line', class_=f'curve {color} faint', x1=at, x2=at, **ends))
  pixels = [(float(to_x(x)), float(to_y(y))) for x, y in line.points()]
  if line.is_joined and len(pixels) > 1:
    text = ' '.join(f'{svg.coordinate(a)},{svg.coordinate(b)}' for a, b in pixels)
    out.append(svg.tag('polyline', class_=f'curve {color}', points=text))
  else:
    out += [svg.tag('circle', class_=f'dot {color}', cx=a, cy=b, r=3) for a, b in pixels]
  return out
