"""A fake kubectl with a controller of JobSets: its pods are processes of this machine.

The controller follows the failure policy of a manifest as JobSet 0.13 and Kubernetes' Job do: an
exit code of a FailJob rule fails the job for the reason PodFailurePolicy, any other failure for
BackoffLimitExceeded (backoffLimit 0); the first rule for the reason decides, without one all start
again.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import yaml


def reason(spec, codes):
  """Why a job has failed; '' while it has not."""
  failed = [c for c in codes if c]
  for rule in spec['podFailurePolicy']['rules']:
    on = rule['onExitCodes']
    if rule['action'] == 'FailJob' and on['operator'] == 'In' and set(on['values']) & set(failed):
      return 'PodFailurePolicy'
  return 'BackoffLimitExceeded' if failed else ''


class Controller:
  """Runs a JobSet to its end."""

  def __init__(self, cloud, name):
    self.cloud, self.name = cloud, name
    self.manifest = yaml.safe_load((cloud.root / f'jobset-{name}.yaml').read_text())
    (self.replicated,) = self.manifest['spec']['replicatedJobs']
    self.spec = self.replicated['template']['spec']
    self.pod = self.spec['template']['spec']
    self.is_stopped = False
    signal.signal(signal.SIGTERM, self._stop)

  def _stop(self, *_):
    self.is_stopped = True

  def report(self, state, **more):
    file = self.cloud.root / f'jobset-{self.name}.json'
    new = file.with_suffix('.new')
    new.write_text(json.dumps({'state': state, 'pid': os.getpid()} | more))
    new.rename(file)

  def start(self, index):
    (container,) = self.pod['containers']
    secret = self.cloud.root / f'secret-{container["envFrom"][0]["secretRef"]["name"]}'
    env = self.cloud.environment(f'{self.name}-{index}', JOB_COMPLETION_INDEX=str(index))
    if secret.exists():
      env |= dict(line.split('=', 1) for line in secret.read_text().splitlines())
    home = self.cloud.home(f'{self.name}-{index}')
    home.mkdir(parents=True, exist_ok=True)
    words = [
      w.replace('/config/', f'{self.mount(home)}/').replace('/tmp/code', f'{home}/code')
      for w in (*container['command'], *container['args'])
    ]
    with (home / 'log').open('a') as log:
      return subprocess.Popen(words, cwd=home, env=env, stdout=log, stderr=log)

  def mount(self, home):
    """Writes the files of the ConfigMap; returns their folder."""
    folder = home / 'config'
    folder.mkdir(exist_ok=True)
    made = self.cloud.root / f'config-{self.name}.yaml'
    config = yaml.safe_load(made.read_text()) if made.exists() else {}
    for name, text in config.get('data', {}).items():
      (folder / name).write_text(text)
    for name, text in config.get('binaryData', {}).items():
      (folder / name).write_bytes(base64.b64decode(text, validate=True))
    return folder

  def end(self, pods):
    for pod in pods:
      with contextlib.suppress(ProcessLookupError):
        pod.terminate()
    end = time.monotonic() + self.pod['terminationGracePeriodSeconds']
    for pod in pods:
      try:
        pod.wait(max(end - time.monotonic(), 0.01))
      except subprocess.TimeoutExpired:
        pod.kill()
        pod.wait()

  def run(self):
    restarts = 0
    while True:
      pods = [self.start(i) for i in range(self.spec['completions'])]
      self.report('Running', restarts=restarts, pods=[p.pid for p in pods])
      while True:
        codes = [p.poll() for p in pods]
        why = reason(self.spec, [c if c is None or c >= 0 else 128 - c for c in codes])
        if why or self.is_stopped or None not in codes:
          break
        time.sleep(0.05)
      self.end(pods)
      if not why or self.is_stopped:
        return self.report('Stopped' if self.is_stopped else 'Completed', restarts=restarts)
      policy = self.manifest['spec']['failurePolicy']
      rules = (r for r in policy['rules'] if why in r['onJobFailureReasons'])
      action = next((r['action'] for r in rules), 'RestartJobSet')
      if action == 'FailJobSet' or restarts == policy['maxRestarts']:
        return self.report('Failed', restarts=restarts, reason=why)
      restarts += 1


def kubectl(cloud, words):
  words = [w for w in words if not w.startswith('--namespace')]
  state = cloud.root / f'jobset-{words[2]}.json'
  manifest = state.with_suffix('.yaml')
  match words[:2]:
    case ['apply', '-f']:
      *configs, job = [d for d in yaml.safe_load_all(sys.stdin) if d]
      name = job['metadata']['name']
      for config in configs:
        (cloud.root / f'config-{name}.yaml').write_text(yaml.safe_dump(config))
      manifest, state = (cloud.root / f'jobset-{name}.{end}' for end in ('yaml', 'json'))
      if manifest.exists():  # also where it has ended
        print(f'jobset.jobset.x-k8s.io/{name} unchanged')
        return 0
      manifest.write_text(yaml.safe_dump(job))
      state.unlink(missing_ok=True)  # of a deleted one
      subprocess.Popen(
        [sys.executable, __file__, str(cloud.root), name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(cloud.root / 'controller.log').open('a'),
        start_new_session=True,
      )
    case ['create', 'secret']:
      assert words[2] == 'generic' and words[4] == '--from-env-file=/dev/stdin'
      (cloud.root / f'secret-{words[3]}').write_text(sys.stdin.read())
    case ['get', 'jobset']:
      if not manifest.exists():
        message = f'jobsets.jobset.x-k8s.io "{words[2]}" not found'
        print(f'Error from server (NotFound): {message}', file=sys.stderr)
        return 1
      text = state.read_text() if state.exists() else '{"state": ""}'
      ended = {'Completed', 'Failed'} & {json.loads(text)['state']}
      print(' '.join(ended) if words[-1].startswith('jsonpath=') else text)
    case ['logs', '-l']:
      name = words[2].partition('=')[2].partition(',')[0]
      print((cloud.home(f'{name}-0') / 'log').read_text())
    case ['delete', 'secret']:
      (cloud.root / f'secret-{words[2]}').unlink(missing_ok=True)
    case ['delete', 'jobset']:
      found = json.loads(state.read_text())
      if found['state'] == 'Running':
        os.kill(found['pid'], signal.SIGTERM)
      while json.loads(state.read_text())['state'] == 'Running':
        time.sleep(0.05)
      manifest.unlink()
  return 0


if __name__ == '__main__':
  import machines

  Controller(machines.Cloud(sys.argv[1]), sys.argv[2]).run()
