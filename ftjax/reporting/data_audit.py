"""Arranges audit.json, the faults that were found in the training data, for the report."""

from collections.abc import Mapping
from typing import Any

from ftjax.reporting.figures import count

_VERSION = 1


def build(audit: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns a sentence, rows of a table and notes; None without an audit that can be read.

  audit: {"version", "rows", "flagged", "evaluation", "kinds": [{"kind", "severity", "title",
  "count", "remedy", "first"}], "notes"}, and of a short audit "is_whole", whether all rows were
  read.
  """
  kinds = audit.get('kinds')
  if audit.get('version') != _VERSION or not isinstance(kinds, list):
    return None
  texts = ('severity', 'title', 'count', 'first', 'remedy')
  rows = [
    [count(k.get(name)) if name == 'count' else str(k.get(name, '')) for name in texts]
    for k in kinds
    if isinstance(k, Mapping)
  ]
  evaluation = audit.get('evaluation')
  compared = f', compared with {count(evaluation)} evaluation rows' if evaluation else ''
  notes = audit.get('notes')
  part = '' if audit.get('is_whole', True) else 'the first '
  return {
    'text': f'{count(audit.get("flagged"))} of {part}{count(audit.get("rows"))} training rows have '
    f'findings{compared}.',
    'rows': rows,
    'notes': [str(n) for n in notes] if isinstance(notes, list) else [],
  }
