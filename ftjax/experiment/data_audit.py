"""The audit of a config's training data: prints and writes the findings, and compares two versions
of the data.
"""

import dataclasses
import json
from typing import Any

import ml_collections

from ftjax.audit import audit, cleaning, diversity, drift, table
from ftjax.audit.rows import Row
from ftjax.config import task_specs
from ftjax.data import (
  sources,
  synthetic,
)
from ftjax.data.tokenizer import Tokenizer
from ftjax.evaluation import tasks
from ftjax.experiment import audited_rows, contamination_check, data_cleaning, out_of_fold
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

FILE = 'audit.json'  # in a workdir: the summary that report.html shows


@dataclasses.dataclass(frozen=True)
class Request:
  """What to do beside printing the audit.

  Attributes:
    out: file for all findings, a JSON object a line; '': none.
    clean: file for the rows that are left; '': none. kinds: that are removed; (): the usual ones.
    against: an old version of the data, as data.train names sources; '': none.
    workdir: folder for FILE; '': none.
    is_audit: whether the data are audited; else they are only compared. out_of_fold: results of a
      cross-validation, see out_of_fold.py; '': none. encoder: a model folder for embeddings; '':
      none.
  """

  out: str = ''
  clean: str = ''
  kinds: tuple[str, ...] = ()
  against: str = ''
  workdir: str = ''
  is_audit: bool = True
  out_of_fold: str = ''
  encoder: str = ''


def show(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, scratch: str, request: Request
) -> None:
  """Audits the training data of a config and prints the result.

  Args:
    c: the config.
    tokenizer: of its model, with the template.
    scratch: local folder for synthetic rows.
    request: what else to do.

  Raises:
    ConfigError: unknown kinds, or an output file that exists or is read.
    DataError: a source that cannot be read, or without a usable row.
  """
  kinds = cleaning.kinds_of(request.kinds)
  given = out_of_fold.read(request.out_of_fold) if request.out_of_fold else None
  specs = _specs(c.data.train, scratch)
  _check_outputs(request)
  rows, unusable = audited_rows.read(c, tokenizer, specs)
  if not rows:
    first = f'; the first: {unusable[0].file}:{unusable[0].line}: {unusable[0].detail}' * bool(
      unusable
    )
    raise DataError(f'data.train={c.data.train}: no usable row in it{first}')
  if request.is_audit:
    evaluation = _rows_of_tasks(c)
    if c.data.eval:
      held_out, _ = audited_rows.read(c, tokenizer, _specs(c.data.eval, scratch))
      evaluation = held_out + evaluation
    found = audit.run(
      *(rows, evaluation, unusable),
      special=special_tokens(tokenizer),
      embed=_embed(request.encoder),
      given=given,
      seed=c.seed,
    )
    print(table.text(found))
    _write(found, request)
    if request.clean:
      print('\n' + data_cleaning.clean(specs, found, kinds, request.clean))
  if request.against:
    old, _ = audited_rows.read(c, tokenizer, _specs(request.against, scratch))
    if not old:
      raise DataError(f'--against={request.against}: no usable row in it')
    names = (request.against, ', '.join(spec.path for spec in specs))
    print(('\n' if request.is_audit else '') + table.drift(drift.compare(old, rows), names))


def _embed(path: str) -> diversity.Embed | None:
  """Returns what gives embeddings by the model in a folder; None for ''."""
  if not path:
    return None
  from ftjax.experiment.text_encoder import TextEncoder  # imports jax

  return TextEncoder(path)


def special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
  """Returns the texts of a tokenizer's special tokens."""
  return frozenset(tokenizer.token(i) for i in tokenizer.special_ids if i < tokenizer.vocab_size)


def _rows_of_tasks(c: ml_collections.ConfigDict) -> list[Row]:
  """Returns the rows of eval.tasks as texts; without those of lm-eval, which downloads them."""
  specs = [s for s in task_specs.parse_all(c.eval.tasks) if s.kind not in task_specs.LM_EVAL_KINDS]
  out = []
  for task in tasks.load_tasks(specs):
    for number, row in enumerate(task.rows, 1):
      item = contamination_check.item_of(row)
      out.append(Row(task.path, number, item.prompt, item.answers, source=task.name))
  return out


def _specs(value: Any, scratch: str) -> list[sources.Spec]:
  return [synthetic.resolve(spec, scratch) for spec in sources.parse_specs(value)]


def _check_outputs(request: Request) -> None:
  """Refuses output files that exist, cannot be made, or are one file; before anything is read."""
  named: dict[str, str] = {}
  for flag, path in (('--clean', request.clean), ('--audit_out', request.out)):
    if not path:
      continue
    if not path.endswith('.jsonl'):
      raise ConfigError(f'{flag}={path}; expected a name that ends with .jsonl')
    for name in (path, data_cleaning.log_name(path)) if flag == '--clean' else (path,):
      if files.exists(name):
        raise ConfigError(f'{flag}: {name} exists; name another file, or remove it')
      if name in named:
        raise ConfigError(f'{flag}: {name} is written by {named[name]} too; name another file')
      named[name] = flag
    try:
      files.makedirs(files.absolute(path).rpartition('/')[0])
    except OSError as error:
      raise ConfigError(f'{flag}={path}: its folder cannot be made: {error}') from error


def _write(found: audit.Audit, request: Request) -> None:
  if request.out:
    lines = [json.dumps(f.to_json(), ensure_ascii=True) for f in found.findings]
    files.write_text(request.out, ''.join(f'{line}\n' for line in lines))
    print(f'\n{len(lines):,} findings in {request.out}')
  if request.workdir:
    files.makedirs(request.workdir)
    files.write_text(
      files.join(request.workdir, FILE), json.dumps(found.to_json(), indent=1) + '\n'
    )
