"""The chunked cross-entropy head against dense logits: time and memory of loss and gradients.

Both get hidden states in bfloat16 and a float32 table, whose product is taken in bfloat16 with
float32 sums; dense logits are float32 [tokens, vocabulary]. Memory is what the compiler reserves
for temporaries and results. The guarantee is a chunked head of at most 1.15 times the dense time.
"""

import functools

import jax
import jax.numpy as jnp

from accelerator import measuring
from accelerator.record import Record, check
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models import head
from ftjax.runtime import sharding

COLUMNS = (
  ('ms', 'chunked, ms', '.2f'),
  ('dense_ms', 'dense, ms', '.2f'),
  ('ratio', 'chunked / dense time', '.2f'),
  ('gib', 'chunked, GiB', '.3f'),
  ('dense_gib', 'dense, GiB', '.3f'),
  ('third_ms', 'chunked, 30 % supervised, ms', '.2f'),
  ('error', 'error of a gradient against dense', '.2g'),
)
# (model, tokens, width, vocabulary)
CASES = (
  ('Llama 3 8B', 8192, 4096, 128256),
  ('Qwen3 1.7B', 8192, 2048, 151936),
  ('Qwen3 1.7B', 16384, 2048, 151936),
)
TINY_CASES = (('tiny', 256, 32, 1000),)
ERROR = 2e-2  # relative; both round to bfloat16, in another order
RATIO = 1.15  # guarantee 4.4


def chunked(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array):
  """Returns (loss, its gradients by x and w). x: bfloat16[1, T, D], w: float32[V, D]."""

  def loss(x, w):
    total, _ = head.cross_entropy_sums(x, w, labels, weights, LossConfig())
    return total / weights.sum()

  return jax.value_and_grad(loss, argnums=(0, 1))(x, w)


def dense(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array):
  """Returns the same from an array of all logits."""

  def whole(x, w, labels, weights):
    def loss(x, w):
      logits = jnp.einsum('BTD,VD->BTV', x, w.astype(x.dtype), preferred_element_type=jnp.float32)
      picked = jnp.take_along_axis(logits, labels[..., None], axis=2)[..., 0]
      found = (jax.nn.logsumexp(logits, axis=-1) - picked) * weights
      return found.sum() / weights.sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

  specs = [sharding.spec(*axes) for *_, axes in arguments(1, 1, 1)]
  return sharding.shard_map(whole, tuple(specs), (sharding.spec(), tuple(specs[:2])))(
    x, w, labels, weights
  )


def arguments(tokens: int, width: int, vocab: int) -> list[tuple]:
  """Returns (shape, dtype, logical axes) of the arguments of `chunked` and `dense`."""
  row = (1, tokens)
  return [
    ((*row, width), jnp.bfloat16, ('batch', 'seq', 'act_embed')),
    ((vocab, width), jnp.float32, ('vocab', 'embed')),
    (row, jnp.int32, ('batch', 'seq')),
    (row, jnp.float32, ('batch', 'seq')),
  ]


def compiled(function, given) -> tuple[jax.stages.Compiled, float]:
  """Returns (the program, GiB of its temporaries and results)."""
  found = jax.jit(function).lower(*given).compile()
  held = found.memory_analysis()
  return found, (held.temp_size_in_bytes + held.output_size_in_bytes) / 2**30


def _measure(row: dict, tokens: int, width: int, vocab: int) -> None:
  keys = jax.random.split(jax.random.key(0), 3)
  places = [
    jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec(*a))
    for *_, a in arguments(tokens, width, vocab)
  ]
  host = (
    jax.random.normal(keys[0], (1, tokens, width), jnp.bfloat16),
    jax.random.normal(keys[1], (vocab, width), jnp.float32) * width**-0.5,
    jax.random.randint(keys[2], (1, tokens), 0, vocab),
    jnp.ones((1, tokens), jnp.float32),
  )
  x, w, labels, everywhere = given = jax.device_put(host, tuple(places))
  del host
  third = everywhere * (jnp.arange(tokens) % 10 < 3)[None]
  call, row['gib'] = compiled(chunked, given)
  _, (dx, dw) = call(*given)
  row['ms'] = 1000 * measuring.median_seconds(functools.partial(call, *given))
  run_third = functools.partial(call, x, w, labels, third)
  row['third_ms'] = 1000 * measuring.median_seconds(run_third)
  other, row['dense_gib'] = compiled(dense, given)
  _, expected = other(*given)
  gaps = [jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in zip((dx, dw), expected, strict=True)]
  row['error'] = measuring.largest(map(float, gaps))
  del dx, dw, expected
  row['dense_ms'] = 1000 * measuring.median_seconds(functools.partial(other, *given))
  row['ratio'] = row['ms'] / row['dense_ms']
  check(row, 'error of a gradient against dense', row['error'], ERROR)
  if measuring.platform() != 'cpu':  # the guarantee is about accelerators and large vocabularies
    check(row, 'chunked / dense time', row['ratio'], RATIO)


def run(record: Record, tiny: bool) -> None:
  """Measures both heads at each size."""
  measuring.one_device()
  for name, tokens, width, vocab in TINY_CASES if tiny else CASES:
    with record.row(f'{name}, {tokens:,} tokens x {vocab:,}') as row:
      _measure(row, tokens, width, vocab)
