"""What the launchers would do: each dry run against a golden text, manifests against the schemas of
their systems, gcloud commands against gcloud's own parser, scripts against their linters.

`python tests/test_launch_dry_run.py` writes the golden texts anew.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jsonschema
import launchers
import pytest
import yaml
from launchers import ROOT, dry

GOLDEN = ROOT / 'tests' / 'golden' / 'launch'
RUN = ['--name=r1', '--config=sft_llama3_8b', '--workdir=gs://bucket/r1']
TPU = [*RUN, '--project=p', '--zone=us-east5-b']
IMAGE = [*RUN, '--image=registry/ftjax:1']
DIGEST = '--digest=sha256:' + '0' * 64
SECRET = 'hf_' + 'w4Kx9sTfG7hJ1kL3mN5pQ'

CASES = {
  'tpu_vm_v5e': ['tpu_vm.sh', *TPU, '--accelerator=v5litepod-16'],
  'tpu_vm_v5p': ['tpu_vm.sh', *TPU, '--accelerator=v5p-8', '--internal-ips'],
  'tpu_vm_v6e': ['tpu_vm.sh', *TPU, '--accelerator=v6e-8', '--', '--config.seed=3'],
  'tpu_vm_v3': ['tpu_vm.sh', *TPU, '--accelerator=v3-32'],
  'queued_v5e': ['queued_resource.sh', *TPU, '--accelerator=v5litepod-256', '--spot', '--watch'],
  'queued_v6e': ['queued_resource.sh', *TPU, '--accelerator=v6e-16', '--valid-until=6h'],
  'gce_v6e_slice': ['gce.sh', *TPU, '--accelerator=v6e-16', '--flex-start=24h', '--watch'],
  'gce_v6e_host': ['gce.sh', *TPU, '--accelerator=ct6e-standard-8t', '--flex-start=24h'],
  'gce_v5p': ['gce.sh', *TPU, '--accelerator=v5p-16', '--spot'],
  'gce_tpu7x': ['gce.sh', *TPU, '--accelerator=tpu7x-16', '--reservation=r'],
  'gke_v5e': ['gke.sh', *IMAGE, '--accelerator=v5litepod-16', '--queue=q', '--spot'],
  'gke_v5p_slices': ['gke.sh', *IMAGE, '--accelerator=v5p-128', '--slices=2'],
  'gke_v6e': ['gke.sh', *IMAGE, '--accelerator=v6e-8', '--service-account=trainer'],
  'gke_tpu7x': ['gke.sh', *IMAGE, '--accelerator=tpu7x:2x2x2', '--checkpoint-gib=90'],
  'gke_gpu': ['gke.sh', *IMAGE, '--platform=cuda', '--hosts=2', '--gpu=nvidia-h100-80gb'],
  'xpk_v5e': ['xpk.sh', *IMAGE, '--cluster=c', '--zone=us-a', '--accelerator=v5litepod-16'],
  'xpk_v6e': ['xpk.sh', *IMAGE, '--cluster=c', '--zone=us-a', '--accelerator=v6e-8'],
  'xpk_tpu7x': [
    *('xpk.sh', *IMAGE, '--cluster=c', '--zone=us-a', '--accelerator=tpu7x-8'),
    *('--checkpoint-gib=90', '--slices=2'),
  ],
  'slurm': [
    *('slurm.sh', *RUN, '--workdir=/disk/r1', '--nodes=2', '--python=/disk/env/bin/python'),
    *('--time=24:00:00', '--partition=gpu'),
  ],
  'sky_v5e': ['sky.sh', *RUN, '--accelerator=v5litepod-16', '--spot'],
  'sky_gpu': ['sky.sh', *RUN, '--accelerator=H100:8', '--nodes=2'],
  'gce_delete': ['gce.sh', 'delete', *TPU[:1], *TPU[3:], '--accelerator=v6e-16'],
  'tpu_vm_delete': ['tpu_vm.sh', 'delete', '--name=r1', '--zone=us-a', '--accelerator=v6e-8'],
  'ssh': ['ssh.sh', *RUN, '--hosts=me@a,me@b'],
  'ssh_code': ['ssh.sh', *RUN, '--hosts=me@a', f'--code={ROOT}/tests/seams/toy_reward.py'],
  'sky_code': ['sky.sh', *RUN, '--accelerator=H100:8', f'--code={ROOT}/tests/seams/toy_reward.py'],
  'docker_build': ['docker.sh', 'build', '--name=r1', '--platform=cuda', DIGEST],
  'docker_run': ['docker.sh', '--name=r1', '--config=tiny_sft', '--workdir=/runs/r1'],
  **{
    f'{launcher}_{verb}': [f'{launcher}.sh', verb, '--name=r1', *place]
    for launcher, place in {
      'queued_resource': ['--zone=us-a', '--accelerator=v5litepod-16'],
      'gce': ['--project=p', '--zone=us-a', '--accelerator=v6e-8'],
      'gke': ['--accelerator=v5litepod-16'],
      'xpk': ['--cluster=c', '--zone=us-a', '--accelerator=v5litepod-16'],
      'slurm': ['--workdir=/disk/r1'],
      'sky': [],
      'docker': [],
    }.items()
    for verb in ('status', 'logs', 'stop')
  },
}


@pytest.mark.parametrize('name', CASES)
def test_a_dry_run_prints_the_golden_text(name):
  assert dry(*CASES[name]) == (GOLDEN / f'{name}.txt').read_text()


def test_secrets_are_in_no_dry_run():
  """Every launcher that starts something passes them in its own way; none prints them."""
  for launcher in sorted({c[0] for c in CASES.values()}):
    words = next(c for c in CASES.values() if c[0] == launcher and 'build' not in c)
    out = dry(*words, env={'HF_TOKEN': SECRET})
    assert SECRET not in out
    assert launcher == 'slurm.sh' or any(w in out for w in ('HF_TOKEN', 'secrets.env', 'NAMES'))


def test_a_secret_among_the_flags_is_refused():
  words = [*CASES['ssh'], '--', f'--config.model.path={SECRET}']
  code, out, err = launchers.run(*words, env={'HF_TOKEN': SECRET})
  assert code == 2 and 'HF_TOKEN' in err and SECRET not in out + err


BAD = {
  'no such flag of tpu_vm.sh; did you mean --accelerator?': ['tpu_vm.sh', '--acelerator=v6e-8'],
  'did you mean status?': ['gce.sh', 'statsu'],
  '--workdir is required': ['tpu_vm.sh', '--name=r', '--config=c'],
  "--name=Run: expected a-z": ['tpu_vm.sh', '--name=Run'],
  'there are v5litepod-1 v5litepod-4 v5litepod-8': ['tpu_vm.sh', *TPU, '--accelerator=v5e-17'],
  'did you mean v5litepod-16?': ['tpu_vm.sh', *TPU, '--accelerator=v5litpod-16'],
  'but tpu7x is offered by: gce gke': ['tpu_vm.sh', *TPU, '--accelerator=tpu7x-8'],
  'but v5e is offered by: tpu-api gke': ['gce.sh', *TPU, '--accelerator=v5litepod-16'],
  'does not make --accelerator=v6e-8': [
    *('gce.sh', *TPU, '--accelerator=v6e-8', '--machine-type=ct5p-hightpu-4t')
  ],
  '4 hosts write checkpoints together; expected gs://': [
    *('gce.sh', *TPU, '--accelerator=v6e-16', '--workdir=/r1')
  ],
  'expected one of them': ['gce.sh', *TPU, '--accelerator=v6e-8', '--spot', '--flex-start=1h'],
  '--project is required': ['gce.sh', *RUN, '--zone=us-a', '--accelerator=v6e-16'],
  'expected true or false': ['tpu_vm.sh', *TPU, '--accelerator=v6e-8', '--spot=maybe'],
  'a pod loses its disk': ['gke.sh', *IMAGE, '--accelerator=v6e-8', '--workdir=/r1'],
  'cannot stand in a manifest': ['gke.sh', *IMAGE, '--image=i: "x', '--accelerator=v6e-8'],
  '--grace-seconds=abc: expected a whole number': [
    *(*CASES['xpk_v5e'], '--grace-seconds=abc')
  ],
  '--grace-seconds=1.5: expected a whole number': [*CASES['gke_v6e'], '--grace-seconds=1.5'],
  'a value with a line break': [*CASES['gke_v6e'], '--', '--config.notes=a\nb'],
  '--stop-seconds=0.5: expected a whole number': [*CASES['ssh'], '--stop-seconds=0.5'],
  'would not start again': ['xpk.sh', *CASES['xpk_v5e'][1:], '--restarts=0'],
  'expected sha256: and 64': ['docker.sh', 'build', '--name=r1', '--digest=sha256:12'],
  'give it before --': ['ssh.sh', *CASES['ssh'][1:], '--', '--workdir=/x'],
  'expected flags of ftjax.train': ['ssh.sh', *CASES['ssh'][1:], '--', 'rm', '-rf'],
  '--config=no.py: no such file here': ['ssh.sh', *RUN, '--config=no.py', '--hosts=a'],
  "is not [USER@]HOST": ['ssh.sh', *RUN, '--hosts=-oProxyCommand=x'],
}  # fmt: skip


@pytest.mark.parametrize('message', BAD)
def test_bad_flags_end_with_2_and_name_the_remedy(message):
  code, _, err = launchers.run(BAD[message][0], '--dry-run', *BAD[message][1:])
  assert code == 2 and message in err and err.startswith('error: '), err


def test_values_with_spaces_and_quotes_reach_the_command_whole():
  value = '--config.data.train=a b\'s "c" $HOME `x` \\'
  out = dry(*CASES['ssh'], '--', value)
  command = shlex.split(out.splitlines()[-1])[-1]
  assert value in shlex.split(command)
  manifest = dry(*CASES['gke_v5e'], '--', value).removesuffix(
    'kubectl --namespace=default apply -f -\n'
  )
  (job,) = [d for d in yaml.safe_load_all(manifest) if d]
  assert value in containers(job)[0]['args']


def test_every_launcher_has_help():
  for launcher in sorted({c[0] for c in CASES.values()}):
    code, out, _ = launchers.run(launcher, '--help')
    assert code == 0 and '--dry-run' in out and '--name=VALUE' in out and 'status|logs|stop' in out


# A command of a launcher, in a block of code or in a cell of a table.
COMMAND = re.compile(r'^(?:\|[^|]*\| `)?(launch/\w+\.sh [^`\n]+)', re.MULTILINE)


def test_commands_of_the_docs_have_dry_runs(tmp_path):
  for name in ('my_config.py', 'my_rewards.py'):
    (tmp_path / name).write_text('# of the reader\n')
  pages = sorted((ROOT / 'docs').glob('*.md'))
  found = {p.name: COMMAND.findall(p.read_text()) for p in pages}
  assert len(found['launching.md']) > 12 and len(found['install.md']) > 8
  for line in dict.fromkeys(line for lines in found.values() for line in lines):
    launcher, *words = shlex.split(line)
    assert dry(launcher.removeprefix('launch/'), *words, cwd=tmp_path), line


# Manifests

APPLY = 'kubectl --namespace=default apply -f -\n'


def containers(job):
  (replicated,) = job['spec']['replicatedJobs']
  return replicated['template']['spec']['template']['spec']['containers']


def manifests(name):
  text = (GOLDEN / f'{name}.txt').read_text()
  lines = [x for x in text.splitlines() if not x.startswith(('kubectl ', 'sky ', '#'))]
  return [d for d in yaml.safe_load_all('\n'.join(lines)) if d]


VERBS = ('status', 'logs', 'stop')
GKE = [n for n, words in CASES.items() if words[0] == 'gke.sh' and words[1] not in VERBS]


@pytest.mark.parametrize('name', GKE)
def test_job_sets_are_of_their_schema_and_spare_user_errors(name):
  (job,) = manifests(name)
  schema = json.loads((ROOT / 'tests/schemas/jobset.json').read_text())
  jsonschema.validate(job, schema, jsonschema.Draft202012Validator)
  (replicated,) = job['spec']['replicatedJobs']
  spec = replicated['template']['spec']
  codes = spec['podFailurePolicy']['rules'][0]['onExitCodes']
  assert codes['values'] == [2, 3, 4, 5] and codes['containerName'] == containers(job)[0]['name']
  assert job['spec']['failurePolicy']['rules'][0]['action'] == 'FailJobSet'
  assert job['spec']['failurePolicy']['maxRestarts'] > 0 and spec['backoffLimit'] == 0
  assert spec['parallelism'] == spec['completions']


def test_the_schema_of_job_sets_refuses_a_misspelt_key():
  (job,) = manifests(GKE[0])
  schema = json.loads((ROOT / 'tests/schemas/jobset.json').read_text())
  job['spec']['replicatedJobs'][0]['template']['spec']['podFailurePolicies'] = {}
  with pytest.raises(jsonschema.ValidationError, match='podFailurePolicies'):
    jsonschema.validate(job, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize('name', ['sky_v5e', 'sky_gpu', 'sky_code'])
def test_sky_tasks_are_of_their_schema(name):
  (task,) = manifests(name)
  jsonschema.validate(task, json.loads((ROOT / 'tests/schemas/skypilot_task.json').read_text()))
  subprocess.run(['bash', '-n', '-c', task['run']], check=True)


def test_a_config_file_becomes_a_config_map(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text('import x\n\n\ndef get_config():\n  return "\\n"\n')
  out = dry(*CASES['gke_v5e'], f'--config={file}').removesuffix(
    'kubectl --namespace=default apply -f -\n'
  )
  config, job = [d for d in yaml.safe_load_all(out) if d]
  assert config['data']['mine.py'] == file.read_text()
  (container,) = containers(job)
  assert '--config=/config/mine.py' in container['args']
  assert container['volumeMounts'] == [{'name': 'config', 'mountPath': '/config'}]


def test_the_compose_file_passes_secrets_by_name():
  service = yaml.safe_load((ROOT / 'launch/docker/compose.yaml').read_text())['services']['train']
  assert service['environment'] == {
    **{'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': '/code'},
    **{'HF_TOKEN': None, 'WANDB_API_KEY': None},
  }
  assert service['user'] != '0' and '-m' in service['entrypoint']


# Tools that have a say


def tool(name):
  path = shutil.which(name, path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
  if path is None:
    pytest.skip(f'{name} is not installed')
  return path


def check(*command):
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def scripts():
  return [str(p) for p in sorted((ROOT / 'launch').rglob('*')) if p.suffix in ('.sh', '.sbatch')]


def test_bash_reads_every_script():
  for script in scripts():
    check('bash', '-n', script)


# Of the Compute Engine documentation, newer than the gcloud of June 2025 that is at hand.
NEWER = ('--accelerator-topology-mode', '--target-size-policy-mode', 'FLEX_START')


@pytest.mark.full
def test_gcloud_knows_every_flag():
  """By an unknown flag that is added: gcloud must name it alone."""
  gcloud = tool('gcloud')
  seen = {}
  for name in CASES:
    for line in (GOLDEN / f'{name}.txt').read_text().splitlines():
      words = shlex.split(line) if line.startswith('gcloud ') else []
      shape = tuple(w.partition('=')[0] if w.startswith('--') else w for w in words)
      if words and shape not in seen and not any(n in line for n in NEWER):
        seen[shape] = words[1:]
  assert len(seen) > 15
  for words in seen.values():
    done = subprocess.run([gcloud, *words, '--ftjax-probe'], capture_output=True, text=True)
    assert done.returncode == 2 and 'unrecognized arguments: --ftjax-probe' in done.stderr, (
      f'{words}\n{done.stderr}'
    )


if __name__ == '__main__':
  GOLDEN.mkdir(parents=True, exist_ok=True)
  for case, case_words in CASES.items():
    (GOLDEN / f'{case}.txt').write_text(dry(*case_words))
