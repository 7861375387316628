"""Checks the names of tasks, figures and served models that evaluation will need, before data are
read and anything is trained: a run of days must not end at a misspelt name.
"""

import ml_collections

from ftjax.cluster import processes
from ftjax.config import gate_rules, task_specs
from ftjax.evaluation import endpoint, general
from ftjax.evaluation.http_client import Limits
from ftjax.evaluation.metrics import samples
from ftjax.evaluation.tasks import Task

# One question to each server, which may not run yet.
_LIMITS = Limits(concurrency=1, timeout=20.0, attempts=1)
_CLASSES = ('a', 'b')  # any: tasks with classes have more figures than those without


def check(c: ml_collections.ConfigDict) -> None:
  """Checks `gate` and eval.models; every process calls it, and process 0 alone asks servers.

  Raises:
    ConfigError: a task or figure in `gate` that eval.tasks does not have, an entry of eval.models
      of another form, or a model that its server does not have; names what there is.
  """
  specs = task_specs.parse_all(c.eval.tasks)
  theirs = {spec.name for spec in specs if spec.kind in task_specs.LM_EVAL_KINDS}
  own = [
    Task(spec.name, spec.kind, spec.path, (), '', _CLASSES)
    for spec in specs
    if spec.name not in theirs
  ]
  own += general.load(has_template=True) if c.eval.general else ()
  check_rules(gate_rules.parse_all(c.gate), own, theirs, c.eval.samples)
  served = [endpoint.parse(text) for text in c.eval.models]
  if served:
    processes.from_main(lambda: [endpoint.Endpoint(s, _LIMITS).check_name() for s in served])


def check_rules(
  rules: tuple[gate_rules.Rule, ...], own: list[Task], theirs: set[str], count: int
) -> None:
  """Checks the names in rules of `gate`; the figures of lm-eval's tasks are known when they ran.

  Args:
    own: tasks of ftjax. theirs: names of lm-eval's.
    count: completions of each prompt.

  Raises:
    ConfigError: an unknown name.
  """
  known = {}
  for task in own:
    found = (*task.metrics, *task.details)
    if any(m.name == 'accuracy' for m in found):
      found += samples.metrics(count)
    known[task.name] = [m.name for m in found]
  gate_rules.check_known(rules, known | dict.fromkeys(theirs))
