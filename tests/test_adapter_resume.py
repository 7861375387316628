"""What an adapter run continues from: its own checkpoint, the adapter of another run, or the model
after merging one. Another base, or another adapter, is refused.
"""

import contextlib
import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_model
from test_saved_model import tiny, train

from ftjax import convert
from ftjax.algorithms import dpo, token_loss
from ftjax.data import synthetic
from ftjax.experiment import init_from
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.hf import load
from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.serving import generator

ADAPTER = {
  'lora.rank': 4,
  'lora.alpha': 8.0,
  'lora.base': 'nf4',
  'lora.block': 8,
  'lora.init': 'pissa',
  'lora.train': 'embed/w',
  'lora.merge_kl': 1.0,
}
# One layer, so that a run takes a moment.
ARCH = dataclasses.replace(
  tiny_model.TINY,
  vocab_size=synthetic.VOCAB_SIZE,
  max_len=256,
  stacks=((tiny_model.TINY.stacks[0][0], 1),),
)


def settings(folder, algorithm='sft', **changes):
  own = {'model.path': str(folder), 'model.random': {}, 'data.train': 'sums:60', 'eval.every': 2}
  if algorithm != 'sft':
    own |= {'data.train': 'pairs:60', 'data.eval_fraction': 0.3}
  return tiny(algorithm, **(own | ADAPTER | changes))


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Runs of this file have a mesh of one device."""
  make = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sharding, 'make_mesh', lambda s, d=None: make(dict.fromkeys(s, 1), d or jax.devices()[:1])
    )
    yield


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return tiny_model.write_folder(tmp_path_factory.mktemp('base') / 'model', ARCH)


@pytest.fixture(scope='module')
def finished(base, tmp_path_factory):
  """Workdir of an adapter run of four steps on `base`."""
  return train(settings(base), tmp_path_factory.mktemp('finished'))


@contextlib.contextmanager
def other_bit(folder):
  """Another base while it lasts: one bit of a weight is another."""
  path = f'{folder}/model.safetensors'
  with open(path, 'rb') as file:
    content = file.read()
  with open(path, 'wb') as file:
    file.write(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
  try:
    yield
  finally:
    with open(path, 'wb') as file:
      file.write(content)


def evaluated(workdir):
  """The loss over the evaluation rows after the last step."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [row['loss'] for row in rows if row['split'] == 'eval'][-1]


def begin(c, workdir):
  """(a run before its first step, its parameters)."""
  run = experiment.start(c, str(workdir))
  return run, run.load_first()


# Another base.


@pytest.mark.full
def test_a_resume_on_another_base_is_refused(base, finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'run')
  before = sorted(p.name for p in (workdir / 'checkpoints').iterdir())
  with other_bit(base), pytest.raises(ConfigError, match=r'another run.*model: other content'):
    train(settings(base, steps=6), workdir)
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == before


def test_an_adapter_is_not_continued_on_another_base(base, finished, tmp_path):
  told = r'the adapter was trained on .*SHA-256 .*give the base that it was trained on'
  with other_bit(base), pytest.raises(DataError, match=told):
    train(settings(base, init_from=str(finished)), tmp_path)
  assert not (tmp_path / 'checkpoints').exists() or not list((tmp_path / 'checkpoints').iterdir())


def test_no_text_and_no_merged_model_of_an_adapter_on_another_base(base, finished, tmp_path):
  with other_bit(base):
    for path in (finished, finished / 'export'):
      with pytest.raises(DataError, match='the adapter was trained on'):
        generator.Generator(str(path), generator.Settings())
      with pytest.raises(DataError, match='the adapter was trained on'):
        convert.convert(str(path), str(tmp_path / 'merged'), None)
  assert not (tmp_path / 'merged').exists()


# Another adapter.

CHANGED = {
  'lora.rank': 8,
  'lora.alpha': 16.0,
  'lora.targets': '.*attn.*',
  'lora.rank_pattern': (('layer0/attn/q', 2),),
  'lora.alpha_pattern': (('layer0/attn/q', 2.0),),
  'lora.rslora': True,
  'lora.dora': True,
  'lora.init': 'uniform',
  'lora.train': 'final_norm/scale',
  'lora.base': 'nf4',
  'lora.block': 4,
  'lora.on_init_from': 'merge',
}


def test_a_resume_with_another_adapter_is_refused_by_name(base, finished, tmp_path):
  """Also one without, and with the base held in another way."""
  workdir = shutil.copytree(finished, tmp_path / 'run')
  with pytest.raises(ConfigError, match='another run') as told:
    train(settings(base, steps=6, **CHANGED), workdir)
  for key in CHANGED:
    assert (f'{key}: ' in str(told.value)) == (key != 'lora.base'), key
  held = {'lora.base': 'int8', 'lora.block': 64}
  with pytest.raises(ConfigError, match=r"lora\.base: 'nf4' -> 'int8'"):
    train(settings(base, steps=6, **held), workdir)
  with pytest.raises(ConfigError, match=r'lora\.rank: 4 -> 0'):
    c = tiny('sft', **{'model.path': base, 'model.random': {}, 'data.train': 'sums:60', 'steps': 6})
    train(c, workdir)


OTHERS = {
  'lora.rank': ({'lora.rank': 2}, 'lora.rank'),
  'lora.alpha': ({'lora.alpha': 16.0}, 'lora.alpha'),
  'lora.targets': ({'lora.targets': '.*attn.*'}, 'lora.targets'),
  'lora.dora': ({'lora.dora': True}, 'lora.dora'),
  'lora.train': ({'lora.train': ''}, 'lora.train'),
  'lora.base': ({'lora.base': 'int8', 'lora.block': 64}, 'lora.base'),
  'lora.block': ({'lora.block': 4}, 'lora.block'),
}


@pytest.mark.parametrize(('changes', 'told'), OTHERS.values(), ids=OTHERS)
def test_another_adapter_does_not_continue_one(changes, told, base, finished, tmp_path):
  with pytest.raises(ConfigError, match=f'another adapter than .*{told}.* as the adapter'):
    begin(settings(base, init_from=str(finished), **changes), tmp_path)


# Continued, merged, and trained whole.


def test_a_continued_adapter_begins_where_the_other_ended(base, finished, tmp_path):
  """Every leaf bit by bit, and the loss; the factors that PiSSA subtracts are those of the first
  run.
  """
  run, params = begin(settings(base, init_from=str(finished)), tmp_path)
  with ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.restore(finished / 'checkpoints' / '4' / 'state')
  ended = trees.flatten(saved['params']) | trees.flatten(saved['frozen'])
  flat = trees.flatten(params)
  for name in kinds.names(run.arch, 'adapter'):
    np.testing.assert_array_equal(flat[name], ended[name], name)
  found = token_loss.evaluation(run)(params, lambda: False)
  assert found['loss'] == pytest.approx(evaluated(finished), rel=1e-6)
  assert run.arch.adapter.continued and run.arch.untrained() is run.arch


def test_a_merged_adapter_is_the_base_of_a_new_one(base, finished, tmp_path):
  c = settings(
    base,
    init_from=str(finished),
    **{
      'lora.on_init_from': 'merge',
      'lora.base': 'float32',
      'lora.block': 64,
      'lora.init': 'uniform',
    },
  )
  run, params = begin(c, tmp_path)
  assert run.first_source == f'{finished}/merged' and not run.arch.adapter.continued
  found = token_loss.evaluation(run)(params, lambda: False)
  # Its weights are bfloat16.
  assert found['loss'] == pytest.approx(evaluated(finished), rel=2e-3)
  assert not np.asarray(trees.flatten(params)['stack0/block0/attn/q/lora_b']).any()


def test_full_tuning_starts_from_the_merged_model(base, finished, tmp_path):
  own = {'model.path': base, 'model.random': {}, 'data.train': 'sums:60'}
  run, params = begin(tiny('sft', init_from=str(finished), **own), tmp_path)
  assert run.arch.adapter is None
  flat = trees.flatten(params)
  merged = load.load_params(
    f'{finished}/merged', run.arch, sharding.shardings(run.mesh, kinds.axes(run.arch)), jnp.float32
  )
  for name, leaf in trees.flatten(merged).items():
    np.testing.assert_array_equal(flat[name], leaf)


def test_without_a_merged_model_the_message_says_how_to_make_it(base, finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'run')
  shutil.rmtree(workdir / 'merged')
  own = {'model.path': base, 'model.random': {}, 'data.train': 'sums:60'}
  with pytest.raises(ConfigError, match=r'lora.rank=0 starts from its merged model') as told:
    begin(tiny('sft', init_from=str(workdir), **own), tmp_path / 'next')
  source, target = str(told.value).split('--source=')[1].split(' --target=')
  convert.convert(source, target, None)
  start = init_from.find(tiny('sft', init_from=str(workdir), **own))
  assert start.base == f'{workdir}/merged'


@pytest.mark.full
def test_the_reference_of_a_continued_run_is_the_adapter_it_continues(base, finished, tmp_path):
  """And not the base: the loss of DPO begins at ln 2, also after a resume."""
  c = settings(base, 'dpo', init_from=str(finished), steps=2)
  c.checkpoint.every = 1
  train(c, tmp_path / 'dpo')
  rows = [
    json.loads(line) for line in (tmp_path / 'dpo' / 'metrics.jsonl').read_text().splitlines()
  ]
  first = next(row for row in rows if row['split'] == 'train')
  assert first['loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert abs(first['rewards/chosen']) < 1e-5
  run, params = begin(settings(base, 'dpo', init_from=str(finished)), tmp_path / 'other')
  trainer = Trainer(run, dpo.make_loss(run.forward, run.config))
  kept = trees.flatten(trainer.fresh().frozen['reference'])
  flat = trees.flatten(params)
  assert 'stack0/block0/attn/q/lora_a' in kept and 'embed/w' in kept
  for name in kinds.names(run.arch, 'adapter'):
    np.testing.assert_array_equal(kept[name], flat[name])


@pytest.mark.full
@pytest.mark.parametrize('how', ['continue', 'merge'])
def test_an_adapter_run_from_another_ends_like_any(how, base, finished, tmp_path):
  """Its export names the base that it was trained on, and can be read and continued in turn."""
  c = settings(base, init_from=str(finished), **{'lora.on_init_from': how})
  workdir = train(c, tmp_path / how)
  named = json.loads((workdir / 'export' / 'adapter_config.json').read_text())
  expected = base if how == 'continue' else f'{finished}/merged'
  assert named['base_model_name_or_path'] == expected
  answer = generator.Generator(str(workdir), generator.Settings(max_tokens=4))
  assert isinstance(answer.answer([answer.encode_text('1 + 2 =')], 0)[0], str)
  again = train(
    settings(base, init_from=str(finished), steps=6, **{'lora.on_init_from': how}), workdir
  )
  rows = [json.loads(line) for line in (again / 'metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows if r['split'] == 'train'] == list(range(1, 7))
