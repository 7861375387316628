"""Copies the trials of a search to an optuna storage, optuna.db of the workdir, for its dashboard:
`optuna-dashboard sqlite:///DIR/optuna.db`.

The records of the study are what it resumes from; the storage is brought up to them at each start,
and a fault of it costs nothing else.
"""

import contextlib
import importlib.util
import logging
import sqlite3
from collections.abc import Iterator, Sequence

from ftjax.config.search_space import Dimension
from ftjax.runtime.errors import attempt
from ftjax.storage import files
from ftjax.studies import points
from ftjax.studies.folder import Folder, Record
from ftjax.studies.metric import StudyMetric
from ftjax.studies.runner import Job

log = logging.getLogger(__name__)

FILE = 'optuna.db'


class Silent:
  """In place of a storage where there is none."""

  def begin(self, job: Job) -> None:
    """Does nothing."""

  def note(self, record: Record) -> None:
    """Does nothing."""

  def close_trials(self, records: Sequence[Record]) -> None:
    """Does nothing."""


class OptunaStorage:
  """The trials of a study in a SQLite file.

  Args:
    path: of the file.
    metric: whose direction the study has.
    space: of its trials.
  """

  def __init__(self, path: str, metric: StudyMetric, space: Sequence[Dimension]):
    optuna = points.import_optuna()
    from sqlalchemy.pool import NullPool

    self._optuna, self._space = optuna, space
    self._storage = optuna.storages.RDBStorage(
      'sqlite://',  # a path in the URL could not hold '?'
      engine_kwargs={'creator': lambda: sqlite3.connect(path), 'poolclass': NullPool},
    )
    self._study = optuna.create_study(
      storage=self._storage,
      study_name='ftjax',
      direction='maximize' if metric.rises else 'minimize',
      load_if_exists=True,
    )

  def begin(self, job: Job) -> None:
    """Adds a running trial, unless it is there."""
    attempt('optuna.db', lambda: self._begin(job))

  def _begin(self, job: Job) -> None:
    if int(job.name) < len(self._study.get_trials(deepcopy=False)):
      return
    state = self._optuna.trial.TrialState.RUNNING
    self._storage.create_new_trial(
      self._study._study_id,
      template_trial=self._optuna.trial.create_trial(
        state=state,
        params=points.params(self._space, job.values),
        distributions=points.distributions_of(self._space),
        user_attrs={k: v for k, v in job.values.items()} | {'run': job.name},
      ),
    )

  def note(self, record: Record) -> None:
    """Adds the values of a run's parts."""
    attempt('optuna.db', lambda: self._note(record, is_over=False))

  def close_trials(self, records: Sequence[Record]) -> None:
    """Brings all trials up to their records at the end: those that did not go on were pruned."""

    def close() -> None:
      for record in records:
        self._begin(Job(record.name, record.values))
        self._note(record, is_over=True)

    attempt('optuna.db', close)

  def _note(self, record: Record, is_over: bool) -> None:
    states = self._optuna.trial.TrialState
    trial = self._study.get_trials(deepcopy=False)[int(record.name)]
    if trial.state.is_finished():
      return
    for outcome in record.outcomes:
      if outcome.value is not None and outcome.stop_at:
        self._storage.set_trial_intermediate_value(trial._trial_id, outcome.stop_at, outcome.value)
    if record.has_failed:
      self._storage.set_trial_user_attr(trial._trial_id, 'reason', record.last.reason)
      self._storage.set_trial_state_values(trial._trial_id, states.FAIL)
    elif (value := record.value_at(0)) is not None:
      self._storage.set_trial_state_values(trial._trial_id, states.COMPLETE, [value])
    elif is_over and record.last is not None:
      self._storage.set_trial_state_values(trial._trial_id, states.PRUNED, [record.last.value])


@contextlib.contextmanager
def opened(
  folder: Folder, metric: StudyMetric, space: Sequence[Dimension]
) -> Iterator[OptunaStorage | Silent]:
  """Opens the storage of a study; a Silent one where optuna or a local folder is missing."""
  if files.is_remote(folder.path) or importlib.util.find_spec('optuna') is None:
    log.info('no optuna.db for the dashboard: it needs optuna (ftjax[study]) and a local --workdir')
    yield Silent()
    return
  made: list[OptunaStorage] = []
  # SQLite, SQLAlchemy and alembic have errors of many kinds; none of them may end a study.
  attempt('optuna.db', lambda: made.append(OptunaStorage(folder.join(FILE), metric, space)))
  yield made[0] if made else Silent()
