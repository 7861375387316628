"""`ftjax.supervise`: which exit codes start a command again, when it gives up, what signals do, and
what is left in restarts.jsonl. The commands are tiny shell and Python programs.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_run

from ftjax.cluster import preemption
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files, shared_log, snapshots
from ftjax.supervision import exit_codes, supervisor
from ftjax.supervision.supervisor import Settings, find_workdir, wait_before

# Of this process, which has threads of jax; `ftjax.supervise` has one thread.
pytestmark = pytest.mark.filterwarnings('ignore:os.fork:RuntimeWarning')

# Finalizes the next checkpoint of $1, as a disk shows it.
SAVE = """
next() { n=$(ls "$1/checkpoints" 2>/dev/null | wc -l); d="$1/checkpoints/$((n + 1))"
  mkdir -p "$d/meta" "$d/state"; echo '{}' > "$d/_CHECKPOINT_METADATA"
  echo '{}' > "$d/meta/metadata"; echo '{}' > "$d/state/_METADATA"; }
"""


def shell(script, *words):
  return ('sh', '-c', SAVE + script, 'sh', *map(str, words))


def supervised(tmp_path, script, **settings):
  """(exit code, rows of restarts.jsonl) of a script that gets the workdir as $1."""
  workdir = tmp_path / 'a run'
  command = shell(script, workdir)
  code = supervisor.supervise(Settings(command, str(workdir), **{'backoff': 0.0} | settings))
  return code, rows(workdir)


def rows(workdir):
  path = pathlib.Path(workdir) / 'restarts.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def heed_signals():
  """In a child: supervise passes on no signal that its parent ignores, as tests under nohup do."""
  for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


def start(*words, **more):
  """`python -m ftjax.supervise` as a process of its own."""
  more = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True} | more
  more = {'preexec_fn': heed_signals} | more
  command = [sys.executable, '-m', 'ftjax.supervise', *map(str, words)]
  return subprocess.Popen(command, cwd=tiny_run.ROOT, **more)


def until(is_time, seconds=60):
  end = time.monotonic() + seconds
  while not (found := is_time()):
    assert time.monotonic() < end
    time.sleep(0.01)
  return found


# Exit codes


@pytest.mark.parametrize('code', [0, 2, 3, 4, 5])
def test_a_final_code_ends_it(tmp_path, code):
  assert supervised(tmp_path, f'exit {code}')[0] == code
  # A workdir is not made for a command that was refused.
  assert [r['exit_code'] for r in rows(tmp_path / 'a run')] == ([0] if code == 0 else [])


@pytest.mark.parametrize(
  ('script', 'code', 'name'),
  [
    ('exit 1', 1, ''),
    ('exit 42', 42, ''),
    ('exit 75', 75, ''),
    ('exit 134', 134, 'SIGABRT'),
    ('exit 143', 143, 'SIGTERM'),
    ('kill -9 $$', 137, 'SIGKILL'),
    ('kill -ABRT $$', 134, 'SIGABRT'),
  ],
)
def test_other_codes_start_again_and_give_up_without_progress(tmp_path, capfd, script, code, name):
  ended, found = supervised(tmp_path, f'echo "line of $$" >&2; {script}')
  assert ended == 5
  assert [(r['exit_code'], r['signal'], r['attempt']) for r in found] == [
    (code, name, i) for i in (1, 2, 3)
  ]
  assert [r['then'] for r in found] == ['starting again now'] * 2 + ['giving up']
  assert [r['wait_s'] for r in found] == [0, 0, None]
  assert len({r['pid'] for r in found}) == 3 and all(r['reason'] for r in found)
  assert all(r['seconds'] >= 0 and r['step_before'] is r['step_after'] is None for r in found)
  err = capfd.readouterr().err
  assert 'gave up: 3 starts in a row without a newer finalized checkpoint' in err
  assert f'  | line of {found[-1]["pid"]}\n' in err and f'Look at: {exit_codes.advice(code)}' in err
  assert 'restarts.jsonl' in err and f'ended after {found[0]["seconds"]:.1f} s with {code}' in err


def test_the_report_has_the_last_twenty_lines_and_no_secret(tmp_path, capfd):
  script = 'i=0; while [ $i -lt 50 ]; do i=$((i+1)); echo "row $i" >&2; done; '
  script += 'printf "10%%\\r20%%\\r30%%\\n" >&2; echo "api_key=abcdef123456" >&2; exit 1'
  supervised(tmp_path, script, max_idle_starts=1)
  shown = [line[4:] for line in capfd.readouterr().err.splitlines() if line.startswith('  | ')]
  expected = [f'row {i}' for i in range(33, 51)]
  assert shown == [*expected, '30%', 'api_key=<redacted>']


def test_a_command_that_makes_progress_is_never_given_up(tmp_path):
  script = 'next "$1"; [ $(ls "$1/checkpoints" | wc -l) = 6 ] || exit 1'
  code, found = supervised(tmp_path, script, backoff=100.0)
  assert code == 0
  assert [(r['step_before'], r['step_after']) for r in found] == [
    (None, 1),
    *((i, i + 1) for i in range(1, 6)),
  ]
  assert [r['wait_s'] for r in found] == [0] * 5 + [None]


def test_only_starts_in_a_row_count(tmp_path):
  """Progress at the third start: two more than that are allowed again."""
  script = 'echo x >> "$1.starts"; [ $(wc -l < "$1.starts") = 3 ] && next "$1"; exit 1'
  code, found = supervised(tmp_path, script)
  assert code == 5 and [r['step_after'] for r in found] == [None, None, 1, 1, 1, 1]


@pytest.mark.parametrize('torn', ['3.orbax-checkpoint-tmp', '3'])
def test_a_save_that_did_not_finish_is_no_progress(tmp_path, torn):
  code, found = supervised(tmp_path, f'mkdir -p "$1/checkpoints/{torn}/state"; exit 75')
  assert code == 5 and [r['step_after'] for r in found] == [None] * 3


def test_a_workdir_that_cannot_be_listed_is_no_progress(tmp_path, capfd):
  (tmp_path / 'a run').write_text('a file')
  assert supervised_code(tmp_path / 'a run', 'exit 1') == 5
  assert 'cannot be written' in capfd.readouterr().err


def supervised_code(workdir, script):
  return supervisor.supervise(Settings(shell(script, workdir), str(workdir), backoff=0.0))


def test_waits_double_up_to_a_limit():
  assert [wait_before(i, 10.0) for i in range(8)] == [0, 10, 20, 40, 80, 160, 300, 300]
  assert wait_before(1, 1000.0) == wait_before(9, 1000.0) == 1000.0 and wait_before(3, 0.0) == 0


def test_processes_that_a_crash_leaves_are_killed_before_the_next_start(tmp_path):
  """They may hold the workdir's lock, or a device."""
  script = 'sleep 60 & echo $! >> "$1.pids"; exit 1'
  supervised(tmp_path, script, max_idle_starts=2)
  pids = (tmp_path / 'a run.pids').read_text().split()
  assert len(pids) == 2
  until(lambda: not any(is_alive(pid) for pid in pids), 10)


def is_alive(pid):
  """Whether a process runs; a zombie that nobody has waited for does not."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
  except OSError:
    return False


# Arguments


@pytest.mark.parametrize(
  ('words', 'workdir'),
  [
    (['python', '-m', 'ftjax.train', '--workdir=a b/c'], 'a b/c'),
    (['python', '-m', 'ftjax.train', '--workdir', 'gs://b/run'], 'gs://b/run'),
    (['x', '--workdir=1', '-workdir=2'], '2'),
    (['x', '--workdir=~/run'], os.path.expanduser('~/run')),
    (['x', '--workdir'], ''),
    (['sh', '-c', 'python -m ftjax.train --workdir=inner'], ''),
  ],
)
def test_the_workdir_of_a_command(words, workdir):
  assert find_workdir(words) == workdir


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    ([], 'write it after --'),
    (['--workdir=x', '--'], 'write it after --'),
    (['--', 'true'], 'no --workdir'),
    (['true', '--workdir=x'], 'write -- before the command'),
    (['--max_idle_starts=0', '--', 'true', '--workdir=x'], 'max_idle_starts'),
    (['--translate=75', '--', 'true', '--workdir=x'], '--translate=75: expected OLD:NEW'),
    (['--', './no such program', '--workdir=x'], './no such program: cannot be started'),
    (['--', '/', '--workdir=x'], '/: cannot be started'),
  ],
)
def test_a_wrong_command_line_is_refused(words, text):
  done = start(*words)
  _, err = done.communicate(timeout=60)
  assert done.returncode == 2 and text in err and err.startswith('error: ')
  assert not pathlib.Path(tiny_run.ROOT / 'x').exists()


def test_translations():
  assert exit_codes.parse_translation('') == {}
  assert exit_codes.parse_translation('75:42, 134:42') == {75: 42, 134: 42}
  for wrong in ('75', '75:', 'a:b', '75:256', '-1:3', '75:1,75:2'):
    with pytest.raises(ConfigError, match='--translate'):
      exit_codes.parse_translation(wrong)


# Pre-flight

CHECKED = 'for last; do :; done; echo "$last" >> "$1.calls"; [ "$last" = --preflight ] && '


def test_preflight_runs_once_before_the_first_start(tmp_path):
  code, found = supervised(tmp_path, CHECKED + 'exit 0; exit 1', preflight=True)
  assert code == 5 and [r['kind'] for r in found] == ['preflight'] + ['run'] * 3
  calls = (tmp_path / 'a run.calls').read_text().splitlines()
  assert calls == ['--preflight'] + [str(tmp_path / 'a run')] * 3


def test_a_failed_preflight_ends_it(tmp_path):
  code, _ = supervised(tmp_path, CHECKED + 'exit 5; exit 0', preflight=True)
  assert code == 5 and (tmp_path / 'a run.calls').read_text() == '--preflight\n'


def test_a_preflight_that_could_not_run_is_tried_again(tmp_path):
  script = CHECKED + '[ $(wc -l < "$1.calls") = 1 ] && exit 75; exit 0'
  code, found = supervised(tmp_path, script, preflight=True)
  assert code == 0 and [(r['kind'], r['exit_code']) for r in found] == [
    ('preflight', 75),
    ('preflight', 0),
    ('run', 0),
  ]


# Signals

SAVES = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
  (folder / 'got').write_text(str(number))
  time.sleep(float(sys.argv[2]))
  sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, stop)
(folder / 'pid').write_text(str(os.getpid()))
time.sleep(100)
"""


def running(tmp_path, *flags, delay=0.0, **more):
  """supervise with a child that saves `delay` seconds after SIGTERM; returned once it runs."""
  command = [sys.executable, '-c', SAVES, tmp_path, delay]
  process = start(*flags, f'--workdir={tmp_path}', '--', *command, **more)
  until(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text())
  return process


@pytest.mark.parametrize(
  ('number', 'received', 'flags', 'code'),
  [
    (signal.SIGTERM, signal.SIGTERM, [], 75),
    (signal.SIGINT, signal.SIGINT, ['--translate=75:42'], 42),
    (signal.SIGHUP, signal.SIGTERM, [], 75),
  ],
)
def test_a_stop_signal_is_forwarded_and_nothing_starts_again(
  tmp_path, number, received, flags, code
):
  process = running(tmp_path, *flags, delay=0.3)
  process.send_signal(number)
  _, err = process.communicate(timeout=30)
  assert process.returncode == code, err
  assert (tmp_path / 'got').read_text() == str(int(received))
  [row] = rows(tmp_path)
  assert row['exit_code'] == 75 and row['then'] == 'was asked to stop' and row['wait_s'] is None
  assert f'{number.name}: stopping the command' in err


def test_a_second_stop_signal_kills(tmp_path):
  process = running(tmp_path, delay=60)
  process.send_signal(signal.SIGTERM)
  until((tmp_path / 'got').exists)
  process.send_signal(signal.SIGTERM)  # at once: some tools send it twice
  time.sleep(1.2)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=10)
  assert process.returncode == 137 and 'SIGTERM again: killing' in err


def test_a_stop_signal_ends_a_wait_at_once(tmp_path):
  words = ['--backoff=100', f'--workdir={tmp_path}', '--', 'sh', '-c', 'exit 134']
  process = start(*words)
  until(lambda: rows(tmp_path))
  begin = time.monotonic()
  process.terminate()
  assert process.wait(timeout=30) == 134 and time.monotonic() - begin < 5
  assert len(rows(tmp_path)) == 1


def test_a_stopped_shell_is_waited_for_with_what_it_started(tmp_path):
  """sh ends at SIGTERM, before the run that it has started has saved."""
  inner = f'{sys.executable} -c "$0" {tmp_path} 0.5; exit $?'
  process = start(f'--workdir={tmp_path}', '--', 'sh', '-c', inner, SAVES)
  until((tmp_path / 'pid').exists)
  process.terminate()
  assert process.wait(timeout=30) in (75, 143)
  assert (tmp_path / 'got').read_text() and not is_alive((tmp_path / 'pid').read_text())


@pytest.mark.skipif(sys.platform != 'linux', reason='PR_SET_PDEATHSIG')
def test_the_child_is_killed_with_its_supervisor(tmp_path):
  process = running(tmp_path)
  process.kill()
  process.wait()
  until(lambda: not is_alive((tmp_path / 'pid').read_text()), 10)
  assert not (tmp_path / 'got').exists()


# Terminals and connections that go away


def test_nohup_survives_the_end_of_the_terminal(tmp_path):
  ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
  process = running(tmp_path, preexec_fn=ignore)
  process.send_signal(signal.SIGHUP)
  time.sleep(0.5)
  assert process.poll() is None and is_alive((tmp_path / 'pid').read_text())
  process.terminate()
  assert process.wait(timeout=30) == 75


def test_output_that_nobody_reads_any_more_is_dropped(tmp_path):
  """An ssh connection that was closed: the command runs on, and is started again."""
  loud = 'i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo "row $i"; echo "row $i" >&2; done; '
  command = shell(loud + 'next "$1"; [ -e "$1/checkpoints/3" ] || exit 75', tmp_path)
  process = start(f'--workdir={tmp_path}', '--', *command)
  process.stdout.close()
  process.stderr.close()
  assert process.wait(timeout=60) == 0
  assert [r['exit_code'] for r in rows(tmp_path)] == [75, 75, 0]


def test_closed_streams_and_an_almost_empty_environment(tmp_path):
  command = [sys.executable, '-m', 'ftjax.supervise', '--backoff=0', f'--workdir={tmp_path}']
  command += ['--', '/bin/sh']
  script = '"$@" <&- >&- 2>&-'
  inner = ['-c', 'echo out; echo err >&2; [ -e "$0/x" ] && exit 0; : > "$0/x"; exit 1', tmp_path]
  words = ['/bin/sh', '-c', script, 'sh', *command, *map(str, inner)]
  folder = {'PYTHONPATH': str(tiny_run.ROOT)}
  done = subprocess.run(words, cwd=tmp_path, env=folder, timeout=60, check=False)
  assert done.returncode == 0 and len(rows(tmp_path)) == 2


def test_output_passes_through_unchanged(tmp_path):
  script = 'printf "a\\rb\\0\\377"; printf "50%%\\r100%%" >&2; exit 0'
  process = start(f'--workdir={tmp_path}', '--', *shell(script), text=False)
  out, err = process.communicate(timeout=30)
  assert out == b'a\rb\x00\xff' and err.startswith(b'50%\r100%') and process.returncode == 0


# Without jax


def test_it_works_where_jax_is_broken(tmp_path):
  (tmp_path / 'jax.py').write_text('raise ImportError("broken")')
  path = os.pathsep.join([str(tmp_path), str(tiny_run.ROOT)])
  process = start(f'--workdir={tmp_path}', '--', 'true', env=os.environ | {'PYTHONPATH': path})
  assert process.wait(timeout=60) == 0 and len(rows(tmp_path)) == 1


def test_nothing_heavy_is_imported():
  code = 'import sys, ftjax.supervise; print(*{"jax", "numpy", "orbax"} & sys.modules.keys())'
  done = subprocess.run([sys.executable, '-c', code], cwd=tiny_run.ROOT, capture_output=True)
  assert done.returncode == 0 and done.stdout.strip() == b''


# Machines that end, and buckets


def test_a_machine_that_is_being_preempted_gets_no_new_start(tmp_path, monkeypatch):
  monkeypatch.setattr(preemption, 'server', lambda: 'localhost:1')
  for notice, count in ((True, 1), (False, 3)):
    monkeypatch.setattr(preemption, 'is_preempted', lambda host, notice=notice: notice)
    code, found = supervised(tmp_path / str(notice), 'exit 75')
    assert code == (75 if notice else 5) and len(found) == count
  assert 'being preempted' in rows(tmp_path / 'True' / 'a run')[0]['then']


def test_checkpoints_and_the_log_in_a_bucket(bucket):
  run = 'gs://bucket/run'
  assert snapshots.newest(run) is None
  for step, is_whole in ((2, True), (4, True), (6, False)):
    files.write_text(f'{run}/checkpoints/{step}/state/x', 'x')
    if is_whole:
      files.write_text(f'{run}/checkpoints/{step}/{snapshots.COMMIT}', '')
  assert snapshots.newest(run) == 4
  code = supervisor.supervise(Settings(('sh', '-c', 'exit 75'), run, backoff=0.0))
  found = [json.loads(r) for r in files.read_text(f'{run}/restarts.jsonl').splitlines()]
  assert code == 5 and [r['step_after'] for r in found] == [4] * 3


@pytest.mark.parametrize('place', ['disk', 'gs://bucket'])
def test_no_line_of_several_writers_is_lost(bucket, tmp_path, place):
  folder = place if place != 'disk' else str(tmp_path / 'new folder')
  path = f'{folder}/restarts.jsonl'
  threads = [
    threading.Thread(target=shared_log.append, args=(path, f'{{"host": {i}}}')) for i in range(6)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  lines = [
    line
    for name in files.listdir(folder)
    if name.startswith('restarts.')
    for line in files.read_text(f'{folder}/{name}').splitlines()
  ]
  assert sorted(json.loads(line)['host'] for line in lines) == list(range(6))
  with pytest.raises(ValueError, match='one line'):
    shared_log.append(path, 'a\nb')
