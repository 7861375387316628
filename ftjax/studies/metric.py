"""The figure that a study compares its runs by: its name, its direction, and its value of a run."""

import dataclasses
import json
import math

import ml_collections

from ftjax.config import algorithms, task_specs
from ftjax.evaluation import kinds
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files

KEY = 'study.metric'


@dataclasses.dataclass(frozen=True)
class StudyMetric:
  """A figure of a run.

  Attributes:
    name: as in study.metric.
    task: of eval.tasks whose figure it is, measured at the end of a run; '': of metrics.jsonl.
    figure: its name there: 'accuracy', or 'loss' of the split 'eval'.
    better: 'max' or 'min'.
    is_best: whether the best evaluation counts, not the last: the checkpoint that is exported.
    form: as of evaluation.metric.Metric.
  """

  name: str
  task: str
  figure: str
  better: str
  is_best: bool = False
  form: str = 'number'

  @property
  def rises(self) -> bool:
    """Whether a larger value is better."""
    return self.better == 'max'

  def order(self, value: float) -> float:
    """Returns a number that is smaller the better a value is."""
    return -value if self.rises else value

  def read(self, workdir: str, stop_at: int = 0) -> float | None:
    """Returns the value of a run; None where it was not measured, or is not finite.

    Args:
      workdir: of the run.
      stop_at: step at which it was stopped; 0: the run has ended.
    """
    value = self._of_task(workdir) if self.task and not stop_at else self._logged(workdir, stop_at)
    return value if value is not None and math.isfinite(value) else None

  def _of_task(self, workdir: str) -> float | None:
    path = files.join(workdir, 'eval', 'summary.json')
    if not files.exists(path):
      return None
    entry = json.loads(files.read_text(path))['tasks'].get(self.task, {})
    found = entry.get('scores', {}).get('tuned', {}).get(self.figure) or {}
    return _number(found.get('value'))

  def _logged(self, workdir: str, stop_at: int) -> float | None:
    path = files.join(workdir, 'metrics.jsonl')
    if not files.exists(path):
      return None
    name, values = f'{self.task}/{self.figure}' if self.task else self.figure, {}
    for line in files.read_text(path).split('\n'):
      try:
        row = json.loads(line) if line else {}
      except ValueError:  # a torn last line
        continue
      if row.get('split') == 'eval' and (value := _number(row.get(name))) is not None:
        values[row['step']] = value
    if stop_at:
      return values.get(stop_at)
    if not values:
      return None
    if self.is_best:
      return min(values.values(), key=self.order)
    return values[max(values)]


def _number(value) -> float | None:
  try:
    return None if value is None or isinstance(value, bool) else float(value)
  except (TypeError, ValueError):
    return None


def find(c: ml_collections.ConfigDict, has_eval: bool = False) -> StudyMetric:
  """Returns the figure that study.metric names, or the usual one.

  Args:
    c: the config of the study.
    has_eval: the study itself gives each run evaluation rows.

  Raises:
    ConfigError: it is not measured in the runs.
  """
  specs = task_specs.parse_all(c.eval.tasks)
  own = [spec for spec in specs if spec.kind not in task_specs.LM_EVAL_KINDS]
  measured = algorithms.of(c).measured(c)
  has_loss = bool(has_eval or c.data.eval or c.data.eval_fraction)
  name = c.study.metric or c.checkpoint.best_metric
  if not name and own:
    name = f'{own[0].name}/{kinds.find(own[0].kind).metrics[0].name}'
  if not name and has_loss:
    name = f'eval/{next(iter(measured))}'
  is_best = bool(name) and name == c.checkpoint.best_metric
  task, _, figure = name.removeprefix('eval/').partition('/')
  spec = next((s for s in own if s.name == task), None)
  if spec is not None:
    return _of_task(c, name, spec, figure, is_best)
  known = [f'eval/{n}' for n in measured] if has_loss else []
  if name not in known:
    tasks = [f'{s.name}/{kinds.find(s.kind).metrics[0].name}' for s in own]
    offered = ', '.join([*tasks, *known]) or 'none: give eval.tasks, data.eval or eval_fraction'
    raise ConfigError(f'{KEY}={name!r}; expected a figure that the runs measure: {offered}')
  figure = name.removeprefix('eval/')
  return StudyMetric(name, '', figure, measured[figure], is_best)


def _of_task(c, name, spec, figure, is_best) -> StudyMetric:
  kind = kinds.find(spec.kind)
  if kind.judge is not None:
    raise ConfigError(f'{KEY}={name}: {spec.name} compares two models; take another task')
  found = (*kind.metrics, *kind.class_metrics, *kind.details, *kind.class_details)
  names = [m.name for m in found]
  if figure not in names:
    raise ConfigError(f'{KEY}={name!r}; expected {spec.name}/NAME with one of {names}')
  metric = found[names.index(figure)]
  if not metric.better:
    raise ConfigError(f'{KEY}={name}: neither more nor less of it is better; take another figure')
  better = 'max' if metric.better == 'higher' else 'min'
  needs_loop = bool(c.study.rungs) or name.startswith('eval/')
  if needs_loop and spec.name not in c.eval.in_loop:
    why = f'study.rungs={c.study.rungs}' if c.study.rungs else f'{KEY}={name}'
    raise ConfigError(
      f'{why} reads {spec.name}/{figure} during training: add {spec.name!r} to eval.in_loop'
    )
  if needs_loop and figure not in [m.name for m in (*kind.metrics, *kind.class_metrics)]:
    raise ConfigError(f'{KEY}={name}: {figure} is measured at the end of a run alone')
  if name.startswith('eval/'):
    return StudyMetric(name, '', f'{spec.name}/{figure}', better, is_best, metric.form)
  return StudyMetric(name, spec.name, figure, better, False, metric.form)
