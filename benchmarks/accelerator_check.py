"""One command that checks and measures ftjax on the attached GPU or TPU, within a budget of time.

  python benchmarks/accelerator_check.py --out=DIR [--budget=540]

Needs no network and no files: models have the shapes of released ones and random weights, tokens
are random. Each section is a process of its own with a limit of its own, so that a crash, a hang or
too little memory loses that section alone; what it had measured until then is kept. Sections run in
order of importance until the budget is spent; those left out are listed, and `--after=FILE` runs
them in a second call. DIR gets results.json and table.md after every section, and a log for each.
docs/accelerator_check.md describes the sections, the wheels to bring, and what a figure means.

Exit codes: 0 all sections that ran are right; 1 a section crashed, ran out of memory or of its own
time; 2 bad flags; 5 a result is wrong.
"""

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from accelerator import machine, record, report
from accelerator.sections import SECTIONS, Section

HERE = Path(__file__).resolve().parent
# Kept back for stopping a section and writing the results.
RESERVE = 5.0


def environment(section: Section, out: Path, attached: str, tiny: bool) -> dict[str, str]:
  """Returns the environment of a section's process.

  out: folder of the results. attached: 'gpu', 'tpu' or 'cpu'.
  """
  own = dict(os.environ)
  roots = [str(HERE)]
  if (HERE.parent / 'ftjax').is_dir():  # else the installed package
    roots.append(str(HERE.parent))
  own['PYTHONPATH'] = os.pathsep.join([*roots, *filter(None, [own.get('PYTHONPATH')])])
  own['JAX_PLATFORMS'] = {'gpu': 'cuda,cpu', 'tpu': 'tpu,cpu', 'cpu': 'cpu'}[attached]
  own['FTJAX_CHECK_PLATFORM'] = attached  # measuring.EXPECTED
  if attached == 'cpu' and tiny:  # programs this small take longer to compile than to run
    own.setdefault(
      'XLA_FLAGS',
      '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
    )
    own.setdefault('JAX_COMPILATION_CACHE_DIR', str(out / 'programs'))
    own.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  # One process at a time holds the card, but for those of `peers`.
  own['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false' if section.shares_device else 'true'
  own.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.93')
  own.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')
  return own


def run_section(section: Section, limit: float, out: Path, attached: str, tiny: bool) -> dict:
  """Runs a section in a process of its own for at most `limit` seconds; returns its result."""
  rows, log = out / f'{section.name}.jsonl', out / f'{section.name}.log'
  rows.unlink(missing_ok=True)
  job = {'module': section.module, 'tiny': tiny, 'arguments': section.arguments(attached)}
  command = [sys.executable, str(Path(__file__).resolve()), f'--section={json.dumps(job)}']
  begin = time.monotonic()
  with log.open('w', encoding='utf-8') as file:
    process = subprocess.Popen(
      [*command, f'--rows={rows}'],
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=subprocess.STDOUT,
      env=environment(section, out, attached, tiny),
      start_new_session=True,  # its own children end with it
    )
    try:
      code = process.wait(timeout=limit)
      state = 'done' if code == 0 else _ended(code, log)
    except subprocess.TimeoutExpired:
      state = f'timed out after {limit:.0f} s'
    finally:
      _end(process)
  columns, found = record.read(rows)
  seconds = round(time.monotonic() - begin, 1)
  result = {'name': section.name, 'state': state, 'seconds': seconds}
  result |= {'columns': columns, 'rows': found}
  if not is_whole(result):  # so that results.json alone explains it
    result['log'] = log.read_text(encoding='utf-8', errors='replace')[-6000:]
  return result


def _ended(code: int, log: Path) -> str:
  """Returns why a process ended before its section did."""
  text = log.read_text(encoding='utf-8', errors='replace')
  last = next((line for line in reversed(text.splitlines()) if line.strip()), '')[:300]
  if code < 0:
    names = {s.value: s.name for s in signal.Signals}
    how = f'killed by {names.get(-code, -code)}'
  else:
    how = f'exit code {code}'
  if last.startswith(record.OUT_OF_MEMORY):
    return last
  return f'{record.OUT_OF_MEMORY}: {last}' if record.is_memory(last) else f'{how}: {last}'


def _end(process: subprocess.Popen) -> None:
  """Ends a section's process with all that it started; asks first, as a device may need closing."""
  for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
    try:
      os.killpg(process.pid, number)
    except ProcessLookupError:
      break
    try:
      process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
      continue
  process.poll()


def is_right(result: dict) -> bool:
  """Returns whether all checks of a section have passed."""
  return all(c['passed'] for row in result['rows'] for c in row.get('checks', []))


def is_whole(result: dict) -> bool:
  """Returns whether a section ran to its end, without an error in any row."""
  return result['state'] == 'done' and not any('failure' in row for row in result['rows'])


def run_all(
  sections: list[Section], out: Path, attached: str, tiny: bool, budget: float, head: dict
) -> dict:
  """Runs sections until the budget, in seconds, is spent; returns and writes the results.

  head: what stands in the results besides; `sections` of it are earlier ones.
  """
  begin = time.monotonic()
  results = head | {'sections': list(head.get('sections', [])), 'skipped': []}
  for section in sections:
    left = budget - RESERVE - (time.monotonic() - begin)
    if left < (1.0 if tiny else section.least):
      results['skipped'].append({'name': section.name, 'why': f'{max(left, 0):.0f} s were left'})
      _write(results, out, begin)
      continue
    print(f'{section.name}: {section.title} ...', file=sys.stderr, flush=True)
    results['running'] = section.name
    _write(results, out, begin)
    found = run_section(section, min(section.limit, left), out, attached, tiny)
    found['title'] = section.title
    del results['running']
    results['sections'].append(found)
    _write(results, out, begin)
    verdict = 'right' if is_right(found) else 'WRONG'
    print(f'  {found["state"]}, {found["seconds"]} s, {verdict}', file=sys.stderr, flush=True)
  return results


def _write(results: dict, out: Path, begin: float) -> None:
  """Writes results.json and table.md, each whole or not at all."""
  results['seconds'] = round(time.monotonic() - begin, 1)
  texts = {'results.json': json.dumps(results, indent=1), 'table.md': report.markdown(results)}
  for name, text in texts.items():
    part = out / f'{name}.part'
    part.write_text(text, encoding='utf-8')
    part.replace(out / name)


def exit_code(results: dict) -> int:
  """Returns 5 for a wrong result, 1 for a section that did not run to its end, else 0."""
  if not all(map(is_right, results['sections'])):
    return 5
  return 0 if all(map(is_whole, results['sections'])) else 1


def _chosen(parser: argparse.ArgumentParser, only: str, earlier: dict) -> list[Section]:
  names = [s.name for s in SECTIONS]
  wanted = only.split(',') if only else names
  if unknown := set(wanted) - set(names):
    parser.error(f'--only: no section {", ".join(sorted(unknown))}; known: {", ".join(names)}')
  finished = {r['name'] for r in earlier.get('sections', [])}
  return [s for s in SECTIONS if s.name in wanted and s.name not in finished]


def _earlier(parser: argparse.ArgumentParser, path: str) -> dict:
  """Returns the whole sections of an earlier results.json, {} for ''."""
  if not path:
    return {}
  try:
    found = json.loads(Path(path).read_text(encoding='utf-8'))
    return {'sections': [s for s in found['sections'] if is_whole(s)], 'before': found['machine']}
  except (OSError, ValueError, KeyError, TypeError) as error:
    parser.error(f'--after={path}: expected results.json of an earlier call ({error})')


def _section_process(job: str, rows: str) -> None:
  """What a section's process does; see run_section."""
  what = json.loads(job)
  try:
    module = importlib.import_module(what['module'])
    own = record.Record(Path(rows), module.COLUMNS)
    module.run(own, what['tiny'], **what['arguments'])
  except Exception as error:
    traceback.print_exc()
    print(record.describe(error), flush=True)
    sys.exit(1)


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
  """Returns the parser and the flags."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', help='folder for results.json, table.md and logs; made if absent')
  parser.add_argument('--budget', type=float, default=540.0, help='seconds for everything')
  parser.add_argument('--only', default='', help='sections, comma-separated')
  parser.add_argument('--after', default='', help='results.json: its whole sections are kept')
  parser.add_argument('--commit', default='', help='of the code, where it is no git checkout')
  parser.add_argument('--tiny', action='store_true', help='small shapes, to try the check itself')
  parser.add_argument(
    '--platform',
    choices=('auto', 'gpu', 'tpu', 'cpu'),
    default='auto',
    help='auto: what is found; cpu implies --tiny',
  )
  parser.add_argument('--list', action='store_true', help='list the sections and end')
  parser.add_argument('--section', help=argparse.SUPPRESS)
  parser.add_argument('--rows', help=argparse.SUPPRESS)
  return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """Runs the check; returns the exit code."""
  parser, args = parse(argv)
  if args.section:
    _section_process(args.section, args.rows)
    return 0
  if args.list:
    for s in SECTIONS:
      print(f'{s.name:14} at most {s.limit:.0f} s: {s.title}')
    return 0
  if not args.out:
    parser.error('--out=DIR is missing: where results.json and table.md go')
  if not args.budget > 0:
    parser.error(f'--budget={args.budget}: expected seconds above 0')
  out = Path(args.out).resolve()
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f'--out={args.out}: {error}')
  earlier = _earlier(parser, args.after)
  sections = _chosen(parser, args.only, earlier)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a section's process ends with this one
  attached = machine.attached() if args.platform == 'auto' else args.platform
  if args.platform == 'auto' and attached == 'cpu':
    print('no accelerator was found: small shapes on the CPU', file=sys.stderr, flush=True)
  tiny = args.tiny or attached == 'cpu'
  head = earlier | {
    'machine': machine.describe(HERE.parent, args.commit),
    'attached': attached,
    'tiny': tiny,
    'budget': args.budget,
    'command': ' '.join(['python', *(sys.argv if argv is None else [Path(__file__).name, *argv])]),
    'python': platform.python_version(),
    'started': time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime()),
  }
  results = run_all(sections, out, attached, tiny, args.budget, head)
  print((out / 'table.md').read_text(encoding='utf-8'))
  return exit_code(results)


if __name__ == '__main__':
  sys.exit(main())
