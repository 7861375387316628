"""Encoder-decoders on meshes of eight devices against one device: loss and gradient of packed rows,
on the models of parity/t5_cases.py.
"""

import functools

import numpy as np
import pytest
import t5_models
from jax.sharding import NamedSharding
from test_meshes import distance, name
from tiny_model import on_one_device, tokens_at

from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.training import prefetch

B, SOURCE, TARGET = 8, 32, 24
MESHES = (
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'fsdp': 4, 'context': 2},
  {'data': 2, 'context': 2, 'tensor': 2},
)


@functools.cache
def batch():
  """Packed rows as numpy arrays: two documents and padding, three documents, or padding alone."""
  rng, arrays = np.random.default_rng(0), {}
  for prefix, width in (('source_', SOURCE), ('', TARGET)):
    segments = np.zeros((B, width), np.int32)
    for row in range(B - 1):
      a, b = sorted(rng.choice(np.arange(3, width - 3), 2, replace=False))
      segments[row, :a], segments[row, a:b], segments[row, b:] = 1, 2, 3 if row % 3 else 0
    arrays[f'{prefix}segments'] = segments
    arrays[f'{prefix}positions'] = np.asarray(tokens_at(segments).positions)
    arrays[f'{prefix}tokens'] = rng.integers(0, 67, (B, width), np.int32)
  arrays['labels'] = rng.integers(0, 67, (B, TARGET), np.int32)
  weights = rng.uniform(0.5, 2, (B, TARGET)) * (arrays['segments'] > 0)
  return arrays | {'weights': weights.astype(np.float32)}


def compute(mesh, case='t5'):
  arch = t5_models.padded(t5_models.architecture(case), mesh.shape['tensor'])
  where = NamedSharding(mesh, sharding.spec('batch', 'seq'))
  placed = prefetch.place(batch(), dict.fromkeys(batch(), where))
  loss, gradient = t5_models.loss_and_gradient(arch, t5_models.params(case, arch), placed)
  declared = kinds.declared(arch)
  return float(loss), {
    n: np.array(g)[tuple(map(slice, declared[n].file_shape))]
    for n, g in trees.flatten(gradient).items()
  }


@pytest.fixture(scope='module')
def one_device():
  return on_one_device(compute)


@pytest.mark.parametrize(
  'sizes',
  [pytest.param(s, marks=[pytest.mark.full] * bool(i)) for i, s in enumerate(MESHES)],
  ids=map(name, MESHES),
)
def test_loss_and_gradient_are_those_of_one_device(sizes, use_mesh, one_device):
  expected_loss, expected = one_device('t5')
  loss, gradient = compute(use_mesh(**sizes))
  assert loss == pytest.approx(expected_loss, rel=1e-6)
  assert distance(gradient, expected) <= 1e-5
  for n, g in expected.items():
    assert g.any() and distance({n: gradient[n]}, {n: g}) <= 2e-5, n
