"""Converts a model to a HF folder: python -m ftjax.convert --source=SRC --target=DIR
[--dtype=float32|bfloat16].

SRC is a HF folder, a .gguf file, a workdir of ftjax.train (its `export/` is copied), or, if no such
path is there, a hub id, which is fetched through huggingface_hub if that is installed (that last
path is not exercised by the tests: they run without a network). Without --dtype tensors stay as
they are stored; GGUF weights become float32, which holds them exactly. Needs numpy, no jax.
"""

import sys
from pathlib import Path

from absl import app, flags

from ftjax.runtime import files as files_lib
from ftjax.runtime.errors import ConfigError, DataError, RunError

_SOURCE = flags.DEFINE_string('source', None, 'HF folder, .gguf file, workdir or hub id')
_TARGET = flags.DEFINE_string('target', None, 'folder to write; replaced if it is a model folder')
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], 'dtype of the weights; default: as stored'
)


def local_source(source: str) -> Path:
  """The path of a model on this machine: itself, a workdir's export, or a hub snapshot.

  Raises:
    DataError: neither a path nor a hub id that can be fetched.
  """
  path = files_lib.as_path(source)
  if (path / 'export' / 'config.json').is_file():
    return path / 'export'
  if path.exists():
    return path
  # A hub id is NAME or OWNER/NAME: anything else was meant as a path.
  if (
    files_lib.is_remote(source)
    or source.count('/') > 1
    or source.startswith(('.', '/', '~'))
    or source.endswith('.gguf')
  ):
    raise DataError(f'--source={source}: no such file or folder')
  try:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
  except ImportError as e:
    raise DataError(
      f'--source={source}: no such path here, and huggingface_hub, which could fetch a hub id, is '
      'not installed'
    ) from e
  try:
    return Path(
      snapshot_download(
        source, allow_patterns=['*.safetensors', '*.json', '*.jinja', '*.model', '*.txt']
      )
    )
  except (HfHubHTTPError, HFValidationError, OSError, ValueError) as e:
    raise DataError(f'--source={source}: no such path here, and the hub gave: {e}') from e


def convert(source: str, target: str, dtype: str | None):
  """Writes the model at `source` as a HF folder, weights in `dtype` (None: as stored)."""
  import ml_dtypes
  import numpy as np

  from ftjax.hf import export, load, names
  from ftjax.hf.safetensors import TensorInfo
  from ftjax.models.architecture import from_hf
  from ftjax.models.config_keys import check_unquantized

  path = local_source(source)
  if files_lib.absolute(target) == files_lib.absolute(path) or (
    not files_lib.is_remote(target)
    and not files_lib.is_remote(path)
    and Path(target).resolve() == path.resolve()
  ):
    raise ConfigError(f'--target={target} is the source itself')
  weights = load.open_source(path)
  config, files = load.read_config(path), load.tokenizer_files(path)
  check_unquantized(config)
  if path.suffix == '.gguf' or config.get('model_type') in names.FAMILIES:
    load.check_tensors(weights, from_hf(config))  # a part of a split model has a config too
  kinds = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}

  def kind(stored: np.dtype) -> np.dtype:
    # kind 'V' is ml_dtypes' floats; indexes and masks keep their type.
    return kinds[dtype] if dtype and stored.kind in 'fV' else stored

  tensors = {
    name: TensorInfo(info.shape, kind(info.dtype)) for name, info in weights.tensors.items()
  }
  if dtype:
    files['config.json'] = export.config_file(config, files['config.json'], kinds[dtype])
  export.write_model(
    target, tensors, lambda name: weights.read(name).astype(tensors[name].dtype, copy=False), files
  )
  size = sum(info.nbytes for info in tensors.values())
  print(f'{target}: {len(tensors)} tensors, {size / 1e6:.1f} MB, and {", ".join(sorted(files))}')


def main(argv: list[str]):
  del argv
  try:
    if not _SOURCE.value or not _TARGET.value:
      raise ConfigError('--source and --target are needed; see --help')
    convert(_SOURCE.value, _TARGET.value, _DTYPE.value)
  except RunError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(e.exit_code)


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser with exit code 2 for bad flags, where absl itself exits 1."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise flags.Error(f'unexpected argument {rest[1]!r}; flags are --name=value')
  except flags.Error as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(ConfigError.exit_code)
  return rest


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
