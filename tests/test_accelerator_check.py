"""benchmarks/accelerator_check.py: what becomes of sections that fail in every way, and that its
checks can fail. The long tests run all sections with small shapes, and compile those of a GPU.
"""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'benchmarks' / 'accelerator_check.py'

# Modules of sections, as small as what they show.
MODULES = {
  'good': 'with record.row("a") as row:\n    row["x"] = 1.5\n    check(row, "gap", 0.0, 0.0)',
  'wrong': 'with record.row("a") as row:\n    row["x"] = 1\n    check(row, "leak", 0.25, 0.0)',
  'undefined': 'with record.row("a") as row:\n    check(row, "leak", float("nan"), 1.0)',
  'crash': (
    'with record.row("before") as row:\n    row["x"] = 2\n  os.kill(os.getpid(), signal.SIGSEGV)'
  ),
  'memory_of_a_row': (
    'with record.row("big") as row:\n    row["x"] = 3\n'
    '    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")\n'
    '  with record.row("small") as row:\n    row["x"] = 4'
  ),
  'memory': 'raise MemoryError("planned peak of a step: 99 GiB")',
  'hang': (
    'with record.row("before") as row:\n    row["x"] = 5\n'
    '  child = subprocess.Popen(["sleep", "600"])\n'
    '  Path(os.environ["FOLDER"], "child").write_text(f"{child.pid} {os.getpid()}")\n'
    '  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n  time.sleep(600)'
  ),
}
HEAD = """
import os, signal, subprocess, time
from pathlib import Path
from accelerator.record import check
COLUMNS = (('x', 'value', '.2f'),)
def run(record, tiny):
  """


@pytest.fixture
def check(monkeypatch, tmp_path):
  """The script as a module, and modules of sections on its path."""
  monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
  monkeypatch.syspath_prepend(str(tmp_path))
  for name, body in MODULES.items():
    (tmp_path / f'section_{name}.py').write_text(HEAD + body + '\n')
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  monkeypatch.setenv('FOLDER', str(tmp_path))
  import accelerator_check

  return accelerator_check


def section(check, name, limit=60.0):
  return check.Section(name, f'Section {name}', f'section_{name}', limit, 1)


HEADER = {
  'machine': {'driver': '', 'cuda': '', 'host': 'h', 'packages': 'p', 'commit': '', 'code': 'c'},
  'attached': 'cpu',
  'tiny': True,
  'budget': 60.0,
  'command': 'c',
  'python': '3',
  'started': 'now',
}


def run_all(check, out, *names, budget=60.0, limit=60.0):
  out.mkdir(exist_ok=True)
  sections = [section(check, name, limit) for name in names]
  return check.run_all(sections, out, 'cpu', True, budget, dict(HEADER))


def is_alive(pid):
  """Whether a process runs; one that has ended and was not waited for does not."""
  state = pathlib.Path(f'/proc/{pid}/stat')
  try:
    return state.read_text().rpartition(')')[2].split()[0] not in 'ZX'
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_a_section_that_fails_loses_itself_alone(check, tmp_path):
  out = tmp_path / 'a folder'
  names = ('crash', 'memory_of_a_row', 'memory', 'wrong', 'good')
  results = run_all(check, out, *names)
  found = {s['name']: s for s in results['sections']}
  assert found['crash']['state'].startswith('killed by SIGSEGV')
  assert found['crash']['rows'][0]['x'] == 2, 'what was measured before is kept'
  big, small = found['memory_of_a_row']['rows']
  assert big['failure'].startswith('out of memory: RESOURCE_EXHAUSTED') and small['x'] == 4
  assert found['memory']['state'].startswith('out of memory')
  assert found['wrong']['state'] == found['good']['state'] == 'done'
  assert [check.is_whole(s) for s in results['sections']] == [False, False, False, True, True]
  assert [check.is_right(s) for s in results['sections']] == [True, True, True, False, True]
  table = (out / 'table.md').read_text()
  assert '**failed**: a: leak 0.25, at most 0 expected' in table and '| before | 2.00 |' in table
  assert json.loads((out / 'results.json').read_text()) == results
  assert check.exit_code(results) == 5
  assert check.exit_code(results | {'sections': results['sections'][:2]}) == 1
  assert check.exit_code(results | {'sections': results['sections'][-1:]}) == 0


def test_a_value_that_is_no_number_fails_its_check(check, tmp_path):
  results = run_all(check, tmp_path / 'out', 'undefined')
  assert check.exit_code(results) == 5
  assert 'leak nan' in (tmp_path / 'out' / 'table.md').read_text()


@pytest.mark.full
def test_a_section_that_hangs_ends_with_all_it_started(check, tmp_path):
  results = run_all(check, tmp_path / 'out', 'hang', 'good', limit=3.0)
  first, second = results['sections']
  assert first['state'] == 'timed out after 3 s' and first['rows'][0]['x'] == 5
  assert second['state'] == 'done' and check.exit_code(results) == 1
  assert not any(map(is_alive, (tmp_path / 'child').read_text().split()))


@pytest.mark.full
def test_sections_without_time_are_listed(check, tmp_path):
  out = tmp_path / 'out'
  results = run_all(check, out, 'hang', 'good', 'wrong', budget=check.RESERVE + 2.5)
  assert [s['name'] for s in results['sections']] == ['hang'], results['sections']
  assert [s['name'] for s in results['skipped']] == ['good', 'wrong']
  assert '## Left out for time' in (out / 'table.md').read_text()


def test_results_are_kept_where_the_check_is_ended(check, tmp_path):
  """SIGTERM while a section hangs: its process ends too, and finished sections are written."""
  out = tmp_path / 'out'
  code = (
    'import sys, json, pathlib, accelerator_check as c\n'
    'c.signal.signal(c.signal.SIGTERM, lambda *_: sys.exit(1))\n'
    'out, head = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])\n'
    'sections = [c.Section(n, n, "section_" + n, 60, 1) for n in ("good", "hang")]\n'
    'c.run_all(sections, out, "cpu", True, 60, head)'
  )
  out.mkdir()
  paths = [str(ROOT / 'benchmarks'), str(tmp_path)]
  process = subprocess.Popen(
    [sys.executable, '-c', code, str(out), json.dumps(HEADER)],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(paths)},
  )
  marker = tmp_path / 'child'
  while not marker.exists() and process.poll() is None:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 1
  results = json.loads((out / 'results.json').read_text())
  assert [s['name'] for s in results['sections']] == ['good'] and results['running'] == 'hang'
  assert not any(map(is_alive, marker.read_text().split()))


def test_a_second_call_runs_what_the_first_left_out(check, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(check, 'SECTIONS', [section(check, n) for n in ('good', 'crash')])
  first, second = tmp_path / 'first', tmp_path / 'second'
  assert check.main(['--platform=cpu', f'--out={first}', '--commit=abc']) == 1
  (tmp_path / 'section_crash.py').write_text(HEAD + MODULES['good'] + '\n')
  assert check.main(['--platform=cpu', f'--out={second}', f'--after={first}/results.json']) == 0
  results = json.loads((second / 'results.json').read_text())
  assert [s['name'] for s in results['sections']] == ['good', 'crash']
  assert results['before']['commit'] == 'abc' and '`--after`' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--out=DIR is missing'),
    (['--out=x', '--budget=0'], '--budget=0.0: expected seconds above 0'),
    (['--out=x', '--only=atention'], '--only: no section atention'),
    (['--out=/dev/null/x'], '--out=/dev/null/x'),
    (['--out=x', '--after=/dev/null'], '--after=/dev/null: expected results.json'),
  ],
)
def test_bad_flags(check, flags, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as raised:
    check.main(flags)
  assert raised.value.code == 2 and message in capsys.readouterr().err


def test_a_line_that_was_cut_is_left_out(check, tmp_path):
  rows = check.record.Record(tmp_path / 'rows', [('x', 'x', '')])
  with rows.row('whole') as row:
    row['x'] = jnp.float32(0.5)
  with (tmp_path / 'rows').open('a') as file:
    file.write('{"name": "cu')
  columns, found = check.record.read(tmp_path / 'rows')
  assert columns == [['x', 'x', '']] and [r['x'] for r in found] == [0.5]
  assert check.record.read(tmp_path / 'none') == ([], [])


def test_the_machine_is_described_without_jax(check):
  """Also that neither the runner nor what it imports loads jax, which would hold the device."""
  code = (
    'import sys, accelerator_check as c\n'
    'd = c.machine.describe(c.HERE.parent, "")\n'
    'assert "jax" not in sys.modules and "ftjax" not in sys.modules\n'
    'print(d["packages"], d["code"], c.machine.attached())'
  )
  environment = os.environ | {'PYTHONPATH': str(ROOT / 'benchmarks')}
  done = subprocess.run(
    [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
  )
  assert 'jaxlib' in done.stdout and done.stdout.split()[-1] == 'cpu'
  assert check.machine.code_digest(ROOT) in done.stdout


def test_a_kernel_that_ignores_documents_fails(check, monkeypatch):
  """The check of influence finds what it is there for, in outputs and gradients."""
  from accelerator import attention

  case = attention.Case('all see all', 2, 1, 16)
  kept = attention.dense.visible
  row, wrong = {}, {}
  attention._measure(row, case, 'dense', 128, True, {})
  assert all(c['passed'] for c in row['checks'])

  def ignoring(where, window):
    return kept([jnp.ones_like(w) if i % 2 == 0 else w for i, w in enumerate(where)], window)

  monkeypatch.setattr(attention.dense, 'visible', ignoring)
  attention._measure(wrong, case, 'dense', 128, True, {})
  assert not wrong['checks'][0]['passed'] and wrong['leak'] > 0.1


def test_runs_that_differ_are_found(check):
  from accelerator import bitwise

  run = {'losses': ['0x1p0', '0x2p0'], 'digest': 'a', 'tokens_per_s': 2.0, 'compile_s': 1.0}
  rows = [{}, {}, {}]
  others = (run, run | {'losses': ['0x1p0', '0x3p0']}, run | {'digest': 'b'})
  for row, other in zip(rows, others, strict=True):
    bitwise.compare(row, run, other)
  assert [r['equal'] for r in rows] == [True, False, False]
  assert [r['first'] for r in rows] == ['', 2, 'parameters alone']
  assert '--xla_gpu_deterministic_ops=true' in bitwise.deterministic({})['XLA_FLAGS']


def test_packages_of_peers_that_are_missing_are_named(check, monkeypatch):
  from accelerator import peers

  monkeypatch.setattr(peers.importlib.util, 'find_spec', lambda name: None)
  assert peers.missing('liger') == ['torch', 'transformers', 'liger_kernel']


def test_the_wheels_are_those_that_the_check_imports(check):
  """Every module that a section imports is of jax's own needs, or in the list of wheels."""
  code = (
    'import sys\n'
    'from accelerator import attention, blocks, decoding, device, head, layers, training\n'
    'print(*{m.partition(".")[0] for m in sys.modules})'
  )
  environment = os.environ | {'PYTHONPATH': f'{ROOT / "benchmarks"}:{ROOT}'}
  done = subprocess.run(
    [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
  )
  listed = (ROOT / 'benchmarks' / 'accelerator_wheels.txt').read_text()
  names = {line.split('#')[0].split('=')[0].strip() for line in listed.splitlines()}
  own = {n.lower().replace('-', '_') for n in names if n}
  found = set(done.stdout.split())
  for module, package in (
    ('absl', 'absl_py'),
    ('flax', 'flax'),
    ('jinja2', 'jinja2'),
    ('ml_collections', 'ml_collections'),
    ('optax', 'optax'),
    ('orbax', 'orbax_checkpoint'),
    ('pyarrow', 'pyarrow'),
    ('regex', 'regex'),
    ('tokenizers', 'tokenizers'),
    ('tqdm', 'tqdm'),
  ):
    assert (module in found) == (package in own), module
  assert not found & {'torch', 'transformers', 'datasets', 'gguf', 'tensorboardX', 'sentencepiece'}


@pytest.mark.full
def test_all_sections_run_with_small_shapes(check, tmp_path):
  out = tmp_path / 'out'
  command = [sys.executable, str(SCRIPT), '--platform=cpu', f'--out={out}', '--budget=500']
  done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
  results = json.loads((out / 'results.json').read_text())
  assert done.returncode == 0, done.stdout
  assert [s['name'] for s in results['sections']] == [s.name for s in check.SECTIONS]
  assert not results['skipped'] and all(s['rows'] for s in results['sections'])
  by_name = {s['name']: s['rows'] for s in results['sections']}
  kernels = {r['kernel'] for n in ('attention', 'attention_rest') for r in by_name[n]}
  assert kernels == {'dense', 'blocked', 'triton', 'splash'}
  assert by_name['bitwise'][0]['equal'] is True
  assert all(r['tokens_per_s'] > 0 for r in by_name['lora_8b'] + by_name['decode_0.6b'])


@pytest.mark.full
def test_the_kernels_of_a_gpu_compile_for_one(check, monkeypatch):
  """Every program of the attention section, grouped products and both heads."""
  if importlib.util.find_spec('jax_cuda13_plugin') is None:
    pytest.skip('needs jax_cuda13_plugin')
  from accelerator import attention, head, layers, measuring

  from ftjax.planning import topology
  from ftjax.runtime import sharding

  mesh = measuring.one_device(topology.devices(topology.parse('h200:1'))[0])

  def like(shape, dtype, *names):
    place = jax.NamedSharding(mesh, sharding.spec(*names or [None] * len(shape)))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

  for case in attention.CASES:
    name = attention.kernels(case, 2048, 'gpu', False)[0]
    q, k = (like((2, 2048, n, case.head_dim), case.dtype) for n in (case.heads, case.kv_heads))
    where = [like((2, 2048), 'int32')] * 2
    text = attention.program(name, case, False).lower(q, k, k, *where, q).compile().as_text()
    assert ('attention_keys' in text) == (name == 'triton')
  for p in layers.PRODUCTS:
    shapes = (p.rows, p.inputs), (p.groups, p.inputs, p.outputs), (p.rows, p.outputs)
    x, w, g = (like(s, 'bfloat16') for s in shapes)
    call = layers.grouped_program(False).lower(x, w, like((p.groups,), 'int32'), g)
    assert 'grouped_sums' in call.compile().as_text()
  for _, tokens, width, vocab in head.CASES[:1]:
    given = [like(s, d, *names) for s, d, names in head.arguments(tokens, width, vocab)]
    (_, ours), (_, dense) = (head.compiled(f, given) for f in (head.chunked, head.dense))
    assert ours < dense / 2
