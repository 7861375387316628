"""Writes report.html: one file that needs no network, made of the files of a workdir.

The texts of the page, those of strangers included, go through one gate on their way into the
template: control and format characters are written out, and HTML is escaped. A content security
policy allows the page's own style and script, by hash, and nothing else.
"""

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from ftjax.reporting import curves, data_audit, examples, findings, provenance, results, run_files
from ftjax.reporting.figures import LEVEL, clean, count, number
from ftjax.reporting.run_files import REPORT, ReportInput
from ftjax.storage import files

LIMIT = 5_000_000  # bytes of a page
_ROOM = 100_000  # bytes that examples may take at least
_MOST_ANSWERS = 100  # rows of eval.prompts


def write(workdir: str, is_running: bool = False) -> str:
  """Writes report.html into a workdir and returns its path.

  What is missing there is stated in the page.

  Args:
    workdir: of a run, finished or not.
    is_running: whether the run that trains is the one that calls this.
  """
  path = files.join(workdir, REPORT)
  files.write_text(path, render(run_files.read(workdir, is_running)))
  return path


def render(run: ReportInput) -> str:
  """Returns the page of a run."""
  found = shared(run.name, run.summary)
  tasks = [task['task'] for task in findings.tasks(run.summary)]
  groups, left_out = curves.groups(run.log, tasks)
  sections = [('trained', 'Trained'), ('data', 'Data'), ('reproduce', 'Reproduce')]
  found |= {
    'status': run.status(),
    'problems': run.problems,
    'trained': provenance.trained(run),
    'curves': groups,
    'curves_left_out': left_out,
    'notes': run.log.notes,
    'data': provenance.data(run),
    'audit': data_audit.build(run.audit),
    'resources': provenance.resources(run.log),
    'seed': str(run.config.get('seed', '-')),
    'commands': provenance.commands(run),
    'config_code': provenance.config_code(run.config) if run.config else '',
    'versions': provenance.versions(run.manifest),
    'hashes': provenance.hashes(run.manifest),
    'answers': _answers(run.samples),
  }
  return fill(found, run.summary, sections)


def shared(name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what pages of one run and of several have in common."""
  problem = findings.problem(summary)
  return {
    'name': name,
    'light': findings.light(summary),
    'verdict': [str(s) for s in summary.get('verdict') or []] if not problem else [problem],
    'notices': findings.notices(summary),
    'level': LEVEL,
    'results': results.build(summary),
    'gate': None if problem else _gate(summary.get('gate')),
    'runs': None,
    'notes': [],
  }


def fill(
  found: Mapping[str, Any], summary: Mapping[str, Any], sections: Sequence[tuple[str, str]]
) -> str:
  """Returns the template filled in, with as many examples as LIMIT leaves room for.

  Args:
    found: variables of the template but "examples" and "sections".
    summary: whose examples are shown.
    sections: (id, title) of those that only this kind of page has.
  """
  template, style, script, hashes = _template()
  shown = {**found, **hashes, 'style': style, 'script': script, 'examples': []}
  shown['sections'] = _contents(found, summary, sections)
  page = template.render(shown)
  tasks, models = findings.tasks(summary), summary.get('models') or []
  if not any(t.get('examples') for t in tasks):
    return page
  room = max(_ROOM, LIMIT - len(page.encode()) - _ROOM)
  while True:
    shown['examples'] = examples.build(tasks, models, room)
    page = template.render(shown)
    if len(page.encode()) <= LIMIT or room < _ROOM:
      return page
    room //= 2


def _contents(
  found: Mapping[str, Any], summary: Mapping[str, Any], sections: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
  """Returns (id, title) of the sections of a page, in order."""
  own = dict(sections)
  has_examples = any(t.get('examples') for t in findings.tasks(summary)) or found.get('answers')
  order = [
    ('verdict', 'Verdict'),
    ('trained', own.get('trained')),
    ('results', 'Scores'),
    ('tasks', 'Each task' if found['results']['tasks'] else None),
    ('examples', 'Examples' if has_examples else None),
    ('curves', 'Curves'),
    ('data', own.get('data')),
    ('cost', 'Time and memory'),
    ('reproduce', own.get('reproduce')),
  ]
  return [(name, title) for name, title in order if title]


def _gate(gate: Mapping[str, Any] | None) -> dict[str, Any] | None:
  if not gate:
    return None
  checks = [
    {'what': str(c.get('what', '')), 'value': number(c.get('value'))}
    | {'limit': number(c.get('limit')), 'passed': bool(c.get('passed'))}
    for c in gate.get('checks') or []
  ]
  return {'passed': bool(gate.get('passed')), 'checks': checks}


def _answers(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """Returns the answers to eval.prompts, of the first and the last evaluation side by side."""
  by_prompt: dict[str, list[Mapping[str, Any]]] = {}
  for row in samples:
    by_prompt.setdefault(str(row.get('prompt', '')), []).append(row)
  rows = []
  for prompt, found in list(by_prompt.items())[:_MOST_ANSWERS]:
    ends = found if len(found) == 1 else [found[0], found[-1]]
    texts = [str(row.get('answer', '')) for row in ends]
    answers = [
      (f'step {row["step"]}', examples.folded([(text, False)], len(text)))
      for row, text in zip(ends, texts, strict=True)
    ]
    rows.append({'prompt': examples.folded([(prompt, False)], len(prompt)), 'answers': answers})
  return {'rows': rows, 'left_out': len(by_prompt) - len(rows)} if rows else None


def fill_template(name: str, found: Mapping[str, Any]) -> str:
  """Returns another page of the same style, of a template that has no examples."""
  template, style, script, hashes = _template(name)
  return template.render({**found, **hashes, 'style': style, 'script': script})


@functools.cache
def _template(name: str = 'page.html') -> tuple[jinja2.Template, Markup, Markup, dict[str, str]]:
  """Returns the template, its style and script, and their hashes for the security policy."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('ftjax.reporting'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_harmless,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['count'] = count
  loader = environment.loader
  texts = [loader.get_source(environment, name)[0] for name in ('page.css', 'page.js')]
  digests = [hashlib.sha256(text.encode()).digest() for text in texts]
  hashes = [f'sha256-{base64.b64encode(d).decode()}' for d in digests]
  policy = {'style_hash': hashes[0], 'script_hash': hashes[1]}
  return environment.get_template(name), Markup(texts[0]), Markup(texts[1]), policy


def _harmless(value: Any) -> Any:
  """Returns the value of an expression of the template, texts cleaned; elements pass."""
  return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
