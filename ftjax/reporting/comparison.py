"""Reports on several runs side by side, as a page and as text."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting import curves, page, provenance, run_files, text_table
from ftjax.reporting.figures import number
from ftjax.reporting.run_files import ReportInput

_HEAD = ('status', 'algorithm', 'model', 'training data', 'last train loss', 'least eval loss')


_MODELS = ('base', 'base_shots', 'tuned')


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A comparison of runs: page is HTML, text a table for a terminal."""

  page: str
  text: str


def compare(workdirs: Sequence[str], summary: Mapping[str, Any]) -> Comparison:
  """Returns the comparison of runs.

  Args:
    workdirs: of the runs.
    summary: of their results on the same examples, version 2; its models are the runs.
  """
  runs = [run_files.read(workdir) for workdir in workdirs]
  names = distinct([run.name for run in runs], workdirs)
  problems = [f'{name}: {p}' for name, run in zip(names, runs, strict=True) for p in run.problems]
  if left_out := summary.get('left_out'):
    problems.append(f'Tasks that not all of the runs have are left out: {", ".join(left_out)}.')
  logs = {name: run.log for name, run in zip(names, runs, strict=True)}
  charts = curves.overlays(logs)
  found = page.shared(' / '.join(names), summary) | {
    'status': f'{len(runs)} runs',
    'problems': problems,
    'runs': {
      'head': _HEAD,
      'rows': [_row(name, run) for name, run in zip(names, runs, strict=True)],
      'changes': provenance.config_changes([run.config for run in runs]),
    },
    'curves': [curves.Group('Curves of all runs', tuple(charts), True)] if charts else [],
    'curves_left_out': 0,
    'answers': None,
  }
  return Comparison(page.fill(found, summary, [('trained', 'Runs')]), text_table.text(summary))


def distinct(names: Sequence[str], workdirs: Sequence[str]) -> list[str]:
  """Returns the names of runs: of those that share a name the whole workdirs, and another one for
  a folder that is called as a model of a run is.
  """
  out = [
    workdir if list(names).count(name) > 1 else name
    for name, workdir in zip(names, workdirs, strict=True)
  ]
  return [f'{name} (run)' if name in _MODELS else name for name in out]


def _row(name: str, run: ReportInput) -> list[str]:
  facts = dict(provenance.trained(run))
  last = run.log.last('train', 'loss')
  evaluated = run.log.series('eval', 'loss')
  finite = evaluated.finite().values if evaluated is not None else ()
  least = number(float(min(finite))) if len(finite) else '-'
  cells = [facts.get(k, '-') for k in ('algorithm', 'model', 'training data')]
  return [name, run.status(), *cells, number(last), least]
