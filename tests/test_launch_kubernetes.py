"""The life of a run on Kubernetes, with a fake kubectl whose controller follows the failure policy
of the manifest; the training is a shell script.
"""

import json
import os
import signal

import launchers
import pytest
from test_launch_life import SECRET, training

PLACE = ['--name=r1', '--platform=cpu', '--hosts=2']
RUN = [*PLACE, '--image=i:1', '--config=tiny_sft', '--workdir=gs://bucket/r1']


@pytest.fixture
def cloud(tmp_path):
  fake = launchers.FakeCloud(tmp_path / 'cloud').make()
  yield fake
  fake.close()


def state(cloud):
  file = cloud.root / 'jobset-r1.json'
  return json.loads(file.read_text()) if file.exists() else {'state': ''}


def start(cloud, script, *more, **env):
  code, out, err = launchers.run('gke.sh', *RUN, *more, env=training(cloud, script) | env)
  assert code == 0, err
  return out


def ends(cloud):
  launchers.until(lambda: state(cloud)['state'] not in ('', 'Running'))
  return state(cloud)


def test_both_pods_end_and_the_job_set_is_complete(cloud):
  out = start(cloud, 'echo "$@ $HF_TOKEN"', '--', '--config.seed=3', HF_TOKEN=SECRET)
  assert ends(cloud)['state'] == 'Completed'
  code, log, _ = launchers.run('gke.sh', 'logs', *PLACE, env=cloud.env())
  assert code == 0 and '--config.seed=3' in log
  assert '--coordinator=r1-train-0-0.r1:8476 --num_processes=2 --process_id=0' in log
  assert SECRET in log  # the pod has it
  assert SECRET not in out + (cloud.root / 'calls.log').read_text()


@pytest.mark.parametrize('code', [2, 3, 4, 5])
def test_an_error_of_the_user_fails_it_without_a_restart(cloud, code):
  start(cloud, f'[[ $JOB_COMPLETION_INDEX == 1 ]] && exit {code}; sleep 60')
  assert ends(cloud) | {'pid': 0} == {
    **{'state': 'Failed', 'restarts': 0},
    **{'reason': 'PodFailurePolicy', 'pid': 0},
  }


def test_a_lost_pod_starts_all_again_and_75_too(cloud):
  script = (
    'n=$(cat ~/n 2>/dev/null || echo 0); echo $((n + 1)) >~/n; '
    'case $n,$HOME in 0,*) touch ~/on; sleep 60 ;; 1,*-0) exit 75 ;; esac'
  )
  start(cloud, script)
  homes = [cloud.home(f'r1-{i}') for i in range(2)]
  launchers.until(lambda: 'pods' in state(cloud) and all((h / 'on').exists() for h in homes))
  os.kill(state(cloud)['pods'][1], signal.SIGKILL)
  found = ends(cloud)
  assert found['state'] == 'Completed' and found['restarts'] == 2


def test_restarts_have_an_end(cloud):
  start(cloud, 'exit 134', '--restarts=2')
  assert ends(cloud)['restarts'] == 2 and state(cloud)['state'] == 'Failed'


def test_a_job_set_that_has_ended_is_made_again(cloud):
  """By an apply alone nothing would start: its manifest is unchanged, and it has ended."""
  for code, ended in ((0, 'Completed'), (2, 'Failed')):
    start(cloud, f'exit {code}')
    assert ends(cloud)['state'] == ended
  first = state(cloud)['pid']
  got, _, err = launchers.run('gke.sh', *RUN, env=training(cloud, 'sleep 60'))
  assert got == 0 and 'r1 has ended (Failed); deleting what is left' in err
  launchers.until(lambda: state(cloud).get('pods') and state(cloud)['pid'] != first)
  deletes = cloud.of('delete', 'jobset')
  assert len(deletes) == 2 and all('--cascade=foreground' in words for words in deletes)


def test_a_job_set_that_runs_is_left_alone(cloud):
  """No newer code, config or secrets under its feet."""
  start(cloud, 'sleep 60')
  launchers.until(lambda: 'pods' in state(cloud))
  pods, calls = state(cloud)['pods'], len(cloud.calls())
  code, _, err = launchers.run('gke.sh', *RUN, env=training(cloud, 'exit 0') | {'HF_TOKEN': SECRET})
  assert code == 0 and 'has not ended: it is left as it is' in err
  assert [c[2:4] for c in cloud.calls()[calls:]] == [['get', 'jobset']]
  assert state(cloud)['pods'] == pods


def test_a_cluster_that_does_not_answer_is_not_changed(cloud):
  (cloud.root / 'bin/kubectl').write_text('#!/bin/sh\necho "Unable to connect" >&2; exit 1\n')
  code, _, err = launchers.run('gke.sh', *RUN, env=cloud.env(HF_TOKEN=SECRET))
  assert code == 1 and 'Unable to connect' in err and 'nothing was changed' in err


def test_stop_lets_the_pods_save(cloud):
  start(cloud, 'trap "touch ~/saved; exit 75" TERM; touch ~/ready; while :; do sleep 0.1; done')
  homes = [cloud.home(f'r1-{i}') for i in range(2)]
  launchers.until(lambda: all((h / 'ready').exists() for h in homes))
  code, out, _ = launchers.run('gke.sh', 'status', *PLACE, env=cloud.env())
  assert code == 0 and 'Running' in out
  assert launchers.run('gke.sh', 'stop', *PLACE, env=cloud.env())[0] == 0
  assert state(cloud)['state'] == 'Stopped' and all((h / 'saved').exists() for h in homes)
