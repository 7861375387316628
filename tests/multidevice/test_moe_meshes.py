"""Experts on meshes of eight devices against one device: the loss with the load-balance loss, its
gradient and the statistics of the load, in the step that a run compiles; also under adapters.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_adapters
from jax.sharding import NamedSharding
from test_meshes import distance, micro_batches, name
from tiny_model import decoder, host, init, on_one_device, place

from ftjax.algorithms import sft
from ftjax.config import keys
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.hf import export
from ftjax.models import kinds
from ftjax.models.architecture import MoeSpec
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError
from ftjax.training import prefetch
from ftjax.training.state import create

DENSE = decoder(
  vocab_size=256,
  model_dim=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  ffn_dim=64,
)
ARCH = DENSE.with_blocks(
  lambda block: dataclasses.replace(block, mlp=MoeSpec(8, 3, 64, balance=0.5))
)
CASES = {
  'whole': {},
  'nf4-dora': dict(base='nf4', block=4, dora=True, rank_pattern=tiny_adapters.RANKS),
  'int8-pissa': dict(base='int8', init='pissa'),
}
MESHES = (
  dict(fsdp=2, tensor=2, expert=2),
  dict(context=2, expert=4),
  dict(expert=8),
  dict(data=2, tensor=2, expert=2),
  dict(fsdp=2, expert=4),
  dict(fsdp=4, tensor=2),
)


@pytest.fixture(scope='module')
def batch():
  return micro_batches(0)


def config(case):
  c = tiny_adapters.config(**CASES[case]) if CASES[case] else keys.default()
  c.batch_size, c.grad_accum, c.seq_len, c.steps = 16, 2, 32, 100
  c.optim.name, c.optim.clip_norm, c.remat = 'sgd', 0.0, 'none'
  return c


@pytest.fixture(scope='module')
def first():
  """Returns the parameters of a case, numpy arrays by name."""

  @functools.cache
  def found(case):
    if not CASES[case]:
      return host(init(ARCH))
    return host(tiny_adapters.init(tiny_adapters.adapted(ARCH, **CASES[case])))

  return found


def train(mesh, batch, case, first):
  """(metrics, gradient) of a step on a mesh."""
  c = config(case)
  run = experiment.without_data(c, mesh, ARCH)
  trainer = Trainer(run, sft.make_loss(run.forward, c))
  declared = kinds.declared(run.arch)
  params = trees.unflatten({n: place(x, *declared[n].axes) for n, x in first.items()})
  frozen, trained = trees.select(params, lambda n: n in trainer.frozen)
  places = jax.tree.map(lambda a: a.sharding, trainer.abstract)
  state = jax.jit(lambda t, f: create(t, f, trainer.optimizer, False), out_shardings=places)(
    trained, frozen
  )
  rows = NamedSharding(mesh, sharding.spec(None, 'batch', 'seq'))
  state, metrics = trainer.compile()(state, prefetch.place(batch, dict.fromkeys(batch, rows)))
  # The first momentum is the first gradient.
  return {k: float(v) for k, v in metrics.items()}, host(state.opt[0].trace)


@pytest.fixture(scope='module')
def one_device(batch, first):
  """Returns what a case gives on one device; each is trained once."""
  return on_one_device(lambda mesh, case: train(mesh, batch, case, first(case)))


PAIRS = [pytest.param(case, sizes, marks=pytest.mark.full) for case in CASES for sizes in MESHES]


@pytest.mark.parametrize(
  ('case', 'sizes'), PAIRS, ids=[f'{c}-{name(s)}' for c in CASES for s in MESHES]
)
def test_a_step_is_that_of_one_device(case, sizes, use_mesh, batch, first, one_device):
  expected, gradient = one_device(case)
  metrics, found = train(use_mesh(**sizes), batch, case, first(case))
  assert metrics['loss'] == pytest.approx(expected['loss'], rel=1e-6)
  assert {k for k in metrics if k.startswith('moe/')} >= {'moe/balance', 'moe/max_load'}
  for k in (k for k in expected if k.startswith('moe/')):
    assert metrics[k] == pytest.approx(expected[k], rel=1e-5), k
  assert found.keys() == gradient.keys() and distance(found, gradient) <= 2e-6
  for n, g in gradient.items():
    assert distance({n: found[n]}, {n: g}) <= 2e-5, n
    assert g.any(), n


def test_experts_that_do_not_divide_are_refused(use_mesh):
  arch = DENSE.with_blocks(lambda block: dataclasses.replace(block, mlp=MoeSpec(6, 2, 64)))
  wanted = 'its expert dimension of 6 cannot be split into 4 shards; change mesh.expert'
  with pytest.raises(ConfigError, match=wanted):
    experiment.without_data(config('whole'), use_mesh(fsdp=2, expert=4), arch)


def test_an_expert_is_read_from_a_split_axis_bitwise(use_mesh):
  """What stands in the others does not matter."""
  use_mesh(fsdp=2, expert=4)
  x = np.random.default_rng(0).normal(size=(2, 8, 4, 6)).astype(np.float32)
  x[1, 3, 0, :2], x[1, 2] = (-0.0, np.inf), np.nan
  leaf = place(x, 'layers', 'expert', 'embed', 'ffn')
  assert export.on_host(leaf, (1, 3)).tobytes() == x[1, 3].tobytes()
