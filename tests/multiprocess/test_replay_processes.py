"""A replay by several processes: all end with one verdict."""

import json
import shutil

import cluster
import pytest

pytestmark = [pytest.mark.full, pytest.mark.usefixtures('users_programs')]


def replay(run, workdir, logs):
  """(exit codes, what process 0 printed) of two processes."""
  flags = [f'--replay={run}', f'--workdir={workdir}']
  with cluster.Processes(2, flags, logs) as both:
    codes = both.wait()
    return codes, both.logs[0].read_text()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('two')
  with cluster.Processes(2, cluster.arguments(folder / 'run'), folder / 'logs') as both:
    assert both.wait() == [0, 0], both.logs[0].read_text()
  return folder / 'run'


def test_two_processes_replay_two(run, tmp_path):
  codes, printed = replay(run, tmp_path / 'again', tmp_path / 'logs')
  assert codes == [0, 0], printed
  assert f'equal, bitwise ({cluster.STEPS} rows of training' in printed


def test_all_end_with_5_at_the_first_difference(run, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(run, copy, ignore=shutil.ignore_patterns('export'))
  rows = [json.loads(line) for line in (copy / 'metrics.jsonl').read_text().splitlines()]
  next(r for r in rows if (r['split'], r['step']) == ('train', 3))['loss'] *= 2
  (copy / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  codes, printed = replay(copy, tmp_path / 'again', tmp_path / 'logs')
  assert codes == [5, 5], printed
  assert 'differs first at step 3 (training): loss=' in printed


def test_all_end_with_5_where_it_is_another_run(run, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(run, copy, ignore=shutil.ignore_patterns('export'))
  manifest = json.loads((copy / 'manifest.json').read_text())
  manifest['code']['digest'] = 'f' * 64  # of other code
  (copy / 'manifest.json').write_text(json.dumps(manifest))
  codes, printed = replay(copy, tmp_path / 'again', tmp_path / 'logs')
  assert codes == [5, 5], printed
  assert 'code of ftjax: commit' in printed
