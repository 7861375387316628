"""The entries of eval.tasks: 'name=kind:path', and 'lm_eval:TASK' for a task of lm-eval."""

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ftjax.config import choices
from ftjax.runtime import named_object
from ftjax.runtime.errors import ConfigError

KEY = 'eval.tasks'
# Kinds whose path is a task of EleutherAI's lm-eval; with the second its prompts are turns of the
# model's chat template.
LM_EVAL, LM_EVAL_CHAT = 'lm_eval', 'lm_eval_chat'
LM_EVAL_KINDS = (LM_EVAL, LM_EVAL_CHAT)
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')
# A user's kind, module:OBJECT, or a function that a built-in kind calls, before the path.
_OBJECT = re.compile(
  r'(?P<kind>(?:(?:judge|reward)/)?[A-Za-z_][\w.]*:[A-Za-z_]\w*):(?P<path>(?!//).+)', re.DOTALL
)
# A built-in reward, with its arguments in parentheses: reward/length(at_most=9).
_REWARD = re.compile(r'(?P<kind>reward/\w+(?:\(.*?\))?):(?P<path>.+)', re.DOTALL)
# Kinds that are completed by the name of a function: reward/math, judge/module:FUNCTION.
FUNCTION_KINDS = ('judge/', 'reward/')


class TaskSpec(NamedTuple):
  """An entry of eval.tasks.

  name: of the files of eval/. kind: of choices.TASK_KINDS or LM_EVAL_KINDS, or 'module:OBJECT'.
  path: a source of data; of LM_EVAL_KINDS a task of lm-eval.
  """

  name: str
  kind: str
  path: str


@runtime_checkable
class TaskKindFacts(Protocol):
  """What a user's kind of task has: evaluation.kind.Kind."""

  score: Any
  metrics: Any
  respond: Any


def own_object(kind: str) -> str | None:
  """Returns the 'module:OBJECT' of a kind that is, or calls, a user's own; None for the others."""
  name = kind.removeprefix('judge/').removeprefix('reward/')
  return name if named_object.is_named(name) else None


def parse(text: str) -> TaskSpec:
  """Returns the parts of 'name=kind:path', or of 'lm_eval:TASK', whose name is the task's.

  Raises:
    ConfigError: another form, an unknown kind, or a name that is no file name.
  """
  name, equals, rest = text.partition('=')
  if not equals and text.partition(':')[0].strip() in LM_EVAL_KINDS:
    name, equals, rest = text.partition(':')[2], '=', text
  kind, colon, path = (part.strip() for part in rest.partition(':'))
  if not (equals and colon and path and _NAME.fullmatch(name.strip())):
    raise ConfigError(
      f'{KEY}: got {text!r}, expected name=kind:path like sentiment=choice:data/test.jsonl, '
      'the name of letters, digits and _ . -'
    )
  if kind in (*choices.TASK_KINDS, *LM_EVAL_KINDS):
    return TaskSpec(name.strip(), kind, path)
  if found := _OBJECT.fullmatch(rest.strip()) or _REWARD.fullmatch(rest.strip()):
    kind, path = found['kind'], found['path'].strip()
  else:
    near = difflib.get_close_matches(kind, choices.TASK_KINDS, n=1)
    hint = f'did you mean {near[0]}? Expected' if near else 'expected'
    raise ConfigError(
      f'{KEY}: {text!r} has the kind {kind!r}; {hint} one of {", ".join(choices.TASK_KINDS)}, '
      "reward/NAME or reward/NAME(ARGUMENTS), judge/module:FUNCTION, or a user's 'module:OBJECT'"
    )
  return TaskSpec(name.strip(), kind, path)


def parse_all(texts: Sequence[str]) -> tuple[TaskSpec, ...]:
  """Returns the parts of all entries of eval.tasks.

  Raises:
    ConfigError: see `parse`; or a name that is given twice.
  """
  if wrong := [text for text in texts if not isinstance(text, str)]:
    raise ConfigError(f'{KEY}: {wrong[0]!r}; expected a text, name=kind:path')
  found = tuple(parse(text) for text in texts)
  names = [spec.name for spec in found]
  if twice := sorted({n for n in names if names.count(n) > 1}):
    raise ConfigError(f'{KEY}: {twice} named twice; a name is a file of eval/')
  return found


def check_objects(specs: Sequence[TaskSpec]) -> None:
  """Imports the kinds of tasks that are a user's own.

  Raises:
    ConfigError: a kind that cannot be imported, or is of another type.
  """
  for spec in specs:
    if (name := own_object(spec.kind)) is None:
      continue
    found = named_object.load(KEY, name)
    if spec.kind.startswith(FUNCTION_KINDS):
      if not callable(found):
        raise named_object.wrong(KEY, name, found, 'a function')
      continue
    if not isinstance(found, TaskKindFacts) or isinstance(found, type):
      raise named_object.wrong(KEY, spec.kind, found, 'a ftjax.evaluation.kind.Kind')
