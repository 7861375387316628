"""Settings with several seeds each: means, with the error between seeds and that of the examples
apart.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.reporting.figures import interval as shown_interval
from ftjax.reporting.figures import number
from ftjax.reporting.study import Content, Estimate, Forest, Table
from ftjax.studies import findings, task_scores
from ftjax.studies.findings import Findings
from ftjax.studies.folder import Record
from ftjax.studies.metric import StudyMetric
from ftjax.studies.study import Plan, Study

log = logging.getLogger(__name__)


def run(study: Study) -> Findings:
  """Runs all settings with all seeds, and returns what they show."""
  seeds, plans = study.config.study.seeds, []
  names = [d.key for d in study.space]
  for number_, values in enumerate(itertools.product(*(d.all_values() for d in study.space))):
    setting = dict(zip(names, values, strict=True))
    for seed in seeds:
      own = setting | {'seed': seed}
      plans.append(Plan(f'{number_:03d}-seed{seed}', own, own))
  log.info('seeds: %d settings with %d seeds each', len(plans) // len(seeds), len(seeds))
  return _findings(study, study.run_all(plans), len(seeds))


@dataclasses.dataclass(frozen=True)
class _Setting:
  """A setting whose runs have all ended: its label, runs and statistics."""

  label: str
  records: tuple[Record, ...]
  stats: dict[str, Any]


def _setting(study: Study, records: Sequence[Record]) -> _Setting:
  keys = {k: v for k, v in records[0].values.items() if k != 'seed'}
  label = ', '.join(f'{k}={_shown(v)}' for k, v in keys.items()) or 'the config'
  scores = task_scores.read(study, [r.name for r in records])
  if scores is not None:
    stats = dataclasses.asdict(task_scores.seed_mean(scores, scores.columns))
  else:
    stats = _of_seeds(np.array([r.value_at(0) for r in records], np.float64))
  return _Setting(label, tuple(records), stats | {'values': [r.value_at(0) for r in records]})


def _of_seeds(values: np.ndarray) -> dict[str, Any]:
  """Returns the statistics of values whose error by examples is not known."""
  from scipy.stats import t

  n = len(values)
  sd = float(values.std(ddof=1)) if n > 1 else math.nan
  se = sd / math.sqrt(n)
  half = float(t.ppf(0.975, n - 1)) * se if n > 1 else math.nan
  mean = float(values.mean())
  nothing = {'within_se': math.nan, 'intraclass': math.nan}
  return {
    'value': mean,
    'low': mean - half,
    'high': mean + half,
    'se': se,
    'between_sd': sd,
  } | nothing


def _shown(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _findings(study: Study, records: Sequence[Record], seeds: int) -> Findings:
  metric = study.metric
  groups = [records[i : i + seeds] for i in range(0, len(records), seeds)]
  ended = [g for g in groups if all(r.value_at(0) is not None for r in g)]
  found = [_setting(study, group) for group in ended]
  table = tuple(findings.row(r, metric) for r in records)
  if not found:
    content = Content(('No setting has ended with all its seeds.',))
    return Findings(content, table, {'settings': []})
  found.sort(key=lambda s: metric.order(s.stats['value']))
  best, differences = found[0], [_difference(study, found[0], s) for s in found[1:]]
  sentences = [_sentence(best, metric, len(found), seeds)]
  if differences:
    open_ = sum(not _excludes_0(d) for d in differences)
    sentences.append(
      f'{open_} of the other {len(differences)} settings are not clearly different from it.'
    )
  if left_out := len(groups) - len(ended):
    sentences.append(f'{left_out} settings have runs that failed, and are left out.')
  about = f'{metric.name} of a setting minus that of the best one, {best.label}, seed by seed.'
  estimates = tuple(
    Estimate(s.label, d['value'], d['low'], d['high'], metric.form)
    for s, d in zip(found[1:], differences, strict=True)
  )
  forests = (Forest('Against the best setting', about, estimates),) if estimates else ()
  content = Content(tuple(sentences), (_table(found, metric),), forests)
  summary = {
    'settings': [{'label': s.label, 'runs': [r.name for r in s.records], **s.stats} for s in found],
    'differences': [d | {'label': s.label} for s, d in zip(found[1:], differences, strict=True)],
  }
  return Findings(content, table, summary, best.records[0].name)


def _excludes_0(difference: dict[str, Any]) -> bool:
  return difference['low'] > 0 or difference['high'] < 0


def _difference(study: Study, best: _Setting, other: _Setting) -> dict[str, Any]:
  """Returns other - best with its interval, each seed with the same seed."""
  names = [r.name for r in (*best.records, *other.records)]
  scores = task_scores.read(study, names)
  if scores is None:
    values = np.subtract(other.stats['values'], best.stats['values'])
    return _of_seeds(values)
  half = len(best.records)
  first, second = scores.columns[:half], scores.columns[half:]
  found = dataclasses.asdict(task_scores.seed_difference(scores, first, second))
  return {k: v for k, v in found.items() if k != 'values'}


def _sentence(best: _Setting, metric: StudyMetric, settings: int, seeds: int) -> str:
  s = best.stats
  text = (
    f'Best of {settings} settings with {seeds} seeds each: {best.label}, {metric.name} '
    f'{shown_interval(s, metric.form)}; sd between seeds {number(s["between_sd"], metric.form)}, '
    f'error of the examples {number(s["within_se"], metric.form)}.'
  )
  return text if seeds > 1 else f'{text} One seed shows nothing of the noise between seeds.'


def _table(found: Sequence[_Setting], metric: StudyMetric) -> Table:
  head = (
    *('setting', f'{metric.name}, mean', 'sd between seeds beyond the error of the examples'),
    *('error of the examples', 'of each seed'),
  )
  cells = tuple(
    (
      s.label,
      shown_interval(s.stats, metric.form),
      number(s.stats['between_sd'], metric.form),
      number(s.stats['within_se'], metric.form),
      ', '.join(number(v, metric.form) for v in s.stats['values']),
    )
    for s in found
  )
  return Table('Settings', 'The best first; in brackets 95 % intervals.', head, cells)
