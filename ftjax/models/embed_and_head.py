"""What stands around the blocks of a model: embeddings before them; last norm, and the head of a
language model or of labels after them.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models import lora
from ftjax.models.architecture import Architecture, AttentionSpec, MaskedHead
from ftjax.models.attention import Tokens
from ftjax.models.head_map import Head
from ftjax.models.layers import Dropout, Linear, Normalize, Param, declare
from ftjax.models.logit_chunks import LowRank
from ftjax.models.mlp import ACTIVATIONS
from ftjax.models.score_head import Score
from ftjax.runtime.sharding import gather, gathered, index, shard_map, spec, total

_NAMES = (
  *('embed', 'positions', 'token_types', 'embed_norm', 'relative', 'relative_bias'),
  *('encoder_norm', 'final_norm'),
  *('head', 'masked', 'score'),
)


class Masked(nnx.Module):
  """What architecture.MaskedHead describes: `dense`, `norm`, and `b` float32[V] of the logits."""

  b = None

  def __init__(self, arch: Architecture, head: MaskedHead, padding: int):
    dim = arch.model_dim
    self.activation = ACTIVATIONS[head.activation]
    out = ('batch', 'seq', 'act_embed')
    self.dense = Linear((dim,), (dim,), ('embed', 'act_embed'), out, head.dense_bias)
    self.norm = Normalize((dim,), head.norm)
    if head.bias:
      self.b = declare((arch.vocab_rows,), ('vocab',), 0, padding=padding)

  def __call__(self, x: jax.Array, dropout: Dropout | None) -> jax.Array:
    """Maps hidden states [B, T, D] to what the head multiplies."""
    return self.norm(self.activation(self.dense(x, dropout)))


class Relative(nnx.Module):
  """The table of relative positions `w` float32[P, D], and its norm."""

  norm = None

  def __init__(self, arch: Architecture):
    shape = (arch.relative_positions, arch.model_dim)
    self.w = declare(shape, ('position', 'embed'), arch.model_dim)
    if arch.relative_norm is not None:
      self.norm = Normalize((arch.model_dim,), arch.relative_norm)

  def __call__(self, dtype: jnp.dtype) -> jax.Array:
    """Returns the rows that the layers project, dtype[P, D], not split over devices."""
    rows = jax.sharding.reshard(self.w[...].astype(dtype), gathered('position', 'embed'))
    return rows if self.norm is None else self.norm(rows)


class EmbedAndHead(nnx.Module):
  """The parameters around the blocks: the embedding tables of tokens, of learned positions and of
  token types, their norm, the last norm, and what makes logits or labels.
  """

  def __init__(self, arch: Architecture):
    shape, padding = (arch.vocab_rows, arch.model_dim), arch.vocab_rows - arch.vocab_size
    # T5's random embeddings have a variance of 1, and its tied head scales what it multiplies.
    fan_in = 1 if arch.encoder_stacks else arch.model_dim
    table = declare(shape, ('vocab', 'embed'), fan_in, padding=padding)
    self.embed = nnx.Dict(w=table)
    dim = arch.model_dim
    if arch.encoder_stacks:
      self.encoder_norm = Normalize((dim,), arch.final_norm)
    if tables := _biases(arch):
      self.relative_bias = nnx.Dict(tables)
    if arch.final_norm is not None:
      self.final_norm = Normalize((dim,), arch.final_norm)
    if arch.learned_positions:
      rows = (arch.learned_positions, dim)
      self.positions = nnx.Dict(w=declare(rows, ('position', 'embed'), dim))
    if arch.token_types:
      rows = (arch.token_types, dim)
      self.token_types = nnx.Dict(w=declare(rows, ('token_type', 'embed'), dim))
    if arch.relative_positions:
      self.relative = Relative(arch)
    if arch.embed_norm is not None:
      self.embed_norm = Normalize((dim,), arch.embed_norm)
    if arch.num_labels:
      self.score = Score(arch)
      return
    if arch.masked_head is not None:
      self.masked = Masked(arch, arch.masked_head, padding)
    if not arch.tied and not _is_bare(arch):
      self.head = Head(arch.vocab_rows, dim, padding)


def _biases(arch: Architecture) -> dict[str, Param]:
  """Returns the tables of mixer_spec.RelativeBias by name, each float32[P, N]."""
  mixers = (b.mixer for b in arch.layers() if isinstance(b.mixer, AttentionSpec))
  return {
    m.relative.name: declare(
      (m.relative.buckets, m.num_heads), ('position', 'heads'), arch.model_dim
    )
    for m in mixers
    if m.relative is not None
  }


def _is_bare(arch: Architecture) -> bool:
  """Returns whether an encoder has no head: it gives hidden states."""
  return arch.is_encoder and arch.masked_head is None and not arch.num_labels


@functools.cache
def definition(arch: Architecture) -> lora.Definition:
  """Returns (graph definition, {name: Declared}) of the parameters around the blocks."""
  return lora.define(EmbedAndHead(arch), '', arch)


def merge(arch: Architecture, params: dict) -> EmbedAndHead:
  """Returns the module with its parameters, from those of a whole model."""
  return nnx.merge(definition(arch)[0], {n: params[n] for n in _NAMES if n in params})


def linear_maps(arch: Architecture) -> list[str]:
  """Returns the names of the maps around the blocks that may have an adapter: an untied head, and
  the one before the head of a masked language model.

  The head of a masked language model has none itself: its logits have a bias, which DoRA would
  scale.
  """
  found = lora.linear_maps(EmbedAndHead(arch))
  return found if arch.masked_head is None else [n for n in found if n != 'head']


def head_leaf(arch: Architecture) -> str:
  """Returns the name of the leaf that maps hidden states to logits [V, D] or to labels [R, D]."""
  if arch.num_labels:
    return 'score/w'
  return 'embed/w' if arch.tied or _is_bare(arch) else 'head/w'


def head_update(
  arch: Architecture, params: dict, x: jax.Array, dropout_keys: jax.Array | None = None
) -> LowRank | None:
  """Returns what is added to the logits of hidden states x [B, T, D]: by an adapter of the head, or
  the bias of a masked language model; None without either. dropout_keys: see transformer.routed.
  """
  if arch.masked_head is not None and not arch.num_labels:
    return _logit_bias(params, x) if arch.masked_head.bias else None
  if arch.adapter is None or arch.adapter.find('head') is None:
    return None
  drop = None
  if dropout_keys is not None:
    drop = Dropout(arch.adapter.dropout, fold(dropout_keys, 'head'))
  return merge(arch, params).head.update(x, drop)


def _logit_bias(params: dict, x: jax.Array) -> LowRank:
  """Returns the bias of the logits as an update of rank 1: u is 1, and b the bias, float32."""
  one = jnp.ones((*x.shape[:-1], 1), x.dtype, out_sharding=spec('batch', 'seq', None))
  return LowRank(one, params['masked']['b'].astype(jnp.float32)[None])


def head_states(
  arch: Architecture, params: dict, x: jax.Array, dropout_keys: jax.Array | None = None
) -> jax.Array:
  """Returns what the head multiplies, [B, T, D], of the hidden states after the last norm: for a
  masked language model the states after its own map, for others the same.
  """
  if arch.masked_head is None or arch.num_labels:
    return x
  drop = None
  if dropout_keys is not None:
    drop = Dropout(arch.adapter.dropout, fold(dropout_keys, 'masked'))
  return merge(arch, params).masked(x, drop)


def label_logits(
  arch: Architecture,
  params: dict,
  x: jax.Array,
  seq: str | None = 'seq',
  dropout: Dropout | None = None,
) -> jax.Array:
  """Returns the numbers of the labels, float32[B, T, R]; see score_head.Score."""
  return merge(arch, params).score(x, seq, dropout)


def embed(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns rows of table [V, D] for tokens int32[B, T], as dtype[B, T, D].

  A shard_map region: each shard looks up the ids of its part of the vocabulary, and the parts are
  summed over `tensor`."""

  def local(table, tokens):
    # In its own dtype: the gradient adds up all occurrences of a token, too many for bfloat16.
    table = gather(table, 'fsdp', 1)
    ids = tokens - index('tensor') * table.shape[0]
    mine = (ids >= 0) & (ids < table.shape[0])
    rows = jnp.where(mine[..., None], table[jnp.where(mine, ids, 0)].astype(dtype), 0)
    return total(rows, 'tensor')

  specs = (spec('vocab', 'embed'), spec('batch', 'seq'))
  return shard_map(local, specs, spec('batch', 'seq', 'act_embed'), check_vma=True)(table, tokens)


def rows_at(table: jax.Array, places: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns rows of table [P, D], which is split over fsdp alone, for places int32[B, T], as
  dtype[B, T, D]; of places beyond the table NaN, which ends a run.
  """

  def local(table, places):
    table = gather(table, 'fsdp', 1)
    return table.at[places].get(mode='fill', fill_value=jnp.nan).astype(dtype)

  specs = (spec('position', 'embed'), spec('batch', 'seq'))
  return shard_map(local, specs, spec('batch', 'seq', 'act_embed'), check_vma=True)(table, places)


def embedded(
  arch: Architecture,
  params: dict,
  tokens: jax.Array,
  where: Tokens,
  dtype: jnp.dtype,
  token_types: jax.Array | None = None,
) -> jax.Array:
  """Returns what the first block reads, dtype[B, T, D].

  Args:
    arch: the architecture.
    params: nested dict.
    tokens: int32[B, T].
    where: segments and positions of the tokens.
    dtype: compute dtype.
    token_types: int32[B, T], of a model that has them; None: all 0.
  """
  x = embed(params['embed']['w'], tokens, dtype)
  if arch.embed_scale != 1:
    # Rounded to the dtype, as transformers' Gemma does.
    x = x * jnp.asarray(arch.embed_scale, dtype)
  if arch.token_types:
    types = jnp.zeros_like(tokens) if token_types is None else token_types
    x = x + rows_at(params['token_types']['w'], types, dtype)
  if arch.learned_positions:
    places = where.positions + arch.position_offset if arch.position_offset else where.positions
    x = x + rows_at(params['positions']['w'], places, dtype)
  return x if arch.embed_norm is None else merge(arch, params).embed_norm(x)


def relative(arch: Architecture, params: dict, dtype: jnp.dtype) -> jax.Array | None:
  """Returns the table of relative positions, dtype[P, D]; None for a model without."""
  return merge(arch, params).relative(dtype) if arch.relative_positions else None


def normed(arch: Architecture, params: dict, x: jax.Array) -> jax.Array:
  """Returns the hidden states after the last norm, if there is one."""
  return x if arch.final_norm is None else merge(arch, params).final_norm(x)


def encoder_normed(arch: Architecture, params: dict, x: jax.Array) -> jax.Array:
  """Returns the states of the encoder of an encoder-decoder after its last norm."""
  return merge(arch, params).encoder_norm(x)


def fold(keys: jax.Array, name: str) -> jax.Array:
  """Returns key[B] for the use that `name` names."""
  return jax.vmap(lambda k: jax.random.fold_in(k, zlib.crc32(name.encode())))(keys)
