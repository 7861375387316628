"""Draws curves over training steps as SVG.

A long curve keeps its extremes: of each of a few hundred equal parts of the steps the least and the
largest value are drawn, so that 100,000 steps take the space of 400 and no spike is lost.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ftjax.reporting import svg
from ftjax.reporting.figures import count, number

WIDTH, HEIGHT = 400, 210
MOST = 400  # points of a curve
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
_SMOOTH_FROM = 120  # points from which a curve of means is drawn over the measured one
_MEANS = 60  # points of the curve of means
_DOTS = 40  # points up to which each has a dot
_LARGEST = 1e150  # of a value that can be drawn: differences and products stay finite
_LOG_FROM = 20.0  # ratio of largest to least value from which a logarithmic axis is offered


@dataclasses.dataclass(frozen=True)
class Series:
  """A curve: steps float64[N], values float64[N], NaN and infinities included."""

  name: str
  steps: np.ndarray
  values: np.ndarray

  def finite(self) -> 'Series':
    """Returns the part whose values are finite, and not as large as to overflow a drawing."""
    kept = np.abs(self.values) < _LARGEST
    return Series(self.name, self.steps[kept], self.values[kept])


def thin(series: Series, most: int = MOST) -> Series:
  """Returns at most `most` points of a curve of finite values, the extremes of each part of the
  steps included, in order.
  """
  n = len(series.steps)
  if n <= most:
    return series
  first, last = series.steps[0], series.steps[-1]
  parts = most // 2
  part = ((series.steps - first) * (parts / max(last - first, 1))).astype(np.int64)
  part = np.minimum(part, parts - 1)
  order = np.lexsort((series.values, part))
  starts = np.flatnonzero(np.diff(part[order], prepend=-1))
  ends = np.append(starts[1:], n) - 1
  kept = np.unique(np.concatenate([order[starts], order[ends]]))
  return Series(series.name, series.steps[kept], series.values[kept])


def means(series: Series, parts: int = _MEANS) -> Series:
  """Returns the means of consecutive parts of a curve of finite values."""
  groups = np.array_split(np.arange(len(series.steps)), parts)
  groups = [g for g in groups if len(g)]
  return Series(
    series.name,
    np.array([series.steps[g].mean() for g in groups]),
    np.array([series.values[g].mean() for g in groups]),
  )


def wants_log(series: Sequence[Series]) -> bool:
  """Returns whether a logarithmic axis is of use: all values are above 0, the largest many times
  the least.
  """
  values = np.concatenate([s.finite().values for s in series]) if series else np.empty(0)
  return bool(len(values)) and bool(values.min() > 0) and values.max() / values.min() >= _LOG_FROM


def describe(series: Sequence[Series]) -> str:
  """Returns first, last, least and largest value of each curve in words."""
  out = []
  for one in series:
    found = one.finite()
    if not len(found.values):
      out.append(f'{one.name}: no finite value')
      continue
    low, high = found.values.argmin(), found.values.argmax()
    lost = len(one.values) - len(found.values)
    if len(found.values) == 1:
      text = f'{number(found.values[0].item())} at step {count(found.steps[0])}'
    else:
      text = (
        f'first {number(found.values[0].item())}, last {number(found.values[-1].item())}, '
        f'least {number(found.values[low].item())} at step {count(found.steps[low])}, '
        f'largest {number(found.values[high].item())} at step {count(found.steps[high])}'
      )
    text += f', {count(lost)} not finite' if lost else ''
    out.append(f'{one.name}: {text}')
  return '; '.join(out)


@dataclasses.dataclass(frozen=True)
class _Axes:
  """Ranges of a plot, and its scale."""

  x: tuple[float, float]
  y: tuple[float, float]
  is_log: bool

  def points(self, steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels float64[N] twice."""
    low, high = (np.log10(v) if self.is_log else v for v in self.y)
    values = np.log10(values) if self.is_log else values
    x = (steps - self.x[0]) / (self.x[1] - self.x[0])
    y = (values - low) / (high - low)
    return (
      _LEFT + x * (WIDTH - _LEFT - _RIGHT),
      HEIGHT - _BOTTOM - y * (HEIGHT - _TOP - _BOTTOM),
    )


def _axes(series: Sequence[Series], is_log: bool) -> _Axes:
  steps = np.concatenate([s.steps for s in series])
  values = np.concatenate([s.values for s in series])
  x0, x1 = float(steps.min()), float(steps.max())
  y0, y1 = float(values.min()), float(values.max())
  if x0 == x1:
    x0, x1 = x0 - 1, x1 + 1
  if y0 == y1:
    room = abs(y0) * 0.5 or 1.0
    y0, y1 = (y0 / 2, y1 * 2) if is_log else (y0 - room, y1 + room)
  elif is_log:
    y0, y1 = y0 / 1.05, y1 * 1.05
  else:
    room = (y1 - y0) * 0.08
    y0, y1 = y0 - room if y0 < 0 else max(0.0, y0 - room), y1 + room
  return _Axes((x0, x1), (y0, y1), is_log)


def _grid(axes: _Axes) -> list[Markup]:
  out = []
  ticks = svg.log_ticks(*axes.y) if axes.is_log else svg.linear_ticks(*axes.y)
  for value in ticks:
    _, y = axes.points(np.array([axes.x[0]]), np.array([value]))
    y = float(y[0])
    out.append(svg.tag('line', class_='grid', x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y))
    label = svg.tick_label(value)
    out.append(svg.tag('text', label, class_='tick end', x=_LEFT - 6, y=y + 4))
  for value in svg.linear_ticks(*axes.x, most=5):
    if value != round(value):
      continue  # a step is a whole number
    x, _ = axes.points(np.array([value]), np.array([axes.y[0]]))
    label = svg.tick_label(value)
    out.append(svg.tag('text', label, class_='tick middle', x=float(x[0]), y=HEIGHT - 8))
  return out


def _curve(axes: _Axes, series: Series, number: int) -> list[Markup]:
  out, color = [], f's{number % 8}'
  drawn = thin(series)
  is_noisy = len(series.values) >= _SMOOTH_FROM
  x, y = axes.points(drawn.steps, drawn.values)
  if len(x) > 1:
    faint = ' faint' if is_noisy else ''
    points, name = _points(x, y), series.name
    out.append(svg.tag('polyline', class_=f'curve {color}{faint}', points=points, data_name=name))
  if is_noisy:
    mean = means(series)
    points = _points(*axes.points(mean.steps, mean.values))
    out.append(svg.tag('polyline', class_=f'curve {color}', points=points))
  if len(x) <= _DOTS:
    out += [
      svg.tag(
        'circle', class_=f'dot {color}', cx=float(a), cy=float(b), r=2.5, data_name=series.name
      )
      for a, b in zip(x, y, strict=True)
    ]
  return out


def _points(x: np.ndarray, y: np.ndarray) -> str:
  pairs = zip(x.tolist(), y.tolist(), strict=True)
  return ' '.join(f'{svg.coordinate(a)},{svg.coordinate(b)}' for a, b in pairs)


def draw(name: str, series: Sequence[Series], is_log: bool = False) -> Markup:
  """Returns the curves as one drawing; page.js reads values under the pointer from its data.

  Args:
    name: of the metric.
    series: the curves; those without a finite value are left out.
    is_log: a logarithmic axis; values of 0 or less are then left out.
  """
  kept = [s.finite() for s in series]
  if is_log:
    kept = [Series(s.name, s.steps[s.values > 0], s.values[s.values > 0]) for s in kept]
  kept = [s for s in kept if len(s.values)]
  if not kept:
    return Markup('')
  axes = _axes(kept, is_log)
  content = _grid(axes)
  numbers = {s.name: i for i, s in enumerate(series)}
  for one in kept:
    content += _curve(axes, one, numbers[one.name])
  scale = f'{axes.x[0]:.9g} {axes.x[1]:.9g} {axes.y[0]:.9g} {axes.y[1]:.9g}'
  frame = f'{_LEFT} {WIDTH - _RIGHT} {HEIGHT - _BOTTOM} {_TOP}'
  return svg.drawing(
    *(WIDTH, HEIGHT, name, describe(series), *content),
    class_='chart',
    data_scale=scale,
    data_frame=frame,
    data_log='1' if is_log else None,
    tabindex='0',
  )
