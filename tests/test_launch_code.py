"""Modules of the user under the launchers: what is copied and what is refused before anything is
created, by dry runs; what arrives, with fake programs and a training that is a shell script.
"""

import base64
import io
import os
import pathlib
import shlex
import subprocess
import sys
import tarfile

import launchers
import pytest
import yaml
from launchers import ROOT, dry

CONFIG = """from ftjax import config
import sizes


def get_config():
  'Not other:thing, which a docstring names.'
  c = config.default()
  c.rollout.rewards = (('my_rewards:slogan', 1.0), ('format:think', 0.5))
  return c
"""
SECRET = 'hf_' + 'm5Wz8TfG1hJ4kL7mN9pQ2'
RUN = ['--name=r1', '--workdir=gs://bucket/r1', '--config=my_config.py']
SSH = ['ssh.sh', *RUN, '--hosts=m1', '--platform=tpu']
GKE = ['gke.sh', *RUN, '--accelerator=v6e-8', '--image=i']
XPK = ['xpk.sh', *RUN, '--cluster=c', '--zone=us-a', '--accelerator=v6e-8', '--image=i']


@pytest.fixture
def cloud(tmp_path):
  fake = launchers.FakeCloud(tmp_path / 'the cloud').make()
  yield fake
  fake.close()


@pytest.fixture
def here(tmp_path):
  """A folder with a config, a reward, a module and a package that they import, and what is not for
  the hosts.
  """
  folder = tmp_path / 'my work'
  (folder / 'wording/data').mkdir(parents=True)
  files = {
    'my_config.py': CONFIG,
    'my_rewards.py': 'def slogan(completions, **_):\n  from wording import score\n',
    'sizes.py': 'HIDDEN = 64\n',
    'other.py': '',
    'wording/__init__.py': '',
    'wording/score.py': 'import json\nfrom . import names\n',
    'wording/names.py': 'import pathlib\n',
    'wording/data/names.txt': 'tandem\n',
    '.env': f'HF_TOKEN={SECRET}\n',
    '.git/config': '',
    'wording/__pycache__/score.pyc': '',
    'env/pyvenv.cfg': '',
    'env/lib.py': '',
  }
  for name, text in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  return folder


def refused(here, *words, **env):
  code, out, err = launchers.run(*words[:1], '--dry-run', *words[1:], cwd=here, env=env)
  assert code == 2 and not out, err
  assert err.startswith('error: ') and err.count('\n') == 1
  return err


# What is refused


@pytest.mark.parametrize('words', [SSH, GKE, XPK], ids=lambda words: words[0])
def test_modules_that_the_hosts_would_not_have_are_named_with_the_remedy(here, words):
  err = refused(here, *words)
  assert 'sizes.py (needed by my_config.py:2)' in err
  assert 'my_rewards.py (needed by my_config.py:8)' in err
  assert 'wording (needed by my_rewards.py:2)' in err and 'other' not in err
  remedy = err[err.index('--code=') :].strip()
  assert sorted(remedy.removeprefix('--code=').split(',')) == [
    'my_rewards.py',
    'sizes.py',
    'wording',
  ]
  assert 'my_rewards.py, sizes.py, wording/__init__.py' in dry(*words, remedy, cwd=here)
  err = refused(here, *words, '--code=sizes.py,my_rewards.py')
  assert (
    'not have wording (needed by my_rewards.py:2); add --code=sizes.py,my_rewards.py,wor' in err
  )


def test_a_module_that_a_flag_names_is_needed_too(here):
  words = ['ssh.sh', *RUN[:2], '--hosts=m1', '--config=tiny_grpo']
  err = refused(here, *words, '--', '--config.rollout.rewards=math@1,other:f@2')
  assert 'other.py (needed by --config.rollout.rewards=math@1,other:f@2)' in err
  assert dry(*words, '--', '--config.rollout.rewards=length:target=4,elsewhere:f', cwd=here)


def test_nothing_is_created_where_a_module_is_missing(cloud, here):
  words = ['tpu_vm.sh', *RUN, '--zone=us-a', '--accelerator=v5litepod-16', *cloud.install]
  code, _, err = launchers.run(*words, cwd=here, env=cloud.env())
  assert code == 2 and 'my_rewards.py' in err
  assert not cloud.of('create') and not cloud.of('ssh')


def test_secrets_and_keys_are_not_copied(here):
  (line,) = [x for x in dry(*SSH, '--code=.', cwd=here).splitlines() if x.startswith('#')][:1]
  assert set(line.removeprefix('# code.tar.gz: ').split(', ')) == SENT
  (here / 'sizes.py').write_text(f'TOKEN = "{SECRET}"\n')
  err = refused(here, *SSH, '--code=.', HF_TOKEN=SECRET)
  assert 'sizes.py holds the value of HF_TOKEN' in err and SECRET not in err
  (here / 'sizes.py').write_text('-----BEGIN RSA PRIVATE ' + 'KEY-----\n')
  assert 'sizes.py holds a private key' in refused(here, *SSH, '--code=.')


BAD = {
  '--code=.env: names that begin with a dot are not copied': ('--code=sizes.py,.env', {}),
  '--code=.git/: names that begin with a dot are not copied': ('--code=.git/', {}),
  'no such file or folder': ('--code=nothing.py', {}),
  'there is no file in it': ('--code=.,empty/', {'empty/.hidden': ''}),
  'more than 10 MiB or 2,000 files; the largest so far: rows.bin (11,000,000 bytes)': (
    '--code=.',
    {'rows.bin': 'x' * 11_000_000},
  ),
  'would hide the module json': ('--code=.', {'json.py': ''}),
  'would hide the module ftjax': ('--code=.', {'ftjax/__init__.py': ''}),
  'would both be sizes.py': ('--code=.,b/sizes.py', {'b/sizes.py': ''}),
  'sizes.py:1: SyntaxError': ('--code=.', {'sizes.py': 'def f(\n'}),
}


@pytest.mark.parametrize('message', BAD)
def test_bad_code_ends_with_2(here, message):
  flag, files = BAD[message]
  for name, text in files.items():
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text(text)
  assert message in refused(here, *SSH, flag)


def test_links(here, tmp_path):
  (tmp_path / 'real.py').write_text('')
  (here / 'linked.py').symlink_to(tmp_path / 'real.py')
  assert 'linked.py' in dry(*SSH, '--code=.', cwd=here)
  (here / 'folder').symlink_to(tmp_path)
  assert 'folder is a link to a folder' in refused(here, *SSH, '--code=.')
  (here / 'folder').unlink()
  (here / 'broken.py').symlink_to(tmp_path / 'nothing')
  assert 'broken.py is no file' in refused(here, *SSH, '--code=.')


def test_a_manifest_carries_so_much(here):
  (here / 'noise.bin').write_bytes(os.urandom(160 << 10))
  assert 'carries at most 153,600' in refused(here, *GKE, '--code=.')
  assert 'carries at most 65,536' in refused(here, *XPK, '--code=.')
  assert dry(*SSH, '--code=.', cwd=here)


def test_without_python_there_is_no_check_and_no_code(here, tmp_path):
  """Programs of the launcher but for python3."""
  programs = tmp_path / 'programs'
  programs.mkdir()
  for name in ('dirname', 'basename', 'awk', 'tr', 'rm'):
    (programs / name).symlink_to(f'/usr/bin/{name}')
  env = os.environ | {'PATH': str(programs)}
  words = ['/bin/bash', str(ROOT / 'launch/ssh.sh'), '--dry-run', *SSH[1:]]
  done = subprocess.run(words, env=env, cwd=here, capture_output=True, text=True)
  assert done.returncode == 0 and 'not checked which modules' in done.stderr, done.stderr
  done = subprocess.run([*words, '--code=.'], env=env, cwd=here, capture_output=True, text=True)
  assert done.returncode == 2 and 'python3 is not on PATH' in done.stderr


# What arrives

SENT = {'my_config.py', 'my_rewards.py', 'other.py', 'sizes.py'}
SENT |= {f'wording/{n}' for n in ('__init__.py', 'score.py', 'names.py', 'data/names.txt')}
IMPORTS = 'import my_rewards, sizes, wording.score; print(wording.score.__file__)'
# In place of a training: imports what has arrived, with the environment of the host.
TRAINING = f'cd /; {shlex.quote(sys.executable)} -c "{IMPORTS}"; find "${{PYTHONPATH%%:*}}" -type f'


def training(cloud, script):
  file = cloud.root / 'training.sh'
  file.write_text(script)
  return cloud.env(FAKE_TRAINING=str(file))


def found(log, folder):
  """Names of the files that the training has seen below `folder`."""
  lines = [x for x in log.splitlines() if x.startswith(f'{folder}/')]
  assert f'{folder}/wording/score.py' in lines, log
  return {str(pathlib.PurePath(x).relative_to(folder)) for x in lines if '__pycache__' not in x}


def test_the_hosts_have_the_code_on_their_path(cloud, here):
  env = training(cloud, TRAINING)
  words = [*SSH, '--code=.', *cloud.install]
  code, _, err = launchers.run(*words, cwd=here, env=env)
  assert code == 0, err
  assert 'ssh.sh: code: my_config.py, my_rewards.py' in err
  home = cloud.home('m1') / '.ftjax/r1'
  launchers.until((home / 'exit_code').exists)
  assert found((home / 'log').read_text(), home / 'code') == SENT
  (here / 'other.py').unlink()  # another start: what was there is replaced
  (here / 'my_rewards.py').write_text('import sizes\n')
  assert launchers.run(*words, cwd=here, env=env)[0] == 0
  assert not (home / 'code/other.py').exists()
  assert (home / 'code/my_rewards.py').read_text() == 'import sizes\n'
  launchers.until((home / 'exit_code').exists)
  plain = [w for w in words if not w.startswith(('--code', '--config'))]
  assert launchers.run(*plain, '--config=tiny_sft', cwd=here, env=env)[0] == 0
  assert not (home / 'code').exists() and not (home / 'code.tar.gz').exists()


def test_the_code_of_a_running_training_is_kept(cloud, here):
  env = training(cloud, 'sleep 60')
  words = [*SSH, '--code=.', *cloud.install]
  assert launchers.run(*words, cwd=here, env=env)[0] == 0
  (here / 'sizes.py').write_text('HIDDEN = 1\n')
  assert launchers.run(*words, cwd=here, env=env)[0] == 0
  home = cloud.home('m1') / '.ftjax/r1'
  assert (home / 'code/sizes.py').read_text() == 'HIDDEN = 64\n'


def test_the_launcher_leaves_no_copy_of_the_code(cloud, here, tmp_path):
  (tmp_path / 'tmp').mkdir()
  env = training(cloud, 'exit 0') | {'TMPDIR': str(tmp_path / 'tmp')}
  assert launchers.run(*SSH, '--code=.', *cloud.install, cwd=here, env=env)[0] == 0
  assert launchers.run(*SSH, '--dry-run', '--code=.', cwd=here, env=env)[0] == 0
  assert not list((tmp_path / 'tmp').iterdir())


def test_pods_have_the_code_on_their_path(here, tmp_path):
  cloud = launchers.FakeCloud(tmp_path / 'pods').make()  # no space: it stands for /tmp and /config
  try:
    check_pods(cloud, here)
  finally:
    cloud.close()


def check_pods(cloud, here):
  env = training(cloud, TRAINING)
  words = ['gke.sh', *RUN, '--platform=cpu', '--image=i', '--code=.']
  code, _, err = launchers.run(*words, cwd=here, env=env)
  assert code == 0, err
  home = cloud.home('r1-0')
  state = cloud.root / 'jobset-r1.json'
  launchers.until(lambda: state.exists() and 'Completed' in state.read_text())
  assert found((home / 'log').read_text(), home / 'code') == SENT
  assert (home / 'config/my_config.py').read_text() == CONFIG


def test_the_same_code_is_the_same_archive(here):
  """So that an unchanged ConfigMap is unchanged."""
  texts = []
  for _ in range(2):
    text = dry(*GKE, '--code=.', cwd=here).rpartition('kubectl ')[0]
    config, _ = [d for d in yaml.safe_load_all(text) if d]
    texts.append(base64.b64decode(config['binaryData']['code.tar.gz']))
    (here / 'sizes.py').touch()
  assert texts[0] == texts[1]
  with tarfile.open(fileobj=io.BytesIO(texts[0])) as tar:
    assert set(tar.getnames()) == SENT
    assert {(m.uid, m.mode) for m in tar.getmembers()} == {(0, 0o644)}


def test_an_xpk_command_carries_config_and_code(here, tmp_path):
  out = dry(*XPK, '--code=my_rewards.py,sizes.py,wording', cwd=here)
  (word,) = [w for w in shlex.split(out) if w.startswith('--command=')]
  assert '--config=/tmp/code/my_config.py' in word
  command, _, train = word.removeprefix('--command=').partition('exec ')
  assert train.startswith('python -m ftjax.supervise')
  there = tmp_path / 'pod'
  script = f'{command} cd / && {shlex.quote(sys.executable)} -c "{IMPORTS}"'
  script = script.replace('/tmp/code', str(there))
  printed = subprocess.check_output(['bash', '-c', script], text=True)
  assert printed == f'{there}/wording/score.py\n'
  assert (there / 'my_config.py').read_text() == CONFIG and not (there / 'other.py').exists()


def test_slurm_and_docker_read_the_code_where_it_is(here):
  words = ['slurm.sh', *RUN, '--workdir=/disk/r1', '--python=/disk/env/bin/python']
  path = f'PYTHONPATH={here}:{here.parent}'
  out = dry(*words, '--code=my_rewards.py,sizes.py,../my work', cwd=here, env={'PYTHONPATH': ''})
  assert shlex.split(out)[:3] == ['env', path, 'sbatch']
  assert 'no such file or folder' in refused(here, *words, '--code=nothing')
  words = ['docker.sh', *RUN]
  assert 'my_rewards.py (needed by' in refused(here, *words)
  out = shlex.split(dry(*words, '--code=./,wording', cwd=here))
  assert f'--volume={here}:/code-1:ro' in out and f'--volume={here}/wording:/code/wording:ro' in out
  assert '--env=PYTHONPATH=/code-1:/code' in out
