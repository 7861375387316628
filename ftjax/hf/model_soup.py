"""Averages the weights of several models of one architecture, without jax: a model soup (Wortsman
et al. 2022) of several runs, or the average of checkpoints along one run (Izmailov et al. 2018).

Tensors are averaged one at a time, some rows of them at once, in float64, and rounded once."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ftjax.families import table
from ftjax.families.hf_config import check_unquantized
from ftjax.hf import export, load
from ftjax.hf.model_copy import KINDS
from ftjax.hf.model_folder import AVERAGE_REPORT
from ftjax.hf.tensor_source import TensorInfo, TensorSource, row_blocks
from ftjax.runtime.errors import DataError

# What a folder's config.json may say of itself without being another model.
_OF_FOLDER = ('_name_or_path', 'torch_dtype', 'dtype', 'transformers_version', 'use_cache')


def mean(sources: Sequence[TensorSource], name: str) -> np.ndarray:
  """Returns the mean of a tensor over sources, in the dtype of the first; what is no float, such as
  an index, is the same in all and is returned as it is.

  Raises:
    DataError: a tensor without numbers to average that differs.
  """
  info = sources[0].tensors[name]
  if info.dtype.kind not in 'fV':  # 'V': the floats of ml_dtypes
    first = sources[0].read(name)
    for source in sources[1:]:
      if not np.array_equal(source.read(name), first):
        raise DataError(f'{source.place}: {name} differs from {sources[0].place}, and is no float')
    return first
  out = np.empty(info.shape, info.dtype)
  for rows in row_blocks(info) if info.shape else (...,):
    index = None if rows is ... else (rows,)
    parts = (source.read(name, index).astype(np.float64) for source in sources)
    out[rows] = sum(parts) / len(sources)
  return out


def check_same(folders: Sequence[Path]) -> None:
  """Refuses models whose weights cannot be averaged.

  Raises:
    DataError: another architecture, tensor, shape or tokenizer than the first one's.
  """
  first, *others = [_facts(folder) for folder in folders]
  for folder, found in zip(folders[1:], others, strict=True):
    for what, value in found.items():
      if value != first[what]:
        raise DataError(
          f'{folder} has another {what} than {folders[0]}{_difference(first[what], value)}: only '
          'models of one architecture and tokenizer are averaged'
        )


def _facts(folder: Path) -> dict[str, Mapping]:
  config = load.read_config(folder)
  check_unquantized(config)
  if table.is_known(config):
    arch = table.architecture(config)
    load.check_tensors(load.open_model_source(folder, arch), arch)
  tensors = load.open_source(folder).tensors
  tokenizer = load.tokenizer_files(folder)
  return {
    'config.json': {k: v for k, v in config.items() if k not in _OF_FOLDER},
    'set of tensors': {name: info.shape for name, info in tensors.items()},
    'tokenizer': {k: v for k, v in tokenizer.items() if k in ('tokenizer.json', 'vocab.txt')},
  }


def _difference(first: Mapping, other: Mapping) -> str:
  """Returns the first entry that differs, as text."""
  for key in sorted({*first, *other}):
    if first.get(key) != other.get(key):
      ours, theirs = first.get(key), other.get(key)
      is_short = len(repr(ours)) + len(repr(theirs)) < 200
      return f' ({key}: {ours!r} and {theirs!r})' if is_short else f' ({key})'
  return ''


def write(
  folders: Sequence[Path],
  target: str | os.PathLike,
  dtype: str | None = None,
  report: Mapping | None = None,
) -> None:
  """Writes the mean of the weights of HF folders as a HF folder, with the small files of the first.

  Args:
    folders: which `check_same` accepts.
    target: the folder.
    dtype: of the weights, 'float32' or 'bfloat16'; None: as stored in the first.
    report: of what it is made, for average.json; None: no such file.

  Raises:
    DataError, NonFiniteError: see export.write_model.
  """
  sources = [load.open_source(folder) for folder in folders]

  def kind(stored: np.dtype) -> np.dtype:
    return KINDS[dtype] if dtype and stored.kind in 'fV' else stored

  tensors = {n: TensorInfo(i.shape, kind(i.dtype)) for n, i in sources[0].tensors.items()}
  config, files = load.read_config(folders[0]), load.tokenizer_files(folders[0])
  if dtype:
    files['config.json'] = export.config_file(config, files['config.json'], KINDS[dtype])
  if report is not None:
    files[AVERAGE_REPORT] = (json.dumps(report, indent=1) + '\n').encode()

  def read(name: str) -> np.ndarray:
    return mean(sources, name).astype(tensors[name].dtype, copy=False)

  export.write_model(target, tensors, read, files)


def greedy(
  folders: Sequence[Path],
  names: Sequence[str],
  score: Callable[[Sequence[Path]], float],
  log: Callable[[str], None],
) -> tuple[list[int], dict]:
  """Returns (numbers of the models in the greedy soup, its report).

  The models are tried from the best to the worst; one stays in the soup where the soup's score is
  then not worse (Wortsman et al. 2022, recipe 1). Of models with equal scores the earlier is tried
  first.

  Args:
    folders: of the models.
    names: of them, for the report.
    score: of the mean of some of the folders; larger is better.
    log: takes a line about each try.
  """
  own = []
  for folder, name in zip(folders, names, strict=True):
    own.append(score([folder]))
    log(f'{name}: {own[-1]:.6g}')
  order = sorted(range(len(own)), key=lambda i: (-own[i], i))
  kept, best, tries = [order[0]], own[order[0]], []
  for i in order[1:]:
    found = score([folders[j] for j in (*kept, i)])
    is_kept = found >= best
    log(f'with {names[i]}: {found:.6g}, {"kept" if is_kept else "left out"}')
    tries.append({'model': names[i], 'score': found, 'kept': is_kept})
    if is_kept:
      kept, best = [*kept, i], found
  report = {
    'models': [names[i] for i in kept],
    'score': best,
    'scores': dict(zip(names, own, strict=True)),
    'tries': tries,
  }
  return kept, report
