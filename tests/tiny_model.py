"""A decoder small enough to compute at once: V 256, D 32, 3 layers, 4 heads on 2 kv heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data import synthetic
from ftjax.hf import export
from ftjax.models import head, kinds, kv_cache
from ftjax.models.architecture import Architecture, AttentionSpec, BlockSpec, GatedMlpSpec, Norm
from ftjax.models.attention import Tokens
from ftjax.models.rope_spec import Rope
from ftjax.runtime import trees
from ftjax.runtime.sharding import put, spec


def decoder(
  *,
  vocab_size,
  model_dim,
  num_layers,
  num_heads,
  num_kv_heads,
  head_dim,
  ffn_dim,
  norm=Norm(1e-5),  # noqa: B008 - frozen
  rope=Rope(),  # noqa: B008 - frozen
  tied=True,
  max_len=128,
):
  """A decoder whose layers are all Llama's."""
  mixer = AttentionSpec(num_heads, num_kv_heads, head_dim, rope)
  block = BlockSpec(mixer, GatedMlpSpec(ffn_dim), norm)
  stacks = (((block,), num_layers),)
  return Architecture('llama', vocab_size, model_dim, stacks, norm, tied, max_len)


def with_mixer(arch, **changes):
  """The same with other fields of all attention specs."""
  replace = dataclasses.replace
  return arch.with_blocks(lambda block: replace(block, mixer=replace(block.mixer, **changes)))


TINY = decoder(
  vocab_size=256,
  model_dim=32,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  ffn_dim=64,
)
UNTIED = dataclasses.replace(TINY, tied=False)
QWEN2 = with_mixer(dataclasses.replace(TINY, family='qwen2'), qkv_bias=True)


def write_folder(folder, arch=None):
  """A HF folder of a random model with the byte tokenizer; its path as text."""
  arch = arch or dataclasses.replace(TINY, vocab_size=synthetic.VOCAB_SIZE, max_len=512)
  export.export(
    init(arch),
    arch,
    folder,
    source_config=None,
    tokenizer_files=synthetic.byte_tokenizer(),
    dtype=np.float32,
    stop_ids=(),
  )
  return str(folder)


def place(array, *names):
  """A numpy array on the current mesh, its dimensions named as in runtime/sharding.py."""
  return put(jax.sharding.get_mesh(), np.asarray(array), *names)


def tokens_at(segments, positions=None):
  """Tokens of segments int[B, T]; positions count from 0 within each run of a segment."""
  segments = np.asarray(segments, np.int32)
  if positions is None:
    positions = np.zeros_like(segments)
    for t in range(1, segments.shape[1]):
      same = segments[:, t] == segments[:, t - 1]
      positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
  return Tokens(place(segments, 'batch', 'seq'), place(np.int32(positions), 'batch', 'seq'))


def ids(batch, length, seed=0, vocab=TINY.vocab_size):
  """int32[B, T] random token ids."""
  return np.random.default_rng(seed).integers(0, vocab, (batch, length), np.int32)


def init(arch, seed=0):
  """Random parameters on the current mesh, of numpy, which compiles nothing. Norm scales and biases
  are drawn too: no factor is 1, no summand 0 by luck. Padding of the vocabulary changes no draw.
  """
  rng = np.random.default_rng(seed)
  leaves = {}
  for name, p in sorted(kinds.declared(arch).items()):
    x = rng.normal(size=p.file_shape)
    x = x * p.fan_in**-0.5 if p.fan_in else p.constant + 0.1 * x
    x = np.pad(x, [(0, n - m) for n, m in zip(p.shape, p.file_shape, strict=True)])
    leaves[name] = place(x.astype(np.float32), *p.axes)
  return trees.unflatten(leaves)


def all_logits(arch, params, x):
  """float32[B, T, V] of hidden states x, of every token: what the product never makes."""
  x = kinds.head_states(arch, params, x)
  rows = jax.sharding.reshard(x, spec(None, None, None)).reshape(-1, x.shape[-1])
  rows = jax.sharding.reshard(rows, spec('batch', None))
  update = kinds.head_update(arch, params, rows[:, None])
  update = None if update is None else update._replace(u=update.u[:, 0])
  found = head.logits(rows, kinds.head_weights(arch, params), arch.logit_spec, update)
  found = jax.sharding.reshard(found, spec(None, None))
  return found[:, : arch.vocab_size].reshape(*x.shape[:2], -1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _logits(arch, params, tokens, where, remat, types):
  more = {'dtype': jnp.float32, 'remat': remat, 'token_types': types}
  return all_logits(arch, params, kinds.apply(arch, params, tokens, where, **more))


def logits(arch, params, tokens, where, remat='none', types=None):
  """float32[B, T, V], all of them: what the product never makes. types: of the tokens."""
  types = None if types is None else place(types, 'batch', 'seq')
  return np.asarray(_logits(arch, params, place(tokens, 'batch', 'seq'), where, remat, types))


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(arch, params, tokens, labels, weights, where):
  x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32)
  x, table = kinds.head_states(arch, params, x), kinds.head_weights(arch, params)
  update = kinds.head_update(arch, params, x)
  return head.token_logprobs(x, table, labels, weights, logit_spec=arch.logit_spec, update=update)


def logprobs(arch, params, tokens, labels, weights, where):
  """float32[B, T]: log p of each label whose weight is not 0, through the head."""
  arrays = (place(a, 'batch', 'seq') for a in (tokens, labels, np.float32(weights)))
  return np.asarray(_logprobs(arch, params, *arrays, where))


def decoded(arch, params, tokens, segments, prompt):
  """Hidden states float32[B, T, D] by prefill of the first `prompt` tokens and a step for each of
  the rest, with room for four more.
  """
  (batch, length), positions = tokens.shape, np.asarray(tokens_at(segments).positions)
  decode = jax.jit(functools.partial(kinds.decode, arch, dtype=jnp.float32))
  memory = kv_cache.empty(arch, batch, length + 4, jnp.float32)
  parts, at = [], 0
  for count in [prompt] + [1] * (length - prompt):
    part = slice(at, at + count)
    where = Tokens(*(place(a[:, part], 'batch', 'seq') for a in (segments, positions)))
    x, memory = decode(
      params, place(tokens[:, part], 'batch', 'seq'), where, memory, jnp.asarray(at, jnp.int32)
    )
    parts.append(np.asarray(x))
    at += count
  np.testing.assert_array_equal(memory.tokens.segments, np.pad(segments, ((0, 0), (0, 4))))
  np.testing.assert_array_equal(memory.tokens.positions, np.pad(positions, ((0, 0), (0, 4))))
  return np.concatenate(parts, 1)


def host(tree):
  """{leaf name: numpy array} of a nested dict."""
  return {n: np.asarray(x) for n, x in trees.flatten(tree).items()}


def on_one_device(function):
  """function(mesh, case) on the mesh of now, once a case. For fixtures of a module, which come
  before `use_mesh` of any test.
  """
  alone = jax.sharding.get_mesh()

  @functools.cache
  def found(case):
    with jax.set_mesh(alone):
      return function(alone, case)

  return found
