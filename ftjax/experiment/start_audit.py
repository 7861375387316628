"""The short audit of the training data at the start of a run: the cheap checks on the first rows.

`python -m ftjax.preview --audit` makes all checks on all rows (data_audit.py)."""

import json
import logging
import tempfile
from typing import Any

from ftjax.audit import audit
from ftjax.audit.finding import ERROR, KINDS
from ftjax.cluster import processes
from ftjax.data import sources, synthetic
from ftjax.experiment import audited_rows, data_audit
from ftjax.experiment.run import Run
from ftjax.runtime.errors import CheckError, attempt
from ftjax.storage import files

log = logging.getLogger(__name__)

# With data.audit this bounds the time, whatever rows are like: some 10 s of tokenizing at most.
_MOST_CHARACTERS = 2_000_000
_NAMED = 6  # kinds in the line of the log


def check(run: Run, is_fresh: bool = True) -> None:
  """Audits the first data.audit rows, logs the counts, and writes audit.json for the report. A
  fault of the audit itself costs nothing. All processes call it; process 0 reads.

  is_fresh: whether the run neither resumes nor repeats another; else nothing is looked at.

  Raises:
    CheckError: data.on_audit is 'error', and a kind of that severity was found.
  """
  c = run.config
  if not c.data.audit or not is_fresh:
    return
  summary = processes.from_main(lambda: _look(run))
  severe = [k for k in summary.get('kinds', []) if k['severity'] == ERROR]
  if severe and c.data.on_audit == 'error':
    found = ', '.join(f'{k["kind"]} {k["count"]:,} (the first: {k["first"]})' for k in severe)
    raise CheckError(
      f'the audit of the training data found {found}, and data.on_audit=error. python -m '
      'ftjax.preview --audit shows all, --clean=OUT.jsonl writes the rows without them; '
      'data.on_audit=report trains on them'
    )


def _look(run: Run) -> dict[str, Any]:
  """Returns the summary of the audit; {} where it failed."""
  summary: dict[str, Any] = {}

  def look():
    c, tokenizer = run.config, run.model.tokenizer
    with tempfile.TemporaryDirectory() as scratch:
      specs = [synthetic.resolve(s, scratch) for s in sources.parse_specs(c.data.train)]
      rows, unusable, is_whole = audited_rows.read_first(
        c, tokenizer, specs, c.data.audit, _MOST_CHARACTERS
      )
    special = data_audit.special_tokens(tokenizer)
    found = audit.run(rows, (), unusable, special=special, seed=c.seed, is_short=True)
    summary.update(found.to_json() | {'is_short': True, 'is_whole': is_whole})
    _log(found, is_whole)
    _write(run.workdir, summary)

  attempt('the audit of the training data', look)
  return summary


def _log(found: audit.Audit, is_whole: bool) -> None:
  counts = found.counts()
  named = ', '.join(f'{kind} {number:,}' for kind, number in list(counts.items())[:_NAMED])
  more = f' and {len(counts) - _NAMED} more kinds' if len(counts) > _NAMED else ''
  part = 'all' if is_whole else 'the first'
  text = f'audit of {part} {found.rows:,} training rows'
  if not counts:
    log.info('%s: no findings', text)
    return
  is_severe = any(KINDS[kind].severity == ERROR for kind in counts)
  log.log(
    logging.WARNING if is_severe else logging.INFO,
    '%s: %d with findings: %s%s; shown by python -m ftjax.preview --audit',
    *(text, found.flagged(), named, more),
  )


def _write(workdir: str, summary: dict[str, Any]) -> None:
  """Writes audit.json, unless a whole audit is there."""
  path = files.join(workdir, data_audit.FILE)
  if files.exists(path):
    try:
      if not json.loads(files.read_text(path)).get('is_short'):
        return
    except (ValueError, AttributeError):
      log.warning('%s is no audit; it is written again', path)
  files.write_text(path, json.dumps(summary, indent=1) + '\n')
