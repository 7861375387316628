"""Base against tuned: runs eval.tasks on all models of a run, prints and stores the comparison."""

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence

from ftjax.cluster import processes
from ftjax.config import task_specs
from ftjax.evaluation import comparison, function_kinds, result, tasks
from ftjax.evaluation import run as evaluation
from ftjax.evaluation.kind import COMPLETE
from ftjax.evaluation.model import Draw, Model
from ftjax.evaluation.result import Result
from ftjax.evaluation.run import Cost
from ftjax.evaluation.tasks import Task
from ftjax.experiment import contamination_check, few_shot
from ftjax.experiment.local_model import LocalModel, Programs
from ftjax.experiment.run import Run
from ftjax.experiment.samples import Samples
from ftjax.reporting import text_table
from ftjax.runtime.digest import digest
from ftjax.storage import files

log = logging.getLogger(__name__)

BASE, SHOTS, TUNED = 'base', 'base_shots', comparison.TUNED
_SEED = 0  # of sampled completions: the same rows and draws in every run


class Evaluator:
  """Scores one run's models. The base is scored once and cached under a hash of all that its scores
  depend on.
  """

  def __init__(self, run: Run):
    c = run.config
    self.run = run
    self.tasks = tasks.load_tasks(task_specs.parse_all(c.eval.tasks))
    # Every process builds all batches and puts its own part of them on its devices.
    processes.check_same('eval.tasks', digest([t.digest for t in self.tasks]))
    self.folder = files.join(run.workdir, 'eval')
    self.programs = Programs(run)
    self.samples = Samples(self.programs)
    self._shots = {task.name: few_shot.find(run, task) for task in self.tasks}
    self.draw = Draw(
      c.eval.max_tokens, c.eval.samples, c.eval.temperature, _SEED, tuple(c.eval.stop)
    )
    self._cost: dict[str, dict[str, Cost]] = {}

  def local(self, params: dict) -> LocalModel:
    """Returns weights as a model under test."""
    return LocalModel(self.programs, params)

  def _score(self, model: Model, task: Task, title: str) -> Sequence[Result]:
    shots = self._shots[task.name] if title == SHOTS else None
    cost = self._cost.setdefault(task.name, {}).setdefault(title, Cost())
    with self.run.watchdog.phase('evaluate'), cost.measured() as results:
      results += evaluation.evaluate(task, model, draw=self.draw, title=title, shots=shots)
    return results

  def base(self, params: dict | None = None) -> dict[str, dict[str, Sequence[Result]]]:
    """Returns {task: {model: results}} of the base, and of the base with examples before each
    prompt: from the cache, or scored with `params`; loads the weights where none are given.
    """
    held = functools.cache(lambda: self.local(self._base_params() if params is None else params))
    out: dict[str, dict[str, Sequence[Result]]] = {}
    for task in self.tasks:
      titles = (BASE,) if self._shots[task.name] is None else (BASE, SHOTS)
      for title in titles:
        make = functools.partial(self._score_held, held, task, title)
        out.setdefault(task.name, {})[title] = self._cached(task, title, make)
    return out

  def _score_held(self, held: Callable[[], Model], task: Task, title: str) -> Sequence[Result]:
    return self._score(held(), task, title)

  def _cached(
    self, task: Task, title: str, make: Callable[[], Sequence[Result]]
  ) -> Sequence[Result]:
    """Returns results of the base; on processes but the first an empty list where it has them."""
    model = self.run.model
    key = evaluation.cache_key(
      task,
      model=model.fingerprint,
      template=model.tokenizer.fingerprint,
      settings=self._settings(task, title),
    )
    place = (files.join(self.folder, 'base'), key, task)
    known = processes.from_main(functools.partial(evaluation.is_cached, *place))
    if processes.is_main():
      return evaluation.cached(*place, make)
    return [] if known else make()

  def _settings(self, task: Task, title: str) -> dict[str, str | int | float]:
    """Returns what changes the base's scores beside task and weights."""
    c = self.run.config
    held = c.lora.base if c.lora.rank else c.model.param_dtype
    out: dict[str, str | int | float] = {
      'compute_dtype': c.model.compute_dtype,
      'param_dtype': f'nf4/{c.lora.block}' if held == 'nf4' else held,
    }
    if task.kind.respond == COMPLETE:
      out['draw'] = digest(repr(self.draw))
    if title == SHOTS:
      out['shots'] = digest(repr(self._shots[task.name]))
    return out

  def _base_params(self) -> dict:
    return self.run.load_params(self.run.model.source, self.run.config.model.param_dtype)

  def tuned(self, params: dict) -> dict | None:
    """Scores the tuned model, compares it with the base, prints and stores the comparison.

    Returns:
      eval/summary.json on process 0; None elsewhere, and where there is nothing to compare.
    """
    base, model, entries = self.base(), self.local(params), []
    for task in self.tasks:
      results = {**base[task.name], TUNED: self._score(model, task, TUNED)}
      if task.kind.judge is not None and processes.is_main():
        results = function_kinds.judged(task.rows, task.kind, results)
      if processes.is_main():
        result.save(files.join(self.folder, f'{task.name}.jsonl'), results)
        entries.append(self._entry(task, results))
    answers = self.samples.compared(model)
    if not (entries or answers) or not processes.is_main():
      return None
    summary = comparison.summarize(entries, answers)
    self._write(summary)
    return summary

  def _entry(self, task: Task, results: Mapping[str, Sequence[Result]]) -> dict:
    entry = comparison.compare(task, results, self._costs(task))
    if (report := self._found_in_training().get(task.name)) is not None:
      clean = comparison.on_rows(task, results, report.clean_ids())
      entry['contamination'] = contamination_check.to_summary(report, clean)
    return entry

  @functools.cache  # noqa: B019, one evaluator a run
  def _found_in_training(self) -> Mapping[str, contamination_check.Report]:
    return contamination_check.check(self.run, self.tasks)

  def _costs(self, task: Task) -> Mapping[str, Mapping[str, float]]:
    found = self._cost.get(task.name, {})
    return {n: {'seconds': c.seconds, 'tokens': c.tokens, 'rows': c.rows} for n, c in found.items()}

  def _write(self, summary: dict) -> None:
    files.makedirs(self.folder)
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    files.write_text(files.join(self.folder, 'summary.json'), text + '\n')
    print('\n' + text_table.text(summary) + '\n', flush=True)
