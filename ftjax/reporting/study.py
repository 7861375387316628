"""Reports on a study: study.html, made of the parts of report.html, and a text for a terminal."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftjax.reporting import charts, page, text_table, xy_chart
from ftjax.reporting.figures import LEVEL, interval, name, pad, width
from ftjax.storage import files

FILE = 'study.html'
_LONGEST_CELL = 60
_MOST_ROWS = 40  # of a table on a terminal


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A difference with its interval, in a forest plot: NaN where an end is not known."""

  label: str
  value: float
  low: float
  high: float
  form: str


@dataclasses.dataclass(frozen=True)
class Table:
  """A table: its heading, what it shows, column names, and cells as text."""

  heading: str
  about: str
  head: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart of scores over a number; log_x: on a logarithmic axis."""

  heading: str
  about: str
  lines: Mapping[str, xy_chart.Line]
  log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Forest:
  """Differences on one scale, with what they are differences of."""

  heading: str
  about: str
  rows: tuple[Estimate, ...]


@dataclasses.dataclass(frozen=True)
class Content:
  """What a report shows: sentences, the most important first, then tables, forests and charts."""

  sentences: tuple[str, ...]
  tables: tuple[Table, ...] = ()
  forests: tuple[Forest, ...] = ()
  charts: tuple[Chart, ...] = ()


def write(workdir: str, title: str, facts: Mapping[str, Any], content: Content) -> str:
  """Writes study.html into the workdir of a study and returns its path.

  Args:
    workdir: of the study.
    title: of the page.
    facts: {label: text} of what the study was.
    content: what it found.
  """
  path = files.join(workdir, FILE)
  files.write_text(path, render(title, facts, content))
  return path


def render(title: str, facts: Mapping[str, Any], content: Content) -> str:
  """Returns the page of a study."""
  found = {
    'name': title,
    'level': LEVEL,
    'facts': [(label, text) for label, v in facts.items() if (text := _fact(v))],
    'sentences': content.sentences,
    'tables': content.tables,
    'forests': [f for f in map(_forest, content.forests) if f['drawings']],
    'charts': [c for c in map(_chart, content.charts) if c['drawing']],
  }
  return page.fill_template('study.html', found)


def _fact(value: Any) -> str:
  return ', '.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _forest(forest: Forest) -> dict[str, Any]:
  rows = [
    charts.Estimate(row.label, dataclasses.asdict(row), row.form, 'undecided')
    for row in forest.rows
  ]
  drawn = charts.forest(rows)
  drawings, axis = drawn or ([], None)
  texts = [interval(row.found, row.form, '+') for row in rows]
  labels = [row.label for row in rows]
  shown = list(zip(labels, texts, drawings, strict=False))
  return {'heading': forest.heading, 'about': forest.about, 'drawings': shown, 'axis': axis}


def _chart(chart: Chart) -> dict[str, Any]:
  drawing = xy_chart.draw(chart.heading, chart.lines, chart.log_x)
  names = list(chart.lines)
  return {'heading': chart.heading, 'about': chart.about, 'drawing': drawing, 'names': names}


def text(content: Content) -> str:
  """Returns the sentences and tables for a terminal."""
  parts = [text_table.wrap(sentence) for sentence in content.sentences]
  parts += [_text_of(table) for table in content.tables if table.rows]
  return '\n\n'.join(parts)


def _text_of(table: Table) -> str:
  rows = [table.head, *table.rows[:_MOST_ROWS]]
  cells = [[name(cell) for cell in row] for row in rows]
  columns = [min(_LONGEST_CELL, max(map(width, column))) for column in zip(*cells, strict=True)]
  lines = [
    '  '.join(pad(c, n) for c, n in zip(row, columns, strict=True)).rstrip() for row in cells
  ]
  left_out = len(table.rows) - _MOST_ROWS
  if left_out > 0:
    lines.append(f'... and {left_out} more rows, in study.csv')
  return '\n'.join([f'{table.heading}. {table.about}'.strip(), *lines])
