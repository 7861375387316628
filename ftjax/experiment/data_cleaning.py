"""Writes training data without the rows that an audit found, and a log of those that went."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftjax.audit import audit, cleaning
from ftjax.audit.finding import Finding
from ftjax.data import formats, sources
from ftjax.data.formats import Bad
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files


def log_name(path: str) -> str:
  """Returns the name of the log of the removed rows, beside a cleaned file."""
  return path.removesuffix('.jsonl') + '.log.jsonl'


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
