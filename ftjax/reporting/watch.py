"""Shows a run on a terminal while it trains, from its metrics.jsonl alone."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from ftjax.reporting import figures, line_chart
from ftjax.reporting.metrics_log import MetricsLog
from ftjax.reporting.run_files import name_of
from ftjax.storage import files

WIDTH = 100
_PLOT_WIDTH, _PLOT_HEIGHT = 72, 9
_RECENT = 50  # steps of a mean, and of the speed that the end is estimated from
_TAIL = 256  # bytes of the file that are compared before it is read on
_QUIET = 300.0  # seconds without a new row after which the frame mentions it
_CLEAR = '\x1b[H\x1b[2J'
# Shown in this order; the rest of the evaluation's metrics after them.
_TRAIN = ('loss', 'accuracy', 'reward', 'lr', 'grad_norm', 'tokens_per_s', 'step_s', 'mfu')
_LAST = ('goodput', 'device_memory_peak_gib', 'host_memory_peak_gib')


def frame(log: MetricsLog, name: str, steps: int = 0, quiet: float = 0.0) -> str:
  """Returns what the terminal shows of a run: progress, a table of metrics, a plot of the loss.

  Args:
    log: the rows so far.
    name: of the run.
    steps: of the run; 0 where it is not known.
    quiet: seconds since the last new row.
  """
  done = log.last_step
  lines = [figures.pad(f'{figures.one_line(name)}: {_progress(log, steps)}', WIDTH).rstrip()]
  if quiet >= _QUIET:
    lines.append(f'no new row for {figures.duration(quiet)}: the run may have ended')
  if not log.rows:
    return '\n'.join([*lines, 'no step has been logged yet'])
  rows = [
    *_rows(log, 'train', _TRAIN),
    *_rows(log, 'rollout', ('reward', 'length', 'truncated')),
    *_rows(log, 'eval', _evaluated(log)),
    *_rows(log, 'train', _LAST),
  ]
  form = '{:<34} {:>14} {:>14} {:>14} {:>14}'
  lines += ['', form.format('', 'last', f'mean of {_RECENT}', 'least', 'largest'), '-' * 94]
  lines += [form.format(figures.pad(row[0], 34), *row[1:]) for row in rows]
  plot = _plot(log)
  lines += ['', *plot] if plot else []
  if log.notes:
    step, note = log.notes[-1]
    lines += ['', figures.pad(f'step {step}: {figures.one_line(note)}', WIDTH).rstrip()]
  if steps and done >= steps:
    lines += ['', 'All steps are done.']
  return '\n'.join(lines)


def _progress(log: MetricsLog, steps: int) -> str:
  done = log.last_step
  if not steps:
    return f'step {figures.count(done)}'
  text = f'step {figures.count(done)} of {figures.count(steps)} ({done / steps:.0%})'
  seconds = log.series('train', 'step_s')
  recent = [] if seconds is None else seconds.finite().values[-_RECENT:].tolist()
  if done >= steps or not recent:
    return text
  left = (steps - done) * statistics.median(recent)
  return f'{text}, about {figures.duration(left)} of steps left'


def _evaluated(log: MetricsLog) -> list[str]:
  return [name for split, name in log.names() if split == 'eval' and name != 'note']


def _rows(log: MetricsLog, split: str, names: Sequence[str]) -> list[tuple[str, ...]]:
  """Returns (label, last, mean of the last, least, largest) of each metric that is there."""
  out = []
  for name in names:
    series = log.series(split, name)
    if series is None:
      continue
    last, known = float(series.values[-1]), series.finite().values
    label = figures.one_line(f'{split} {name}')
    shown = figures.number(last) if figures.is_finite(last) else str(last)
    if len(known):
      mean = known[-_RECENT:].mean()
      rest = tuple(figures.number(float(v)) for v in (mean, known.min(), known.max()))
    else:
      rest = (figures.MISSING,) * 3
    out.append((label, shown, *rest))
  return out


def _plot(log: MetricsLog) -> list[str]:
  """Returns the curve of the training loss, or of the reward, in characters; nothing with fewer
  than two points.
  """
  for split, name in (('rollout', 'reward'), ('train', 'loss')):
    series = log.series(split, name)
    if series is not None and len(series.finite().values) > 1:
      break
  else:
    return []
  means = line_chart.means(series.finite(), _PLOT_WIDTH)
  low, high = float(means.values.min()), float(means.values.max())
  span = (high - low) or 1.0
  grid = [[' '] * _PLOT_WIDTH for _ in range(_PLOT_HEIGHT)]
  for i, value in enumerate(means.values.tolist()):
    x = i * _PLOT_WIDTH // len(means.values)
    grid[round((high - value) / span * (_PLOT_HEIGHT - 1))][x] = '*'
  ends = {0: figures.number(high), _PLOT_HEIGHT - 1: figures.number(low)}
  lines = [f'{ends.get(i, ""):>12} |{"".join(row).rstrip()}' for i, row in enumerate(grid)]
  first, last = (figures.count(float(s)) for s in (series.steps[0], series.steps[-1]))
  foot = f'{first}{last:>{_PLOT_WIDTH - len(first)}}'
  return [f'{split} {name}', *lines, ' ' * 13 + '+' + '-' * _PLOT_WIDTH, ' ' * 14 + foot]


class Follower:
  """Reads the rows that a metrics.jsonl gains, and all of it again where it was cut by a resume."""

  def __init__(self, path: str):
    self._path = path
    self._start()

  def _start(self) -> None:
    self.log = MetricsLog()
    self._place, self._rest, self._tail = 0, b'', b''

  def read(self) -> bool:
    """Reads what is new; returns whether there was something."""
    if not files.exists(self._path):
      return False
    with files.as_path(self._path).open('rb') as file:
      # What was read last stands there no more where a resume has cut the file.
      if self._tail:
        file.seek(self._place - len(self._tail))
        if file.read(len(self._tail)) != self._tail:
          self._start()
      file.seek(self._place)
      found = file.read()
    self._place += len(found)
    self._tail = (self._tail + found)[-_TAIL:]
    lines = (self._rest + found).split(b'\n')
    self._rest = lines.pop()
    for line in lines:
      self.log.add(line.decode('utf-8', 'replace'))
    return bool(found)


def watch(
  workdir: str,
  *,
  interval: float = 2.0,
  out: TextIO = sys.stdout,
  sleep: Callable[[float], None] = time.sleep,
  clock: Callable[[], float] = time.monotonic,
) -> None:
  """Draws a run's metrics again and again until all its steps are done, or Ctrl-C.

  On what is no terminal each frame that has something new follows the one before it.

  Args:
    workdir: of the run, which may not have begun.
    interval: seconds between two looks at the file.
    out: where frames are written.
    sleep, clock: of the time module.
  """
  follower, last = Follower(files.join(workdir, 'metrics.jsonl')), clock()
  is_first, is_terminal = True, out.isatty()
  try:
    while True:
      is_new = follower.read()
      last = clock() if is_new else last
      steps = _steps(workdir)
      if is_new or is_terminal or is_first:
        text = frame(follower.log, name_of(workdir), steps, clock() - last)
        out.write((_CLEAR if is_terminal else '') + text + '\n')
        out.flush()
      is_first = False
      if steps and follower.log.last_step >= steps:
        return
      sleep(interval)
  except KeyboardInterrupt:
    out.write('\n')


def _steps(workdir: str) -> int:
  """Returns the number of steps of a run; 0 where its manifest.json is not there yet."""
  path = files.join(workdir, 'manifest.json')
  if not files.exists(path):
    return 0
  try:
    steps = json.loads(files.read_text(path)).get('steps')
  except (ValueError, AttributeError):
    return 0
  return steps if isinstance(steps, int) else 0
