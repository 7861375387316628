"""The audit of a config's training data: reads the rows for audit/, prints and writes the findings,
writes the cleaned rows, and compares two versions of the data.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from ftjax.audit import audit, cleaning, drift, table
from ftjax.audit.finding import Finding, excerpt
from ftjax.audit.rows import Row
from ftjax.config import algorithms, task_specs
from ftjax.data import (
  encode,
  formats,
  labeled_examples,
  preference_rows,
  prompt_rows,
  sources,
  synthetic,
)
from ftjax.data.formats import Bad, Chat, Completion, Text
from ftjax.data.tokenizer import Tokenizer
from ftjax.evaluation import tasks
from ftjax.experiment import contamination_check
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

FILE = 'audit.json'  # in a workdir: the summary that report.html shows
_CHUNK = 250  # rows tokenized at once

Example = (
  formats.Example | preference_rows.Pair | preference_rows.LabeledExample | prompt_rows.Prompt
)


@dataclasses.dataclass(frozen=True)
class Request:
  """What to do beside printing the audit.

  Attributes:
    out: file for all findings, a JSON object a line; '': none.
    clean: file for the rows that are left; '': none. kinds: that are removed; (): the usual ones.
    against: an old version of the data, as data.train names sources; '': none.
    workdir: folder for FILE; '': none.
    is_audit: whether the data are audited; else they are only compared.
  """

  out: str = ''
  clean: str = ''
  kinds: tuple[str, ...] = ()
  against: str = ''
  workdir: str = ''
  is_audit: bool = True


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
  specs = _specs(c.data.train, scratch)
  _check_outputs(request)
  rows, unusable = read(c, tokenizer, specs)
  if not rows:
    first = f'; the first: {unusable[0].file}:{unusable[0].line}: {unusable[0].detail}' * bool(
      unusable
    )
    raise DataError(f'data.train={c.data.train}: no usable row in it{first}')
  if request.is_audit:
    evaluation, _ = read(c, tokenizer, _specs(c.data.eval, scratch)) if c.data.eval else ([], [])
    evaluation += _rows_of_tasks(c)
    special = frozenset(
      tokenizer.token(i) for i in tokenizer.special_ids if i < tokenizer.vocab_size
    )
    found = audit.run(rows, evaluation, unusable, special=special, seed=c.seed)
    print(table.text(found))
    _write(found, request)
    if request.clean:
      print('\n' + clean(specs, found, kinds, request.clean))
  if request.against:
    old, _ = read(c, tokenizer, _specs(request.against, scratch))
    if not old:
      raise DataError(f'--against={request.against}: no usable row in it')
    names = (request.against, ', '.join(spec.path for spec in specs))
    print(('\n' if request.is_audit else '') + table.drift(drift.compare(old, rows), names))


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
    for name in (path, log_name(path)) if flag == '--clean' else (path,):
      if files.exists(name):
        raise ConfigError(f'{flag}: {name} exists; name another file, or remove it')
      if name in named:
        raise ConfigError(f'{flag}: {name} is written by {named[name]} too; name another file')
      named[name] = flag
    try:
      files.makedirs(files.absolute(path).rpartition('/')[0])
    except OSError as error:
      raise ConfigError(f'{flag}={path}: its folder cannot be made: {error}') from error


def log_name(path: str) -> str:
  """Returns the name of the log of the removed rows, beside a cleaned file."""
  return path.removesuffix('.jsonl') + '.log.jsonl'


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


# Reading


def read(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, specs: Sequence[sources.Spec]
) -> tuple[list[Row], list[Finding]]:
  """Reads sources as texts.

  Returns:
    (rows; findings of those that cannot be used: 'empty_answer' where that is the reason, else
    'unusable').
  """
  rows: list[Row] = []
  unusable: list[Finding] = []
  reader = _Reader(c, tokenizer)
  for spec in specs:
    for found in reader.read(spec):
      (unusable if isinstance(found, Finding) else rows).append(found)
  return rows, unusable


def _unusable(place: tuple[str, int], reason: str, row: Any) -> Finding:
  kind = 'empty_answer' if 'empty' in reason else 'unusable'
  shown = '' if isinstance(row, Bad) else excerpt(json.dumps(row, ensure_ascii=False, default=str))
  return Finding(kind, -1, *place, shown, reason)


class _Reader:
  """Reads the rows of sources with the settings of a config."""

  def __init__(self, c: ml_collections.ConfigDict, tokenizer: Tokenizer):
    record = algorithms.of(c)
    self._shape = 'prompt' if record.on_rollouts else record.example(c)
    self._loss_on, self._tokenizer = c.data.loss_on, tokenizer
    self._most = (
      algorithms.max_example(c) - c.rollout.max_tokens if record.on_rollouts else c.seq_len
    )
    if self._shape == 'label':
      self._most //= 2

  def read(self, spec: sources.Spec) -> Iterator[Row | Finding]:
    """Yields the rows of a source in order, or findings of those that cannot be used."""
    names = sources.source_names(spec)
    waiting: list[tuple[tuple[str, int], Any, Example | Bad]] = []
    form = spec.format
    for number, line, row in sources.scan(spec):
      example: Example | Bad = row if isinstance(row, Bad) else Bad('')
      if not isinstance(row, Bad):
        try:
          if self._shape == 'text':
            form = form or formats.detect(row)
          example = self._parse(row, form, spec)
        except ValueError as error:
          example = Bad(str(error))
      waiting.append(((names[number], line), row, example))
      if len(waiting) >= _CHUNK:
        yield from self._rows(waiting, spec.path)
        waiting = []
    yield from self._rows(waiting, spec.path)

  def _parse(self, row: Mapping[str, Any], form: str | None, spec: sources.Spec) -> Example:
    has_template = self._tokenizer.template is not None
    if self._shape == 'prompt':
      return prompt_rows.read_prompt(row, has_template, spec.format)
    if self._shape == 'text':
      return formats.parse(row, form, has_template, is_named=spec.format is not None)
    return preference_rows.parse(row, self._shape, spec.format, has_template)

  def _rows(
    self, waiting: Sequence[tuple[tuple[str, int], Any, Any]], source: str
  ) -> Iterator[Row | Finding]:
    good = [example for _, _, example in waiting if not isinstance(example, Bad)]
    counted = iter(self._tokens(good))
    for place, row, example in waiting:
      tokens = example if isinstance(example, Bad) else next(counted)
      if isinstance(tokens, Bad):
        yield _unusable(place, tokens.reason, row)
      else:
        prompt, answers = texts_of(example)
        is_pair = isinstance(example, preference_rows.Pair)
        label = _label(row) if self._shape == 'text' else None
        yield Row(*place, prompt, answers, label, is_pair, source, tokens, self._most)

  def _tokens(self, parsed: Sequence[Any]) -> list[int | Bad]:
    """Returns the number of tokens of each example, or Bad where it cannot be encoded."""
    if self._shape == 'prompt':
      return [_count_prompt(p, self._tokenizer) for p in parsed]
    if self._shape == 'text':
      found = encode.encode(parsed, self._tokenizer, self._loss_on)
    else:
      found = labeled_examples.encode(parsed, self._tokenizer)
    return [x if isinstance(x, Bad) else max(len(e.tokens) for e in x) for x in found]


def _count_prompt(prompt: prompt_rows.Prompt, tokenizer: Tokenizer) -> int | Bad:
  try:
    return len(encode.encode_prompt(prompt.asked, tokenizer, 'warn'))
  except ValueError as error:
    return Bad(str(error))


def _label(row: Mapping[str, Any]) -> str | None:
  """Returns the column `label` as text; None without one."""
  value = row.get('label')
  return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def texts_of(example: Example) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns (texts before the answer, answers) of a parsed row; see audit.rows.Row."""
  if isinstance(example, preference_rows.Pair):
    prompt, chosen = texts_of(example.chosen)
    return prompt, (*chosen[-1:], *texts_of(example.rejected)[1][-1:])
  if isinstance(example, preference_rows.LabeledExample):
    return texts_of(example.answer)
  if isinstance(example, prompt_rows.Prompt):
    asked = example.asked
    prompt = (asked,) if isinstance(asked, str) else _contents(asked.messages)
    return prompt, () if example.answer is None else (example.answer,)
  if isinstance(example, Completion):
    return (example.prompt,), (example.completion,)
  if isinstance(example, Text):
    return (), (example.text,)
  return _of_chat(example)


def _contents(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
  found = (m.get(key) for m in messages for key in ('reasoning_content', 'content'))
  return tuple(text for text in found if isinstance(text, str) and text)


def _of_chat(chat: Chat) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the texts of all but the assistant, and those of the assistant's turns, tool calls
  among them as JSON.
  """
  given, own = [], []
  for message in chat.messages:
    (own if message['role'] == 'assistant' else given).extend(_contents([message]))
    if calls := message.get('tool_calls'):
      own.append(json.dumps(calls, ensure_ascii=False, default=str))
  return tuple(given), tuple(own)


# Cleaning


def clean(
  specs: Sequence[sources.Spec], found: audit.Audit, kinds: frozenset[str], path: str
) -> str:
  """Writes the rows without findings of some kinds, and a log of those that went.

  Args:
    specs: the sources of the training data.
    found: their audit.
    kinds: that are removed, as of `cleaning.kinds_of`.
    path: of the rows; the log is `log_name(path)`.

  Returns:
    the counts as text.

  Raises:
    ConfigError: sources of different formats, which cannot be one file.
    DataError: a row that JSON cannot hold.
  """
  gone = cleaning.removals(found.findings, kinds)
  # The log is renamed first: there are never cleaned rows without it.
  targets = {f'{name}.partial': name for name in (log_name(path), path)}
  try:
    kept, removed, forms = _write_rows(specs, gone, *reversed(targets))
    if len(forms) > 1:
      raise ConfigError(
        f'--clean: the sources have the formats {sorted(map(str, forms))}, which cannot be one '
        'file; clean them one by one with --config.data.train=SOURCE'
      )
    for scratch, name in targets.items():
      files.as_path(scratch).rename(name)
  finally:
    for scratch in targets:
      if files.exists(scratch):
        files.remove(scratch)
  by_kind = Counter(kind for reasons in gone.values() for kind in {f.kind for f in reasons})
  listed = ', '.join(f'{kind} {n:,}' for kind, n in sorted(by_kind.items())) or 'nothing'
  named = next((s.format for s in specs if s.format), None)
  use = f'; use it as {path}::{named}' if named else ''
  return (
    f'read {kept + removed:,} rows, removed {removed:,} ({listed}), kept {kept:,} in {path}{use}\n'
    f'removed rows and reasons: {log_name(path)}'
  )


def _write_rows(
  specs: Sequence[sources.Spec],
  gone: Mapping[tuple[str, int], Sequence[Finding]],
  path: str,
  log_path: str,
) -> tuple[int, int, set[str | None]]:
  """Writes the rows that stay, and the log of those in `gone`; returns (kept, removed, formats)."""
  kept = removed = 0
  forms: set[str | None] = set()
  with (
    files.as_path(path).open('w', encoding='utf-8') as out,
    files.as_path(log_path).open('w', encoding='utf-8') as logged,
  ):
    for place, row, form in _raw(specs):
      line = '' if isinstance(row, Bad) else _line(row, place)
      if reasons := gone.get(place):
        removed += 1
        logged.write(_entry(place, reasons, line))
        continue
      if isinstance(row, Bad):
        raise DataError(f'{place[0]}:{place[1]}: changed since the audit: {row.reason}')
      kept += 1
      forms.add(form)
      out.write(line + '\n')
  return kept, removed, forms


def _raw(specs: Sequence[sources.Spec]) -> Iterator[tuple[tuple[str, int], Any, str | None]]:
  """Yields ((file, line), row or Bad, format) of all rows of sources."""
  for spec in specs:
    names = sources.source_names(spec)
    form = spec.format
    for number, line, row in sources.scan(spec):
      if form is None and not isinstance(row, Bad):
        form = _detected(row)
      yield (names[number], line), row, form


def _detected(row: Mapping[str, Any]) -> str | None:
  try:
    return formats.detect(row)
  except ValueError:
    return None


def _line(row: Mapping[str, Any], place: tuple[str, int]) -> str:
  try:
    text = json.dumps(row, ensure_ascii=False)
    text.encode()
  except UnicodeEncodeError:  # half a surrogate pair
    return json.dumps(row)
  except TypeError as error:
    raise DataError(
      f'{place[0]}:{place[1]}: the row cannot be written as JSON: {error}; remove that column'
    ) from error
  return text


def _entry(place: tuple[str, int], reasons: Sequence[Finding], line: str) -> str:
  """Returns the line of the log on a removed row; the hash is that of its JSON line, '' without."""
  entry = {
    'file': place[0], 'line': place[1], 'kinds': [f.kind for f in reasons],
    'details': [f.detail for f in reasons],
    'sha256': hashlib.sha256(line.encode()).hexdigest() if line else '',
  }  # fmt: skip
  return json.dumps(entry) + '\n'
