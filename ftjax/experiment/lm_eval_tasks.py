"""Tasks of EleutherAI's lm-eval as entries of eval.tasks: 'lm_eval:TASK', and 'lm_eval_chat:TASK'
with the model's chat template.

A task is loaded before training, with its data set, so that a misspelt name or a data set that
cannot be had ends the run then. lm-eval itself makes the prompts, applies the filters and computes
the values of each document; lm_eval_model.py answers.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftjax.config.task_specs import LM_EVAL, LM_EVAL_CHAT, TaskSpec
from ftjax.evaluation import lm_eval_results
from ftjax.evaluation.lm_eval_results import Documents
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, StoppedEarly

if TYPE_CHECKING:
  from ftjax.experiment.lm_eval_model import LmEvalModel

log = logging.getLogger(__name__)

_SEED = 1234  # lm-eval's own, so that few-shot examples are those of its command line
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class LmEvalTask:
  """An entry of eval.tasks, loaded.

  Attributes:
    name: of the entry. path: lm-eval's name of the task or group.
    is_chat: whether prompts are turns of the model's chat template.
    loaded: what lm-eval's TaskManager.load returns.
    digest: of all that the prompts and figures depend on, the model apart.
  """

  name: str
  path: str
  is_chat: bool
  loaded: Mapping[str, Any] = dataclasses.field(repr=False)
  digest: str

  @property
  def kind_name(self) -> str:
    """Returns its kind in eval.tasks."""
    return LM_EVAL_CHAT if self.is_chat else LM_EVAL


def need() -> None:
  """Raises ConfigError with the extra to install if lm-eval is missing."""
  if importlib.util.find_spec('lm_eval') is None:
    raise ConfigError(
      "eval.tasks: lm_eval: needs the package lm-eval; pip install '.[eval]' in the checkout of "
      'ftjax'
    )


def load_tasks(
  specs: Sequence[TaskSpec], *, include_path: str, shots: int | None = None
) -> tuple[LmEvalTask, ...]:
  """Returns the lm-eval tasks of entries of eval.tasks, with their data sets.

  Args:
    specs: those whose kind is lm_eval or lm_eval_chat.
    include_path: eval.lm_eval_path, a folder of the user's own YAML tasks; '': none.
    shots: few-shot examples; None: what the task has.

  Raises:
    ConfigError: lm-eval is not installed, no such task or folder, a task whose data set cannot be
      had, or one that runs generated programs or shows pictures.
  """
  if not specs:
    return ()
  need()
  if include_path and not os.path.isdir(include_path):
    raise ConfigError(f'eval.lm_eval_path={include_path}: there is no such folder')
  from lm_eval.tasks import TaskManager

  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  manager = TaskManager(include_path=include_path or None)
  return tuple(_load(manager, spec, shots) for spec in specs)


def _load(manager: Any, spec: TaskSpec, shots: int | None) -> LmEvalTask:
  what = f'eval.tasks: {spec.kind}:{spec.path}'
  if spec.path not in manager.all_tasks:
    import difflib

    near = difflib.get_close_matches(spec.path, manager.all_tasks, n=3)
    hint = f'; did you mean {" or ".join(near)}?' if near else ''
    raise ConfigError(
      f'{what}: lm-eval has no such task{hint} Tasks of your own are read from eval.lm_eval_path'
    )
  if spec.path in manager.all_tags:
    raise ConfigError(f'{what} is a tag of several tasks; name its tasks one by one')
  try:
    with _seeded():
      loaded = manager.load([spec.path])
  except StoppedEarly:
    raise
  except Exception as error:  # of lm-eval, of datasets, or of the task's own code
    reason = f'{type(error).__name__}: {error}'
    raise ConfigError(
      f'{what}: the task cannot be loaded: {reason:.500}. Its data set may need a network; once it '
      'is in the cache of datasets (HF_HOME), runs without a network find it'
    ) from error
  groups = loaded['groups']
  if spec.path in groups and not groups[spec.path].has_aggregation:
    members = sorted(loaded['tasks'])
    raise ConfigError(
      f'{what} is a group without a figure of its own; name its tasks one by one: '
      f'{", ".join(members[:_SHOWN])}{", ..." if len(members) > _SHOWN else ""}'
    )
  for name, task in loaded['tasks'].items():
    if getattr(task, 'UNSAFE_CODE', False):  # lm-eval's evaluator asks the same way
      raise ConfigError(f'{what}: {name} runs programs that the model writes; ftjax does not')
    if getattr(task, 'MULTIMODAL', False):
      raise ConfigError(f'{what}: {name} shows pictures or sound; ftjax has text models')
    _set_shots(task, shots)
  content = digest([_facts(task) for task in loaded['tasks'].values()])
  return LmEvalTask(spec.name, spec.path, spec.kind == LM_EVAL_CHAT, loaded, content)


def _set_shots(task: Any, shots: int | None) -> None:
  """Sets the number of few-shot examples, as lm-eval's command line does: a task that fixes 0 keeps
  it.
  """
  own = task.get_config('num_fewshot')
  if own is None:
    task.set_config(key='num_fewshot', value=shots or 0)
  elif shots is not None and own != 0:
    task.set_config(key='num_fewshot', value=shots)


def _facts(task: Any) -> list[str]:
  """Returns what names a task and its documents."""
  from lm_eval import __version__
  from lm_eval.utils import handle_non_serializable

  def text(value: Any) -> str:
    return json.dumps(value, default=handle_non_serializable, sort_keys=True)

  documents = digest([text(dict(doc)) for doc in task.eval_docs])
  return [__version__, str(task.VERSION), text(task.dump_config()), documents]


def evaluate(
  model: 'LmEvalModel', task: LmEvalTask, *, limit: int | None = None, seed: int = _SEED
) -> Documents:
  """Returns the results of one task with its metrics.

  Args:
    model: answers.
    limit: the first documents of the task, or of each task of a group; None: all of them.
    seed: of the choice of few-shot examples.

  Raises:
    DataError, NonFiniteError, ConfigError: see LmEvalModel.
  """
  from lm_eval.evaluator import evaluate as evaluate_tasks

  for own in task.loaded['tasks'].values():
    own.set_fewshot_seed(seed=seed)
  with _seeded():
    found = evaluate_tasks(
      model,
      task.loaded,
      limit=limit,
      bootstrap_iters=0,
      apply_chat_template=task.is_chat,
      fewshot_as_multiturn=task.is_chat,
    )
  tasks = task.loaded['tasks']
  aggregations: dict[str, tuple[str, bool]] = {}
  for own in tasks.values():
    aggregations |= _aggregations(own)
  figures = found.get('groups', {}).get(task.path) or found['results'][task.path]
  return lm_eval_results.read(
    {name: found['samples'][name] for name in tasks},
    aggregations,
    lambda name, doc: _choices(tasks[name], doc),
    model.lengths,
    {k: float(v) for k, v in figures.items() if ',' in k and isinstance(v, int | float)},
  )


def _aggregations(task: Any) -> dict[str, tuple[str, bool]]:
  """Returns by metric (name of the aggregation, whether higher is better)."""
  from lm_eval.api.registry import aggregation_registry

  names = {aggregation_registry.get(name): name for name in aggregation_registry}
  higher = task.higher_is_better()
  return {
    metric: (names.get(function, 'of the task itself'), bool(higher.get(metric, True)))
    for metric, function in task.aggregation().items()
  }


def _choices(task: Any, doc: Mapping[str, Any]) -> list[str] | None:
  """Returns the choices of a document; None where the model writes a text."""
  if task.OUTPUT_TYPE != 'multiple_choice':
    return None
  found = task.doc_to_choice(doc)
  return [str(choice) for choice in found]


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
  """Seeds the generators of Python and numpy as lm-eval does, and puts their states back."""
  states = random.getstate(), np.random.get_state()
  random.seed(0)
  np.random.seed(_SEED)
  try:
    yield
  finally:
    random.setstate(states[0])
    np.random.set_state(states[1])
