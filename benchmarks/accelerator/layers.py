"""Grouped products of mixtures of experts, and whole models of four kinds, on the device.

The grouped kernel (models/kernels/grouped_triton.py on NVIDIA GPUs) is compared with a plain loop
over the groups in float32. Models are cut to a few layers of their real width: documents of a
packed row must not influence each other, through attention with and without window, convolution and
state of delta nets, and experts; and bfloat16 must stay near float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from accelerator import attention, measuring
from accelerator.record import Record, check
from ftjax.experiment import weights
from ftjax.models import grouped, kinds
from ftjax.models.architecture import Architecture
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees

COLUMNS = (
  ('leak', 'influence on other documents or groups', '.3g'),
  ('leak_gradient', 'influence on gradients', '.3g'),
  ('error', 'error against float32', '.2g'),
  ('cosine', 'smallest cosine of a gradient with float32', '.4f'),
  ('ms', 'ms', '.3f'),
  ('tflops', 'TFLOP/s', '.1f'),
  ('ragged_ms', 'XLA ragged_dot, ms', '.3f'),
)
# Most relative error of a bfloat16 product with float32 sums, and of logarithms of probabilities
# after a few layers, in nats; the least cosine of a parameter's gradient.
PRODUCT, LOGPROB, COSINE = 1e-2, 0.1, 0.97
# Experts' rows lie in blocks with those of other documents: sums of gradients have another order.
EXPERTS_GRADIENT = 1e-2


@dataclasses.dataclass(frozen=True)
class Product:
  """A grouped product: rows, inputs, outputs, groups."""

  name: str
  rows: int
  inputs: int
  outputs: int
  groups: int


PRODUCTS = (
  Product('grouped product, up of Qwen3-30B-A3B', 8192, 2048, 768, 128),
  Product('grouped product, down of Qwen3-30B-A3B', 8192, 768, 2048, 128),
  Product('grouped product, up of Mixtral 8x7B', 2048, 4096, 14336, 8),
  Product('grouped product, odd sizes', 1000, 200, 330, 5),
)
TINY_PRODUCTS = (Product('grouped product, tiny', 60, 24, 40, 4),)
# (name of known_models.py, layers: one of each kind at least, changes)
MODELS = (
  ('Qwen3-0.6B', 4, {}),
  ('gemma-3-1b', 6, {'sliding_window': 256}),
  ('Qwen3-30B-A3B', 2, {'num_experts': 16}),
  ('Qwen3.5-4B', 4, {}),
)
_TINY = {
  'Qwen3-0.6B': {'num_hidden_layers': 1},
  'gemma-3-1b': {
    'num_hidden_layers': 2,
    'sliding_window': 40,
    'sliding_window_pattern': 2,
    'query_pre_attn_scalar': 16,
  },
  'Qwen3-30B-A3B': {
    'num_hidden_layers': 1,
    'num_experts': 4,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 32,
  },
  'Qwen3.5-4B': {
    'num_hidden_layers': 2,
    'full_attention_interval': 2,
    'linear_num_key_heads': 2,
    'linear_key_head_dim': 16,
    'linear_num_value_heads': 4,
    'linear_value_head_dim': 16,
  },
}


def group_sizes(p: Product) -> np.ndarray:
  """Returns int32[groups] that sum to less than the rows: uneven, the second group empty."""
  chance = np.random.default_rng(1)
  shares = chance.dirichlet(np.full(p.groups, 1.0))
  sizes = np.floor(shares * (p.rows - 7)).astype(np.int32)
  sizes[1] = 0
  return sizes


def grouped_program(interpret: bool):
  """Returns jitted (x [M, I], w [G, I, O], sizes, g [M, O]) -> (y, dx, dw) of the product as models
  compute it on this device; interpret: of the GPU kernels, on any device.
  """

  def whole(x, w, sizes, g):
    y, back = jax.vjp(lambda x, w: grouped.dot(x, w, sizes), x, w)
    return y, *back(g)

  def by_kernel(x, w, sizes, g):
    kept = (jnp.arange(len(x)) < sizes.sum())[:, None]
    g = jnp.where(kept, g, 0)
    y, dx = (
      jnp.where(kept, grouped._by_kernel(a, b, sizes, True), 0)
      for a, b in ((x, w), (g, w.swapaxes(1, 2)))
    )
    return y, dx, grouped._sums_by_kernel(x, g, sizes, True)

  if not interpret:
    return jax.jit(whole)
  specs = dict(in_specs=(jax.P(),) * 4, out_specs=(jax.P(),) * 3)
  return jax.jit(jax.shard_map(by_kernel, check_vma=False, **specs))


def grouped_reference(x, w, sizes, g):
  """Returns (y, dx, dw) in float32: every group's matrix times all rows, and a mask."""
  x, w, g = (a.astype(jnp.float32) for a in (x, w, g))
  ends = jnp.cumsum(sizes)
  row = jnp.arange(len(x))

  def body(carry, group):
    y, dx = carry
    matrix, end, size = group
    own = ((row >= end - size) & (row < end))[:, None]
    dot = functools.partial(jnp.matmul, precision='highest')
    y = y + jnp.where(own, dot(x, matrix), 0)
    dx = dx + jnp.where(own, dot(g, matrix.T), 0)
    return (y, dx), dot(jnp.where(own, x, 0).T, g)

  (y, dx), dw = jax.lax.scan(body, (jnp.zeros_like(g), jnp.zeros_like(x)), (w, ends, sizes))
  return y, dx, dw


def _check_product(row: dict, p: Product, interpret: bool) -> None:
  keys = iter(jax.random.split(jax.random.key(0), 3))
  shapes = ((p.rows, p.inputs), (p.groups, p.inputs, p.outputs), (p.rows, p.outputs))
  x, w, g = (jax.random.normal(next(keys), s, jnp.bfloat16) for s in shapes)
  sizes = measuring.on_device(group_sizes(p))
  call = grouped_program(interpret)
  found = [np.asarray(a) for a in call(x, w, sizes, g)]
  expected = [np.asarray(a) for a in jax.jit(grouped_reference)(x, w, sizes, g)]
  row['error'] = measuring.largest(map(measuring.error, found, expected))
  check(row, 'error of the product or a gradient', row['error'], PRODUCT)
  behind = int(sizes.sum())
  rest = float(np.abs(found[0][behind:].astype(np.float32)).max())
  check(row, 'rows behind the last group are 0', rest, 0.0)
  # Other rows in the first group: nothing of the other groups may change.
  first = int(sizes[0])
  inside = (jnp.arange(p.rows) < first)[:, None]
  changed = [np.asarray(a) for a in call(jnp.where(inside, -100 * x, x), w, sizes, g)]
  parts = [(found[0][first:], changed[0][first:]), (found[2][1:], changed[2][1:])]
  row['leak'] = measuring.largest(measuring.difference(*x) for x in parts)
  check(row, 'influence between groups', row['leak'], 0.0)
  row['ms'] = 1000 * measuring.median_seconds(functools.partial(call, x, w, sizes, g))
  row['tflops'] = 6 * behind * p.inputs * p.outputs / row['ms'] / 1e9
  if measuring.platform() == 'gpu':
    ragged = jax.jit(grouped._ragged)
    row['ragged_ms'] = 1000 * measuring.median_seconds(functools.partial(ragged, x, w, sizes))


def model(name: str, layers: int, tiny: bool, changes: dict) -> Architecture:
  """Returns a model of a few layers, with a small vocabulary and a head of its own."""
  sizes = {'num_hidden_layers': layers, 'vocab_size': 512 if tiny else 4096}
  sizes |= _TINY[name] if tiny else changes
  return measuring.architecture(name, tiny, **sizes, tie_word_embeddings=False)


def gradient_program(arch: Architecture, dtype: str):
  """Returns jitted (params, batch, own) -> (log-probabilities float32[B, T], gradient of their sum
  over `own` bool[B, T]).
  """
  forward = Forward(arch, jnp.dtype(dtype))

  def total(params, batch, own):
    found = forward.token_logprobs(params, batch)
    return jnp.where(own, found, 0).sum(), found

  def whole(params, batch, own):
    with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
      (_, found), gradient = jax.value_and_grad(total, has_aux=True)(params, batch, own)
    return found, gradient

  return jax.jit(whole)


def _batches(arch: Architecture, length: int) -> tuple[dict, dict, np.ndarray]:
  """Returns (batch, the same with other tokens in document 3, bool[2, T] tokens of the others)."""
  segments, positions = attention.documents(length)
  chance, half = np.random.default_rng(3), arch.vocab_size // 2
  changed = segments == 3
  # Document 3 has tokens of its own: no other document may have a gradient there.
  tokens = chance.integers(1, half, segments.shape)
  both = [np.where(changed, chance.integers(half, 2 * half, tokens.shape), tokens) for _ in 'ab']

  def batch(tokens):
    tokens = np.where(segments > 0, tokens, 0).astype(np.int32)
    labels = np.roll(tokens, -1, 1)
    inside = (segments == np.roll(segments, -1, 1)) & (segments > 0)
    inside[:, -1] = False
    made = {'tokens': tokens, 'segments': segments, 'positions': positions}
    made |= {'labels': np.where(inside, labels, 0), 'weights': inside.astype(np.float32)}
    return {k: sharding.put(jax.sharding.get_mesh(), v, 'batch', 'seq') for k, v in made.items()}

  return *map(batch, both), (segments > 0) & ~changed


def _check_model(row: dict, arch: Architecture, length: int) -> None:
  params = weights.random(
    arch,
    jax.random.key(0),
    jnp.dtype('float32'),
    trees.flatten(sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))),
  )
  before, after, others = _batches(arch, length)
  own = sharding.put(jax.sharding.get_mesh(), others, 'batch', 'seq')
  call = gradient_program(arch, 'bfloat16')
  (found, gradient), (changed, other) = (call(params, b, own) for b in (before, after))
  row['leak'] = measuring.difference(found, changed, others)
  row['leak_gradient'] = _largest_gap(gradient, other)
  del other
  most = EXPERTS_GRADIENT if arch.mixtures() else 0.0
  check(row, 'influence between documents', row['leak'], 0.0)
  check(row, 'influence on gradients, relative', row['leak_gradient'], most)
  rows = np.asarray(gradient['embed']['w'])[arch.vocab_size // 2 :]
  foreign = float(np.abs(rows.astype(np.float32)).max())
  check(row, 'gradient of embeddings of the changed document', foreign, 0.0)
  moved = measuring.difference(found, changed, ~others)
  check(row, 'the changed document itself did not change', -moved, -1e-3)
  exact, precise = gradient_program(arch, 'float32')(params, before, own)
  gaps = np.abs(np.asarray(found) - np.asarray(exact))[others]
  row['error'] = float(gaps.mean())
  check(row, 'mean error of log-probabilities, nats', row['error'], LOGPROB)
  row['cosine'] = _smallest_cosine(gradient, precise)
  if not arch.mixtures():  # rounding may give a token other experts
    check(row, 'cosine of a gradient with float32', -row['cosine'], -COSINE)


def _largest_gap(tree: dict, other: dict) -> float:
  """Returns the largest difference of two trees' entries, relative to the largest of their leaf."""
  gaps = []
  for a, b in _pairs(tree, other):
    gaps.append(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30))
  return measuring.largest(gaps)


def _smallest_cosine(tree: dict, other: dict) -> float:
  """Returns the smallest cosine of two trees' leaves; of leaves that are both 0 it is 1."""
  found = []
  for a, b in _pairs(tree, other):
    sizes = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    found.append(float(np.vdot(a, b)) / sizes if sizes else float(not a.any() and not b.any()))
  return float(np.min(found))


def _pairs(tree: dict, other: dict):
  """Yields both trees' leaves as float32 on the host, where they cost no compilation."""
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  return (tuple(np.asarray(x).astype(np.float32).ravel() for x in pair) for pair in leaves)


def run(record: Record, tiny: bool, *, part: str) -> None:
  """Checks grouped products, or whole models; delta nets, which compile longest, come last.

  part: products or models.
  """
  measuring.one_device()
  if part == 'products':
    for p in TINY_PRODUCTS if tiny else PRODUCTS:
      with record.row(p.name) as row:
        _check_product(row, p, measuring.platform() == 'cpu')
    return
  for name, layers, changes in MODELS:
    with record.row(f'{name}, {layers} layers') as row:
      _check_model(row, model(name, layers, tiny, changes), 128 if tiny else 1024)
