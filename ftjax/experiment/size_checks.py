"""Sizes of a config that must divide, or fit the model, checked before anything is compiled."""

import math

import ml_collections
from jax.sharding import Mesh

from ftjax.config import algorithms
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError

BALANCE_OF_MODEL = -1.0  # moe.balance: the factor of config.json


def check(c: ml_collections.ConfigDict, arch: Architecture, mesh: Mesh) -> None:
  """Raises ConfigError when a size does not divide, or the algorithm trains models of another kind,
  before anything is compiled.
  """
  _check_kind(c, arch)
  declared = kinds.declared(arch)
  try:
    sharding.check_divides(
      {n: p.axes for n, p in declared.items()},
      {n: p.shape for n, p in declared.items()},
      mesh,
    )
  except ConfigError as error:
    is_packed = str(error).partition(':')[0].endswith(('/codes', '/absmax', '/scales'))
    if arch.base != 'nf4' or not is_packed:
      raise
    raise ConfigError(f'{error}. A block of nf4 is not split: try a smaller lora.block') from error
  size = math.prod(mesh.shape[a] for a in sharding.BATCH)
  for key, rows in (
    ('batch_size / grad_accum', algorithms.rows_per_step(c) // c.grad_accum),
    ('eval.batch_size', c.eval.batch_size),
  ):
    if rows % size:
      raise ConfigError(
        f'{key} = {rows} rows cannot be split over {size} devices (mesh.data x fsdp x expert)'
      )
  size = mesh.shape['context']
  lengths = {'seq_len': c.seq_len, 'seq2seq.source_len': algorithms.source_len(c)}
  for key, length in lengths.items():
    if size > 1 and length % (2 * size):
      raise ConfigError(
        f'{key}={length} is no multiple of 2 x mesh.context={2 * size}: a device takes two chunks '
        'of a row'
      )
  if c.moe.balance != BALANCE_OF_MODEL and not arch.mixtures():
    raise ConfigError(
      f'moe.balance={c.moe.balance}: the model has no experts; leave it at {BALANCE_OF_MODEL:g}'
    )
  if c.seq_len > arch.max_len:
    raise ConfigError(
      f'seq_len={c.seq_len} is more than the {arch.max_len} positions the model was made for '
      '(max_position_embeddings, of GPT-2 n_positions, in its config.json); lower seq_len'
    )


def _check_kind(c: ml_collections.ConfigDict, arch: Architecture) -> None:
  """Refuses an encoder-decoder where the algorithm has no rows for its encoder, and others where it
  has.
  """
  if c.eval.num_beams > 1 and not arch.is_encoder_decoder:
    raise ConfigError(
      f'eval.num_beams={c.eval.num_beams}: beam search is for encoder-decoders, and the model is '
      f'of kind {arch.kind!r} (family {arch.family!r}); leave it at 1'
    )
  if arch.is_encoder_decoder == bool(algorithms.source_len(c)):
    return
  model = f'model.path={c.model.path}' if c.model.path else 'model.random'
  if arch.is_encoder_decoder:
    raise ConfigError(
      f'algorithm={c.algorithm}: {model} is an encoder-decoder (family {arch.family!r}), whose '
      'encoder reads the prompt. Set algorithm=seq2seq for rows with a prompt and an answer, '
      'algorithm=span_corruption for documents, or give a decoder (docs/families.md)'
    )
  raise ConfigError(
    f'algorithm={c.algorithm} trains encoder-decoders, and {model} is a model of kind '
    f'{arch.kind!r} (family {arch.family!r}). Give a T5 (docs/families.md), or set algorithm=sft'
  )
