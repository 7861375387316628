"""The attention of DeBERTa: buckets by hand, blocks of queries, other documents. Its numbers
against transformers: parity/test_families.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny_model import place, tokens_at

from ftjax.models import disentangled
from ftjax.models.mixer_spec import DisentangledSpec

SPEC = DisentangledSpec(num_heads=2, head_dim=4, span=8, longest=40)


def test_buckets_by_hand():
  """Of 8 on each side: 4 distances of their own, then 5 to 40 in steps of a factor 39/4."""
  found = disentangled.buckets(61, 8, 40) - 8
  own = dict(zip(range(-60, 61), found.tolist(), strict=True))
  assert [own[d] for d in range(5)] == [0, 1, 2, 3, 4]
  borders = [4 * (39 / 4) ** (n / 3) for n in (1, 2, 3)]  # 8.5, 18.3, 39
  for d in range(5, 61):
    assert own[d] == min(7, 5 + sum(d > b + 1e-4 for b in borders)), d
    assert own[-d] == -min(8, 5 + sum(d > b + 1e-4 for b in borders)), d
  plain = disentangled.buckets(20, 8, 0) - 8
  np.testing.assert_array_equal(plain, np.clip(np.arange(-19, 20), -8, 7))


def arrays(length):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, length, 2, 4)).astype(np.float32) for _ in range(3))
  tables = (rng.normal(size=(16, 2, 4)).astype(np.float32) for _ in range(2))
  return *(place(a, 'batch', 'seq', 'heads', None) for a in (q, k, v)), *map(jnp.asarray, tables)


@functools.partial(jax.jit, static_argnums=2)
def both(given, where, own):
  def total(*given):
    y = disentangled.attend(*given, where, where, own)
    return (y * y).sum(), y

  (_, y), gradients = jax.value_and_grad(total, argnums=tuple(range(5)), has_aux=True)(*given)
  return y, gradients


def test_rows_in_blocks_of_queries_are_those_at_once(monkeypatch):
  """512 queries, two documents: output and gradients."""
  given = arrays(512)
  where = tokens_at(np.repeat([[1, 2]], [300, 212], axis=1))
  found = both(given, where, SPEC)
  monkeypatch.setattr(disentangled, '_BLOCK', 512)
  both.clear_cache()  # it holds the program of blocks
  expected = both(given, where, SPEC)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_without_terms_of_positions_it_is_softmax_attention():
  q, k, v, *_ = arrays(40)
  where = tokens_at(np.repeat([[1, 2]], 20, axis=1))
  own = dataclasses.replace(SPEC, has_c2p=False, has_p2c=False)
  got = disentangled.attend(q, k, v, None, None, where, where, own)
  for part in (slice(0, 20), slice(20, 40)):
    a, b, c = (np.asarray(x)[0, part] for x in (q, k, v))
    weights = jax.nn.softmax(np.einsum('tnh,snh->nts', a, b) / 2, -1)
    expected = np.einsum('nts,snh->tnh', weights, c)
    np.testing.assert_allclose(np.asarray(got)[0, part], expected, atol=1e-5)
