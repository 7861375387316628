"""Reads the files of a workdir that a report is made of. A file that is missing or damaged costs
the report its section, not the report.
"""

import dataclasses
import json
from typing import Any

from ftjax.reporting import metrics_log
from ftjax.reporting.metrics_log import MetricsLog
from ftjax.runtime.redaction import redact
from ftjax.storage import files

REPORT = 'report.html'


@dataclasses.dataclass(frozen=True)
class ReportInput:
  """What a report is made of.

  Attributes:
    name: of the run: the last part of its workdir.
    config: config.json, {dotted key: value}, without secrets.
    manifest: manifest.json.
    log: metrics.jsonl.
    summary: eval/summary.json, version 2.
    audit: audit.json of `python -m ftjax.preview --audit --workdir=…`.
    samples: rows of samples.jsonl: {"step", "prompt", "answer"}.
    problems: sentences on files that are missing or damaged.
    is_running: whether the run that trains is the one that writes the report.
  """

  name: str
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
  log: MetricsLog = dataclasses.field(default_factory=MetricsLog)
  summary: dict[str, Any] = dataclasses.field(default_factory=dict)
  audit: dict[str, Any] = dataclasses.field(default_factory=dict)
  samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  problems: list[str] = dataclasses.field(default_factory=list)
  is_running: bool = False

  @property
  def steps(self) -> int:
    """Returns the number of steps of the run; 0 where it is not known."""
    steps = self.config.get('steps')
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else 0

  def status(self) -> str:
    """Returns in words how far the run is."""
    done, steps = self.log.last_step, self.steps
    if not done:
      return 'running, before step 1' if self.is_running else 'not trained here'
    if steps and done >= steps:
      return f'{done} steps, complete'
    of = f' of {steps}' if steps else ''
    return f'running, step {done}{of}' if self.is_running else f'stopped at step {done}{of}'


def name_of(workdir: str) -> str:
  """Returns the last part of the path of a workdir."""
  return files.absolute(workdir).rstrip('/').rpartition('/')[2] or 'run'


def read(workdir: str, is_running: bool = False) -> ReportInput:
  """Returns the input of the report of a workdir.

  Args:
    workdir: of a run, finished or not.
    is_running: see ReportInput.
  """
  problems: list[str] = []
  log = metrics_log.read(files.join(workdir, 'metrics.jsonl'))
  if not log.rows:
    problems.append('There is no metrics.jsonl: no training step has been logged here.')
  if log.bad_lines > 1:  # one is the line that is being written
    problems.append(f'metrics.jsonl: {log.bad_lines} lines cannot be read and are left out.')
  config = _object(workdir, 'config.json', problems)
  manifest = _object(workdir, 'manifest.json', problems)
  return ReportInput(
    name=name_of(workdir),
    config=redact(config),
    manifest=redact(manifest),
    log=log,
    summary=_object(workdir, 'eval/summary.json', problems, is_expected=False),
    audit=_object(workdir, 'audit.json', problems, is_expected=False),
    samples=_samples(workdir, problems),
    problems=problems,
    is_running=is_running,
  )


def _object(
  workdir: str, name: str, problems: list[str], is_expected: bool = True
) -> dict[str, Any]:
  path = files.join(workdir, *name.split('/'))
  if not files.exists(path):
    if is_expected:
      problems.append(f'There is no {name}.')
    return {}
  try:
    found = json.loads(files.read_bytes(path))
  except (ValueError, RecursionError) as error:
    problems.append(f'{name} cannot be read ({type(error).__name__}); its sections are left out.')
    return {}
  if not isinstance(found, dict):
    problems.append(f'{name} is no JSON object; its sections are left out.')
    return {}
  return found


def _samples(workdir: str, problems: list[str]) -> list[dict[str, Any]]:
  path = files.join(workdir, 'samples.jsonl')
  if not files.exists(path):
    return []
  rows, bad = [], 0
  for line in files.read_bytes(path).decode('utf-8', 'replace').split('\n'):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      row = None
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      rows.append(row)
    else:
      bad += 1
  if bad:
    problems.append(f'samples.jsonl: {bad} lines cannot be read and are left out.')
  return rows
