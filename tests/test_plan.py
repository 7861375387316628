"""The planner: names of slices, collectives read from HLO, the account of a compiled step against
arrays that live, the entry's exit codes.
"""

import dataclasses
import gc
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.algorithms import sft
from ftjax.config import keys, validation
from ftjax.experiment import adapters, auxiliary
from ftjax.experiment import run as experiment
from ftjax.experiment.model import random_config
from ftjax.experiment.trainer import Trainer
from ftjax.families import table as families
from ftjax.generation import weights
from ftjax.generation.engine import Engine
from ftjax.generation.queue import ring_capacity
from ftjax.models import counts, kinds
from ftjax.planning import collectives, compile, cost, hlo, known_models, memory, suggest, topology
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install '.[plan]'"
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
  found = {
    (c.kind, c.axes): c for c in collectives.collectives(hlo.read(HLO), mesh, unknown_trips=7)
  }
  inner = found['all-gather', 'fsdp+tensor']  # members 0 to 3 differ in both axes
  assert (inner.count, inner.bytes, inner.group_size) == (15, 15 * 256, 4)
  assert inner.sent == 15 * 256 * 3 / 4
  scattered = found['reduce-scatter', 'fsdp']
  assert (scattered.count, scattered.bytes) == (5, 5 * 4 * 2 * 8 * 4)
  assert (found['all-gather', 'tensor'].bytes, found['all-gather', 'tensor'].group_size) == (128, 2)
  total = found['all-reduce', 'fsdp+tensor']
  assert (total.count, total.bytes, total.sent) == (7, 7 * 40, 7 * 40 * 2 * 7 / 8)


def test_the_result_of_a_started_collective_is_inputs_and_outputs():
  """As of GPUs, where arrays go together: f32[8, 4] and f32[8] in, a quarter of each out."""
  text = """\
ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %s = ((f32[8,4]{1,0}, f32[8]{0}), (f32[2,4]{1,0}, f32[2]{0})) reduce-scatter-start(%x, %y), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
"""  # noqa: E501
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), devices=jax.devices())
  (found,) = collectives.collectives(hlo.read(text), mesh)
  assert (found.kind, found.axes, found.bytes) == ('reduce-scatter', 'fsdp', (32 + 8) * 4)
  assert found.sent == 160 * 3 / 4


def test_the_trips_of_a_loop_stand_in_its_condition():
  """As libtpu 0.0.52 writes loops: over layers, and over chunks whose number is computed."""
  text = """\
%layers.clone (wide.param.98: (s32[], bf16[16,8])) -> pred[] {
  %constant.327.clone.3 = s32[]{:T(128)} constant(24), metadata={op_name="while/cond/lt"}
  %constant.328 = s32[]{:T(128)} constant(-1), metadata={op_name="while/cond/mod"}
  %gte.1 = s32[]{:T(128)} get-tuple-element(%wide.param.98), index=0
  ROOT %lt.121 = pred[]{:T(512)} compare(%gte.1, %constant.327.clone.3), direction=LT, metadata={}
}

%chunks (wide.param.16: (s32[], s32[])) -> pred[] {
  %gte.2 = s32[]{:T(128)} get-tuple-element(%wide.param.16), index=5
  %gte.3 = s32[]{:T(128)} get-tuple-element(%wide.param.16), index=0
  ROOT %lt.115 = pred[]{:T(512)} compare(%gte.3, %gte.2), direction=LT, metadata={}
}

%body (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %g = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups=[1,8]<=[8], dimensions={0}
}

%tail (p: (s32[], s32[])) -> (s32[], s32[]) {
  %q = f32[10]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (x: bf16[16,8]) -> bf16[16,8] {
  %one = (s32[], bf16[16,8]) while(%t), condition=%layers.clone, body=%body, metadata={}
  %two = (s32[], s32[]) while(%u), condition=%chunks, body=%tail, metadata={}
}
"""
  mesh = jax.make_mesh((8,), ('fsdp',), devices=jax.devices())
  found = {c.kind: c.count for c in collectives.collectives(hlo.read(text), mesh, unknown_trips=7)}
  assert found == {'all-gather': 24, 'all-reduce': 7}


def test_what_a_sparse_core_sums_is_seen():
  """As libtpu 0.0.52 writes it for tpu7x: an asynchronous call of a custom call of the sum."""
  text = """\
%called_computation.52 (p: bf16[4096,1024]) -> bf16[4096,1024] {
  ROOT %all-reduce.140 = bf16[4096,1024]{1,0} all-reduce(%p), channel_id=45, replica_groups=[1,8]<=[8], to_apply=%add
}

%async_computation.18 (p: bf16[4096,1024]) -> bf16[4096,1024] {
  ROOT %custom-call.40 = bf16[4096,1024]{1,0} custom-call(%p), custom_call_target="TODO", called_computations={%called_computation.52}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[4096,1024]) -> bf16[4096,1024] {
  %s = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%async_computation.18
  %d = bf16[4096,1024]{1,0} async-done(%s)
}
"""  # noqa: E501
  mesh = jax.make_mesh((8,), ('fsdp',), devices=jax.devices())
  (found,) = collectives.collectives(hlo.read(text), mesh)
  assert (found.kind, found.count, found.bytes) == ('all-reduce', 1, 4096 * 1024 * 2)


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
  """As libtpu 0.0.52 writes one for v5e."""
  text = """\
%all-reduce-scatter.1.clone.1 (input.10: bf16[2816,1024]) -> bf16[2816,256] {
  %all-reduce.61 = bf16[2816,1024]{1,0} all-reduce(%input.10), channel_id=24, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[2816,256]{1,0} dynamic-slice(%all-reduce.61, %c, %m), dynamic_slice_sizes={2816,256}
}

ENTRY %main (x: bf16[2816,1024]) -> bf16[2816,256] {
  %s = bf16[2816,256]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone.1
}
"""  # noqa: E501
  mesh = jax.make_mesh((4,), ('fsdp',), devices=jax.devices()[:4])
  (found,) = collectives.collectives(hlo.read(text), mesh)
  assert (found.kind, found.count, found.bytes) == ('reduce-scatter', 1, 2816 * 1024 * 2)
  assert found.sent == found.bytes * 3 / 4


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
  (found,) = collectives.collectives(hlo.read(text + body), mesh)
  assert (found.count, found.bytes) == (2 * 5, 2 * 5 * 32 * 8 * 2)


def test_what_crosses_slices_is_read_from_the_hosts_transfers():
  attributes = '_xla_megascale_transfer_type="ALL_REDUCE",_xla_megascale_target="{1,2}x{0:3}"'
  send = f'(bf16[36,8]{{1,0}}, u32[], token[]) send(%a, %t), frontend_attributes={{{attributes}}}'
  text = f"""
%body (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {{
  %s = {send}
  %d = token[] send-done(%s), frontend_attributes={{{attributes}}}
  %g = bf16[16,8]{{1,0}} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={{0}}
}}

ENTRY %main (x: f32[16,8]) -> f32[16,8] {{
  %l = (s32[], bf16[16,8]) while(%p), condition=%c, body=%body, TRIPS
}}
"""
  text = text.replace('TRIPS', 'backend_config={"known_trip_count":{"n":"5"}}')
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), devices=jax.devices())
  found = collectives.collectives(hlo.read(text), mesh, domains=[0] * 4 + [1] * 4)
  size = 5 * 36 * 8 * 2
  assert collectives.Collective('all-reduce', 'data', 2, 5, size, size, network=True) in found
  assert [c.network for c in found if c.kind == 'all-gather'] == [False] and len(found) == 2


def test_a_group_across_hosts_goes_over_the_network():
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), devices=jax.devices())
  line = '  %g = f32[8]{{0}} all-reduce(%w), replica_groups={}, to_apply=%add\n'
  entry = 'ENTRY %main (x: f32[8]) -> f32[8] {\n'
  for groups, axes, network in (
    ('[4,2]<=[2,4]T(1,0)', 'data', True),
    ('[2,4]<=[8]', 'fsdp', False),
  ):
    text = entry + line.format(groups) + '}\n'
    (found,) = collectives.collectives(hlo.read(text), mesh, domains=[0] * 4 + [1] * 4)
    assert (found.axes, found.network) == (axes, network)
    assert not collectives.collectives(hlo.read(text), mesh)[0].network  # on one host


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
  found = collectives.groups(f'%x), replica_groups={text}, to_apply=%add')
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
  (found,) = collectives.collectives(hlo.read(compiled.as_text()), mesh)
  assert (found.kind, found.axes, found.count) == ('all-gather', 'tensor', 6)
  assert found.bytes == 6 * 16 * 3 * 4


def test_a_replicated_parameter_is_reported():
  mesh = jax.make_mesh((8,), ('fsdp',), devices=jax.devices())
  leaf = lambda spec: jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
  assert memory.replicated({'a': leaf(P('fsdp')), 'b': leaf(P())}, mesh) == {'b': 64}


# A whole step


def small():
  c = keys.default()
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
  arch = families.architecture(random_config(c.model.random.to_dict()))
  return compile.make(c, topology.parse(name), arch, sft.make_loss), arch


NF4 = {'rank': 4, 'base': 'nf4', 'block': 8}


@pytest.mark.parametrize(
  ('mesh', 'lora'),
  [
    pytest.param(dict(fsdp=8), {}, marks=pytest.mark.full),
    (dict(data=2, fsdp=2, tensor=2), {}),
    pytest.param(dict(fsdp=4, tensor=2), NF4, marks=pytest.mark.full),
  ],
  ids=str,
)
def test_the_plan_counts_the_bytes_that_live(mesh, lora):
  """Every array that lives after a step of a real run, its metrics left out, on each device."""
  c = small()
  c.mesh.update(mesh)
  c.lora.update(lora)
  found, arch = planned(c)
  assert found.fits and found.devices == 8
  whole = sharding.make_mesh({a: c.mesh[a] for a in sharding.AXES})
  with jax.set_mesh(whole):
    gc.collect()
    before = jax.live_arrays()  # held, so that no new array takes an old one's identity
    known = {id(a) for a in before}
    run = experiment.without_data(c, whole, arch)
    trainer = Trainer(run, sft.make_loss(run.forward, c))
    step = trainer.compile()
    state, batch = trainer.fresh(), {}
    host = np.zeros((2, 8, 64), np.int32)
    for name, where in run.batch_shardings(micro=True).items():
      dtype = np.float32 if name == 'weights' else np.int32
      batch[name] = jax.device_put(host.astype(dtype), where)
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    del metrics
    gc.collect()
    live = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
      if id(array) not in known:
        for shard in array.addressable_shards:
          live[shard.device] += shard.data.nbytes
  assert set(live.values()) == {found.memory.arguments}, live
  assert memory.shard_bytes((state, batch)) == found.memory.arguments
  weights = trainer.abstract.params, trainer.abstract.frozen
  assert found.memory.parameters == memory.shard_bytes(weights)
  assert found.memory.optimizer >= 2 * memory.shard_bytes(trainer.abstract.params)
  assert (found.trained < found.parameters) == bool(lora)
  assert found.memory.peak >= found.memory.arguments
  split = found.memory.gradients + found.memory.activations
  assert found.memory.gradients > 0 and split >= found.memory.temporaries


def small_rollout(algorithm, **overrides):
  c = small()
  c.algorithm, c.grad_accum, c.batch_size = algorithm, 1, 4
  c.data.train, c.rollout.rewards = 'sums:20', 'exact'
  c.rollout.group, c.rollout.max_tokens, c.rollout.slots = 4, 16, 16
  c.update_from_flattened_dict(overrides)
  validation.validate(c)
  arch = families.architecture(random_config(c.model.random.to_dict()))
  make_loss = importlib.import_module(f'ftjax.algorithms.{algorithm}').make_loss
  return compile.make(c, topology.parse('cpu:8'), arch, make_loss), arch, c


def one_device(tree):
  """Bytes of arrays on the first device."""
  first = jax.devices()[0]
  shards = [s for a in jax.tree.leaves(tree) for s in a.addressable_shards if s.device == first]
  return sum(s.data.nbytes for s in shards)


@pytest.mark.parametrize('mesh', [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
def test_the_plan_counts_the_memory_of_rollouts(mesh):
  """The copy that samples and its cache are as large as those of a real rollout."""
  changes = {f'mesh.{a}': n for a, n in mesh.items()} | {'policy.kl_coef': 0.1}
  found, arch, c = small_rollout('grpo', **changes)
  whole = sharding.make_mesh({a: c.mesh[a] for a in sharding.AXES})
  with jax.set_mesh(whole):
    run = experiment.without_data(c, whole, arch)
    run.watchdog = experiment.Watchdog({'restore': 0.0})
    params = run.load_params('', 'float32')
  copy = weights.rollout_params(params, arch, weights.rollout_mesh(whole), jnp.float32)
  assert found.rollout.weights == one_device(copy)
  assert found.rollout.auxiliary == one_device(params), 'the reference'
  engine = Engine(arch, jnp.float32, (), 0, slots=16)
  with jax.set_mesh(weights.rollout_mesh(whole)):
    # Prompts of at most 48 tokens, and completions of 16.
    capacity = ring_capacity(48, 16, engine.tokens_per_dispatch)
    cache, _ = engine._programs.start(16, capacity)
  assert found.rollout.cache == one_device(cache)
  state = found.memory.arguments - found.memory.parameters
  assert found.rollout.peak > state + found.rollout.weights + found.rollout.cache
  assert found.needed == max(found.memory.peak + found.rollout.auxiliary, found.rollout.peak)


def test_the_reference_is_the_base_under_an_adapter_and_no_copy():
  """Of the reference only the scales of adapters are left; packed bytes are copied for sampling."""
  changes = {'mesh.data': 2, 'mesh.fsdp': 4, 'policy.kl_coef': 0.1}
  changes |= {f'lora.{k}': v for k, v in NF4.items()}
  found, arch, c = small_rollout('grpo', **changes)
  assert found.rollout.auxiliary == 0
  held = trees.flatten(kinds.abstract(adapters.adapted(arch, c)))
  assert found.rollout.weights == sum(x.size * x.dtype.itemsize for x in held.values())
  codes = [n for n, x in held.items() if n.endswith('/codes') and x.dtype == jnp.uint8]
  assert len(codes) == 7


def test_memory_of_a_rollout_decides_too(monkeypatch):
  """On a slice that fits the step, but not the step with the auxiliary models."""
  found, _, _ = small_rollout('grpo', **{'mesh.fsdp': 8, 'policy.kl_coef': 0.1})
  assert found.fits and found.needed > found.memory.peak
  room = (found.needed + found.memory.peak) / 2
  monkeypatch.setitem(
    topology.CHIPS, 'cpu', dataclasses.replace(topology.CHIPS['cpu'], memory=room)
  )
  assert not small_rollout('grpo', **{'mesh.fsdp': 8, 'policy.kl_coef': 0.1})[0].fits


def test_the_cost_counts_every_model_of_the_step():
  arch = families.architecture(known_models.read('SmolLM2-135M'))
  value = dataclasses.replace(arch, num_labels=1)
  one = cost.model_flops([(arch, 3)], 4, 64)
  blocks = counts.matmul_params(arch) - arch.vocab_size * arch.model_dim
  mixer = arch.layers()[0].mixer
  pairs = 4 * 64 * 65 / 2
  attention = 12 * arch.num_layers * mixer.num_heads * mixer.head_dim * pairs
  assert one == 6 * counts.matmul_params(arch) * 4 * 64 + attention
  assert cost.model_flops([(arch, 3), (arch, 1)], 4, 64) == pytest.approx(one * 4 / 3)
  both = cost.model_flops([(arch, 3), (value, 3)], 4, 64)
  assert both == pytest.approx(one + 6 * (blocks + arch.model_dim) * 4 * 64 + attention)
  c = keys.default()
  for algorithm, kl, wanted in (
    ('sft', 0.0, [3]),
    ('dpo', 0.0, [3, 1]),
    ('grpo', 0.1, [3]),
    ('ppo', 0.1, [3, 3]),
  ):
    c.algorithm, c.policy.kl_coef = algorithm, kl
    assert [times for _, times in auxiliary.find(c, arch).passes(arch)] == wanted


def test_candidates_leave_room_for_other_models():
  """PPO of 8B on v5e: one chip cannot hold policy, value model, reference and the copy that
  samples, so `tensor` must split that.
  """
  arch = families.architecture(known_models.read('Llama-3.1-8B'))
  where = topology.parse('v5e:8x8')
  alone = suggest.candidates(arch, where, 64, 2048, 2, 1)[0]
  held = suggest.Held(trained=2, copies=1, samples=True)
  assert alone.tensor == 1
  assert suggest.candidates(arch, where, 64, 2048, 2, 1, held)[0].tensor > 1


def test_a_candidate_with_an_adapter_needs_less():
  """8B in float32 with its moments is no candidate for one chip of 16 GB; QLoRA is."""
  arch, where = families.architecture(known_models.read('Llama-3.1-8B')), topology.parse('v5e:1x1')
  c = keys.default()
  c.lora.rank = 16

  def least(arch):
    (found,) = suggest.candidates(arch, where, 8, 1024, 2, 1)
    return suggest._bytes(found, arch, 8, 1024, 2, suggest.Held()) / 2**30

  assert least(arch) > 100
  c.lora.base = 'bfloat16'
  assert 15 < least(adapters.adapted(arch, c)) < 24
  c.lora.base = 'nf4'
  assert 5 < least(adapters.adapted(arch, c)) < 14


STACKED = [
  *(f'stack0/block0/attn/{n}/w' for n in 'kqvo'),
  *(f'stack0/block0/mlp/{n}/w' for n in ('gate', 'up', 'down')),
]


@pytest.mark.parametrize('mesh', [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_layers_are_gathered_inside_the_scan(mesh, remat):
  c = small()
  c.seq_len, c.model.random.intermediate_size = 40, 192  # no activation is as large as a weight
  c.mesh.update(mesh)
  c.remat = remat
  found, arch = planned(c)
  gathers = [x for x in found.collectives if x.kind == 'all-gather' and x.axes == 'fsdp']
  assert sum(x.count for x in gathers) >= arch.num_layers * c.grad_accum
  assert sorted(found.gathering.layered) == sorted(STACKED)
  assert found.gathering.whole == found.gathering.unseen == ()
  assert set(found.replicated) == {
    'final_norm/scale',
    'stack0/block0/attn_norm/scale',
    'stack0/block0/mlp_norm/scale',
  }


def test_weights_gathered_before_the_loop_are_seen():
  """The same product with its weights gathered all at once: the account must tell."""
  mesh = jax.make_mesh((8,), ('fsdp',), devices=jax.devices())
  leaf = lambda *shape: jax.ShapeDtypeStruct(  # noqa: E731
    shape, jnp.float32, sharding=NamedSharding(mesh, P(None, 'fsdp'))
  )
  params = {'stack0': {'w': leaf(6, 64, 48)}}

  def gather(w, axis):
    return jax.lax.all_gather(w, 'fsdp', axis=axis, tiled=True)

  def at_once(w, x):
    w = gather(w, 1)
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

  def by_layer(w, x):
    body = lambda x, w: (jnp.tanh(x @ gather(w, 0)) @ gather(w, 0).T, None)  # noqa: E731
    return jax.lax.scan(body, x, w)[0]

  found = {}
  for fn in (at_once, by_layer):
    specs = dict(in_specs=(P(None, 'fsdp'), P()), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((5, 64), jnp.float32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
      whole = jax.shard_map(fn, mesh=mesh, **specs)
      text = jax.jit(whole).lower(params['stack0']['w'], x).compile().as_text()
    found[fn] = memory.gathering(hlo.read(text), params, mesh)
  assert found[at_once] == memory.Gathering((), ('stack0/w',), ('stack0/w',))
  assert found[by_layer] == memory.Gathering(('stack0/w',), (), ())


def test_what_the_compiler_wrote_last_is_read_and_removed(tmp_path):
  for i, text in enumerate(('first', 'second')):
    file = tmp_path / f'module_000{i}.jit_step.after_optimizations.txt'
    file.write_text(text)
    os.utime(file, (i, i))
  (tmp_path / 'module_0000.jit_step.after_optimizations-buffer.txt').write_text('no')
  (tmp_path / 'module_0000.jit_step').mkdir()
  assert topology.written(str(tmp_path)) == 'second'
  assert topology.written(str(tmp_path)) == ''
  env = topology.environment(topology.parse('v6e:2x2'), '/tmp/xy')
  assert '--xla_dump_to=/tmp/xy' in env['XLA_FLAGS']


@needs_libtpu
def test_what_libtpu_writes_is_what_jaxlib_prints():
  """On v5e, where it can print: the same collectives, in the same loops."""
  code = """
import os, sys, tempfile
from ftjax import config
from ftjax.planning import topology
where, dump = topology.parse('v5e:2x2'), tempfile.mkdtemp()
os.environ.update(topology.environment(where, dump))
import jax
from ftjax.experiment import run as experiment
from ftjax.algorithms import sft
from ftjax.families import table as families
from ftjax.planning import collectives as communication, hlo
from ftjax.runtime import sharding, trees
from ftjax.experiment.trainer import Trainer
c = config.default()
c.model.random = dict(hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
                      num_key_value_heads=2, intermediate_size=512, vocab_size=512)
c.data.train, c.batch_size, c.seq_len, c.eval.batch_size = 'sums:20', 8, 256, 8
mesh = sharding.make_mesh({a: c.mesh[a] for a in sharding.AXES}, topology.devices(where))
with jax.set_mesh(mesh):
  arch = families.architecture(experiment.random_config(c.model.random.to_dict()))
  run = experiment.without_data(c, mesh, arch)
  trainer = Trainer(run, sft.make_loss(run.forward, c))
  compiled = trainer.compile()
texts = compiled.as_text(), topology.written(dump)
printed, written = (communication.collectives(hlo.read(t), mesh) for t in texts)
assert printed and printed == written, (printed, written)
print('same:', len(printed))
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0 and 'same:' in done.stdout, done.stderr[-2000:]


def test_a_program_that_cannot_be_printed_claims_nothing_of_its_collectives(monkeypatch):
  monkeypatch.setattr(compile, 'program_text', lambda _: '')
  found, _ = planned(small())
  assert found.fits and found.collectives is None and found.gathering is None
  assert found.cost.links == found.cost.network == 0 or math.isnan(found.cost.links)


@pytest.mark.parametrize(
  ('text', 'gib'),
  [
    ('Ran out of memory in memory space hbm. Used 40.50G of 15.75G hbm.', 40.5),
    (
      'E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
      'temporaries (31.66G) exceeds available HBM (31.24G). HLO module: jit_step.',
      31.66,
    ),
    ('out of memory', 0.0),
  ],
)
def test_required_bytes_are_read_from_the_message_of_a_compiler(text, gib):
  """Messages of libtpu 0.0.52, and one that tells nothing."""
  assert compile._required_bytes(f'RESOURCE_EXHAUSTED: {text}') == gib * 2**30


# What no mesh can do


@pytest.mark.parametrize(
  ('mesh', 'change', 'told'),
  [
    (dict(data=8), dict(batch_size=12), r'batch_size / grad_accum = 12 rows.* 8 devices'),
    (dict(expert=8), dict(batch_size=12), r'batch_size / grad_accum = 12 rows.*expert'),
    (dict(fsdp=8), {'eval.batch_size': 12}, r'eval.batch_size = 12 rows'),
    (
      dict(fsdp=8),
      dict(hidden_size=60, num_attention_heads=2),
      r'embed dimension of 60 .* 8 shards.*mesh.fsdp',
    ),
    (dict(context=8), dict(seq_len=60), r'seq_len=60 is no multiple of .*mesh.context'),
    (dict(tensor=8), {}, r'kv_heads dimension of 2 .* 8 shards.*mesh.tensor'),
    (dict(fsdp=4, tensor=2), dict(vocab_size=321), r'vocab dimension of 321 .*mesh.tensor'),
    (dict(fsdp=4, tensor=2), dict(intermediate_size=129), r'ffn dimension of 129 .*mesh.tensor'),
    (dict(data=3), {}, r'8 devices are no multiple of 3'),
    (dict(data=2, fsdp=2), {}, r'makes 4 devices, but there are 8'),
  ],
)
def test_sizes_that_do_not_divide_are_refused_before_compiling(monkeypatch, mesh, change, told):
  def compiled(_):
    raise AssertionError('it was compiled')

  monkeypatch.setattr(Trainer, 'compile', compiled)
  c = small()
  c.grad_accum = 1
  c.mesh.update(mesh)
  with c.unlocked():
    for key, value in change.items():
      part = c.model.random if key in c.model.random else c
      part.update_from_flattened_dict({key: value})
  with pytest.raises(ConfigError, match=told):
    planned(c)


# Shapes and suggestions


@pytest.mark.parametrize(
  ('name', 'billions'),
  [
    ('SmolLM2-135M', 0.134515008),
    ('Llama-3.2-1B', 1.235814400),
    ('Llama-3.2-3B', 3.212749824),
    ('Llama-3.1-8B', 8.030261248),
    ('Llama-3.1-70B', 70.553706496),
    ('Qwen2.5-0.5B', 0.494032768),
    ('Qwen2.5-1.5B', 1.543714304),
    ('Qwen2.5-3B', 3.085938688),
    ('Qwen2.5-7B', 7.615616512),
    ('Qwen3-0.6B', 0.596049920),
    ('Qwen3-1.7B', 1.720574976),
    ('Qwen3-4B', 4.022468096),
    ('Qwen3-8B', 8.190735360),
    ('Qwen3-14B', 14.768307200),
    ('Qwen3-32B', 32.762123264),
    ('gemma-2-2b', 2.614341888),
    ('gemma-2-9b', 9.241705984),
    ('gemma-2-27b', 27.227128320),
    ('gemma-3-270m', 0.268098176),
    ('gemma-3-1b', 0.999885952),
    ('gemma-3-4b', 3.880263168),
    ('gemma-3-12b', 11.766034176),
    ('gemma-3-27b', 27.009346304),
    ('Mistral-7B-v0.1', 7.241732096),
    ('Mistral-7B-v0.3', 7.248023552),
    ('Mistral-Nemo-2407', 12.247782400),
    ('Mistral-Small-24B-2501', 23.572403200),
  ],
)
def test_shapes_have_the_published_number_of_parameters(name, billions):
  assert counts.num_params(
    families.architecture(known_models.read(f'models/{name}-Instruct'))
  ) == round(billions * 1e9)


@pytest.mark.parametrize(
  ('name', 'billions'),
  [('Ministral-3-3B', 3.4), ('Ministral-3-8B', 8.4), ('Ministral-3-14B', 13.5)],
)
def test_the_text_parts_of_ministral_3_have_their_rounded_number_of_parameters(name, billions):
  arch = families.architecture(known_models.read(f'mistralai/{name}-Reasoning-2512'))
  assert counts.num_params(arch) / 1e9 == pytest.approx(billions, abs=0.1)


@pytest.mark.parametrize(
  ('path', 'name'),
  [
    ('google/gemma-3-1b-it', 'gemma-3-1b'),
    ('google/gemma-3-4b-pt@0123abc', 'gemma-3-4b'),
    ('Qwen/Qwen3-8B-Base', 'Qwen3-8B'),
    ('mistralai/Mistral-7B-Instruct-v0.3', 'Mistral-7B-v0.3'),
  ],
)
def test_a_model_that_was_trained_further_has_the_shape_of_its_base(path, name):
  assert known_models.read(path) == known_models.SHAPES[name]


def test_an_unknown_model_names_the_known_ones():
  with pytest.raises(ConfigError, match=r'model.path=nowhere/Foo: .*HF_HUB_OFFLINE.*Llama-3.1-8B'):
    known_models.read('nowhere/Foo')


def test_few_long_rows_on_a_large_slice_split_the_sequence():
  """64 rows of 8,192 tokens on 256 chips: one row is cut over 4 of them."""
  arch, where = (
    families.architecture(known_models.read('Llama-3.1-8B')),
    topology.parse('v5e:16x16'),
  )
  found = suggest.candidates(arch, where, 64, 8192, 2, 6)
  assert {'context': 4, 'fsdp': 64}.items() <= dataclasses.asdict(found[0]).items()
  assert any(c.tensor == 2 and c.context == 2 for c in found)
  whole = suggest.candidates(arch, where, 256, 8192, 2, 6)[0]
  assert (whole.fsdp, whole.context, whole.tensor, whole.grad_accum) == (256, 1, 1, 1)


def test_candidates_divide():
  arch, where = (
    families.architecture(known_models.read('Llama-3.1-8B')),
    topology.parse('2xv5e:16x16'),
  )
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
  assert {'parameters', 'optimizer', 'gradients', 'activations', 'peak'} <= found['memory'].keys()
  for item in found['collectives']:
    assert {'kind', 'axes', 'group_size', 'count', 'bytes', 'sent', 'network'} <= item.keys()
  assert found['collectives'] and found['replicated'] and found['gathering']['layered']
  assert found['compile_seconds'] > 0 and found['compiler_options'] == {}
  assert found['attention'] == 'dense' and found['suggestion']['mesh.fsdp'] == 2


def test_a_folder_with_config_json_alone_is_enough(tmp_path):
  shape = random_config(small().model.random.to_dict())
  (tmp_path / 'config.json').write_text(json.dumps(shape))
  assert known_models.read(str(tmp_path)) == shape
  settings = ('seq_len=64', 'batch_size=8', 'eval.batch_size=8', f'model.path={tmp_path}')
  code, told = plan(
    '--config=sft_smollm2_135m', '--topology=cpu:2', *(f'--config.{s}' for s in settings)
  )
  assert code == 0 and f'{tmp_path}: ' in told and 'It fits.' in told
  assert 'Weights gathered one layer at a time' in told and 'compiler options: none' in told


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    (['--topology=v5e'], r'--topology=v5e: expected'),
    (['--topology=cpu:3'], r'embed dimension of 64 cannot be split into 3 shards'),
    (['--topology=cpu:4', '--config.mesh.tensor=4'], r'cannot be split into 4 shards'),
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
