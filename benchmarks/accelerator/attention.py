"""Attention kernels on the device: no influence between documents, outputs and gradients against
float32, and speed.

Influence: one document's queries, keys, values and incoming gradients are changed by a factor of
-100. Outputs and gradients of all other documents must keep every bit: the difference is exactly 0.
Errors are relative to the largest entry of the reference, a plain softmax in float32 on the same
rounded inputs. Padding is left out: its values mean nothing (docs/attention.md).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from accelerator import measuring
from accelerator.record import Record, check, describe
from ftjax.models import attention
from ftjax.models.kernels import blocked, dense
from ftjax.runtime import sharding

COLUMNS = (
  ('kernel', 'kernel', ''),
  ('leak', 'influence between documents', '.3g'),
  ('forward', 'error of outputs', '.2g'),
  ('backward', 'largest error of a gradient', '.2g'),
  ('ms', 'forward and backward, ms', '.3f'),
  ('tflops', 'model TFLOP/s', '.1f'),
  ('note', 'note', ''),
)
# Most relative error: bfloat16 has 8 bits, and the weights of a softmax are rounded to it too.
LIMITS = {'bfloat16': 2e-2, 'float32': 1e-5}
_CHANGED = 3  # the document whose influence is measured


@dataclasses.dataclass(frozen=True)
class Case:
  """Heads of a model: of queries, of keys, their size; window and soft cap of the scores."""

  name: str
  heads: int
  kv_heads: int
  head_dim: int
  window: int | None = None
  soft_cap: float | None = None
  dtype: str = 'bfloat16'


CASES = (
  Case('Llama 3.1 8B, Qwen3 8B', 32, 8, 128),
  Case('Gemma 2 9B', 16, 8, 256, window=700, soft_cap=50.0),
  Case('Llama 3.2 1B', 32, 8, 64),
  Case('Gemma 3 1B', 4, 1, 256, window=512),
  Case('Qwen2.5 0.5B', 14, 2, 64),
  Case('Phi-3 mini', 32, 32, 96, window=700),
  Case('Qwen2.5 0.5B in float32', 14, 2, 64, dtype='float32'),
)
TINY_CASES = (
  Case('tiny', 4, 2, 16),
  Case('tiny, window and cap', 4, 1, 16, window=50, soft_cap=5.0),
)


def kernels(case: Case, length: int, platform: str, every: bool) -> list[str]:
  """Returns the kernels that can compute a case, the platform's choice first. every: on CPU those
  of the other platforms too, which are interpreted there.
  """
  problem = attention.Problem(platform, 1, length, length, case.head_dim, case.dtype)
  names = [attention.kernel(problem)]
  names += ['triton', 'splash'] if every and platform == 'cpu' else []
  return list(dict.fromkeys([*names, 'blocked', 'dense']))


def program(name: str, case: Case, interpret: bool, reference: bool = False):
  """Returns jitted (q, k, v, segments, positions, g) -> (out, dq, dk, dv) of a kernel, or with
  `reference` of a plain softmax in float32. g: the gradient of the outputs.
  """
  features = dict(window=case.window, soft_cap=case.soft_cap)

  def attend(q, k, v, segments, positions):
    where = (segments, positions, segments, positions)
    if reference:
      q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
      return _plain(q, k, v, dense.visible(where, case.window), case.soft_cap)
    if name == 'triton':
      from ftjax.models.kernels import triton

      return triton.attend(q, k, v, where, **features, interpret=interpret)
    if name == 'splash':
      from ftjax.models.kernels import splash

      return splash.attend(q, k, v, (segments, segments), **features, interpret=interpret)
    if name == 'blocked':
      return blocked.attend(q, k, v, where, case.window, case.soft_cap)
    return dense.attend(q, k, v, dense.visible(where, case.window), case.soft_cap)

  def whole(q, k, v, segments, positions, g):
    own = functools.partial(attend, segments=segments, positions=positions)
    out, back = jax.vjp(own, q, k, v)
    return out, *back(g.astype(out.dtype))

  # As models run it; interpret mode knows no Explicit axes. In float32 products are exact.
  exact = 'highest' if reference or case.dtype == 'float32' else 'default'
  wrap = jax.shard_map if interpret else sharding.shard_map
  inside = wrap(whole, in_specs=(jax.P(),) * 6, out_specs=(jax.P(),) * 4, check_vma=False)

  def call(*arguments):
    with jax.default_matmul_precision(exact):
      return inside(*arguments)

  return jax.jit(call)


def _plain(q, k, v, mask, soft_cap):
  """softmax(cap(q k^T / sqrt(H))) v as it reads, all scores at once."""
  k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
  scores = jnp.einsum('BTNH,BSNH->BNTS', q, k) * q.shape[-1] ** -0.5
  if soft_cap is not None:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30))
  return jnp.einsum('BNTS,BSNH->BTNH', weights, v)


def documents(length: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (segments, positions) int32[2, length]: documents of many lengths, one of a single
  token, padding behind and in front; document 3 is in both rows.
  """
  segments = np.zeros((2, length), np.int32)
  ends = [length * n // 16 for n in (5, 10, 15)]
  segments[0, : ends[0]], segments[0, ends[0]] = 1, 2
  segments[0, ends[0] + 1 : ends[1]], segments[0, ends[1] : ends[2]] = _CHANGED, 4
  segments[1, length // 16 : ends[1]], segments[1, ends[1] :] = 1, _CHANGED
  return segments, positions_of(segments)


def positions_of(segments: np.ndarray) -> np.ndarray:
  """Returns the index of each token in its run of equal segments, int32[B, T]."""
  out = np.zeros(segments.shape, np.int32)
  for b in range(segments.shape[0]):
    for t in range(1, segments.shape[1]):
      same = segments[b, t] == segments[b, t - 1] != 0
      out[b, t] = out[b, t - 1] + 1 if same else 0
  return out


def arguments(case: Case, length: int) -> tuple[list[jax.Array], list[jax.Array]]:
  """Returns the arguments of `program`, and the same with document 3 changed."""
  chance = np.random.default_rng(0)
  heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
  segments, positions = documents(length)
  changed = (segments == _CHANGED)[:, :, None, None]
  arrays = [chance.standard_normal((2, length, n, case.head_dim), np.float32) for n in heads]
  arrays[3] = np.where((segments == 0)[:, :, None, None], 0, arrays[3])
  others = [np.where(changed, -100 * a, a) for a in arrays]

  def placed(q, k, v, g):
    floats = [measuring.on_device(a, jnp.dtype(case.dtype)) for a in (q, k, v, g)]
    return [*floats[:3], *map(measuring.on_device, (segments, positions)), floats[3]]

  return placed(*arrays), placed(*others)


def run(record: Record, tiny: bool, *, own: bool) -> None:
  """Checks the kernel that the platform chooses for each case, and times it; with own=False all
  other kernels that can run here.
  """
  measuring.one_device()
  platform, length = measuring.platform(), 256 if tiny else 2048
  expected: dict = {}
  for case in TINY_CASES if tiny else CASES:
    names = kernels(case, length, platform, tiny)
    for name in names[:1] if own else names[1:]:
      with record.row(case.name) as row:
        row['kernel'] = name
        _measure(row, case, name, length, platform == 'cpu', expected)
  _speed(record, 256 if tiny else 4096, tiny, own)


def _measure(row: dict, case: Case, name: str, length: int, interpret: bool, expected: dict):
  before, after = arguments(case, length)
  segments, _ = documents(length)
  real, others = segments > 0, segments != _CHANGED
  call = program(name, case, interpret)
  if case not in expected:
    reference = program('dense', case, interpret, reference=True)(*before)
    expected[case] = [np.asarray(a) for a in reference]
  found, again, changed = ([np.asarray(a) for a in call(*x)] for x in (before, before, after))
  row['leak'] = measuring.largest(measuring.difference(*x, others) for x in _pairs(found, changed))
  row['repeat'] = measuring.largest(measuring.difference(*x) for x in _pairs(found, again))
  row['changed'] = min(measuring.difference(*x, ~others) for x in _pairs(found, changed))
  errors = [measuring.error(*x, real) for x in _pairs(found, expected[case])]
  row |= {'forward': errors[0], 'backward': measuring.largest(errors[1:])}
  check(row, 'influence between documents', row['leak'], 0.0)
  check(row, 'the changed document itself did not change', -row['changed'], -1e-3)
  check(row, 'error of outputs', errors[0], LIMITS[case.dtype])
  check(row, 'error of gradients', row['backward'], LIMITS[case.dtype])


def _pairs(a: list, b: list) -> zip:
  return zip(a, b, strict=True)


def _speed(record: Record, length: int, tiny: bool, own: bool) -> None:
  """Times forward and backward, on rows of packed documents and of one document."""
  case = TINY_CASES[0] if tiny else CASES[0]
  platform = measuring.platform()
  for title, alone in (('packed documents', False), ('one document', True)):
    names = kernels(case, length, platform, False)
    for name in names[:1] if own else names[1:]:
      with record.row(f'speed, 2 x {length}, {title}') as row:
        row['kernel'] = name
        time_kernel(row, case, length, alone, program(name, case, platform == 'cpu'))
  if platform == 'gpu' and own:
    with record.row(f'speed, 2 x {length}, one document; knows no documents') as row:
      row['kernel'] = 'cuDNN, not used'
      try:
        time_kernel(row, case, length, True, _cudnn())
      except Exception as error:  # no part of ftjax: without it the section is whole
        row['note'] = describe(error)


def time_kernel(row: dict, case: Case, length: int, alone: bool, call) -> None:
  """Writes the time of a `program` into a row: 2 rows of `length` tokens, one document each where
  `alone`.
  """
  batch, pairs = measuring.packed_batch(2, length, 9, one_document=alone)
  keys = iter(jax.random.split(jax.random.key(0), 4))
  sizes = [(2, length, n, case.head_dim) for n in (case.heads, case.kv_heads)]
  q, k, v, g = (
    jax.random.normal(next(keys), sizes[i], jnp.dtype(case.dtype)) for i in (0, 1, 1, 0)
  )
  where = [measuring.on_device(batch[n]) for n in ('segments', 'positions')]
  seconds = measuring.median_seconds(functools.partial(call, q, k, v, *where, g), times=7)
  flops = 12 * case.heads * case.head_dim * pairs
  row |= {'ms': 1000 * seconds, 'tflops': flops / seconds / 1e12}


def _cudnn():
  """Returns the call of cuDNN's attention with the arguments of `program`, documents unread: its
  speed is a mark for ours.
  """

  def whole(q, k, v, segments, positions, g):
    del segments, positions
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation='cudnn')
    out, back = jax.vjp(attend, q, k, v)
    return out, *back(g)

  return jax.jit(sharding.shard_map(whole, (sharding.spec(),) * 6, (sharding.spec(),) * 4))
