"""Arranges the curves of metrics.jsonl: which ones share a chart, and under which heading.

Names that nobody foresaw, of tasks or of a user's algorithm, get a chart of their own under the
part of the name before the first '/'.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from ftjax.reporting import line_chart
from ftjax.reporting.line_chart import Series
from ftjax.reporting.metrics_log import MetricsLog

# Of the machinery: no curve.
_HIDDEN = frozenset({'batch_checksum', 'bad_streak', 'has_signal', 'ok', 'note'})
_ONLY_IF_ANY = frozenset({'skipped', 'no_signal'})  # shown where not 0 throughout

# Charts in order: heading, title, names of the curves. A name with ':' has a split before it.
_CHARTS = (
  ('Loss', 'loss', ('loss',)),
  ('Loss', 'gap of eval and train loss', ('eval:gap',)),
  ('Loss', 'perplexity', ('perplexity',)),
  ('Loss', 'accuracy', ('accuracy',)),
  ('Tasks', 'time of eval.in_loop, seconds', ('in_loop_s',)),
  ('Tasks', 'share of time for eval.in_loop', ('in_loop_share',)),
  ('Rewards', 'reward', ('reward',)),
  ('Rewards', 'standard deviation of rewards', ('reward_std',)),
  ('Rewards', 'rewards, chosen and rejected', ('rewards/chosen', 'rewards/rejected')),
  ('Rewards', 'reward margin', ('rewards/margin', 'margin')),
  ('Rewards', 'reward accuracy', ('rewards/accuracy',)),
  ('Rewards', 'log-probability, chosen and rejected', ('logps/chosen', 'logps/rejected')),
  ('Rewards', 'tokens of a completion', ('length',)),
  ('Rewards', 'share of truncated completions', ('truncated',)),
  ('Optimization', 'learning rate', ('lr',)),
  ('Optimization', 'gradient norm', ('grad_norm',)),
  ('Optimization', 'skipped steps', ('skipped',)),
  ('Optimization', 'steps without signal', ('no_signal',)),
  ('Policy', 'KL divergence', ('kl', 'approx_kl')),
  ('Policy', 'entropy', ('entropy',)),
  ('Policy', 'share of clipped tokens', ('clip/low', 'clip/high')),
  ('Speed', 'tokens per second', ('tokens_per_s', 'supervised_tokens_per_s')),
  ('Speed', 'seconds per step', ('step_s',)),
  ('Speed', 'MFU', ('mfu',)),
  ('Speed', 'goodput', ('goodput',)),
  ('Speed', 'share of time waiting for input', ('input_wait',)),
  ('Memory', 'device memory, GiB', ('device_memory_gib', 'device_memory_peak_gib')),
  ('Memory', 'host memory, GiB', ('host_memory_gib', 'host_memory_peak_gib')),
)
_MAIN = ('Loss', 'Tasks', 'Rewards', 'Optimization')  # headings that are open at first
_MOST_CHARTS = 120
_MOST_OVERLAYS = 40


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart: its title, curves as drawings (linear, and logarithmic or ''), and what it shows in
  words."""

  title: str
  names: tuple[str, ...]
  linear: Markup
  logarithmic: Markup
  text: str
  has_legend: bool


@dataclasses.dataclass(frozen=True)
class Group:
  """Charts under a heading; is_open: whether the page shows them at first."""

  heading: str
  charts: tuple[Chart, ...]
  is_open: bool


def groups(log: MetricsLog, tasks: Sequence[str] = ()) -> tuple[list[Group], int]:
  """Returns (the charts of a run, how many more are left out).

  Args:
    log: of the run.
    tasks: names of evaluation tasks: metrics 'NAME/...' come under the heading Tasks.
  """
  columns = {key: key for key in log.names() if key[1] not in _HIDDEN}
  found = [pair for entry in _CHARTS if (pair := _known(log, columns, *entry))]
  others = _unknown(log, columns, tasks)
  found = [x for x in others if x[0] == 'Tasks'] + found + [x for x in others if x[0] != 'Tasks']
  order = dict.fromkeys(('Loss', 'Tasks', *(entry[0] for entry in _CHARTS)))
  ranks = {heading: i for i, heading in enumerate(order)}
  headings = dict.fromkeys(heading for heading, _ in found)
  out, room = [], _MOST_CHARTS
  for heading in sorted(headings, key=lambda h: ranks.get(h, len(ranks))):
    charts = [chart for own, chart in found if own == heading][:room]
    room -= len(charts)
    if charts:
      out.append(Group(heading, tuple(charts), heading in _MAIN))
  return out, len(found) - sum(len(g.charts) for g in out)


def _known(
  log: MetricsLog, columns: dict, heading: str, title: str, names: Sequence[str]
) -> tuple[str, Chart] | None:
  """Returns (heading, a chart of _CHARTS), and takes its curves out of `columns`; None where the
  run has none of them.
  """
  keys = [key for name in names for key in _keys(columns, name)]
  series = [s for key in keys if (s := _series(log, key, len(names) > 1)) is not None]
  for key in keys:
    columns.pop(key)
  return (heading, _chart(title, series)) if series else None


def _unknown(log: MetricsLog, columns: Mapping, tasks: Sequence[str]) -> list[tuple[str, Chart]]:
  """Returns (heading, chart) of each name that is left."""
  by_name: dict[str, list[tuple[str, str]]] = {}
  for key in columns:
    by_name.setdefault(key[1], []).append(key)
  out = []
  for name, keys in by_name.items():
    series = [s for key in keys if (s := _series(log, key, False)) is not None]
    if series:
      out.append((_heading(name, tasks), _chart(name, series)))
  return out


def overlays(logs: Mapping[str, MetricsLog]) -> list[Chart]:
  """Returns the main curves of several runs and those of tasks, each with a curve for each run;
  logs: by run.
  """
  out = []
  names = ['loss', 'accuracy', 'perplexity', 'reward', 'lr', 'grad_norm', 'tokens_per_s']
  evaluated = (key for log in logs.values() for key in log.names())
  names += list(dict.fromkeys(n for split, n in evaluated if split == 'eval' and '/' in n))
  for name in names[:_MOST_OVERLAYS]:
    for split in ('train', 'eval', 'rollout'):
      found = [log.series(split, name, run) for run, log in logs.items()]
      series = [s for s in found if s is not None]
      if series:
        out.append(_chart(f'{split} {name}', series))
  return out


def _keys(columns: Mapping[tuple[str, str], object], name: str) -> list[tuple[str, str]]:
  split, colon, rest = name.partition(':')
  if colon:
    return [key for key in columns if key == (split, rest)]
  return [key for key in columns if key[1] == name]


def _series(log: MetricsLog, key: tuple[str, str], has_several: bool) -> Series | None:
  split, name = key
  title = f'{split} {name.rpartition("/")[2]}' if has_several else split
  found = log.series(split, name, title)
  if found is None or (name in _ONLY_IF_ANY and not found.values.any()):
    return None
  return found


def _heading(name: str, tasks: Sequence[str]) -> str:
  first, slash, _ = name.partition('/')
  if first in tasks or (slash and first in ('task', 'tasks')):
    return 'Tasks'
  if first in ('reward', 'rewards', 'reward_gap', 'kept_reward'):
    return 'Rewards'
  return first if slash else 'Others'


def _chart(title: str, series: Sequence[Series]) -> Chart:
  linear = line_chart.draw(title, series)
  logarithmic = Markup('')
  if line_chart.wants_log(series):
    logarithmic = line_chart.draw(f'{title}, logarithmic', series, is_log=True)
  names = tuple(s.name for s in series)
  return Chart(title, names, linear, logarithmic, line_chart.describe(series), len(names) > 1)
