"""Every family on meshes of eight devices against one device: loss and gradient of packed rows, on
the models of parity/family_cases.py.
"""

import dataclasses
import functools
import zlib

import family_models
import numpy as np
import pytest
from jax.sharding import NamedSharding
from parity import family_cases as cases
from test_meshes import EVERY_DAY, distance, name
from tiny_model import on_one_device, tokens_at

from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.training import prefetch

B = 8  # what all meshes divide
# Those of test_meshes.py: every pair of axes is split together in one of them.
MESHES = EVERY_DAY
# Shifting all scores of a query changes nothing: without a rotation after it, the gradient of the
# keys' bias is 0 but for rounding.
ZERO = ('attn/k/b', 'attn/pos_k/b')


@functools.cache
def batch(case):
  """Packed rows as numpy arrays: three documents, two and padding, or padding alone; weights are
  not only 0 and 1.
  """
  model, rng = cases.CASES[case], np.random.default_rng(0)
  shape = B, model.tokens
  segments = np.zeros(shape, np.int32)
  for row in range(B - 1):
    a, b = sorted(rng.integers(4, model.tokens - 4, 2))
    segments[row, :a], segments[row, a:b] = 1, 2
    segments[row, b:] = 3 if row % 3 else 0
  weights = rng.uniform(0.5, 2, shape) * (segments > 0) * (rng.random(shape) < 0.6)
  tokens, labels = (rng.integers(0, model.vocab, shape, np.int32) for _ in range(2))
  types = {}
  if cases.token_types(model) is not None:
    types = {'token_types': rng.integers(0, 2, shape, np.int32)}
  return types | {
    'tokens': tokens,
    'labels': labels,
    'weights': weights.astype(np.float32),
    'segments': segments,
    'positions': np.asarray(tokens_at(segments).positions),
  }


def compute(case, mesh, rows):
  """(loss, {leaf: gradient}) on a mesh; the vocabulary is padded to what `tensor` divides."""
  arch = family_models.architecture(case)
  arch = dataclasses.replace(arch, vocab_multiple=mesh.shape['tensor'])
  where = NamedSharding(mesh, sharding.spec('batch', 'seq'))
  placed = prefetch.place(rows, dict.fromkeys(rows, where))
  params = family_models.params(case, arch)
  loss, gradient = family_models.loss_and_gradient(arch, params, placed)
  declared, found = kinds.declared(arch), {}
  for n, g in trees.flatten(gradient).items():
    inside = tuple(map(slice, declared[n].file_shape))
    rest = np.array(g)
    found[n] = rest[inside].copy()
    rest[inside] = 0
    assert not rest.any(), n  # the padding has no gradient
  return float(loss), found


@pytest.fixture(scope='module')
def one_device():
  """Returns what a case gives on one device; each is computed once, a few rows at a time, by the
  program that the other tests of families have.
  """

  def whole(mesh, case):
    rows, starts = batch(case), range(0, B, cases.ROWS)
    parts = [
      compute(case, mesh, {k: x[i : i + cases.ROWS] for k, x in rows.items()}) for i in starts
    ]
    return sum(p[0] for p in parts), {n: sum(p[1][n] for p in parts) for n in parts[0][1]}

  return on_one_device(whole)


def is_every_day(case, index):
  """One mesh of each of some cases."""
  return case in family_models.EVERY_DAY and index == zlib.crc32(case.encode()) % len(MESHES)


PAIRS = [
  pytest.param(case, sizes, marks=[] if is_every_day(case, i) else [pytest.mark.full])
  for case in cases.CASES
  for i, sizes in enumerate(MESHES)
]


@pytest.mark.parametrize(
  ('case', 'sizes'), PAIRS, ids=[f'{c}-{name(s)}' for c in cases.CASES for s in MESHES]
)
def test_loss_and_gradient_are_those_of_one_device(case, sizes, use_mesh, one_device):
  """Measured: the gradients differ by 5e-6 of their L2 norm at most, most of them by 2e-6."""
  expected_loss, expected = one_device(case)
  loss, gradient = compute(case, use_mesh(**sizes), batch(case))
  assert loss == pytest.approx(expected_loss, rel=1e-6)
  assert distance(gradient, expected) <= 1e-5
  largest = max(np.abs(g).max() for g in expected.values())
  for n, g in expected.items():
    if n.endswith(ZERO) and np.abs(g).max() <= 1e-6 * largest:
      assert np.abs(gradient[n]).max() <= 1e-6 * largest, n
    else:
      assert g.any() and distance({n: gradient[n]}, {n: g}) <= 2e-5, n
