"""What a study found, in a form that its files and its report are made of."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting.figures import is_finite
from ftjax.reporting.study import Content
from ftjax.storage import files
from ftjax.studies.folder import Folder, Record, write_json
from ftjax.studies.metric import StudyMetric

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Findings:
  """The result of a study.

  Attributes:
    content: of its report.
    rows: of study.csv, a run each.
    summary: further figures, for study.json.
    winner: name of the best run; '' where there is none.
  """

  content: Content
  rows: tuple[Mapping[str, Any], ...]
  summary: Mapping[str, Any]
  winner: str = ''


def row(record: Record, metric: StudyMetric, extra: Mapping[str, Any] | None = None) -> dict:
  """Returns the row of a run in study.csv."""
  last = record.last
  status = 'waiting'
  if last is not None:
    status = (
      'failed' if last.value is None else f'stopped at {last.stop_at}' if last.stop_at else 'done'
    )
  return {
    'run': record.name,
    **{k: v for k, v in record.values.items()},
    **(extra or {}),
    metric.name: record.value_at(0),
    'status': status,
    'seconds': sum(o.seconds for o in record.outcomes),
    'starts': sum(o.starts for o in record.outcomes),
    'reason': last.reason if last else '',
  }


def best(records: Sequence[Record], metric: StudyMetric) -> str:
  """Returns the name of the best of the runs that have ended; '' without one."""
  ended = [(metric.order(r.value_at(0)), i) for i, r in enumerate(records) if _is_done(r)]
  return records[min(ended)[1]].name if ended else ''


def _is_done(record: Record) -> bool:
  return record.value_at(0) is not None


def write(folder: Folder, found: Findings, head: Mapping[str, Any]) -> None:
  """Writes study.csv, study.jsonl, study.json and winner.json.

  Args:
    folder: of the study.
    found: its findings.
    head: what the study was: kind, metric, direction, space.
  """
  columns = list(dict.fromkeys(k for r in found.rows for k in r))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows([{k: _cell(v) for k, v in r.items()} for r in found.rows])
  files.write_text(folder.join('study.csv'), text.getvalue())
  lines = ''.join(json.dumps(r, ensure_ascii=False, allow_nan=False) + '\n' for r in found.rows)
  files.write_text(folder.join('study.jsonl'), lines)
  content = {
    'version': VERSION,
    **head,
    'winner': found.winner,
    'findings': found.content.sentences,
  }
  write_json(folder.join('study.json'), content | {'summary': found.summary, 'runs': found.rows})
  if found.winner:
    files.write_text(folder.join('winner.json'), files.read_text(folder.config(found.winner)))


def _cell(value: Any) -> Any:
  if isinstance(value, float):
    return repr(value) if is_finite(value) else ''
  return '' if value is None else value
