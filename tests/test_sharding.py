"""The mesh and the table of logical axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from tiny_model import TINY, UNTIED, init

from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError


def sizes(**changes):
  return dict.fromkeys(sharding.AXES, 1) | changes


def test_a_free_size_takes_what_is_left():
  assert sharding.mesh_shape(sizes(data=-1, tensor=2), 8) == (4, 1, 1, 2, 1)
  assert sharding.mesh_shape(sizes(fsdp=8), 8) == (1, 8, 1, 1, 1)
  assert sharding.mesh_shape(sizes(context=-1), 1) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize(
  ('changes', 'devices', 'named'),
  [
    ({'data': -1, 'fsdp': -1}, 8, 'at most one'),
    ({'data': -1, 'tensor': 3}, 8, 'mesh.data'),
    ({'data': 2, 'tensor': 2}, 8, '4 devices, but there are 8'),
    ({'data': 16}, 8, '16 devices'),
    ({'data': 0}, 8, 'positive'),
    ({'data': -2, 'fsdp': -4}, 8, 'positive'),
    ({'data': -1, 'tensor': -8}, 8, 'positive'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(changes, devices, named):
  with pytest.raises(ConfigError, match=named):
    sharding.mesh_shape(sizes(**changes), devices)


def test_axes_are_explicit_and_in_order():
  mesh = sharding.make_mesh(sizes(fsdp=-1, tensor=2))
  assert mesh.axis_names == sharding.AXES
  assert mesh.devices.shape == (1, 4, 1, 2, 1)
  assert set(mesh.axis_types) == {AxisType.Explicit}


def test_a_mesh_over_given_devices():
  chosen = jax.devices()[2:4]
  assert set(sharding.make_mesh(sizes(tensor=2), chosen).devices.flat) == set(chosen)


def test_spec_follows_the_table():
  assert sharding.spec('batch', 'seq', None) == PartitionSpec(sharding.BATCH, 'context', None)
  assert sharding.spec('layers', 'embed', 'heads', 'head_dim') == PartitionSpec(
    None, 'fsdp', 'tensor', None
  )
  assert sharding.spec() == PartitionSpec()


def test_an_unknown_name_is_an_error():
  with pytest.raises(KeyError, match='head'):
    sharding.spec('batch', 'head')


@pytest.mark.parametrize('names', [('heads', 'ffn'), ('batch', 'embed'), ('vocab', 'vocab')])
def test_a_mesh_axis_lies_on_one_dimension_only(names):
  with pytest.raises(ValueError, match='twice'):
    sharding.spec(*names)


def test_gathered_gives_up_fsdp_alone():
  assert sharding.gathered('embed', 'heads', 'head_dim') == PartitionSpec(None, 'tensor', None)


def test_batch_ways(use_mesh):
  assert sharding.batch_axis_size() == 1
  use_mesh(data=2, fsdp=2, tensor=2)
  assert sharding.batch_axis_size() == 4
  use_mesh(context=4, tensor=2)
  assert sharding.batch_axis_size() == 1


@pytest.mark.parametrize('arch', [TINY, UNTIED])
def test_every_parameter_has_axes_of_the_table(arch, use_mesh):
  mesh = use_mesh(fsdp=2, tensor=2)
  places = trees.flatten(sharding.shardings(mesh, kinds.axes(arch)))
  params = trees.flatten(init(arch))
  assert places.keys() == params.keys() == trees.flatten(kinds.abstract(arch)).keys()
  for name, place in places.items():
    assert params[name].sharding.is_equivalent_to(place, params[name].ndim), name


def test_fsdp_and_tensor_split_all_matrices(use_mesh):
  """No matrix is replicated by oversight: each device holds its fourth."""
  use_mesh(fsdp=2, tensor=2)
  for name, x in trees.flatten(init(UNTIED)).items():
    parts = 1 if 'norm' in name else 4
    assert x.addressable_shards[0].data.size * parts == x.size, name


def check(mesh):
  flat = kinds.declared(TINY)
  axes, shapes = {n: p.axes for n, p in flat.items()}, {n: p.shape for n, p in flat.items()}
  sharding.check_divides(axes, shapes, mesh)


def test_a_mesh_that_divides_passes(use_mesh):
  check(use_mesh(fsdp=4, tensor=2))
  check(use_mesh(data=2, context=4))


def test_a_mesh_that_does_not_divide_names_the_parameter(use_mesh):
  with pytest.raises(ConfigError, match=r'stack0/block0/attn/[kv]/w.*kv_heads.* 2 .*mesh\.tensor'):
    check(use_mesh(tensor=4))


def test_an_undivided_contraction_is_a_trace_error(use_mesh):
  """Axes are Explicit: the type system sees what the table does not say."""
  use_mesh(tensor=2)
  a = jax.device_put(jnp.ones((4, 4)), sharding.spec(None, 'ffn'))
  with pytest.raises(Exception, match='out_sharding'):
    jnp.einsum('ij,jk->ik', a, a.T)
