"""Writes the model of a HF folder or GGUF file again: as the other of the two, or in another dtype.

Tensors go from file to file, one at a time, without jax. Checkpoints and adapters are no such
files: `ftjax.convert` reads their parameters.
"""

import os
from pathlib import Path

import ml_dtypes
import numpy as np

from ftjax.families import table
from ftjax.families.hf_config import check_unquantized
from ftjax.hf import export, gguf_export, load, model_card, model_folder
from ftjax.hf.tensor_source import TensorInfo

KINDS = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


def write(path: Path, target: str | os.PathLike, dtype: str | None) -> str:
  """Writes a model and returns a line about what was written.

  Args:
    path: HF folder or GGUF file.
    target: folder, or a file that ends in .gguf.
    dtype: of the weights, 'float32' or 'bfloat16', for a GGUF file one of gguf_export.DTYPES; None:
      as stored.

  Raises:
    ConfigError: a GGUF file in the folder of the source.
    DataError, NonFiniteError: see `export.write_model` and `gguf_export.export`.
  """
  weights = load.open_source(path)
  config, files = load.read_config(path), load.tokenizer_files(path)
  check_unquantized(config)
  if path.suffix == '.gguf' or table.is_known(config):
    # A part of a split model has a config too.
    arch = table.architecture(config)
    load.check_tensors(load.open_model_source(path, arch), arch)
  if gguf_export.is_gguf(target):
    gguf_export.check_outside(target, path)
    arch = table.in_gguf(table.architecture(config))
    weights = load.open_model_source(path, arch)
    dtypes = {n: dtype or info.dtype.name for n, info in weights.tensors.items()}
    return gguf_export.export(target, arch, config, files, weights.read, dtypes)

  def kind(stored: np.dtype) -> np.dtype:
    # kind 'V' is ml_dtypes' floats; indexes and masks keep their type.
    return KINDS[dtype] if dtype and stored.kind in 'fV' else stored

  tensors = {
    name: TensorInfo(info.shape, kind(info.dtype)) for name, info in weights.tensors.items()
  }
  if dtype:
    files['config.json'] = export.config_file(config, files['config.json'], KINDS[dtype])
  if model_card.is_card(card := model_folder.readme(path)):
    files[model_card.FILE] = card
  export.write_model(
    target, tensors, lambda name: weights.read(name).astype(tensors[name].dtype, copy=False), files
  )
  size = sum(info.nbytes for info in tensors.values())
  return f'{target}: {len(tensors)} tensors, {size / 1e6:.1f} MB, and {", ".join(sorted(files))}'
