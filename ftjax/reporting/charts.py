"""Draws the figures of an evaluation: differences with intervals, confusion matrices, calibration,
histograms of lengths. Curves over steps are in line_chart.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ftjax.reporting import svg
from ftjax.reporting.figures import count, interval, is_finite, name, number, share

_MOST_CLASSES = 24  # rows and columns of a confusion matrix
_SHADES = 5  # of cells; page.css has their colors
_ROW_WIDTH, _ROW_HEIGHT = 260, 26


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A difference of two models in a forest plot.

  Attributes:
    label: of the row.
    found: {"value", "low", "high"}.
    form: of the metric.
    outcome: 'better', 'worse' or 'undecided'.
  """

  label: str
  found: Mapping[str, Any]
  form: str
  outcome: str


def forest(rows: Sequence[Estimate]) -> tuple[list[Markup], Markup] | None:
  """Returns a drawing per row and one of the axis below them, all on one scale around 0; None where
  no row has a value.
  """
  ends = [row.found.get(k) for row in rows for k in ('value', 'low', 'high')]
  ends = [float(e) for e in ends if is_finite(e)]
  if not ends:
    return None
  largest = min(max(map(abs, ends)), 1e150) * 1.08 or 1.0
  low, high = min(0.0, *ends), max(0.0, *ends)
  low, high = max(low * 1.08, -largest), min(high * 1.08, largest)
  room = (high - low) * 0.06 or 1.0
  low, high = low - room, high + room
  ticks = svg.linear_ticks(low, high, 4)
  grid = [_vertical(low, high, t, 'grid') for t in ticks] + [_vertical(low, high, 0.0, 'zero')]
  drawn = [_estimate(row, low, high, grid) for row in rows]
  # Not cut off at either side.
  places = [min(max(_x(low, high, t), 16.0), _ROW_WIDTH - 16.0) for t in ticks]
  labels = [
    svg.tag('text', svg.tick_label(t), class_='tick middle', x=x, y=14)
    for t, x in zip(ticks, places, strict=True)
  ]
  axis = svg.tag(
    'svg', *labels, viewBox=f'0 0 {_ROW_WIDTH} 20', class_='forest', aria_hidden='true'
  )
  return drawn, axis


def _x(low: float, high: float, value: float) -> float:
  return float((min(max(value, low), high) - low) / (high - low) * _ROW_WIDTH)


def _vertical(low: float, high: float, value: float, style: str) -> Markup:
  x = _x(low, high, value)
  return svg.tag('line', class_=style, x1=x, x2=x, y1=0, y2=_ROW_HEIGHT)


def _estimate(row: Estimate, low: float, high: float, grid: Sequence[Markup]) -> Markup:
  content, middle = list(grid), _ROW_HEIGHT // 2
  value, ends = row.found.get('value'), [row.found.get(k) for k in ('low', 'high')]
  if all(map(is_finite, ends)):
    a, b = (_x(low, high, float(e)) for e in ends)  # type: ignore[arg-type]
    content.append(svg.tag('line', class_=f'bar {row.outcome}', x1=a, x2=b, y1=middle, y2=middle))
    content += [
      svg.tag('line', class_=f'bar {row.outcome}', x1=x, x2=x, y1=middle - 5, y2=middle + 5)
      for x in (a, b)
    ]
  if is_finite(value):
    x = _x(low, high, float(value))  # type: ignore[arg-type]
    mark = f'{x:.1f},{middle - 6} {x + 6:.1f},{middle} {x:.1f},{middle + 6} {x - 6:.1f},{middle}'
    content.append(svg.tag('polygon', class_=f'mark {row.outcome}', points=mark))
  text = f'{interval(row.found, row.form, "+")}, {row.outcome}'
  return svg.drawing(_ROW_WIDTH, _ROW_HEIGHT, row.label, text, *content, class_='forest')


def confusion(found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a confusion matrix for a table: columns, and rows of (label, cells), a cell being its
  count, its share of the row in words, and its shade 0 .. 4; `left_out` classes are the rarest.

  found: {"labels", "predictions", "counts": counts[label][prediction]}.
  """
  labels, predictions = list(found.get('labels') or []), list(found.get('predictions') or [])
  counts = found.get('counts') or []
  sums = [sum(row) for row in counts]
  columns = [sum(row[j] for row in counts) for j in range(len(predictions))]
  rows_kept = sorted(sorted(range(len(labels)), key=lambda i: -sums[i])[:_MOST_CLASSES])
  kept = sorted(sorted(range(len(predictions)), key=lambda j: -columns[j])[:_MOST_CLASSES])
  rows = []
  for i in rows_kept:
    cells = []
    for j in kept:
      part = counts[i][j] / sums[i] if sums[i] else 0.0
      shade = min(_SHADES - 1, int(part * _SHADES))
      is_right = labels[i] == predictions[j]
      cells.append(
        {'count': counts[i][j], 'share': share(part), 'shade': shade, 'is_right': is_right}
      )
    rows.append((name(labels[i]), cells, sums[i]))
  left_out = len(labels) - len(rows_kept), len(predictions) - len(kept)
  return {'columns': [name(predictions[j]) for j in kept], 'rows': rows, 'left_out': max(left_out)}


def calibration(models: Mapping[str, Mapping[str, Any]]) -> Markup:
  """Returns the accuracy of each bin of confidence, by model, as a drawing.

  models: name -> {"bins": [{"low", "high", "n", "confidence", "accuracy"}], "ece"}.
  """
  size, left, bottom = 280, 40, 34
  side = size - left - 20

  def place(x: float, y: float) -> tuple[float, float]:
    return left + x * side, size - bottom - y * side

  content = []
  for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
    x, y = place(tick, tick)
    x0, y0 = place(0, 0)
    content.append(svg.tag('line', class_='grid', x1=x0, x2=x0 + side, y1=y, y2=y))
    content.append(svg.tag('text', f'{tick:g}', class_='tick end', x=x0 - 6, y=y + 4))
    content.append(svg.tag('text', f'{tick:g}', class_='tick middle', x=x, y=y0 + 16))
  content.append(
    svg.tag('text', 'confidence', class_='tick middle', x=left + side / 2, y=float(size - 3))
  )
  content.append(svg.tag('text', 'accuracy', class_='tick', x=4, y=10))
  (x1, y1), (x2, y2) = place(0, 0), place(1, 1)
  content.append(svg.tag('line', class_='zero', x1=x1, x2=x2, y1=y1, y2=y2))
  words = []
  for i, (model, found) in enumerate(models.items()):
    bins = [b for b in found.get('bins') or [] if b.get('n') and is_finite(b.get('accuracy'))]
    bins = [b for b in bins if is_finite(b.get('confidence'))]
    places = [place(b['confidence'], b['accuracy']) for b in bins]
    points = ' '.join(f'{svg.coordinate(x)},{svg.coordinate(y)}' for x, y in places)
    if len(places) > 1:
      content.append(svg.tag('polyline', class_=f'curve s{i % 8}', points=points))
    content += [svg.tag('circle', class_=f'dot s{i % 8}', cx=x, cy=y, r=3) for x, y in places]
    words.append(f'{model}: expected calibration error {number(found.get("ece"), "fraction")}')
  heading = 'Accuracy by confidence; a calibrated model is on the diagonal'
  return svg.drawing(size, size, heading, '; '.join(words), *content, class_='square')


def histogram(heading: str, edges: Sequence[float], counts: Sequence[int]) -> Markup:
  """Returns a histogram as a drawing: counts [K] between edges [K + 1]."""
  width, height, left, bottom = 400, 150, 48, 24
  most = max(counts, default=0)
  if not most or len(edges) != len(counts) + 1:
    return Markup('')
  content = []
  for value in svg.linear_ticks(0, most, 3):
    y = height - bottom - value / most * (height - bottom - 8)
    content.append(svg.tag('line', class_='grid', x1=left, x2=width - 8, y1=y, y2=y))
    label = svg.tick_label(value)
    content.append(svg.tag('text', label, class_='tick end', x=left - 6, y=y + 4))
  span = (edges[-1] - edges[0]) or 1
  scale = (width - 8 - left) / span
  for low, high, n in zip(edges, edges[1:], counts, strict=False):
    x, tall = left + (low - edges[0]) * scale, n / most * (height - bottom - 8)
    bar = svg.tag('title', f'{low:g} to {high:g}: {count(n)}')
    wide = max((high - low) * scale - 1, 0.5)
    y = height - bottom - tall
    content.append(
      svg.tag('rect', bar, class_='bar0', x=x, y=y, width=float(wide), height=float(tall))
    )
  for value in svg.linear_ticks(edges[0], edges[-1], 5):
    x = left + (value - edges[0]) * scale
    label = svg.tick_label(value)
    content.append(svg.tag('text', label, class_='tick middle', x=x, y=height - 8))
  middle = max(range(len(counts)), key=lambda i: counts[i])
  text = (
    f'{count(sum(counts))} in all, from {edges[0]:g} to {edges[-1]:g}; most of them between '
    f'{edges[middle]:g} and {edges[middle + 1]:g}'
  )
  return svg.drawing(width, height, heading, text, *content, class_='chart')
