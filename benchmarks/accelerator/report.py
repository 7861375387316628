"""The results of accelerator_check.py as Markdown."""

from collections.abc import Sequence


def markdown(results: dict) -> str:
  """Returns all tables: the device first, then each section with what went wrong below it."""
  parts = ['# Accelerator check', _head(results)]
  for found in results['sections']:
    parts.append(_section(found))
  if running := results.get('running'):
    parts.append(f'Running when this was written: {running}.')
  if skipped := results['skipped']:
    lines = [f'- {s["name"]}: {s["why"]}' for s in skipped]
    parts.append('\n'.join(['## Left out for time', '', *lines]))
  return '\n\n'.join(parts) + '\n'


def _head(results: dict) -> str:
  machine = results['machine']
  facts = [
    ('device', _device(results)),
    ('driver', machine['driver'] or 'no NVIDIA driver'),
    ('CUDA of the driver', machine['cuda']),
    ('host', machine['host']),
    ('packages', machine['packages']),
    ('Python', results['python']),
    ('commit', machine['commit'] or 'not known'),
    ('SHA-256 of the code', machine['code']),
    ('command', f'`{results["command"]}`'),
    ('started', results['started']),
    ('seconds', f'{results["seconds"]} of {results["budget"]:g}'),
  ]
  lines = [f'- {name}: {value}' for name, value in facts if value]
  if results['tiny']:
    lines.append('- **tiny shapes: the figures mean nothing**, they show that the check runs')
  if results.get('before'):
    lines.append('- some sections are of an earlier call (`--after`)')
  return '\n'.join(lines)


def _device(results: dict) -> str:
  rows = [r for s in results['sections'] if s['name'] == 'device' for r in s['rows']]
  return next((r['text'] for r in rows if r['name'] == 'device' and 'text' in r), '')


def _section(found: dict) -> str:
  checks = [c for row in found['rows'] for c in row.get('checks', [])]
  failed = sum(not c['passed'] for c in checks)
  state = f'{found["state"]}, {found["seconds"]} s'
  if checks:
    state += f'; {len(checks)} checks, ' + (f'**{failed} failed**' if failed else 'all passed')
  parts = [f'## {found["title"]}', f'`{found["name"]}`: {state}']
  measured = [row for row in found['rows'] if set(row) - {'name', 'row_s', 'failure', 'checks'}]
  if measured:
    parts.append(table(found['columns'], measured))
  notes = []
  for row in found['rows']:
    if 'failure' in row:
      notes.append(f'- {row["name"]}: {_cell(row["failure"])}')
    notes += [
      f'- **failed**: {row["name"]}{_kernel(row)}: {c["what"]} {_value(c["value"], ".6g")}, '
      f'at most {c["most"]:g} expected'
      for c in row.get('checks', [])
      if not c['passed']
    ]
  if notes:
    parts.append('\n'.join(notes))
  return '\n\n'.join(parts)


def _kernel(row: dict) -> str:
  return f' ({row["kernel"]})' if 'kernel' in row else ''


def table(columns: Sequence, rows: Sequence[dict]) -> str:
  """Returns rows as a Markdown table, without columns that no row has a value for."""
  used = [c for c in columns if any(row.get(c[0]) not in (None, '') for row in rows)]
  lines = [
    '| | ' + ' | '.join(title for _, title, _ in used) + ' |',
    '|---' * (len(used) + 1) + '|',
  ]
  for row in rows:
    cells = [_value(row.get(key), form) for key, _, form in used]
    lines.append(f'| {_cell(row["name"])} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def _value(value, form: str) -> str:
  if value is None:
    return ''
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, str):  # text, or a number that is not finite
    return _cell(value)
  return format(value, form) if form else str(value)


def _cell(text: str) -> str:
  """Returns text that cannot break a table."""
  return ' '.join(str(text).split()).replace('|', '\\|')
