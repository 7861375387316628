"""ftjax.convert --push against a hub on loopback: what arrives, and why something does not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
from absl import flags
from parity.toy_gguf import Toy, write_toy

from ftjax import convert
from ftjax.hf import load, model_card
from ftjax.runtime.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests' / 'parity' / 'golden'
SECRET = 'hf_' + 'A1b2C3d4' * 4
OTHER = 'hf_' + 'Z9y8X7w6' * 4


@pytest.fixture
def hub(tmp_path, monkeypatch):
  with fake_hub.asked(tmp_path, monkeypatch) as fake:
    fake.writers = {SECRET: 'org', OTHER: 'else'}
    monkeypatch.setenv('HF_TOKEN', SECRET)
    yield fake


def run(*words):
  """Calls the entry in this process, with its flags alone: other tests import other entries."""
  own = flags.FlagValues()
  for flag in flags.FLAGS.get_flags_for_module('ftjax.convert'):
    own[flag.name] = flag
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  try:
    own(['convert', *words])
    convert.main()
  finally:
    for name in own:
      own[name].unparse()


def tree(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()
  }


def pushed(hub, name='org/tuned'):
  repo = hub.repos[f'models/{name}']
  return {k: v for k, v in repo.commits[repo.refs['main']].items() if k != '.gitattributes'}


def card(step=7, **changes):
  fields = dict(
    algorithm='sft', is_reward=False, has_template=False, step=step, base=None, continues=False,
    is_adapter=False, merge='', sources=(), config=model_card.config_file({}), evaluation='',
    scores={}, versions={},
    devices='', task='', num_labels=0,
  )  # fmt: skip
  return model_card.render(model_card.Card(**(fields | changes))).encode()


@pytest.fixture
def folder(tmp_path):
  out = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'model')
  (out / 'additional_chat_templates').mkdir()
  (out / 'additional_chat_templates' / 'rag.jinja').write_bytes(b'{{ messages }}\r\n')
  (out / 'README.md').write_bytes(card())
  return out


def test_a_converted_folder_is_uploaded_and_read_again(hub, folder, tmp_path, capsys):
  run(f'--source={folder}', f'--target={tmp_path / "out"}', '--push=org/tuned')
  commit = hub.repos['models/org/tuned'].refs['main']
  assert f'org/tuned: {hub.url}/org/tuned/commit/{commit}' in capsys.readouterr().out
  assert pushed(hub) == tree(tmp_path / 'out') == tree(folder)
  assert hub.repos['models/org/tuned'].private
  fake_hub.forget()
  convert.convert('org/tuned', str(tmp_path / 'back'), None)
  assert tree(tmp_path / 'back') == tree(folder)
  assert load.fingerprint('org/tuned') == load.fingerprint(folder)


def test_the_second_upload_replaces_the_model_and_nothing_else(hub, folder, tmp_path, caplog):
  run(f'--source={folder}', '--push=org/tuned', '--public')
  repo = hub.repos['models/org/tuned']
  assert not repo.private
  shards = {f'model-0000{i}-of-00002.safetensors': b'old' for i in (1, 2)}
  own = {'notes.txt': b'mine', 'images/a.png': b'x', 'model.fp16.safetensors': b'x'}
  repo.push(pushed(hub) | shards | {'model.safetensors.index.json': b'{}'} | own)
  (folder / '.env').write_text('TOKEN=x')
  (folder / 'optimizer.pt').write_text('x')
  (folder / 'LICENSE').write_text('free')
  shutil.rmtree(folder / 'additional_chat_templates')
  hub.requests.clear()
  run(f'--source={folder}', '--push=org/tuned', '--public')
  kept = {k: v for k, v in tree(folder).items() if k not in ('.env', 'optimizer.pt')}
  assert pushed(hub) == kept | own
  assert 'not uploaded, no part of a model: .env, optimizer.pt' in caplog.text
  assert not [r for r in hub.requests if r[0] == 'PUT'], 'the hub has the weights already'


def test_a_private_upload_into_a_public_model_is_refused(hub, folder):
  hub.repo('org/tuned').push({'x': b'x'})
  with pytest.raises(ConfigError, match='this model is public on the hub; add --public'):
    run(f'--source={folder}', '--push=org/tuned')
  assert pushed(hub) == {'x': b'x'}


def test_the_export_of_a_workdir_is_uploaded(hub, folder, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{"algorithm": "sft"}')
  shutil.copytree(folder, tmp_path / 'run' / 'export')
  run(f'--source={tmp_path / "run"}', '--push=org/tuned')
  assert pushed(hub) == tree(folder)


def test_an_adapter_is_uploaded_too(hub, folder):
  (folder / 'config.json').unlink()
  (folder / 'model.safetensors').rename(folder / 'adapter_model.safetensors')
  (folder / 'adapter_config.json').write_text('{}')
  run(f'--source={folder}', '--push=org/tuned')
  assert pushed(hub) == tree(folder)


def make_adapter(folder, base):
  (folder / 'config.json').unlink()
  (folder / 'model.safetensors').rename(folder / 'adapter_model.safetensors')
  content = {'peft_type': 'LORA', 'base_model_name_or_path': base, 'revision': None}
  (folder / 'adapter_config.json').write_text(json.dumps(content))


@pytest.mark.parametrize('base', ['/srv/models/secret', './llama', 'gs://bucket/llama', 'own'])
def test_an_adapter_of_a_base_that_others_do_not_have_is_refused(hub, folder, tmp_path, base):
  """PEFT uploads such a path, and nobody else can load the adapter."""
  (tmp_path / 'own').mkdir()
  base = str(tmp_path / 'own') if base == 'own' else base
  make_adapter(folder, base)
  with pytest.raises(ConfigError, match=rf'names its base {base}, .*Give --base=org/name'):
    run(f'--source={folder}', '--push=org/tuned')
  assert 'models/org/tuned' not in hub.repos
  run(f'--source={folder}', '--push=org/tuned', f'--base={base}')  # who says so is believed
  assert pushed(hub) == tree(folder)


@pytest.mark.parametrize(('given', 'revision'), [('org/base', None), ('org/base@v1', 'v1')])
def test_the_name_of_the_base_on_the_hub_is_uploaded_in_place_of_its_path(
  hub, folder, given, revision
):
  make_adapter(folder, '/srv/models/secret')
  before = tree(folder)
  run(f'--source={folder}', '--push=org/tuned', f'--base={given}')
  assert tree(folder) == before, 'the folder itself stays'
  found = pushed(hub)
  content = {'peft_type': 'LORA', 'base_model_name_or_path': 'org/base', 'revision': revision}
  assert json.loads(found.pop('adapter_config.json')) == content
  before.pop('adapter_config.json')
  assert found == before and not any(b'secret' in x for x in found.values())


@pytest.mark.parametrize('base', ['org/base', 'gpt2', None])
def test_an_adapter_of_a_base_on_the_hub_is_uploaded_as_it_is(hub, folder, base):
  make_adapter(folder, base)
  run(f'--source={folder}', '--push=org/tuned')
  assert pushed(hub) == tree(folder)


def test_a_base_that_the_adapter_does_not_have_is_refused(hub, folder):
  make_adapter(folder, '/srv/models/secret')
  with pytest.raises(ConfigError, match='--base=/other: with --push expected the name of the base'):
    run(f'--source={folder}', '--push=org/tuned', '--base=/other')
  assert 'models/org/tuned' not in hub.repos


@pytest.mark.parametrize(
  ('words', 'error', 'message'),
  [
    (['--push=org/tuned', '--base=org/base'], ConfigError, 'belongs to a merge; give its --target'),
    (['--push=tuned'], ConfigError, 'expected org/name'),
    (['--push=org/a/b'], ConfigError, 'expected org/name'),
    (['--push=org/tuned@main'], ConfigError, 'expected org/name'),
    (['--push='], ConfigError, 'expected org/name|are needed'),
    (['--push=org/a--b'], ConfigError, 'no valid name'),
    (['--push=org/tuned', '--target=gs://bucket/x'], ConfigError, 'gs://bucket/x is in a bucket'),
    (['--push=org/tuned', '--dtype=bfloat16'], ConfigError, 'give --target=DIR'),
    (['--push=org/tuned', '--source=MODEL.gguf'], ConfigError, 'give --target=DIR'),
    (['--public', '--target=x'], ConfigError, 'give --push=org/name'),
    (['--push=org/tuned', '--source=EMPTY'], DataError, 'config.json is missing'),
    (['--push=org/tuned', '--source=HALF'], DataError, 'model.safetensors'),
    (['--push=org/tuned', '--source=LINKED'], DataError, 'the link leaves the model folder'),
  ],
)
def test_what_is_no_upload(hub, folder, tmp_path, words, error, message):
  (tmp_path / 'EMPTY').mkdir()
  half = shutil.copytree(folder, tmp_path / 'HALF')
  (half / 'model.safetensors').write_bytes((half / 'model.safetensors').read_bytes()[:-9])
  linked = shutil.copytree(folder, tmp_path / 'LINKED')
  (tmp_path / 'secret').write_text('secret')
  (linked / 'vocab.json').symlink_to('../secret')
  words = [w.replace('--source=', f'--source={tmp_path}/') for w in words]
  if not any(w.startswith('--source') for w in words):
    words.append(f'--source={folder}')
  with pytest.raises(error, match=message):
    run(*words)
  assert not hub.repos and not [r for r in hub.requests if 'repos/create' in r[1]]


def test_errors_of_the_hub_are_one_line_without_the_token(hub, folder, monkeypatch, caplog):
  from huggingface_hub import constants

  def refused(error, message):
    with pytest.raises(error, match=message) as found:
      run(f'--source={folder}', '--push=org/tuned')
    assert '\n' not in str(found.value)
    assert SECRET not in str(found.value) + caplog.text

  hub.broken = ('/commit/', 412)
  refused(DataError, r'refused the upload \(HTTP 412: broken\); the model there is unchanged')
  assert pushed(hub) == {}
  hub.broken = ('repos/create', 404)
  refused(ConfigError, 'the hub has no such place')
  hub.broken, hub.status = None, 500
  refused(DataError, 'HTTP 500: out of order')
  hub.status = 0
  (folder / 'README.md').write_text('---\na: [\n---\n')
  refused(DataError, 'Invalid metadata in README.md')
  (folder / 'README.md').unlink()
  monkeypatch.setenv('HF_TOKEN', OTHER)
  hub.repos.clear()
  refused(DataError, r'may not write there \(HTTP 403: .*belongs to org')
  monkeypatch.setenv('HF_TOKEN', 'hf_' + 'q' * 32)
  refused(DataError, 'your token is not valid .HTTP 401')
  monkeypatch.delenv('HF_TOKEN')
  refused(ConfigError, 'no token; log in with `hf auth login`')
  monkeypatch.setenv('HF_TOKEN', SECRET)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  refused(ConfigError, 'HF_HUB_OFFLINE is set')
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  refused(DataError, r'http://127.0.0.1:9 cannot be reached \(ConnectError')


def test_a_login_page_in_place_of_the_hub(hub, folder, monkeypatch):
  def page(handler):
    handler._body()
    handler.send_response(200)
    handler._finish(b'<html>log in</html>')

  monkeypatch.setattr(fake_hub._Handler, '_answer', page)
  with pytest.raises(DataError, match='did not answer as the hub does'):
    run(f'--source={folder}', '--push=org/tuned')


def test_a_gguf_folder_is_uploaded_too(hub, tmp_path):
  folder = tmp_path / 'gguf'
  folder.mkdir()
  write_toy(folder / 'toy.gguf', Toy(), 'gpt2')
  (folder / 'Modelfile').write_text('FROM ./toy.gguf\n')
  run(f'--source={folder}', '--push=org/tuned')
  assert pushed(hub) == tree(folder)
  with pytest.raises(ConfigError, match=r'toy.gguf is a file; give its folder'):
    run(f'--source={folder}', f'--target={folder}/toy.gguf', '--push=org/tuned')


def test_a_private_model_stays_private(hub, folder, caplog):
  run(f'--source={folder}', '--push=org/tuned')
  run(f'--source={folder}', '--push=org/tuned', '--public')
  assert hub.repos['models/org/tuned'].private and 'stays so' in caplog.text


def test_the_command_uploads_and_its_exit_codes(hub, folder):
  def command(**environment):
    words = [sys.executable, '-m', 'ftjax.convert', f'--source={folder}', '--push=org/tuned']
    done = subprocess.run(
      words, cwd=ROOT, env=os.environ | hub.env | environment, capture_output=True, text=True
    )
    assert SECRET not in done.stdout + done.stderr and 'Traceback' not in done.stderr
    return done

  done = command()
  commit = hub.repos['models/org/tuned'].refs['main']
  assert done.stdout == f'org/tuned: {hub.url}/org/tuned/commit/{commit}\n', done.stderr
  assert pushed(hub) == tree(folder)
  done = command(HF_TOKEN=OTHER)
  assert done.returncode == 3
  assert done.stderr.splitlines()[-1].startswith('error: --push=org/tuned: your token may not')


def test_nothing_is_uploaded_without_push(hub, folder, tmp_path):
  run(f'--source={folder}', f'--target={tmp_path / "out"}')
  assert not hub.requests
