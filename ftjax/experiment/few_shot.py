"""The examples that stand before prompts of a task, from a source of their own or training rows."""

import itertools

from ftjax.data import prompt_rows, sources, synthetic
from ftjax.data.formats import Bad, Chat
from ftjax.evaluation import shots, tasks
from ftjax.evaluation.kind import READ
from ftjax.evaluation.tasks import Task
from ftjax.experiment import data
from ftjax.experiment.run import Run
from ftjax.runtime.errors import ConfigError, DataError

_MOST_ROWS = 20_000  # of a source of training rows that are looked at
_SEED = 0


def find(run: Run, task: Task) -> shots.Shots | None:
  """Returns the eval.shots examples of a task; None where it has no prompts, or eval.shots is 0.

  Raises:
    ConfigError: no row has the form of the task.
    DataError: fewer rows than examples, or bad rows.
  """
  count = run.config.eval.shots
  if not count or task.kind.respond == READ:
    return None
  named = dict(entry.split('=', 1) for entry in run.config.eval.shots_from)
  if task.name in named:
    found = tasks.read_rows(sources.parse_spec(named[task.name]), task.kind, 'eval.shots_from')
    rows = [(row.asked, row.answer) for row in found if row.asked is not None]
  else:
    rows = _training_rows(run, isinstance(task.rows[0].asked, str))
  if not rows:
    form = 'texts' if isinstance(task.rows[0].asked, str) else 'conversations'
    raise ConfigError(
      f'eval.shots={count}: no row of data.train is a prompt and an answer as {form}, as the task '
      f"{task.name!r} has them; name a source in eval.shots_from, ('{task.name}=PATH',)"
    )
  asked = {_key(row.asked) for row in task.rows}
  # An example that is asked too would give its answer away.
  rows = [row for row in rows if _key(row[0]) not in asked]
  return shots.choose(rows, count, _SEED)


def _key(asked: Chat | str | None) -> str:
  return asked if isinstance(asked, str) else repr(asked and asked.messages)


def _training_rows(run: Run, as_text: bool) -> list[tuple[Chat | str, str]]:
  c, out = run.config, []
  has_template = run.model.tokenizer.template is not None
  for spec in sources.parse_specs(c.data.train):
    spec = synthetic.resolve(spec, data.cache_folder(c, run.workdir))
    for _, _, row in itertools.islice(sources.scan(spec), _MOST_ROWS):
      if isinstance(row, Bad):
        continue
      try:
        found = prompt_rows.read_prompt(row, has_template, spec.format)
      except (ValueError, DataError):  # of another shape, such as a document
        continue
      if found.answer and isinstance(found.asked, str) == as_text:
        out.append((found.asked, found.answer))
  return out
