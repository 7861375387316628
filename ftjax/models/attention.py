"""Softmax attention with grouped key/value heads: one mask rule for training, packing, padding and
decoding.

Query t may look at key s when both belong to the same segment and positions[t] >= positions[s];
with a window, when also positions[t] - positions[s] < window. Attention that is not causal looks at
the whole segment, with a window where |positions[t] - positions[s]| < window. Segment 0 is padding.
Positions count within a segment, so the rule needs no index arithmetic and survives any reordering
of the sequence.

The reshape of N heads into K groups, and the gather of keys over `context`, are local inside
`shard_map`. Which kernel computes it is chosen by `kernel`, and logged; each honours
the rule, the window and the cap, or is not chosen (docs/attention.md)."""

import dataclasses
import functools
import logging

import jax

from ftjax.models.dropout import Drawn, ModelDropout, kept, kept_share
from ftjax.models.kernels import blocked, dense
from ftjax.runtime import sharding
from ftjax.runtime.sharding import spec

log = logging.getLogger(__name__)

# Shorter rows are quicker with all scores at once.
_LONG = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Where tokens stand: `segments` int32[B, T] (0: padding, else a document) and `positions`
  int32[B, T] within it.
  """

  segments: jax.Array
  positions: jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
  """What a kernel is chosen for.

  platform: 'tpu', 'gpu' or 'cpu'. context: ways that the sequence is split. queries, keys: T and S
  of the whole row. head_dim: H. dtype: of q. window, soft_cap, causal: see `attend`. capability: of
  a GPU, (9, 0) is Hopper. dropout: share of the probabilities that is dropped.
  """

  platform: str
  context: int
  queries: int
  keys: int
  head_dim: int
  dtype: str
  window: int | None = None
  soft_cap: float | None = None
  capability: tuple[int, int] = (9, 0)
  causal: bool = True
  dropout: float = 0.0


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query: Tokens,
  key: Tokens,
  window: int | None = None,
  soft_cap: float | None = None,
  causal: bool = True,
  dropout: ModelDropout | None = None,
) -> jax.Array:
  """softmax(c tanh(q k^T / sqrt(H) / c)) v: scaled dot-product attention; c: soft_cap.

  Args:
    q: [B, T, N, H], any float dtype; scores and softmax are float32.
    k: [B, S, K, H], N a multiple of K.
    v: [B, S, K, H].
    query: segments and positions of the T queries.
    key: of the S keys.
    window: tokens that a query sees, itself and those just before it (Beltagy et al. 2020, section
      3.1); None: all of its segment.
    soft_cap: largest size of a score (Gemma 2, 2024, section 2); None: no cap.
    causal: False: a query sees tokens after it too, with a window as many on either side.
    dropout: of a training step in this layer, whose rate of attention is read; None: none.

  Where queries are keys, rows stand in the order of sharding.zigzag: the kernel of TPUs goes by
  index, and only within segments that lie in one piece.

  Returns:
    [B, T, N, H] in q's dtype. Rows of padding attend among padding; their values are finite and
    mean nothing.
  """
  heads, kv, where = (
    spec('batch', 'seq', 'heads', None),
    spec('batch', 'seq', 'kv_heads', None),
    spec('batch', 'seq'),
  )
  places = (query.segments, query.positions, key.segments, key.positions)
  drawn, drawn_specs = drawing(dropout, q.shape[2], q.shape[1], k.shape[1])
  specs = (heads, kv, kv, where, where, where, where, drawn_specs)
  mesh = jax.sharding.get_abstract_mesh()
  platform = mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
  problem = Problem(
    platform=platform,
    context=mesh.shape['context'],
    queries=q.shape[1],
    keys=k.shape[1],
    head_dim=q.shape[-1],
    dtype=q.dtype.name,
    window=window,
    soft_cap=soft_cap,
    capability=_capability(platform),
    causal=causal,
    dropout=0.0 if drawn is None else dropout.rates.attention,
  )
  name = kernel(problem)
  _log_choice(name, problem)
  local = functools.partial(_local, name=name, problem=problem)
  return sharding.shard_map(local, specs, heads)(q, k, v, *places, drawn)


def drawing(
  dropout: ModelDropout | None, heads: int, queries: int, keys: int
) -> tuple[Drawn | None, Drawn | None]:
  """Returns (what the kept probabilities of a layer are drawn from, its PartitionSpecs); None for
  both where all are kept.
  """
  drawn = None if dropout is None else dropout.attention(heads, queries, keys)
  if drawn is None:
    return None, None
  whole = None if drawn.keys is None else spec(None)
  return drawn, Drawn(spec('batch', 'heads', None), spec('seq'), whole)


def _capability(platform: str) -> tuple[int, int]:
  """Returns the compute capability of the attached GPUs; Hopper's for a compile without them."""
  if platform != 'gpu' or jax.default_backend() != 'gpu':
    return 9, 0
  major, minor = jax.local_devices()[0].compute_capability.split('.')
  return int(major), int(minor)


def kernel(p: Problem) -> str:
  """Which file of kernels/ computes attention: the quickest that honours all of the problem."""
  fast = {'tpu': 'splash', 'gpu': 'triton'}.get(p.platform)
  if fast and not _obstacle(p):
    return fast
  if p.queries >= _LONG and blocked.block_size(p.queries // p.context):
    return 'blocked'
  return 'dense'


def _obstacle(p: Problem) -> str:
  """Why the platform's own kernel cannot take the problem; '' where it can."""
  if p.dropout:
    return 'it has no dropout of attention'
  if p.queries != p.keys:
    return f'{p.queries} queries on {p.keys} keys'
  if p.queries // p.context % 128:
    return f'{p.queries // p.context} queries a device are no multiple of 128'
  if p.platform == 'tpu':
    return ''
  if p.capability < (9, 0):
    return f'compute capability {p.capability[0]}.{p.capability[1]} is below 9.0'
  if p.dtype not in ('bfloat16', 'float16'):  # its float32 products would be rounded
    return p.dtype
  return '' if p.head_dim in (16, 32, 64, 128, 256) else f'head_dim {p.head_dim}'


_logged: set[tuple[str, str]] = set()  # (platform, kernel)


def _log_choice(name: str, p: Problem) -> None:
  """Once for each kernel, whatever the shapes: prompts of a rollout have many."""
  if (p.platform, name) in _logged:
    return
  _logged.add((p.platform, name))
  why = _obstacle(p) if p.platform in ('tpu', 'gpu') else ''
  log.info('attention kernel on %s: %s%s', p.platform, name, f' ({why})' if why else '')


def _local(q, k, v, q_segments, q_positions, k_segments, k_positions, drawn, *, name: str, problem):
  features = dict(window=problem.window, soft_cap=problem.soft_cap, causal=problem.causal)
  interpret = problem.platform == 'cpu'  # tests alone choose a kernel of another platform
  k, v, k_segments, k_positions = (
    sharding.gather(a, 'context', 1) for a in (k, v, k_segments, k_positions)
  )
  if name == 'splash':
    from ftjax.models.kernels import splash  # Pallas is slow to import, and of no use elsewhere

    k, v, k_segments = (sharding.unzigzag(a, problem.context) for a in (k, v, k_segments))
    return splash.attend(q, k, v, (q_segments, k_segments), **features, interpret=interpret)
  where = (q_segments, q_positions, k_segments, k_positions)
  if name == 'triton':
    from ftjax.models.kernels import triton

    return triton.attend(q, k, v, where, **features, interpret=interpret)
  if name == 'blocked':
    return blocked.attend(q, k, v, where, **features, drawn=drawn, rate=problem.dropout)
  mask = dense.visible(where, problem.window, problem.causal)
  if drawn is None:
    return dense.attend(q, k, v, mask, problem.soft_cap)
  rate = problem.dropout
  those = kept(drawn, rate, k.shape[1])
  return dense.attend(q, k, v, mask, problem.soft_cap, those, kept_share(rate))
