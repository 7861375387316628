"""The model of any checkpoint of a run, ended or not, without a change to its workdir."""

import dataclasses
import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import tiny_model

from ftjax import cli, convert
from ftjax.config import validation
from ftjax.data import synthetic
from ftjax.experiment import fit, saved_model
from ftjax.hf import run_export
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.serving import generator
from ftjax.storage import files, snapshots

ROOT = Path(__file__).resolve().parents[1]


def tiny(name, **changes):
  """A shipped tiny config, in few steps, with every checkpoint kept."""
  spec = importlib.util.spec_from_file_location('tiny', ROOT / 'configs' / f'tiny_{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c: ml_collections.ConfigDict = module.get_config()
  for key, value in {
    'steps': 4,
    'optim.warmup_steps': 1,
    'checkpoint.every': 2,
    'checkpoint.keep': 9,
    'eval.prompts': (),
    'compile_cache': False,
    **changes,
  }.items():
    part, _, last = key.rpartition('.')
    (c[part] if part else c)[last] = value
  validation.validate(c)
  return c


def train(c, workdir):
  fit.fit(c, str(workdir), cli.algorithm(c.algorithm).build)
  one = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
  jax.set_mesh(one)  # the run's mesh of all devices would stay for the first test
  return workdir


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
  """A finished run with a moving average and a frozen leaf, over eight devices."""
  c = tiny('sft', **{
    'eval.every': 2,
    'optim.ema_decay': 0.5,
    'optim.freeze': (('embed/w', True), ('.*', False)),
    'checkpoint.best_metric': 'eval/loss',
    'checkpoint.best_mode': 'max',
    'grad_accum': 1,
  })  # fmt: skip
  return train(c, tmp_path_factory.mktemp('averaged') / 'run')


@pytest.fixture(scope='module')
def reward(tmp_path_factory):
  c = tiny('reward_model', **{'steps': 2, 'eval.every': 0})
  return train(c, tmp_path_factory.mktemp('reward') / 'run')


@pytest.fixture
def unended(averaged, tmp_path):
  """The same run as it was before its export."""
  shutil.copytree(averaged, tmp_path / 'run', ignore=shutil.ignore_patterns('export'))
  return tmp_path / 'run'


def content(folder):
  return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def tree(folder):
  """{file: (hash, time)} of everything in a folder."""
  return {
    str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns)
    for p in Path(folder).rglob('*')
    if p.is_file()
  }


def tensors(folder):
  source = SafetensorsFolder(folder)
  return {n: source.read(n) for n in source.tensors}


def test_the_best_checkpoint_of_a_finished_run_is_its_export(averaged, tmp_path):
  """best_mode max of a falling loss: the first checkpoint; so best and last differ."""
  assert snapshots.steps(str(averaged)) == [2, 4]
  for which in ('@best', '@2'):
    convert.convert(f'{averaged}{which}', str(tmp_path / 'out'), None)
    assert content(tmp_path / 'out') == content(averaged / 'export')
  convert.convert(f'{averaged}@last', str(tmp_path / 'last'), None)
  last, best = tensors(tmp_path / 'last'), tensors(averaged / 'export')
  assert last.keys() == best.keys()
  frozen = 'model.embed_tokens.weight'
  assert np.array_equal(last[frozen], best[frozen])
  assert not any(np.array_equal(last[n], best[n]) for n in last if n != frozen)


@pytest.mark.full
def test_the_last_checkpoint_of_a_reward_model_is_its_export(reward, tmp_path):
  convert.convert(f'{reward}@last', str(tmp_path / 'out'), None)
  assert content(tmp_path / 'out') == content(reward / 'export')
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['architectures'] == ['LlamaForSequenceClassification']
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert 'pipeline_tag: "text-classification"' in card and '"reward-model"' in card
  with pytest.raises(ConfigError, match='is a reward model; it scores text'):
    generator.Generator(f'{reward}@last', generator.Settings())


def test_a_run_that_has_not_ended_gives_its_newest_checkpoint_and_stays_as_it_is(
  averaged, unended, tmp_path, capsys
):
  (unended / 'checkpoints' / '6.orbax-checkpoint-tmp').mkdir()  # a save that is under way
  before = tree(unended)
  convert.convert(str(unended), str(tmp_path / 'out'), None)
  assert 'after step 4' in capsys.readouterr().out
  convert.convert(f'{averaged}@4', str(tmp_path / 'four'), None)
  assert content(tmp_path / 'out') == content(tmp_path / 'four')
  assert tree(unended) == before and (unended / 'checkpoints' / '6.orbax-checkpoint-tmp').is_dir()


def test_the_lock_of_a_live_run_does_not_matter(unended, tmp_path):
  lock = files.Lock(str(unended))
  try:
    convert.convert(f'{unended}@2', str(tmp_path / 'out'), 'bfloat16')
  finally:
    lock.release()
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['torch_dtype'] == 'bfloat16'
  assert {x.dtype.name for x in tensors(tmp_path / 'out').values()} == {'bfloat16'}


def test_an_export_that_is_older_than_a_checkpoint_is_not_the_newest(averaged, tmp_path, caplog):
  """The run ended, was given more steps, and goes on."""
  run = shutil.copytree(averaged, tmp_path / 'run')
  assert run_export.find_newest(str(run)) == str(run / 'export')
  os.utime(run / 'export' / 'config.json', (1, 1))
  assert run_export.find_newest(str(run)) is None and 'older than checkpoint 4' in caplog.text
  convert.convert(str(run), str(tmp_path / 'out'), None)
  convert.convert(f'{run}@4', str(tmp_path / 'four'), None)
  assert content(tmp_path / 'out') == content(tmp_path / 'four')


def test_a_checkpoint_that_cannot_be_read_is_passed_over(unended):
  (unended / 'checkpoints' / '4' / 'state' / '_METADATA').write_text('{')
  assert snapshots.steps(str(unended)) == [2]


def test_a_step_that_the_run_removes_meanwhile_gives_way_to_the_next(unended):
  seen = []

  def use(saved):
    seen.append(saved.step)
    if len(seen) == 1:
      shutil.copytree(unended / 'checkpoints' / '4', unended / 'checkpoints' / '6')
      shutil.rmtree(unended / 'checkpoints' / '4')
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved.load(lambda name: where, 'float32')
    return saved.step

  assert saved_model.with_step(str(unended), 'last', use) == 6 and seen == [4, 6]
  with pytest.raises(DataError, match=r'no such checkpoint; finalized are \[2, 6\]'):
    saved_model.with_step(str(unended), '4', use)


@pytest.mark.parametrize(
  ('which', 'message'),
  [
    ('@3', r'@3: there is no such checkpoint; finalized are \[2, 4\]'),
    ('@newest', 'no such file or folder'),
  ],
)
def test_a_step_that_is_not_there_is_named(unended, tmp_path, which, message):
  with pytest.raises(DataError, match=message):
    convert.convert(f'{unended}{which}', str(tmp_path / 'out'), None)
  assert not (tmp_path / 'out').exists()


def test_the_error_for_a_run_without_a_checkpoint_names_when_one_is_saved(unended, tmp_path):
  shutil.rmtree(unended / 'checkpoints')
  for call in (
    lambda: convert.convert(str(unended), str(tmp_path / 'out'), None),
    lambda: generator.Generator(str(unended), generator.Settings()),
  ):
    with pytest.raises(DataError, match=r'no checkpoint is finalized yet.*checkpoint\.every'):
      call()


def test_a_workdir_in_a_bucket_is_read_in_the_same_way(bucket, unended, averaged, tmp_path):
  bucket.upload(unended, 'run')
  assert snapshots.steps('gs://bucket/run') == [2, 4]
  convert.convert('gs://bucket/run@2', str(tmp_path / 'out'), None)
  assert content(tmp_path / 'out') == content(averaged / 'export')


def test_best_needs_a_metric(reward, tmp_path):
  with pytest.raises(DataError, match=r'@best: the run records no best.*best_metric is empty'):
    convert.convert(f'{reward}@best', str(tmp_path / 'out'), None)


def test_only_a_workdir_has_steps(averaged, tmp_path):
  with pytest.raises(DataError, match='export is not a workdir'):
    convert.convert(f'{averaged}/export@4', str(tmp_path / 'out'), None)
  folder = shutil.copytree(averaged / 'export', tmp_path / 'mine@4')  # a path of that name wins
  assert snapshots.parse(str(folder)) == (str(folder), '')


def change_meta(run, **changes):
  path = run / 'checkpoints' / '4' / 'meta' / 'metadata'
  saved = json.loads(path.read_text())
  saved['config'] |= changes
  path.write_text(json.dumps(saved))


def test_the_model_that_a_run_started_from_must_be_there(unended, averaged, tmp_path):
  change_meta(unended, **{'model.path': 'no/model', 'model.random': {}})
  with pytest.raises(DataError, match=r'started with model\.path=no/model, which is not there'):
    convert.convert(str(unended), str(tmp_path / 'out'), None)
  other = shutil.copytree(averaged / 'export', tmp_path / 'other')
  config = json.loads((other / 'config.json').read_text())
  (other / 'config.json').write_text(json.dumps(config | {'intermediate_size': 64}))
  change_meta(unended, **{'model.path': str(other)})
  with pytest.raises(DataError, match=r'mlp/down/w is of shape .*another model now'):
    convert.convert(str(unended), str(tmp_path / 'out'), None)
  tokenizer = json.loads((other / 'tokenizer_config.json').read_text())
  changed = tokenizer | {'chat_template': tokenizer['chat_template'] + ' '}
  (other / 'tokenizer_config.json').write_text(json.dumps(changed))
  with pytest.raises(DataError, match='chat template is not the one'):
    convert.convert(str(unended), str(tmp_path / 'out'), None)


def test_text_from_a_checkpoint_is_that_of_its_export(averaged, unended, tmp_path):
  convert.convert(f'{averaged}@4', str(tmp_path / 'four'), None)
  rows = [(f'x:{i}', {'prompt': p}) for i, p in enumerate(('7 + 5 =', '1 + 1 =', 'a'))]
  settings = generator.Settings(max_tokens=6)
  texts = [
    list(generator.Generator(str(path), settings).answer_rows(rows))
    for path in (unended, tmp_path / 'four')
  ]
  assert texts[0] == texts[1]
  assert [r.keys() for r in texts[0]] == [{'prompt', 'completion'}] * 3


@pytest.mark.full
def test_the_last_checkpoint_of_a_reward_adapter_is_its_merged_model(tmp_path):
  arch = dataclasses.replace(tiny_model.TINY, vocab_size=synthetic.VOCAB_SIZE, max_len=256)
  base = Path(tiny_model.write_folder(tmp_path / 'base', arch))
  for name, text in synthetic.byte_tokenizer().items():
    (base / name).write_bytes(text)
  changes = {'model.path': str(base), 'model.random': {}, 'lora.rank': 2, 'steps': 2}
  c = tiny('reward_model', **changes, **{'eval.every': 0})
  workdir = train(c, tmp_path / 'run')
  for source in (f'{workdir}@last', str(workdir)):
    convert.convert(source, str(tmp_path / 'out'), 'bfloat16')
    found = (tmp_path / 'out' / 'model.safetensors').read_bytes()
    if '@' in source:
      assert found == (workdir / 'merged' / 'model.safetensors').read_bytes()
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'library_name: "transformers"' in card and 'AutoPeftModel' not in card
  with pytest.raises(ConfigError, match='is the source itself, the export of it'):
    convert.convert(f'{workdir}@last', str(workdir / 'export'), None)
  own = (workdir / 'export' / 'README.md').read_text()
  assert 'AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1)' in own
  c.lora.merge = False
  train(c, workdir)
  assert not (workdir / 'merged').exists(), 'it may be of an older adapter'
