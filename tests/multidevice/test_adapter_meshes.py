"""Adapters on meshes of eight devices against one device: the loss, the gradient and the update of
the step that a run of the config compiles.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_adapters
from jax.sharding import NamedSharding
from test_meshes import MESHES, distance, micro_batches, name
from tiny_model import decoder, host, on_one_device, place

from ftjax.algorithms import sft
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from ftjax.training import prefetch
from ftjax.training.state import create

STEPS = 3
# Eight ways of fsdp divide the groups of 16 outputs, and two of tensor those of the keys.
ARCH = decoder(
  vocab_size=256,
  model_dim=128,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  ffn_dim=128,
  tied=False,
)
ARCH = dataclasses.replace(ARCH, vocab_multiple=96)
CASES = {
  'nf4-dora-pissa': dict(
    base='nf4',
    block=4,
    init='pissa',
    dora=True,
    rank_pattern=tiny_adapters.RANKS,
    targets='.*(q|o|up|down)|head',
    dropout=0.25,
    train='embed/w|.*norm/scale',
  ),
  'int8-dora': dict(base='int8', dora=True, rank_pattern=tiny_adapters.RANKS, b_lr_ratio=4.0),
  'nf4-pissa': dict(base='nf4', block=4, init='pissa'),
  'bfloat16-dora-pissa': dict(base='bfloat16', dora=True, init='pissa', rslora=True),
  'float32-dropout': dict(dropout=0.25, alpha_pattern=(('.*/mlp/.*', 3.0),)),
}
EVERY_DAY = (('nf4-dora-pissa', dict(fsdp=2, context=2, tensor=2)),)


@pytest.fixture(scope='module')
def batches():
  return [micro_batches(i) for i in range(STEPS)]


def config(case):
  c = tiny_adapters.config(**CASES[case])
  c.batch_size, c.grad_accum, c.seq_len, c.steps = 16, 2, 32, 100
  c.optim.lr, c.optim.warmup_steps, c.optim.schedule = 1e-3, 0, 'constant'
  c.optim.weight_decay, c.optim.clip_norm, c.optim.eps, c.remat = 0.1, 0.0, 1e-6, 'none'
  return c


@pytest.fixture(scope='module')
def first():
  """Returns the parameters of a case before its first step, numpy arrays by name."""
  return functools.cache(
    lambda case: host(tiny_adapters.init(tiny_adapters.adapted(ARCH, **CASES[case])))
  )


def train(mesh, batches, case, first):
  """Losses of the steps, the gradient of the first, the trained leaves before and after, as numpy
  arrays by name. first: all leaves before.
  """
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
  start, compiled = host(state.params), trainer.compile()
  losses, gradient = [], None
  for batch in batches:
    state, metrics = compiled(state, prefetch.place(batch, dict.fromkeys(batch, rows)))
    losses.append(float(metrics['loss']))
    if gradient is None:  # the first moment is a tenth of the first gradient
      gradient = {n: 10 * x for n, x in host(state.opt[0].mu).items()}
  assert state.params.keys() == trained.keys()
  for n, leaf in host(state.frozen).items():
    np.testing.assert_array_equal(leaf, first[n])
  return losses, gradient, start, host(state.params)


@pytest.fixture(scope='module')
def one_device(batches, first):
  """Returns what a case gives on one device; each is trained once."""
  return on_one_device(lambda mesh, case: train(mesh, batches, case, first(case)))


PAIRS = [(case, sizes) for case in CASES for sizes in MESHES]
MARKED = [
  pytest.param(
    case,
    sizes,
    marks=[]
    if (case, {k: v for k, v in sizes.items() if v > 1}) in EVERY_DAY
    else [pytest.mark.full],
    id=f'{case}-{name(sizes)}',
  )
  for case, sizes in PAIRS
]


@pytest.mark.parametrize(('case', 'sizes'), MARKED)
def test_steps_are_those_of_one_device(case, sizes, use_mesh, batches, first, one_device):
  expected_losses, expected_gradient, start, expected = one_device(case)
  losses, gradient, _, params = train(use_mesh(**sizes), batches, case, first(case))
  np.testing.assert_allclose(losses, expected_losses, rtol=3e-6)
  assert distance(gradient, expected_gradient) <= 5e-6
  moved = {n: params[n] - start[n] for n in start}
  should = {n: expected[n] - start[n] for n in start}
  # Adam divides by the gradient's own size, so rounding weighs more where it is small.
  assert distance(moved, should) <= 1e-3


def test_a_merged_head_is_compared_on_a_mesh(use_mesh):
  """lora.merge measures how far the merged model is, where the head's table is split too."""
  use_mesh(fsdp=2, tensor=2, data=2)
  arch = tiny_adapters.adapted(ARCH, targets='head', dora=True)
  params = tiny_adapters.init(arch)
  batch = {k: v[0] for k, v in micro_batches(0).items()}
  batch = {k: place(v, 'batch', 'seq') for k, v in batch.items()}
  ours = Forward(arch, jnp.float32)
  merged = Forward(kinds.with_merged(arch, 'float32'), jnp.float32)
  plain = Forward(dataclasses.replace(arch, adapter=None), jnp.float32)
  bare = kinds.of_model(plain.arch, params, '')
  found = jax.jit(lambda p, b: ours.divergence_from(p, merged, p, b))(params, batch)
  other = jax.jit(lambda p, q, b: ours.divergence_from(p, plain, q, b))(params, bare, batch)
  assert abs(found) < 1e-5 * other
