"""What an adapter does not do and must refuse, what it must not copy, and factors in bfloat16."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import tiny_pairs

from ftjax.algorithms import dpo, sft
from ftjax.config import keys
from ftjax.config.algorithms import Auxiliary
from ftjax.experiment import adapters, init_from
from ftjax.experiment import run as experiment
from ftjax.experiment.auxiliary import AuxiliaryModel
from ftjax.experiment.model import Model
from ftjax.experiment.run import Run
from ftjax.experiment.saved_model import SavedModel
from ftjax.experiment.trainer import Trainer
from ftjax.families import table
from ftjax.hf import load, peft_export
from ftjax.models import kinds
from ftjax.models.attention import Tokens
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError


def adapted(arch, **lora):
  c = keys.default()
  c.lora.update({'rank': 4, 'alpha': 8.0, 'base': 'float32'} | lora)
  return adapters.adapted(arch, c)


def test_a_limit_of_a_merge_that_is_not_made():
  with pytest.raises(ConfigError, match=r'lora.merge_kl=0.5 does nothing with lora.merge=False'):
    tiny_pairs.settings(lora__rank=2, lora__merge=False, lora__merge_kl=0.5)


WRONG = {
  'freeze': ((('.*lora_.*', True), ('.*', False)), 'optim.freeze freezes the whole adapter'),
  'multipliers': (
    (('layer0/attn/q/w', 5.0), ('.*', 1.0)),
    r"optim.multipliers \(the base is frozen\): \['layer0/attn/q/w'\] match no parameter",
  ),
}


@pytest.mark.parametrize(
  ('targets', 'expected'),
  [
    ('q_proj', '(.*/)?(attn/q)'),
    ('(q_proj|v_proj)', '(.*/)?(attn/q|attn/v)'),
    ("['gate_proj', 'lm_head']", '(.*/)?(mlp/gate|head)'),
  ],
)
def test_targets_with_the_names_of_peft_are_answered_with_ours(targets, expected):
  arch = dataclasses.replace(tiny_model.TINY, tied=False)
  with pytest.raises(ConfigError) as found:
    adapted(arch, targets=targets)
  hint = str(found.value).partition("names are here: lora.targets='")[2].rstrip("'")
  assert hint == expected
  names = {m.name.rpartition('/attn/')[2] for m in adapted(arch, targets=hint).adapter.maps}
  assert len(names) == len(expected.split('|'))


@pytest.mark.parametrize('change', [{'tied': True}, {'tied': False, 'num_labels': 1}])
def test_a_head_that_a_model_has_not_is_not_proposed(change):
  arch = dataclasses.replace(tiny_model.TINY, **change)
  with pytest.raises(ConfigError, match='embed/w may be trained whole') as found:
    adapted(arch, targets='lm_head')
  assert 'names are here' not in str(found.value) and 'head/w' not in str(found.value)
  with pytest.raises(ConfigError, match=r"lora.targets='\(\.\*/\)\?\(attn/q\)'"):
    adapted(arch, targets='q_proj|lm_head')


@pytest.mark.parametrize('key', WRONG)
def test_tables_of_the_optimizer_that_would_do_nothing(key):
  table, message = WRONG[key]
  c = tiny_pairs.settings('dpo', lora__rank=2, **{f'optim__{key}': table})
  run = tiny_pairs.shapes_only(c)
  with pytest.raises(ConfigError, match=message):
    Trainer(run, sft.make_loss(run.forward, c))


def test_a_fresh_state_holds_the_base_that_was_loaded(monkeypatch, use_mesh):
  """A copy would make the start of a run need more memory than its steps."""
  loaded = []
  use_mesh(data=2, fsdp=2)

  def load(run, load_first=Run.load_first):
    loaded.append(load_first(run))
    return loaded[-1]

  monkeypatch.setattr(Run, 'load_first', load)
  c = tiny_pairs.settings(lora__rank=2, lora__base='nf4', lora__block=8)
  run = tiny_pairs.shapes_only(c)
  trainer = Trainer(run, dpo.make_loss(run.forward, c))
  state = trainer.fresh()
  (first,) = (trees.flatten(x) for x in loaded)
  frozen = trees.flatten(state.frozen)
  names = kinds.names(run.arch, 'base')
  assert names and all(frozen[n] is first[n] for n in names)
  # It lies where the step expects it.
  for name, leaf in trees.flatten(trainer.abstract.frozen).items():
    assert (frozen[name].shape, frozen[name].dtype) == (leaf.shape, leaf.dtype)
    assert frozen[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name


def test_the_scale_of_an_adapter_is_not_rounded_to_bfloat16():
  """2.006 is nearer to 2 than to any other number in bfloat16; updates with it are 0.3 % larger on
  average.
  """
  arch = adapted(tiny_model.TINY, targets='.*/mlp/down')
  base = {n: x for n, x in trees.flatten(tiny_model.init(tiny_model.TINY)).items()}
  whole = jax.jit(
    lambda flat: kinds.completed(arch, trees.unflatten(flat), lambda name: None, 0, jnp.float32)
  )(base)
  flat = trees.flatten(whole)
  flat |= {n: x + 0.3 for n, x in flat.items() if n.endswith('/lora_b')}
  scaled = flat | {n: x * 1.003 for n, x in flat.items() if n.endswith('/lora_scale')}
  tokens = tiny_model.place(np.arange(128, dtype=np.int32).reshape(2, 64), 'batch', 'seq')
  where = Tokens(jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(64), (2, 64)))

  @functools.partial(jax.jit, static_argnums=1)
  def hidden(flat, dtype):
    return kinds.apply(arch, trees.unflatten(flat), tokens, where, dtype=dtype)

  moved = {}
  for dtype in ('float32', 'bfloat16'):
    before, after = (np.asarray(hidden(f, dtype), np.float64) for f in (flat, scaled))
    moved[dtype] = after - before
  # The change that float32 sees is there in bfloat16, among the noise of its rounding.
  exact = moved['float32']
  assert (moved['bfloat16'] * exact).sum() / (exact * exact).sum() == pytest.approx(1, abs=0.3)


def test_a_merged_model_that_is_older_than_the_adapter_is_no_start(tmp_path):
  for name, file in (('export', 'adapter_config.json'), ('merged', 'config.json')):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text('{}')
  c = keys.default()
  c.init_from = str(tmp_path)
  os.utime(tmp_path / 'merged' / 'config.json', ns=(2 * 10**18, 2 * 10**18))
  assert init_from.find(c).base == f'{tmp_path}/merged'
  os.utime(tmp_path / 'merged' / 'config.json', ns=(10**18, 10**18))
  with pytest.raises(ConfigError, match='older than the adapter'):
    init_from.find(c)


GOLDEN = str(pathlib.Path(__file__).parent / 'parity' / 'golden' / 'llama_untied_gqa')


def saved(labels, **more):
  """A checkpoint on the model of golden/, which has no tokenizer."""
  arch = dataclasses.replace(table.architecture(load.read_config(GOLDEN)), num_labels=labels)
  model = Model(GOLDEN, adapted(arch), None, (), {}, {}, lambda: load.fingerprint(GOLDEN))
  return SavedModel('', 0, model, 'float32', GOLDEN, **more)


def test_the_base_of_init_from_has_the_fingerprint_of_its_own_kind():
  """Also where model.path names the same folder."""
  found = [saved(0, base_record=r)._fingerprint() for r in ('model', 'init_from')]
  assert found == [saved(0).model.fingerprint, load.fingerprint(GOLDEN)]
  assert found[0] != found[1]


def test_the_base_of_a_reward_models_checkpoint_is_a_language_model():
  """Its head is not read; the score is the adapter's."""
  arch = saved(1).model.arch
  places = trees.flatten(sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch)))
  base = trees.flatten(saved(1)._load_base(places.__getitem__, 'float32'))
  assert base.keys() == set(kinds.names(arch, 'base'))


def test_a_reward_model_that_is_an_adapter_is_known_by_its_settings_and_its_base(tmp_path):
  arch = saved(1).model.arch
  places = trees.flatten(sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch)))
  base = saved(1)._load_base(places.__getitem__, 'float32')
  params = kinds.completed(arch, base, places.__getitem__, 0, jnp.float32)
  home = shutil.copytree(GOLDEN, tmp_path / 'base')
  peft_export.export(
    params,
    arch,
    tmp_path / 'adapter',
    base=str(home),
    sha256='',
    source_config=load.read_config(home),
    tokenizer_files={},
    stop_ids=(),
  )
  record = Auxiliary('reward model', 'rollout', 'rollout.reward_model', has_score=True)
  model = AuxiliaryModel(record, str(tmp_path / 'adapter'), arch, '')

  def found():
    return model.fingerprint(lambda: '', str(tmp_path))

  first = found()
  assert found() == first
  weights = home / 'model.safetensors'
  content = bytearray(weights.read_bytes())
  content[-1] ^= 1
  weights.write_bytes(content)
  other_base = found()
  config = tmp_path / 'adapter' / 'adapter_config.json'
  config.write_text(json.dumps(json.loads(config.read_text()) | {'lora_alpha': 3}))
  assert len({first, other_base, found()}) == 3


def test_an_adapter_of_the_hub_that_a_run_continues_is_pinned(monkeypatch):
  """A resume reads it again, wherever the branch has moved since."""
  monkeypatch.setattr(experiment.model_record, 'pin', lambda path, workdir: path and f'{path}@0')
  for rank, expected in ((2, 'org/adapter@0'), (0, 'org/adapter')):
    c = keys.default()
    c.init_from, c.lora.rank = 'org/adapter', rank
    experiment._pin_models(c, '')
    assert c.init_from == expected
