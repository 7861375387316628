"""A study from its config to its table, report and winner: `run` is the whole sequence."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftjax.config import keys, search_space, section, validation
from ftjax.config.search_space import Dimension, Point
from ftjax.config.section import Section
from ftjax.runtime import redaction
from ftjax.runtime.errors import ConfigError, attempt
from ftjax.storage import files, locations
from ftjax.studies import metric as metric_lib
from ftjax.studies.folder import Folder, Record, write_json
from ftjax.studies.metric import StudyMetric
from ftjax.studies.runner import Job, Runner

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run that is planned: its name, the values that tables show, and the keys that it changes."""

  name: str
  values: Point
  changed: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
  """A config's study in a workdir.

  Attributes:
    config: of the study.
    folder: of its files.
    metric: that runs are compared by.
    space: of study.space.
  """

  config: Section
  folder: Folder
  metric: StudyMetric
  space: tuple[Dimension, ...]

  def run_config(self, changed: Mapping[str, Any]) -> Section:
    """Returns the config of a run, checked: the study's with other values of some keys.

    Raises:
      ConfigError: values that do not go together.
    """
    usual = section.plain(keys.default())
    reset = {k: usual[k] for k in usual if k.startswith('study.')}
    shared = {'data.cache': self.config.data.cache or self.folder.join('data_cache')}
    found = search_space.with_values(self.config, {**reset, **shared, **changed})
    try:
      validation.validate(found)
    except ConfigError as error:
      keys_of_it = [f'{d.key}={changed[d.key]}' for d in self.space if d.key in changed]
      raise ConfigError(
        f'study: a run with {" ".join(keys_of_it) or "its keys"}: {error}'
      ) from error
    return found

  def write_config(self, name: str, changed: Mapping[str, Any]) -> None:
    """Checks the config of a run and writes it to configs/."""
    write_json(self.folder.config(name), section.plain(self.run_config(changed)))

  def runner(self, shares_base: bool = True) -> Runner:
    """Returns what runs the runs."""
    s = self.config.study
    return Runner(self.folder, self.metric, s.launch, s.parallel, shares_base)

  def run_all(self, plans: Sequence[Plan], shares_base: bool = True) -> list[Record]:
    """Runs runs that are all known before the first one starts; returns their records.

    Args:
      plans: of the runs, in order.
      shares_base: whether all of them evaluate the base model on the same rows.
    """
    for plan in plans:
      self.write_config(plan.name, plan.changed)
    self.runner(shares_base).run([Job(plan.name, plan.values) for plan in plans])
    return [self.folder.record(plan.name, plan.values) for plan in plans]


def open_study(c: Section, workdir: str) -> Study:
  """Returns the study of a config.

  Raises:
    ConfigError: a key of `study` that cannot be used.
  """
  if not c.study.kind:
    raise ConfigError(
      'study.kind is empty: name what the runs differ in, such as --config.study.kind=tpe; '
      'docs/studies.md has the kinds'
    )
  locations.check('--workdir', workdir)
  found = metric_lib.find(c, has_eval=c.study.kind == 'kfold')
  return Study(c, Folder(workdir), found, search_space.parse_all(c.study.space, c))


@contextlib.contextmanager
def claimed(study: Study) -> Iterator[None]:
  """Makes the workdir of a study, locks it, and checks that it has no other study."""
  files.probe(study.folder.path)
  lock = files.Lock(study.folder.path)
  try:
    values = section.plain(study.config)
    if hidden := [k for k, v in values.items() if redaction.redact({k: v}) != {k: v}]:
      raise ConfigError(
        f'{hidden[0]} holds a secret, and the configs of the runs are files: give it by an '
        'environment variable'
      )
    study.folder.claim(values)
    study.folder.make()
    yield
  finally:
    attempt('releasing the workdir', lock.release)
