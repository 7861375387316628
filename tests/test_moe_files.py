"""Experts in files: config.json, tensors of each expert and of all together, adapters, counts."""

import functools
import json
import re

import family_models
import jax
import numpy as np
import pytest
import tiny_adapters
from safetensors.numpy import load_file, save_file

from ftjax.families import table
from ftjax.hf import load, peft, peft_export, peft_names, peft_weights
from ftjax.models import counts, kinds
from ftjax.models.architecture import MoeSpec
from ftjax.planning import known_models, suggest, topology
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError

NAMES = {'mixtral': ('block_sparse_moe', 'w1', 'w3', 'w2')}
NAMES['qwen3_moe'] = ('mlp', 'gate_proj', 'up_proj', 'down_proj')
EVERY = pytest.mark.parametrize('name', NAMES)
FILE = 'model.safetensors'


def load_params(folder):
  arch = table.architecture(load.read_config(folder))
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  return trees.flatten(load.load_params(folder, arch, places, np.float32))


def fused(name, folder):
  """A folder of a case in the form that transformers 5 computes with; returns its tensors."""
  family_models.write_folder(name, folder)
  tensors, (block, gate, up, down) = load_file(folder / FILE), NAMES[name]
  for layer, spec in enumerate(family_models.architecture(name).layers()):
    if not isinstance(spec.mlp, MoeSpec):
      continue
    start, new = f'model.layers.{layer}.{block}.', f'model.layers.{layer}.mlp.'

    def stack(which, start=start, count=spec.mlp.num_experts):
      return np.stack([tensors.pop(f'{start}experts.{e}.{which}.weight') for e in range(count)])

    tensors[f'{new}gate.weight'] = tensors.pop(f'{start}gate.weight')
    both = np.concatenate([stack(gate), stack(up)], axis=1)
    tensors[f'{new}experts.gate_up_proj'] = both
    tensors[f'{new}experts.down_proj'] = stack(down)
  save_file(tensors, folder / FILE)
  return tensors


@EVERY
def test_both_forms_of_the_files_are_read(name, tmp_path):
  family_models.write_folder(name, tmp_path / 'apart')
  tensors = fused(name, tmp_path / 'fused')
  assert not any('experts.0' in n for n in tensors)
  expected, found = (load_params(tmp_path / n) for n in ('apart', 'fused'))
  assert found.keys() == expected.keys()
  for n, x in expected.items():
    np.testing.assert_array_equal(found[n], x, err_msg=n)


def test_a_mixture_of_the_forms_and_a_gap_are_refused(tmp_path):
  tensors, experts = fused('qwen3_moe', tmp_path / 'x'), 'model.layers.2.mlp.experts'

  def refused(text, changed):
    save_file(changed, tmp_path / 'x' / FILE)
    with pytest.raises(DataError, match=re.escape(text)):
      load_params(tmp_path / 'x')

  one = np.zeros((12, 24), np.float32)
  both = f'has both {experts}.0.gate_proj.weight and {experts}.gate_up_proj; delete one of them'
  refused(both, tensors | {f'{experts}.0.gate_proj.weight': one})
  gap = {n: x for n, x in tensors.items() if n != f'{experts}.down_proj'}
  refused(f'missing {experts}.0.down_proj.weight', gap)
  short = f'{experts}.gate_up_proj is [5, 24, 24], expected [8, 24, 24]'
  refused(short, tensors | {f'{experts}.gate_up_proj': tensors[f'{experts}.gate_up_proj'][:5]})


# config.json.


def read(name, **changes):
  content = family_models.config(name) | changes
  return table.architecture({k: v for k, v in content.items() if v is not ...})


def test_what_a_config_says_of_experts():
  arch = read('qwen3_moe', mlp_only_layers=[], decoder_sparse_step=2)
  assert [isinstance(s.mlp, MoeSpec) for s in arch.layers()] == [False, True, False, True]
  assert arch.mixtures()[0] == MoeSpec(8, 3, 12, renormalize=False, balance=0.05)
  assert read('qwen3_moe', num_local_experts=..., num_experts=8) == read('qwen3_moe')
  # transformers' own default, and no loss at all.
  assert read('mixtral', router_aux_loss_coef=...).mixtures()[0].balance == 0.001
  assert read('mixtral', router_aux_loss_coef=0).mixtures()[0].balance == 0
  assert read('mixtral', sliding_window=None).layers()[0].mixer.window is None
  windowed = read('qwen3_moe', use_sliding_window=True, sliding_window=7)
  assert {s.mixer.window for s in windowed.layers()} == {7}


@pytest.mark.parametrize(
  ('name', 'changes', 'text'),
  [
    ('mixtral', {'num_experts_per_tok': 9}, 'num_experts_per_tok=9; expected 1 to the number of'),
    ('mixtral', {'num_experts_per_tok': 0}, 'num_experts_per_tok=0'),
    ('mixtral', {'num_local_experts': 'six'}, "num_local_experts='six' is text"),
    ('mixtral', {'router_aux_loss_coef': -0.1}, 'router_aux_loss_coef=-0.1'),
    ('mixtral', {'router_aux_loss_coef': True}, 'router_aux_loss_coef=True'),
    ('mixtral', {'output_router_logits': 3}, 'output_router_logits=3'),
    ('mixtral', {'n_shared_experts': 2}, 'n_shared_experts=2: not known here'),
    ('qwen3_moe', {'num_experts': 5}, 'num_experts=5 and num_local_experts=8; delete the wrong'),
    ('qwen3_moe', {'mlp_only_layers': [4]}, 'mlp_only_layers has 4; there are 4 layers'),
    ('qwen3_moe', {'mlp_only_layers': 'all'}, "mlp_only_layers='all'; expected a list"),
    ('qwen3_moe', {'mlp_only_layers': [0, 1, 2, 3]}, 'leave no layer with experts'),
    ('qwen3_moe', {'decoder_sparse_step': 0}, 'decoder_sparse_step=0'),
    ('qwen3_moe', {'norm_topk_prob': 1}, 'norm_topk_prob=1'),
    ('qwen3_moe', {'moe_intermediate_size': 1.5}, 'moe_intermediate_size=1.5'),
  ],
)
def test_rubbish_is_refused_by_name(name, changes, text):
  with pytest.raises(DataError, match=re.escape(text)):
    read(name, **changes)


# Adapters.


@pytest.mark.parametrize('lora', [{}, {'dora': True, 'init': 'pissa'}], ids=str)
def test_an_adapter_of_experts_is_read_as_it_was_written(lora, tmp_path):
  arch = tiny_adapters.adapted(family_models.architecture('mixtral'), **lora)
  family_models.write_folder('mixtral', tmp_path / 'base')
  params = tiny_adapters.init(arch)
  peft_export.export(
    params,
    arch,
    tmp_path / 'adapter',
    base=str(tmp_path / 'base'),
    sha256='',
    source_config={},
    tokenizer_files={},
    stop_ids=(),
  )
  places = trees.flatten(sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch)))
  found = peft_weights.load_adapter(peft.read(tmp_path / 'adapter'), arch, places, {})
  own = {n: x for n, x in trees.flatten(params).items() if n in kinds.names(arch, 'adapter')}
  assert found.keys() == own.keys()
  for n, x in own.items():
    np.testing.assert_allclose(found[n], x, rtol=1e-6, err_msg=n)
  config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
  assert 'model.layers.0.block_sparse_moe.experts.5.w2' in config['target_modules']


def test_adapters_that_peft_cannot_load_are_named(caplog):
  adapted = functools.partial(tiny_adapters.adapted, family_models.architecture('qwen3_moe'))
  experts = 'layer[023]/mlp/'
  for targets in ('.*/attn/.*', f'{experts}.*', f'{experts}down', f'{experts}(gate|up)|.*/attn/q'):
    assert not peft_names.obstacle(adapted(targets=targets)), targets
  for text, lora in {
    'DoRA of experts': dict(targets=f'{experts}.*', dora=True),
    'unequal adapters': dict(targets=f'{experts}gate'),
    'of a layer without experts': dict(targets='.*/mlp/.*'),
  }.items():
    assert text in peft_names.obstacle(adapted(**lora)), lora
  attention, whole = '.*/attn/.*', 'mlp/gate/w is trained whole, which it would leave out'
  assert whole in peft_names.obstacle(
    adapted(targets=attention, train=f'{experts}(gate|up|down)/w')
  )
  assert not peft_names.obstacle(adapted(targets=attention, train='.*/router/w'))
  mixtral = tiny_adapters.adapted(
    family_models.architecture('mixtral'), targets=attention, train='.*/router/w'
  )
  assert 'no module model.layers.0.block_sparse_moe.gate' in peft_names.obstacle(mixtral)
  unequal = dict(targets='layer0/mlp/.*'), dict(rank_pattern=((f'{experts}down', 2),))
  for lora in unequal:
    assert 'unequal' in peft_names.obstacle(adapted(**({'targets': f'{experts}.*'} | lora)))
  peft_export.check(adapted(targets=f'{experts}.*', dora=True))
  assert 'PEFT 0.21 with transformers 5 will not load this adapter: DoRA of experts' in caplog.text


def test_dropout_of_experts_is_refused():
  arch = family_models.architecture('mixtral')
  with pytest.raises(ConfigError, match=r'lora.dropout=0.1 with an adapter on experts'):
    kinds.declared(tiny_adapters.adapted(arch, dropout=0.1))
  assert kinds.declared(tiny_adapters.adapted(arch, dropout=0.1, targets='.*/attn/.*'))


# Counts.


@pytest.mark.parametrize(
  ('name', 'whole', 'active'),
  # As published: 30.5 and 3.3 billion, 46.7 and 12.9 billion.
  [('Qwen3-30B-A3B', 30_532_122_624, 3.35e9), ('Mixtral-8x7B-v0.1', 46_702_792_704, 12.88e9)],
)
def test_a_token_is_computed_by_its_own_experts(name, whole, active):
  arch = table.architecture(known_models.SHAPES[name])
  assert counts.num_params(arch) == whole
  embedding = arch.vocab_size * arch.model_dim  # is looked up, and counts as active all the same
  assert counts.matmul_params(arch) + embedding == pytest.approx(active, rel=0.003)


def test_proposed_meshes_spread_the_experts():
  """Where all experts' matrices would be gathered, and only as far as they divide."""
  arch = table.architecture(known_models.SHAPES['Qwen3-30B-A3B'])
  where = topology.parse('v5p:4x4x4')
  found = suggest.candidates(arch, where, 64, 4096, 2, 6)
  assert found[0].expert > 1 and found[0].overrides()['mesh.expert'] == found[0].expert
  for c in found:
    assert c.data * c.fsdp * c.context * c.tensor * c.expert == where.num_devices
    assert 128 % c.expert == 0 and 64 % (c.data * c.fsdp * c.expert) == 0
  dense = table.architecture(known_models.SHAPES['Llama-3.1-8B'])
  assert {c.expert for c in suggest.candidates(dense, where, 64, 4096, 2, 6)} == {1}
