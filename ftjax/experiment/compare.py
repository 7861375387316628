"""Base against tuned: runs eval.tasks on all models of a run, prints and stores the comparison."""

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence

from ftjax.cluster import processes
from ftjax.config import gate_rules, task_specs
from ftjax.evaluation import (
  comparison,
  endpoint,
  function_kinds,
  gate,
  general,
  lm_eval_results,
  result,
  tasks,
)
from ftjax.evaluation import run as evaluation
from ftjax.evaluation.contamination import Report
from ftjax.evaluation.http_client import Limits
from ftjax.evaluation.kind import COMPLETE
from ftjax.evaluation.model import Draw, Model
from ftjax.evaluation.result import Result
from ftjax.evaluation.run import Cost
from ftjax.evaluation.tasks import Task
from ftjax.experiment import (
  contamination_check,
  divergence,
  evaluation_names,
  few_shot,
  lm_eval_tasks,
)
from ftjax.experiment.lm_eval_tasks import LmEvalTask
from ftjax.experiment.local_model import LocalModel, Programs
from ftjax.experiment.run import Run
from ftjax.experiment.samples import Samples
from ftjax.experiment.watched_model import WatchedModel
from ftjax.reporting import text_table
from ftjax.runtime import checksum
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import DataError, RunError, StoppedEarly
from ftjax.storage import files

log = logging.getLogger(__name__)

BASE, SHOTS, TUNED = 'base', 'base_shots', comparison.TUNED
_SEED = 0  # of sampled completions: the same rows and draws in every run

Results = dict[str, Sequence[Result]]  # by model


class Evaluator:
  """Scores one run's models. Results of the base and of the tuned model are stored in eval/base and
  eval/tuned under a hash of all that they depend on, so that a stopped evaluation resumes at the
  task at which it was stopped.

  Raises:
    ConfigError, DataError: a task that cannot be run; a rule of `gate` on an unknown figure.
  """

  def __init__(self, run: Run):
    c = run.config
    self.run = run
    specs = task_specs.parse_all(c.eval.tasks)
    theirs = [spec for spec in specs if spec.kind in task_specs.LM_EVAL_KINDS]
    found = tasks.load_tasks(spec for spec in specs if spec not in theirs)
    most = c.eval.rows
    self.tasks = tuple(task.first(most, tasks.ROWS_SEED) for task in found) if most else found
    if c.eval.general:
      self.tasks += general.load(run.model.tokenizer.template is not None)
    self._theirs = lm_eval_tasks.load_tasks(theirs, include_path=c.eval.lm_eval_path)
    # Every process builds all batches and puts its own part of them on its devices.
    processes.check_same('eval.tasks', digest([t.digest for t in (*self.tasks, *self._theirs)]))
    self._rules = gate_rules.parse_all(c.gate)
    named = {task.name for task in self._theirs}
    evaluation_names.check_rules(self._rules, list(self.tasks), named, c.eval.samples)
    self.folder = files.join(run.workdir, 'eval')
    self.programs = Programs(run)
    self.samples = Samples(self.programs)
    self._shots = {
      task.name: None if task.group == general.GROUP else few_shot.find(run, task)
      for task in self.tasks
    }
    stop = tuple(c.eval.stop)
    self.draw = Draw(c.eval.max_tokens, c.eval.samples, c.eval.temperature, _SEED, stop)
    self._cost: dict[str, dict[str, Cost]] = {}
    self._missing: dict[str, dict[str, str]] = {}  # why a server has no results of a task
    limits = Limits(concurrency=c.eval.endpoint.concurrency, timeout=c.eval.endpoint.timeout)
    served = [endpoint.parse(text) for text in c.eval.models]
    self._endpoints = {spec.name: endpoint.Endpoint(spec, limits) for spec in served}

  def local(self, params: dict) -> LocalModel:
    """Returns weights as a model under test."""
    return LocalModel(self.programs, params)

  def _score(self, model: Model, task: Task, title: str) -> Sequence[Result]:
    shots = self._shots[task.name] if title == SHOTS else None
    draw = self._draw_of(task)
    with self.run.watchdog.phase('evaluate'), self._measured(task.name, title) as results:
      try:
        results += evaluation.evaluate(task, model, draw=draw, title=title, shots=shots)
      except DataError as error:
        if title == SHOTS:
          count = self.run.config.eval.shots
          raise DataError(f'{error}. Its examples count too: eval.shots={count}') from error
        if task.group == general.GROUP:
          raise DataError(f'{error}. The row is of eval.general; set it to False') from error
        raise
    return results

  def _draw_of(self, task: Task) -> Draw:
    return Draw(general.MAX_TOKENS) if task.group == general.GROUP else self.draw

  def _score_theirs(self, model: LocalModel, task: LmEvalTask, title: str) -> Sequence[Result]:
    with self.run.watchdog.phase('evaluate'), self._measured(task.name, title) as results:
      limit = self.run.config.eval.rows or None
      results += lm_eval_tasks.evaluate(model.for_lm_eval(), task, limit=limit).results
    return results

  def _measured(self, task: str, title: str):
    return self._cost.setdefault(task, {}).setdefault(title, Cost()).measured()

  def base(self, params: dict | None = None) -> dict[str, Results]:
    """Returns {task: {model: results}} of the base, and of the base with examples before each
    prompt: from the cache, or scored with `params`; loads the weights where none are given.
    """
    held = functools.cache(lambda: self.local(self._base_params() if params is None else params))
    out: dict[str, Results] = {}
    for task in self.tasks:
      for title in (BASE,) if self._shots[task.name] is None else (BASE, SHOTS):

        def make(task=task, title=title):
          return self._score(held(), task, title)

        key = self._key(task.kind_name, task.digest, self._settings(task, title))
        ids = [row.id for row in task.rows]
        out.setdefault(task.name, {})[title] = self._cached(BASE, task.name, key, make, ids)
    for task in self._theirs:

      def make_theirs(task=task):
        return self._score_theirs(held(), task, BASE)

      key = self._key_of_theirs(task)
      out[task.name] = {BASE: self._cached(BASE, task.name, key, make_theirs, None)}
    return out

  def _key_of_theirs(self, task: LmEvalTask, weights: str = '') -> str:
    settings = self._dtypes() | {'rows': self.run.config.eval.rows}
    settings |= {'weights': weights} if weights else {}
    return self._key(f'lm_eval {task.is_chat}', task.digest, settings)

  def _key(self, kind: str, content: str, settings: Mapping[str, str | int | float]) -> str:
    model = self.run.model
    fingerprints = {'model': model.fingerprint, 'template': model.tokenizer.fingerprint}
    return evaluation.cache_key(kind, content, **fingerprints, settings=settings)

  def _cached(
    self,
    title: str,
    name: str,
    key: str,
    make: Callable[[], Sequence[Result]],
    ids: Sequence[str] | None,
  ) -> Sequence[Result]:
    """Returns results of a model; on processes but the first an empty list where it has them.

    Args:
      title: of the folder in eval/.
      name: of the task. key: of all that the results depend on.
      make: computes them; every process calls it, or none.
      ids: of the rows, where they are known.
    """
    folder = files.join(self.folder, title)
    known = processes.from_main(lambda: evaluation.is_cached(folder, key, name))
    if processes.is_main():
      return evaluation.cached(folder, key, name, make, ids)
    return [] if known else make()

  def _dtypes(self) -> dict[str, str | int | float]:
    c = self.run.config
    held = c.lora.base if c.lora.rank else c.model.param_dtype
    return {
      'compute_dtype': c.model.compute_dtype,
      'param_dtype': f'nf4/{c.lora.block}' if held == 'nf4' else held,
    }

  def _settings(self, task: Task, title: str) -> dict[str, str | int | float]:
    """Returns what changes the base's scores beside task and weights."""
    out = self._dtypes()
    if task.kind.respond == COMPLETE:
      out['draw'] = digest(repr(self._draw_of(task)))
      c = self.run.config.eval
      out |= {'beams': f'{c.num_beams} {c.length_penalty}'} if c.num_beams > 1 else {}
    if title == SHOTS:
      out['shots'] = digest(repr(self._shots[task.name]))
    return out

  def _base_params(self) -> dict:
    return self.run.load_params(self.run.model.source, self.run.config.model.param_dtype)

  def tuned(self, params: dict) -> dict:
    """Scores the tuned model, compares it with the base, prints and stores the comparison.

    Returns:
      what `gate` makes of it, for `gate.enforce`; the same on every process.
    """
    base, model, found = self.base(), self.local(params), {}
    scored = self._scored(model, checksum.fingerprint(params))
    for task in self.tasks:
      results = {**base[task.name], TUNED: scored[task.name]}
      if task.name == general.TEXTS_NAME:
        results = self._with_divergence(task, results, params)
      if processes.is_main() and task.group != general.GROUP:
        results |= self._served(task)
      found[task.name] = results
    theirs = {t.name: {**base[t.name], TUNED: scored[t.name]} for t in self._theirs}
    answers = self.samples.compared(model)
    with self.run.watchdog.phase('evaluate'):
      return processes.from_main(lambda: self._finish(found, theirs, answers))

  def _scored(self, model: LocalModel, weights: str) -> Results:
    """Returns {task: results} of the tuned model, whose fingerprint is `weights`."""
    out = {}
    for task in self.tasks:

      def make(task=task):
        return self._score(model, task, TUNED)

      settings = self._settings(task, TUNED) | {'weights': weights}
      key = self._key(task.kind_name, task.digest, settings)
      ids = [row.id for row in task.rows]
      out[task.name] = self._cached(TUNED, task.name, key, make, ids)
    for task in self._theirs:

      def make_theirs(task=task):
        return self._score_theirs(model, task, TUNED)

      key = self._key_of_theirs(task, weights)
      out[task.name] = self._cached(TUNED, task.name, key, make_theirs, None)
    return out

  def _with_divergence(self, task: Task, results: Results, params: dict) -> Results:
    with self.run.watchdog.phase('evaluate'):
      sums = divergence.of_texts(self.run, self._base_params(), params, general.texts(task))
    if not processes.is_main():
      return results
    return {
      name: general.add_divergences(own, sums if name == TUNED else None)
      for name, own in results.items()
    }

  def _served(self, task: Task) -> Results:
    """Returns the results of eval.models, in process 0 only; a server that fails is left out, and
    the others stay.
    """
    out = {}
    for name, model in list(self._endpoints.items()):
      try:
        watched = WatchedModel(model, self.run.watchdog.beat)
        with self.run.watchdog.phase('evaluate'), self._measured(task.name, name) as results:
          results += evaluation.evaluate(
            task, watched, draw=self._draw_of(task), title=name, from_main=evaluation.alone
          )
        out[name] = results
      except StoppedEarly:
        raise
      except RunError as error:
        log.warning('eval.models: %s is left out of the task %s: %s', name, task.name, error)
        self._missing.setdefault(task.name, {})[name] = str(error)
    return out

  def _entry(
    self,
    task: comparison.Compared,
    results: Results,
    asked: Task | LmEvalTask,
    report: Report | None,
  ) -> dict:
    result.save(files.join(self.folder, f'{task.name}.jsonl'), results)
    entry = comparison.compare(task, results, self._costs(task.name))
    entry |= {'path': asked.path, 'digest': asked.digest}  # for --compare
    entry['not_evaluated'] = self._missing.get(task.name, {})
    if report is not None:
      clean = comparison.on_rows(task, results, report.clean_ids())
      entry['contamination'] = contamination_check.to_summary(report, clean)
    return entry

  def _costs(self, task: str) -> Mapping[str, Mapping[str, float]]:
    found = self._cost.get(task, {})
    return {n: {'seconds': c.seconds, 'tokens': c.tokens, 'rows': c.rows} for n, c in found.items()}

  def _finish(
    self, found: dict[str, Results], theirs: dict[str, Results], answers: Sequence[dict]
  ) -> dict:
    """Compares and stores the results, by task; those of lm-eval's tasks are `theirs`."""
    if not (found or theirs or answers):
      return {'gate': None}
    files.makedirs(self.folder)
    entries = []
    own = [task for task in self.tasks if task.group != general.GROUP]
    reports = contamination_check.check(self.run, own)
    found = contamination_check.add_copied(self.run, self.tasks, found)
    for task in self.tasks:
      results = found[task.name]
      if task.kind.judge is not None:
        beat = self.run.watchdog.beat
        results = function_kinds.judged(task.rows, task.kind, results, beat)
      entries.append(self._entry(task, results, task, reports.get(task.name)))
    for task in self._theirs:
      results = theirs[task.name]
      entry = lm_eval_results.entry(task.name, task.kind_name, results)
      entries.append(self._entry(entry, results, task, None))
    summary = comparison.summarize(entries, answers)
    summary['gate'] = gate.check(self._rules, summary)
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    files.write_text(files.join(self.folder, 'summary.json'), text + '\n')
    print('\n' + text_table.text(summary) + '\n', flush=True)
    return {'gate': summary['gate']}
