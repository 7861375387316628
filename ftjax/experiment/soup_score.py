"""Scores averages of models by a figure of one of a config's tasks, for a greedy soup."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections

from ftjax.evaluation import run as evaluation
from ftjax.experiment import compare, in_loop
from ftjax.experiment import run as experiment
from ftjax.hf import model_soup
from ftjax.runtime.errors import ConfigError


def scorer(
  c: ml_collections.ConfigDict, figure: str, folder: Path, scratch: str
) -> Callable[[Sequence[Path]], float]:
  """Returns the score of the mean of the weights of some folders; larger is better.

  Args:
    c: a validated config with eval.tasks; of its model only the dtypes are read.
    figure: 'TASK/METRIC'.
    folder: one of the models, for the architecture and the tokenizer.
    scratch: a folder for files that the caller removes.

  Raises:
    ConfigError: no such task or metric, or one without a better direction.
  """
  c = c.copy_and_resolve_references()
  with c.unlocked():
    c.model.path, c.lora.rank, c.init_from = str(folder), 0, ''
    c.model.random = type(c.model.random)()
    c.eval.in_loop, c.eval.general, c.gate = (), False, ()
  run = experiment.start(c, os.path.join(scratch, 'scores'), with_data=False)
  evaluator = compare.Evaluator(run)
  name, _, wanted = figure.partition('/')
  tasks = {task.name: task for task in evaluator.tasks if task.kind.judge is None}
  if name not in tasks:
    raise ConfigError(f'--greedy={figure}: expected TASK/METRIC with one of {sorted(tasks)}')
  task = tasks[name]
  metrics = {m.name: m for m in task.metrics if m.better}
  if wanted not in metrics:
    raise ConfigError(f'--greedy={figure}: expected {name}/METRIC with one of {sorted(metrics)}')
  metric = metrics[wanted]
  sign = -1.0 if metric.better == 'lower' else 1.0
  candidate = os.path.join(scratch, 'candidate')

  def score(folders: Sequence[Path]) -> float:
    place = str(folders[0])
    if len(folders) > 1:
      model_soup.write(folders, candidate)
      place = candidate
    model = evaluator.local(run.load_params(place, c.model.param_dtype))
    with run.watchdog.phase('evaluate'):
      results = evaluation.evaluate(task, model, draw=evaluator.draw, title='greedy soup')
    return sign * in_loop.value(metric, task, results)

  return score
