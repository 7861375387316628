"""Learning curve: runs on more and more of the rows of data.train, and what more rows would bring.

The rows of a seed are shuffled once and each size takes a prefix, so that the smaller sets lie in
the larger ones.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.evaluation import comparison
from ftjax.evaluation.statistics import power_law
from ftjax.evaluation.statistics.power_law import Forecast
from ftjax.reporting.figures import count as counted
from ftjax.reporting.figures import interval as shown_interval
from ftjax.reporting.figures import is_finite, number
from ftjax.reporting.study import Chart, Content, Estimate, Forest, Table
from ftjax.reporting.xy_chart import Line
from ftjax.runtime.errors import ConfigError
from ftjax.studies import findings, rows, task_scores
from ftjax.studies.findings import Findings
from ftjax.studies.folder import Record
from ftjax.studies.metric import StudyMetric
from ftjax.studies.study import Plan, Study
from ftjax.studies.task_scores import TaskScores

log = logging.getLogger(__name__)

WINNER = 'all_rows'
_MULTIPLES = (1, 2, 5)  # of all rows, where the score is forecast
_SMALL = 0.3  # share of the rows from which the score of all rows is forecast too, as a check


def sizes(count: int, fractions: Sequence[float]) -> list[int]:
  """Returns the numbers of rows of a curve.

  Raises:
    ConfigError: two fractions give the same number, or one gives none.
  """
  out = [round(f * count) for f in fractions]
  if out[0] < 1 or len(set(out)) < len(out):
    raise ConfigError(
      f'study.fractions={tuple(fractions)} of {count} rows give {out} rows; expected different '
      'numbers of at least 1'
    )
  return out


def order(count: int, seed: int, run_seed: int, groups: Sequence[str] | None = None) -> list[int]:
  """Returns the order in which rows join the training set; rows of one group follow each other.

  Args:
    count: of the rows.
    seed: of the study. run_seed: of the runs.
    groups: of the rows.
  """
  rng = np.random.default_rng([seed, run_seed])
  if groups is None:
    return rng.permutation(count).tolist()
  names = list(dict.fromkeys(groups))
  place = dict(zip(names, rng.permutation(len(names)).tolist(), strict=True))
  return sorted(range(count), key=lambda i: (place[groups[i]], i))


def run(study: Study) -> Findings:
  """Runs a learning curve to its end, and returns what it found."""
  c = study.config
  if c.data.eval_fraction:
    raise ConfigError(
      f'study.kind=learning_curve with data.eval_fraction={c.data.eval_fraction} would evaluate '
      'each size on other rows: give data.eval, or eval.tasks with rows of their own'
    )
  train = rows.read(c, study.folder.join('data_cache'))
  counts = sizes(len(train.rows), c.study.fractions)
  groups, plans = train.groups(c.study.group), []
  for seed in c.study.seeds:
    ordered = order(len(train.rows), c.study.seed, seed, groups)
    for size in counts:
      name = f'rows{size}-seed{seed}'
      folder = study.folder.join('subsets', name)
      changed = {'data.train': train.write(folder, ordered[:size], has_weights=True), 'seed': seed}
      plans.append(Plan(name, {'rows': size, 'seed': seed}, changed))
  study.write_config(WINNER, {})
  log.info('learning_curve: %s rows, %d runs', ', '.join(map(str, counts)), len(plans))
  return _findings(study, study.run_all(plans), len(train.rows))


@dataclasses.dataclass(frozen=True)
class _Measured:
  """The scores of the sizes whose runs have all ended.

  sizes: int[K]. values: float64[K, S]. scores: of runs in that order, by example; None where they
  are not known.
  """

  sizes: list[int]
  values: np.ndarray
  scores: TaskScores | None

  def first(self, count: int) -> '_Measured':
    """Returns the part of the smallest `count` sizes."""
    scores = self.scores
    if scores is not None:
      columns = scores.columns[: count * self.values.shape[1]]
      scores = dataclasses.replace(scores, columns=columns)
    return _Measured(self.sizes[:count], self.values[:count], scores)


def _measured(study: Study, records: Sequence[Record]) -> _Measured:
  by_size: dict[int, list[Record]] = {}
  for record in records:
    by_size.setdefault(record.values['rows'], []).append(record)
  kept = {
    n: own for n, own in sorted(by_size.items()) if all(r.value_at(0) is not None for r in own)
  }
  values = np.array([[r.value_at(0) for r in own] for own in kept.values()], np.float64)
  names = [r.name for own in kept.values() for r in own]
  return _Measured(list(kept), values, task_scores.read(study, names) if names else None)


def _forecast(study: Study, found: _Measured, at: Sequence[float]) -> Forecast | None:
  """Returns the forecast from the sizes; None where they are fewer than three."""
  if len(found.sizes) < 3:
    return None
  scores, metric = found.scores, study.metric
  # A share lies in [0, 1]; a loss or a perplexity above 0.
  bounds = task_scores.BOUNDS.get(metric.form, (-math.inf, math.inf))
  if not metric.rises and float(found.values.min()) >= 0:
    bounds = (0.0, bounds[1])
  return power_law.forecast(
    np.array(found.sizes),
    found.values,
    np.array(at, np.float64),
    rises=metric.rises,
    bounds=bounds,
    figure=scores.figure if scores else None,
    clusters=scores.clusters if scores else (),
    seed=comparison.SEED,
  )


def _findings(study: Study, records: Sequence[Record], total: int) -> Findings:
  metric, found = study.metric, _measured(study, records)
  table = tuple(findings.row(r, metric) for r in records)
  sentences, tables, forests = [], [_sizes_table(found, metric)], []
  summary: dict[str, Any] = {
    'rows': found.sizes,
    'values': found.values.tolist(),
    'law': None,
    'forecast': [],
    'check': None,
  }
  targets = [m * total for m in _MULTIPLES]
  forecast = _forecast(study, found, targets)
  if forecast is None:
    sentences.append(
      f'{len(found.sizes)} sizes have scores; a power law needs three: give more study.fractions.'
    )
  else:
    summary |= {'law': dataclasses.asdict(forecast.law), 'forecast': _entries(forecast)}
    sentences += _sentences(forecast, found, metric, total)
    tables.append(_forecast_table(forecast, metric))
    forests.append(_forest(forecast, metric))
  if check := _check(study, found, total):
    summary['check'] = check
    sentences.append(_check_sentence(check, metric))
  if failed := [r.name for r in records if r.has_failed]:
    sentences.append(f'Failed: {", ".join(failed)}; their sizes are left out.')
  charts = (_chart(found, forecast, metric),) if found.sizes else ()
  content = Content(tuple(sentences), tuple(tables), tuple(forests), charts)
  return Findings(content, table, summary, WINNER)


def _entries(forecast: Forecast) -> list[dict[str, float]]:
  columns = ('rows', 'value', 'low', 'high', 'gain', 'gain_low', 'gain_high')
  return [
    {name: float(getattr(forecast, name)[i]) for name in columns} for i in range(len(forecast.rows))
  ]


def _check(study: Study, found: _Measured, total: int) -> dict[str, Any] | None:
  """Returns the forecast of the score of all rows from at most 30 % of them, beside the score."""
  small = [n for n in found.sizes if n <= _SMALL * total + 0.5]
  if total not in found.sizes or len(small) < 3:
    return None
  forecast = _forecast(study, found.first(len(small)), [float(total)])
  measured = float(found.values[found.sizes.index(total)].mean())
  entry = _entries(forecast)[0] if forecast else {}
  low, high = entry['low'], entry['high']
  is_inside = low <= measured <= high if is_finite(low) else None
  return {'from_rows': small, **entry, 'measured': measured, 'is_inside': is_inside}


def _check_sentence(check: dict[str, Any], metric: StudyMetric) -> str:
  text = (
    f'Check: from {", ".join(map(counted, check["from_rows"]))} rows alone, the forecast for '
    f'{counted(check["rows"])} rows was {shown_interval(check, metric.form)}; measured was '
    f'{number(check["measured"], metric.form)}'
  )
  words = {True: 'inside', False: 'outside', None: 'without an interval'}
  return f'{text}, {words[check["is_inside"]]}.'


def _sentences(forecast: Forecast, found: _Measured, metric: StudyMetric, total: int) -> list[str]:
  law, out = forecast.law, []
  for entry in _entries(forecast)[1:]:
    gain = {'value': entry['gain'], 'low': entry['gain_low'], 'high': entry['gain_high']}
    more = entry['rows'] - total
    out.append(
      f'With {counted(more)} more rows ({counted(entry["rows"])} in all), {metric.name} would be '
      f'{shown_interval(entry, metric.form)}: {shown_interval(gain, metric.form, "+")} against '
      f'{counted(found.sizes[-1])} rows by the same law.'
    )
  out.append(
    f'Fitted law: {metric.name} = {law.limit:.4g} {"-" if law.amplitude < 0 else "+"} '
    f'{abs(law.amplitude):.4g} n^-{law.exponent:.3g}. A forecast far beyond the measured sizes '
    'depends on that form.'
  )
  means = found.values.mean(1)
  miss = np.abs(law.at(np.array(found.sizes)) - means)
  at = int(miss.argmax())
  out.append(
    f'The law misses the measured means by up to {number(float(miss[at]), metric.form)}, at '
    f'{counted(found.sizes[at])} rows. One noise between seeds is assumed for all sizes.'
  )
  if found.values.shape[1] < 2:
    out.append(
      'With one seed the noise between seeds is not in the intervals, which are too narrow: give '
      'study.seeds two or more.'
    )
  return out


def _sizes_table(found: _Measured, metric: StudyMetric) -> Table:
  out = []
  for i, size in enumerate(found.sizes):
    values = found.values[i]
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    own = '-'
    if found.scores is not None:
      each = len(values)
      columns = found.scores.columns[i * each : (i + 1) * each]
      ends = task_scores.mean_interval(found.scores, columns)
      own = shown_interval(dataclasses.asdict(ends), metric.form)
    mean = number(float(values.mean()), metric.form)
    seeds = ', '.join(number(float(v), metric.form) for v in values)
    out.append((counted(size), own if own != '-' else mean, number(sd, metric.form), seeds))
  head = ('rows', f'{metric.name}, mean', 'sd between seeds', 'of each seed')
  about = 'In brackets 95 % intervals over seeds and examples.'
  return Table('Measured', about, head, tuple(out))


def _forecast_table(forecast: Forecast, metric: StudyMetric) -> Table:
  cells = []
  for entry in _entries(forecast):
    gain = {'value': entry['gain'], 'low': entry['gain_low'], 'high': entry['gain_high']}
    shown = shown_interval(entry, metric.form)
    cells.append((counted(entry['rows']), shown, shown_interval(gain, metric.form, '+')))
  head = ('rows', f'{metric.name}, forecast', 'gain over the largest measured')
  about = 'By the fitted power law; in brackets 95 % intervals.'
  return Table('Forecast', about, head, tuple(cells))


def _forest(forecast: Forecast, metric: StudyMetric) -> Forest:
  estimates = [
    Estimate(f'{counted(e["rows"])} rows', e['gain'], e['gain_low'], e['gain_high'], metric.form)
    for e in _entries(forecast)
    if e['gain']  # 0 at the size that others are compared with
  ]
  about = f'Forecast gain of {metric.name} over the largest measured size.'
  return Forest('What more rows would bring', about, tuple(estimates))


def _chart(found: _Measured, forecast: Forecast | None, metric: StudyMetric) -> Chart:
  lines = {}
  xs = [float(n) for n in found.sizes for _ in found.values[0]]
  lines['measured'] = Line(xs, found.values.reshape(-1).tolist(), is_joined=False)
  if forecast is not None:
    grid = np.geomspace(found.sizes[0], max(forecast.rows), 60)
    lines['fitted law'] = Line(grid.tolist(), forecast.law.at(grid).tolist())
    low, high = forecast.low.tolist(), forecast.high.tolist()
    at = forecast.rows.tolist()
    lines['forecast'] = Line(at, forecast.value.tolist(), is_joined=False, low=low, high=high)
  about = 'Each point is a run; lines through the forecasts are 95 % intervals.'
  return Chart(f'{metric.name} by rows', about, lines, log_x=True)
