"""Tasks during training: eval.in_loop, on the same few rows of each at every evaluation."""

import logging
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.cluster import processes
from ftjax.evaluation import run as evaluation
from ftjax.evaluation.metric import Metric
from ftjax.evaluation.model import Draw, Model
from ftjax.evaluation.result import Result
from ftjax.evaluation.tasks import Task
from ftjax.experiment.run import Run
from ftjax.experiment.watched_model import WatchedModel
from ftjax.runtime.errors import ConfigError

log = logging.getLogger(__name__)

_SEED = 0  # of the choice of rows


class _CancelledError(Exception):
  """The run is asked to stop, and the evaluation with it."""


class InLoop:
  """The tasks of eval.in_loop, and the time that they have taken.

  Args:
    run: the run.
    tasks: all of eval.tasks.
    draw: how completions are drawn.

  Raises:
    ConfigError: a task that compares two models; or checkpoint.best_metric names a figure that the
      task does not have, or is better in the other direction.
  """

  def __init__(self, run: Run, tasks: tuple[Task, ...], draw: Draw):
    c = run.config
    chosen = {task.name: task for task in tasks if task.name in c.eval.in_loop}
    self.tasks = tuple(chosen[n].first(c.eval.in_loop_rows, _SEED) for n in c.eval.in_loop)
    if pairs := [task.name for task in self.tasks if task.kind.judge is not None]:
      raise ConfigError(
        f'eval.in_loop: {pairs[0]} compares two models, and there is one in the loop; leave it out'
      )
    self._run, self._draw, self._share = run, draw, c.eval.max_share
    self._begun = time.monotonic()
    self._spent = self._last = 0.0
    self._has_warned = False
    self._check_metric()

  def _check_metric(self) -> None:
    c = self._run.config.checkpoint
    for task in self.tasks:
      if not c.best_metric.startswith(f'eval/{task.name}/'):
        continue
      name = c.best_metric.removeprefix(f'eval/{task.name}/')
      found = {m.name: m for m in task.metrics}
      if name not in found:
        raise ConfigError(
          f'checkpoint.best_metric={c.best_metric}; expected eval/{task.name}/NAME with one of '
          f'{sorted(found)}'
        )
      wanted = {'higher': 'max', 'lower': 'min'}.get(found[name].better, c.best_mode)
      if wanted != c.best_mode:
        raise ConfigError(
          f'checkpoint.best_metric={c.best_metric} is better when it is {found[name].better}: set '
          f'checkpoint.best_mode={wanted}'
        )

  def start(self) -> None:
    """Sets the clock, of which eval.max_share is a share, to the beginning of training."""
    self._begun = time.monotonic()

  def measure(
    self, model: Model, is_last: bool, is_cancelled: Callable[[], bool]
  ) -> dict[str, float] | None:
    """Returns {task/metric: figure} and the cost; {} where it is left out for its cost, None when
    cancelled. All processes call it.

    Args:
      model: with the weights of this step.
      is_last: it is the last evaluation, which is never left out.
      is_cancelled: asked now and then.
    """
    if not self.tasks or not (is_last or processes.from_main(self._is_affordable)):
      return {}
    begun = time.monotonic()

    def between() -> None:
      if is_cancelled():
        raise _CancelledError

    model = WatchedModel(model, between)
    out: dict[str, float] = {}
    try:
      for task in self.tasks:
        results = evaluation.evaluate(task, model, draw=self._draw, title='in the loop')
        for metric in task.metrics:
          out[f'{task.name}/{metric.name}'] = value(metric, task, results)
    except _CancelledError:
      return None
    self._last = time.monotonic() - begun
    self._spent += self._last
    out['in_loop_s'], out['in_loop_share'] = self._last, self._share_with(0.0)
    return {name: figure for name, figure in out.items() if math.isfinite(figure)}

  def _share_with(self, more: float) -> float:
    """Returns the share of the time of training, if another `more` seconds are spent."""
    return (self._spent + more) / max(time.monotonic() - self._begun + more, 1e-9)

  def _is_affordable(self) -> bool:
    share = self._share_with(self._last)
    if share <= self._share or not self._spent:
      return True
    if not self._has_warned:
      self._has_warned = True
      log.info(
        'eval.in_loop is left out of this evaluation: with it, it would take %.0f %% of the time, '
        'and eval.max_share=%g; it takes part again when there is time',
        *(100 * share, self._share),
      )
    return False


def value(metric: Metric, task: Task, results: Sequence[Result]) -> float:
  """Returns a metric of a task over results."""
  columns = metric.columns(results, task.classes)
  return float(metric.value(np.ones((1, len(results))), columns)[0])
