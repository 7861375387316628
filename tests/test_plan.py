"""The planner: names of slices, collectives read from HLO, the account of a compiled step against
arrays that live, the entry's exit codes.
"""

import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax import config, experiment, fit, forecast, sft
from ftjax.models.architecture import from_hf
from ftjax.planning import account, shapes, suggest, topology
from ftjax.runtime.errors import ConfigError

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu: pip install ftjax[plan]'
)


@pytest.mark.parametrize(
  ('text', 'kind', 'shape', 'slices', 'devices', 'local'),
  [
    ('v5e:16x16', 'v5e', (16, 16), 1, 256, 256),
    ('2xv5e:16x16', 'v5e', (16, 16), 2, 512, 256),
    ('v5p:4x4x8', 'v5p', (4, 4, 8), 1, 128, 128),
    ('tpu7x:2x2x1', 'tpu7x', (2, 2, 1), 1, 8, 8),
    ('h200:8', 'h200', (8,), 1, 8, 8),
    ('h200:8x4', 'h200', (8, 4), 1, 32, 8),
    ('cpu:8', 'cpu', (8,), 1, 8, 8),
  ],
)
def test_names_of_slices(text, kind, shape, slices, devices, local):
  found = topology.parse(text)
  assert (found.kind, found.shape, found.slices) == (kind, shape, slices)
  assert (found.num_devices, found.local_devices) == (devices, local)


@pytest.mark.parametrize(
  'text', ['v5e', 'v5e:16', 'v9:4x4', 'v5e:0x4', 'h200:8x4x2', '2xcpu:8', '']
)
def test_what_names_no_slice(text):
  with pytest.raises(ConfigError, match='--topology'):
    topology.parse(text)


# Collectives

HLO = """\
HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %w = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %g = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
}

%outer (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %l = (s32[], bf16[16,8]) while(%p), condition=%c, body=%inner, TRIPS3
  %r = f32[2,8]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}

ENTRY %main (x: f32[16,8]) -> f32[16,8] {
  %o = (s32[], bf16[16,8]) while(%t), condition=%c, body=%outer, TRIPS5
  %d = (s32[], f32[]) while(%t), condition=%c, body=%tail
  %a-start = (bf16[4,8], bf16[8,8]) all-gather-start(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %a-done = bf16[8,8] all-gather-done(%a-start)
}

%tail (p: (s32[], f32[])) -> (s32[], f32[]) {
  %q = f32[10]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
}
"""
HLO = re.sub(r'TRIPS(\d)', r'backend_config={"known_trip_count":{"n":"\1"}}', HLO)


def test_collectives_by_hand():
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), devices=jax.devices())
  found = {(c.kind, c.axes): c for c in account.collectives(HLO, mesh, unknown_trips=7)}
  inner = found['all-gather', 'fsdp+tensor']  # members 0 to 3 differ in both axes
  assert (inner.count, inner.bytes, inner.ways) == (15, 15 * 256, 4)
  assert inner.sent == 15 * 256 * 3 / 4
  scattered = found['reduce-scatter', 'fsdp']
  assert (scattered.count, scattered.bytes) == (5, 5 * 4 * 2 * 8 * 4)
  assert (found['all-gather', 'tensor'].bytes, found['all-gather', 'tensor'].ways) == (128, 2)
  total = found['all-reduce', 'fsdp+tensor']
  assert (total.count, total.bytes, total.sent) == (7, 7 * 40, 7 * 40 * 2 * 7 / 8)


def test_an_asynchronous_transfer_counts_once_though_three_fusions_hold_its_text():
  fusion = """
%f{0} (w: bf16[4,8]) -> bf16[32,8] {{
  %g = bf16[32,8]{{1,0}} all-gather(%w), channel_id={1}, replica_groups=[1,8]<=[8], dimensions={{0}}
}}
"""
  body = """
%body (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %a = bf16[32,8]{1,0} fusion(%p), kind=kCustom, calls=%f1
  %b = bf16[32,8]{1,0} fusion(%a), kind=kCustom, calls=%f2
  %c = bf16[32,8]{1,0} fusion(%b), kind=kCustom, calls=%f3
  %d = bf16[32,8]{1,0} fusion(%b), kind=kCustom, calls=%f4
}

ENTRY %main (x: f32[16,8]) -> f32[16,8] {
  %l = (s32[], bf16[16,8]) while(%p), condition=%c, body=%body, TRIPS
}
""".replace('TRIPS', 'backend_config={"known_trip_count":{"n":"5"}}')
  text = ''.join(fusion.format(i, channel) for i, channel in ((1, 7), (2, 7), (3, 7), (4, 8)))
  mesh = jax.make_mesh((8,), ('fsdp',), devices=jax.devices())
  (found,) = account.collectives(text + body, mesh)
  assert (found.count, found.bytes) == (2 * 5, 2 * 5 * 32 * 8 * 2)


@pytest.mark.parametrize(
  ('text', 'rows'),
  [
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=4,'b'=2], device_ids=(7,6,5,4,3,2,1,0) {'b'}", [[7, 6], [5, 4], [3, 2], [1, 0]]),
    ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ('[2,4]<=[4,2]T(1,0)', [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ('{{0,1},{2,3}}', [[0, 1], [2, 3]]),
  ],
)
def test_groups_of_devices(text, rows):
  found = account.groups(f'%x), replica_groups={text}, to_apply=%add')
  np.testing.assert_array_equal(found, rows)


def test_collectives_of_a_compiled_scan():
  mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'), devices=jax.devices())
  body = lambda x, _: (jax.lax.all_gather(x, 'tensor', tiled=True)[:4] + 1, None)  # noqa: E731
  fn = jax.shard_map(
    lambda x: jax.lax.scan(body, x, None, length=6)[0],
    mesh=mesh,
    in_specs=P('tensor'),
    out_specs=P('tensor'),
    check_vma=False,
  )
  whole = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=NamedSharding(mesh, P('tensor')))
  with jax.set_mesh(mesh):
    compiled = jax.jit(fn).lower(whole).compile()
  (found,) = account.collectives(compiled.as_text(), mesh)
  assert (found.kind, found.axes, found.count) == ('all-gather', 'tensor', 6)
  assert found.bytes == 6 * 16 * 3 * 4


def test_a_replicated_parameter_is_told():
  mesh = jax.make_mesh((8,), ('fsdp',), devices=jax.devices())
  leaf = lambda spec: jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
  assert account.replicated({'a': leaf(P('fsdp')), 'b': leaf(P())}, mesh) == {'b': 64}


# A whole step


def small():
  c = config.default()
  c.model.random = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    vocab_size=320,
  )
  c.data.train = 'sums:20'
  c.batch_size, c.seq_len, c.grad_accum, c.steps = 16, 64, 2, 5
  return c


def planned(c, name='cpu:8'):
  arch = from_hf(experiment.random_config(c.model.random.to_dict()))
  return forecast.make(c, topology.parse(name), arch, sft.make_loss), arch


@pytest.mark.parametrize('mesh', [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_the_plan_counts_the_bytes_that_live(mesh):
  c = small()
  c.mesh.update(mesh)
  found, arch = planned(c)
  assert found.fits and found.devices == 8
  with jax.set_mesh(jax.sharding.get_mesh()):
    whole = experiment.sharding.make_mesh({a: c.mesh[a] for a in experiment.sharding.AXES})
    with jax.set_mesh(whole):
      run = experiment.without_data(c, whole, arch)
      trainer = fit.Trainer(run, sft.make_loss(arch, c))
      state = trainer.fresh()
      host = np.zeros((2, 8, 64), np.int32)
      batch = {k: jax.device_put(host, s) for k, s in run.batch_shardings(micro=True).items()}
  first = jax.devices()[0]
  live = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves((state, batch))
    for shard in leaf.addressable_shards
    if shard.device == first
  )
  assert found.memory.arguments == live
  assert found.memory.parameters == account.shard_bytes(trainer.abstract.params)
  assert found.memory.optimizer >= 2 * found.memory.parameters
  assert found.memory.peak >= live


def test_layers_are_gathered_inside_the_scan():
  c = small()
  found, arch = planned(c)
  gathers = [x for x in found.collectives if x.kind == 'all-gather' and x.axes == 'fsdp']
  assert gathers
  layers = arch.num_layers * c.grad_accum
  assert sum(x.count for x in gathers) >= layers
  assert set(found.replicated) == {
    'final_norm/scale',
    'stack0/block0/attn_norm/scale',
    'stack0/block0/mlp_norm/scale',
  }


@pytest.mark.parametrize(
  ('mesh', 'changes', 'told'),
  [
    (dict(data=8), dict(batch_size=8), r'batch_size / grad_accum = 4 rows .* 8 devices'),
    (dict(expert=8), dict(batch_size=8), r'batch_size / grad_accum = 4 rows .* 8 devices'),
    (dict(data=8), {'eval.batch_size': 12}, r'eval.batch_size = 12 rows .* 8 devices'),
    (
      dict(fsdp=8),
      {'model.random.hidden_size': 60, 'model.random.num_attention_heads': 2},
      r'embed dimension of 60 .* 8 ways.*mesh.fsdp',
    ),
    (dict(tensor=8), {}, r'kv_heads dimension of 2 cannot be split 8 ways; change mesh.tensor'),
    (
      dict(fsdp=4, tensor=2),
      {'model.random.vocab_size': 321},
      r'vocab dimension of 321 cannot be split 2 ways; change mesh.tensor',
    ),
    (
      dict(fsdp=4, tensor=2),
      {'model.random.intermediate_size': 129},
      r'ffn dimension of 129 cannot be split 2 ways; change mesh.tensor',
    ),
    (dict(context=8), dict(seq_len=72), r'seq_len=72 is no multiple of 2 x mesh.context=16'),
    (dict(data=3), {}, r'makes 3 devices, but there are 8'),
  ],
)
def test_a_mesh_that_cannot_be_fails_before_compiling(mesh, changes, told, monkeypatch):
  c = small()
  c.mesh.update(dict(data=1, fsdp=1, context=1, tensor=1, expert=1) | mesh)
  c.update_from_flattened_dict(changes)
  monkeypatch.setattr(forecast, '_compile', lambda trainer: pytest.fail('it was compiled'))
  with pytest.raises(ConfigError, match=told):
    planned(c)


def test_no_stack_of_layers_stands_gathered():
  """Each layer's weights are gathered inside the loop, and nowhere all layers at once."""
  c = small()
  c.seq_len = 40  # buffers are known by their size: no activation has that of a weight
  found, _ = planned(c)
  matrices = {f'stack0/block0/attn/{n}/w' for n in 'qkvo'}
  matrices |= {f'stack0/block0/mlp/{n}/w' for n in ('gate', 'up', 'down')}
  assert set(found.gathering.layered) == matrices
  assert found.gathering.whole == found.gathering.unseen == ()


# Shapes and suggestions


@pytest.mark.parametrize(
  ('name', 'billions'),
  [
    ('SmolLM2-135M', 0.134515008),
    ('Llama-3.2-1B', 1.235814400),
    ('Llama-3.2-3B', 3.212749824),
    ('Llama-3.1-8B', 8.030261248),
    ('Llama-3.1-70B', 70.553706496),
  ],
)
def test_shapes_have_the_published_number_of_parameters(name, billions):
  assert from_hf(shapes.read(f'models/{name}-Instruct')).num_params() == round(billions * 1e9)


def test_an_unknown_model_names_the_known_ones():
  with pytest.raises(ConfigError, match=r'model.path=nowhere/Foo.*Llama-3.1-8B'):
    shapes.read('nowhere/Foo')


def test_candidates_divide():
  arch, where = from_hf(shapes.read('Llama-3.1-8B')), topology.parse('2xv5e:16x16')
  found = suggest.candidates(arch, where, 64, 8192, 2, 8)
  assert found
  for c in found:
    assert c.data * c.fsdp * c.context * c.tensor == where.num_devices
    assert 64 % (c.data * c.fsdp * c.grad_accum) == 0 and 8192 % (128 * c.context) == 0


# The entry


def plan(*arguments):
  code, told = tiny_run.run('plan', list(arguments))
  return code, told


def test_the_entry_prints_json():
  code, told = plan(
    '--config=tiny_sft',
    '--topology=cpu:4',
    '--json',
    '--config.remat=full',
    '--config.mesh.data=2',
  )
  found = json.loads(told[told.index('{') :])
  assert code == 0 and found['fits'] and found['devices'] == 4
  assert found['settings']['mesh.fsdp'] == 2 and found['settings']['remat'] == 'full'
  assert found['memory']['arguments'] > 0 and found['cost']['calibrated'] is False


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    (['--topology=v5e'], r'--topology=v5e: expected'),
    (['--topology=cpu:3'], r'embed dimension of 64 cannot be split 3 ways'),
    (['--topology=cpu:4', '--config.mesh.tensor=4'], r'cannot be split 4 ways'),
  ],
)
def test_the_entry_refuses(arguments, told):
  code, said = plan('--config=tiny_sft', *arguments)
  assert code == 2 and told.replace('\\', '') in said


@needs_libtpu
def test_a_tpu_slice_that_is_too_small_exits_5_with_one_that_fits():
  code, told = plan(
    *('--config=sft_llama32_1b', '--topology=v5e:2x2', '--json', '--tries=2'),
    *('--config.batch_size=32', '--config.eval.batch_size=32', '--config.remat=none'),
  )
  found = json.loads(told[told.index('{"') : told.rindex('}') + 1])
  assert code == 5 and not found['fits'] and math.isfinite(found['capacity'])
