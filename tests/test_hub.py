"""Models by their names on the hub, against a hub on loopback: files, commits, errors, caches."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_hub
import pytest
import tiny_model
from test_saved_model import tiny

from ftjax import convert
from ftjax.data import synthetic
from ftjax.experiment import model_record, run
from ftjax.hf import load, peft, safetensors
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.planning import known_models
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import hub as hub_lib
from ftjax.telemetry import manifest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests' / 'parity' / 'golden'
ARCH = dataclasses.replace(tiny_model.TINY, vocab_size=synthetic.VOCAB_SIZE, max_len=512)
SECRET = 'hf_' + 'A1b2C3d4' * 4


def files_of(folder):
  return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
  with fake_hub.asked(tmp_path, monkeypatch) as fake:
    yield fake


def sharded(folder):
  """The golden model in three shards with an index."""
  source = SafetensorsFolder(GOLDEN / 'llama_tied')
  folder.mkdir()
  safetensors.write_folder(folder, source.tensors, source.read, max_shard_bytes=40_000)
  return files_of(GOLDEN / 'llama_tied') | files_of(folder)


def test_only_what_is_needed_is_downloaded_and_only_once(hub, tmp_path):
  content = sharded(tmp_path / 'shards')
  content.pop('model.safetensors')
  shards = {n for n in content if n.endswith('.safetensors')}
  assert len(shards) > 2
  content |= {'tokenizer.json': b'{}', 'README.md': b'x', 'additional_chat_templates/a.jinja': b'a'}
  others = {
    'pytorch_model.bin': b'pickle',
    'consolidated.safetensors': b'x',
    'model.fp16.safetensors': b'x',
    'onnx/model.onnx': b'x',
    'original/consolidated.00.pth': b'x',
  }
  commit = hub.repo('org/m').push(content | others)
  assert load.read_config('org/m')['model_type'] == 'llama'
  assert load.tokenizer_files('org/m').keys() >= {
    'tokenizer.json',
    'additional_chat_templates/a.jinja',
  }
  small = {'config.json', 'generation_config.json', 'tokenizer.json', 'a.jinja', 'README.md'}
  assert set(hub.fetched()) == small | {safetensors.INDEX_FILE}, 'no weights yet'
  source = load.open_source('org/m')
  assert set(hub.fetched()) == small | {safetensors.INDEX_FILE} | shards
  assert len(hub.fetched()) == len(set(hub.fetched()))
  assert source.fingerprint() == load.fingerprint(GOLDEN / 'llama_tied')
  assert source.place.endswith(f'models--org--m/snapshots/{commit}')
  hub.requests.clear()
  fake_hub.forget()
  assert load.read_config(f'org/m@{commit}') and load.open_source(f'org/m@{commit}')
  assert not hub.requests, 'a commit in the cache needs no network'


@pytest.mark.parametrize(
  ('name', 'error', 'words'),
  [
    ('org/none', ConfigError, 'there is no such model .*check the name; if it is private, log in'),
    ('org/m@v9', ConfigError, 'no such revision; give a branch, a tag or a commit'),
    ('org/private', ConfigError, 'no such model .*if it is private, log in with `hf auth login`'),
    ('org/gated', DataError, r'is gated \(HTTP 401\): accept its terms at URL/org/gated with an'),
    ('org/pickled', DataError, 'only pickled weights .*never read here; expected safetensors'),
    ('org/quantized', DataError, 'holds m.Q4_0.gguf: run `hf download org/quantized FILE.gguf'),
    ('org/adapter', DataError, 'this is a LoRA adapter, not a whole model'),
    ('org/notes', DataError, 'config.json is missing on the hub; it holds README.md'),
    ('org/-', ConfigError, ''),
  ],
)
def test_the_error_for_a_name_without_a_model(hub, name, error, words):
  model = files_of(GOLDEN / 'llama_tied')
  config = {'config.json': model['config.json']}
  hub.repo('org/m').push(model)
  for repo, content in (
    ('private', model),
    ('gated', model),
    ('pickled', config | {'pytorch_model.bin': b'x'}),
    ('quantized', config | {'m.Q4_0.gguf': b'x', 'm.Q8_0.gguf': b'x'}),
    ('adapter', {'adapter_config.json': b'{}', 'adapter_model.safetensors': b'x'}),
    ('notes', {'README.md': b'x'}),
  ):
    hub.repo(f'org/{repo}').push(content)
  hub.repo('org/private').needs = hub.repo('org/gated').needs = SECRET
  hub.repo('org/gated').gated = True
  if name == 'org/-':
    assert not hub_lib.is_name(name)
    return
  with pytest.raises(error, match=f'(?s){words.replace("URL", hub.url)}'):
    load.read_config(name)
    load.open_source(name)
  assert not {'pytorch_model.bin', 'm.Q4_0.gguf'} & set(hub.fetched())


def test_an_adapter_of_the_hub(hub):
  """Its files are downloaded, no others; its revision of a base on the hub is read too."""
  folder = GOLDEN / 'peft' / 'llama_lora'
  config = json.loads((folder / 'adapter_config.json').read_text())
  config |= {'base_model_name_or_path': 'org/base', 'revision': 'a' * 40}
  content = {n: (folder / n).read_bytes() for n in ('adapter_model.safetensors',)}
  content |= {'adapter_config.json': json.dumps(config).encode(), 'optimizer.pt': b'x'}
  hub.repo('org/adapter').push(content)
  found = peft.find('org/adapter')
  assert found.base.path == f'org/base@{"a" * 40}'
  assert found.source.fingerprint() == peft.read(folder).source.fingerprint()
  assert 'optimizer.pt' not in hub.fetched()
  assert peft.find(GOLDEN / 'llama_tied') is None


def test_permission_comes_with_the_token_of_the_library(hub, monkeypatch, tmp_path, caplog):
  for name in ('private', 'gated'):
    hub.repo(f'org/{name}').push(files_of(GOLDEN / 'llama_tied'))
    hub.repo(f'org/{name}').needs = SECRET
  hub.repo('org/gated').gated = True
  monkeypatch.setenv('HF_TOKEN', 'hf_' + 'x' * 32)
  for name, words in (('private', 'whether your token may'), ('gated', 'account of your token')):
    with pytest.raises((ConfigError, DataError), match=words) as refused:
      load.read_config(f'org/{name}')
    assert 'x' * 32 not in str(refused.value)
  monkeypatch.delenv('HF_TOKEN')
  (tmp_path / 'hf' / 'token').write_text(SECRET)
  for name in ('private', 'gated'):
    assert load.read_config(f'org/{name}')
  assert SECRET not in caplog.text


def test_without_a_network_the_cache_is_used_or_the_reason_given(hub, monkeypatch, caplog):
  from huggingface_hub import constants

  commit = hub.repo('org/m').push(files_of(GOLDEN / 'llama_tied'))
  load.read_config('org/m')
  hub.requests.clear()
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  fake_hub.forget()
  assert load.read_config('org/m')['model_type'] == 'llama'
  with pytest.raises(DataError, match=r'not looked up \(HF_HUB_OFFLINE is set\)'):
    load.open_source('org/m')  # its weights were never wanted
  with pytest.raises(DataError, match=r'HF_HUB_OFFLINE is set'):
    load.read_config('org/other')
  assert not hub.requests
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  hub.status = 503
  fake_hub.forget()
  assert hub_lib.pin('org/m') == f'org/m@{commit}'
  assert 'Using cached commit hash' in caplog.text
  with pytest.raises(DataError, match=r'the answer was HTTP 503: try again later'):
    load.read_config('org/other')
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(DataError, match=r'http://127.0.0.1:9 cannot be reached \(ConnectError'):
    load.read_config('org/other')


def test_a_local_path_wins_and_so_does_its_folder(hub, tmp_path):
  hub.repo('org/my-model').push(files_of(GOLDEN / 'llama_tied'))
  os.makedirs('org/my-model')
  with pytest.raises(DataError, match=r'^org/my-model: config.json is missing'):
    load.read_config('org/my-model')
  with pytest.raises(DataError, match=r'no such model.*Did you mean org/my-model\?'):
    load.read_config('org/my-modle')
  assert not hub.requests
  for text in ('gs://org/m', '/org/m', './m', 'm', 'a/b/c', 'org2/m.gguf', 'org2/../m', 'org2/m@'):
    assert not hub_lib.is_name(text), text
  for text in ('org2/m', 'org2/m@main', 'org2/m@refs/pr/1', 'o/M-1.5_x@v1.0'):
    assert hub_lib.is_name(text), text


def test_a_run_keeps_its_commit_when_the_branch_moves(hub, tmp_path):
  model, longer = (
    files_of(
      tiny_model.write_folder(tmp_path / str(length), dataclasses.replace(ARCH, max_len=length))
    )
    for length in (64, 96)
  )
  first = hub.repo('org/m').push(model)
  c = tiny('sft', **{'model.path': 'org/m', 'seq_len': 32, 'model.random': {}})
  started = run.start(c, str(tmp_path / 'run'), with_data=False)
  assert c.model.path == started.model.source == f'org/m@{first}'
  known = started.model.fingerprint
  second = hub.repo('org/m').push(longer)
  fake_hub.forget()
  for asked, commit in (('org/m', first), ('org/m@main', second), (f'org/m@{first}', first)):
    assert model_record.pin(asked, str(tmp_path / 'run')) == f'org/m@{commit}'
  c.model.path = 'org/m'
  again = run.start(c, str(tmp_path / 'run'), with_data=False)
  assert (again.model.source, again.model.fingerprint) == (f'org/m@{first}', known)
  other = run.start(
    tiny('sft', **{'model.path': 'org/m', 'seq_len': 32, 'model.random': {}}),
    str(tmp_path / 'other'),
    with_data=False,
  )
  assert other.model.source == f'org/m@{second}' and other.model.fingerprint != known
  made = manifest.build({'model.path': c.model.path, 'init_from': ''}, manifest.Made())
  assert made['models'] == {'model.path': f'org/m@{first}'}


def test_plan_and_convert_take_names(hub, tmp_path):
  hub.repo('org/m').push(files_of(GOLDEN / 'llama_tied'))
  hub.repo('org/Llama-3.2-1B').push({'config.json': b'{}'})
  shape = known_models.read('org/m@main')
  assert shape == json.loads((GOLDEN / 'llama_tied' / 'config.json').read_bytes())
  assert 'model.safetensors' not in hub.fetched()
  assert known_models.read('org/Llama-3.2-1B') == known_models.SHAPES['Llama-3.2-1B']
  convert.convert('org/m', str(tmp_path / 'out'), None)
  assert load.fingerprint(tmp_path / 'out') == load.fingerprint(GOLDEN / 'llama_tied')


OPEN = "from ftjax.hf import load; print('started', flush=True); print(load.fingerprint('org/m'))"


def process(hub):
  return subprocess.Popen(
    [sys.executable, '-c', OPEN],
    cwd=ROOT,
    env=os.environ | hub.env,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )


def test_a_killed_download_resumes_and_processes_share_one(hub, tmp_path):
  content = sharded(tmp_path / 'shards')
  content.pop('model.safetensors')
  first, *_, last = sorted(n for n in content if n.endswith('.safetensors'))
  hub.repo('org/m').push(content)
  wanted = load.fingerprint(GOLDEN / 'llama_tied')
  hub.slow_files[last] = 30.0
  killed = process(hub)
  blobs = tmp_path / 'hf' / 'hub' / 'models--org--m' / 'snapshots'
  deadline = time.monotonic() + 60
  while not (list(blobs.glob(f'*/{first}')) and hub.begun(last)):
    assert killed.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  done = {p.name for p in blobs.glob('*/*')}
  assert first in done and last not in done, 'half a file is no file'
  hub.requests.clear()
  hub.slow_files[last] = 0.5
  both = [process(hub) for _ in range(2)]
  found = [p.communicate(timeout=60)[0].split() for p in both]
  assert found == [['started', wanted]] * 2
  assert hub.fetched().count(last) == 1, 'the other process waited'
  assert not done & set(hub.fetched()), 'what was finished is not fetched again'


def test_names_cost_no_import_until_they_are_used():
  code = "import sys, ftjax.hf.load, ftjax.storage.hub as h; h.is_name('a/b'); "
  code += "print(*(m for m in ('huggingface_hub', 'transformers', 'datasets') if m in sys.modules))"
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert (out.stdout.strip(), out.returncode) == ('', 0), out.stderr


def test_a_folder_named_as_the_organization_appears_later(hub):
  """The run goes on, and resumes."""
  hub.repo('org/m').push(files_of(GOLDEN / 'llama_tied'))
  workdir = 'run'
  Path(workdir).mkdir()
  pinned = model_record.pin('org/m', workdir)
  model_record.keep_commits({'org/m': pinned}, workdir)
  Path('org').mkdir()
  fake_hub.forget()
  assert model_record.pin('org/m', workdir) == pinned
  assert hub_lib.is_pinned(pinned) and load.read_config(pinned)['model_type'] == 'llama'
  assert not hub_lib.is_name('org/misspelt'), 'a local folder wins over other names'
  Path('org/m').mkdir()
  assert model_record.pin('org/m', workdir) == 'org/m'


def test_a_workdir_in_a_folder_named_as_the_organization(hub, tmp_path):
  """A fresh start, which makes the folder, and a resume."""
  model = tiny_model.write_folder(tmp_path / 'm', dataclasses.replace(ARCH, max_len=64))
  commit = hub.repo('org/m').push(files_of(model))
  for _ in range(2):
    c = tiny('sft', **{'model.path': 'org/m', 'seq_len': 32, 'model.random': {}})
    assert run.start(c, 'org/run', with_data=False).model.source == f'org/m@{commit}'
    assert Path('org').is_dir()
    fake_hub.forget()


@pytest.mark.parametrize('answer', [b'{}', b'[]', b'null', b'<html>log in</html>'])
def test_a_login_page_in_place_of_the_hub(hub, monkeypatch, answer):
  def page(handler):
    handler.send_response(200)
    handler._finish(answer)

  monkeypatch.setattr(fake_hub._Handler, '_answer', page)
  with pytest.raises(DataError, match=r'did not answer as the hub does .*proxies and login pages'):
    hub_lib.pin('org/m')
