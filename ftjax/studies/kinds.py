"""The kinds of studies, and the sequence of each: check, run, write its files and its report."""

import logging
from collections.abc import Callable

from ftjax.config.section import Section
from ftjax.reporting import study as report
from ftjax.runtime.errors import CheckError, attempt
from ftjax.storage import files
from ftjax.studies import cross_validation, findings, learning_curve, search, seed_settings
from ftjax.studies.findings import Findings
from ftjax.studies.study import Study, claimed, open_study

log = logging.getLogger(__name__)

KINDS: dict[str, Callable[[Study], Findings]] = {
  'grid': search.run,
  'random': search.run,
  'sobol': search.run,
  'tpe': search.run,
  'gp': search.run,
  'kfold': cross_validation.run,
  'learning_curve': learning_curve.run,
  'seeds': seed_settings.run,
}


def run(c: Section, workdir: str) -> None:
  """Runs the study of a config, or what is left of it, and writes its table, report and winner.

  Args:
    c: a validated config.
    workdir: local folder or gs://, made if missing.

  Raises:
    ConfigError: a study that cannot be run as it is stated; or a run ended with exit code 2.
    DataError: rows that cannot be read.
    CheckError: all runs failed.
    StoppedEarly: asked to stop; the same command resumes.
  """
  study = open_study(c, workdir)
  with claimed(study):
    found = KINDS[c.study.kind](study)
    head = {
      'kind': c.study.kind,
      'metric': study.metric.name,
      'better': study.metric.better,
      'space': list(c.study.space),
      'seed': c.study.seed,
    }
    findings.write(study.folder, found, head)
    attempt(
      'study.html', lambda: report.write(study.folder.path, _title(study), head, found.content)
    )
    print(f'\n{report.text(found.content)}\n', flush=True)
    log.info('table: %s', study.folder.join('study.csv'))
    if files.exists(path := study.folder.join(report.FILE)):
      log.info('report: %s', path)
    if all(row['status'] == 'failed' for row in found.rows):
      raise CheckError(
        f'all {len(found.rows)} runs of the study failed; the first one: '
        f'{found.rows[0]["reason"]}. Their output is in {study.folder.join("logs")}'
      )
    if found.winner:
      log.info('winner: %s', study.folder.join('winner.json'))


def _title(study: Study) -> str:
  return study.folder.path.rstrip('/').rpartition('/')[2]
