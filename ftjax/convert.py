"""python -m ftjax.convert --source=SRC --target=DIR|FILE.gguf [--dtype=DTYPE]

Writes a model as a Hugging Face folder, or as a GGUF file for llama.cpp and Ollama.

SRC is a HF folder, a .gguf file (of several parts, the first), a workdir of ftjax.train, or a model
on the Hugging Face hub, org/name or org/name@REVISION, which is downloaded into the hub's cache.
Without --dtype tensors stay as they are stored; GGUF weights become float32, which holds them
exactly. DTYPE is float32 or bfloat16; for a GGUF file also float16 or q8_0.

A GGUF file is written for the families llama and qwen2, with norms and biases in float32, and a
Modelfile beside it: `ollama create NAME -f Modelfile`.

For a workdir, `export/` is copied. If the run has not ended, or was continued after its export, its
newest checkpoint is exported as the run itself would; WORKDIR@STEP, WORKDIR@last and WORKDIR@best
select a checkpoint. The run may still be running: nothing in its workdir is changed. Exporting a
checkpoint needs jax and runs on the CPU; the parameters must fit into host memory.
"""

import os
from pathlib import Path

from absl import flags

from ftjax import cli
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files as files_lib

_SOURCE = flags.DEFINE_string('source', None, 'HF folder, .gguf file, workdir[@STEP] or hub id.')
_TARGET = flags.DEFINE_string(
  'target', None, 'Folder or .gguf file to write; replaced if it is a model.'
)
_FOLDER_DTYPES = ('float32', 'bfloat16')
_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  [*_FOLDER_DTYPES, 'float16', 'q8_0'],
  'dtype of the weights, float16 and q8_0 in GGUF files alone; default: as stored.',
)


def convert(source: str, target: str, dtype: str | None):
  """Writes the model at `source` as a HF folder or GGUF file, weights in `dtype` (None: as stored).

  Raises:
    ConfigError: the target is in the source, or has no such dtype.
    DataError, NonFiniteError: see `export.export` and `gguf_export.export`.
  """
  from ftjax.hf import gguf_export, load
  from ftjax.storage import snapshots

  if gguf_export.is_gguf(target):
    gguf_export.check_target(target)
  elif dtype and dtype not in _FOLDER_DTYPES:
    raise ConfigError(
      f'--dtype={dtype} is of GGUF files; expected {" or ".join(_FOLDER_DTYPES)}, or a --target '
      'that ends in .gguf'
    )
  workdir, which = snapshots.parse(source)
  if which and not snapshots.is_workdir(workdir):
    raise DataError(f'--source={source}: {workdir} is not a workdir of ftjax.train')
  export = None if which else load.newest_export(workdir)
  _check_target(target, export or source)
  if export is None and snapshots.is_workdir(workdir):
    _convert_checkpoint(workdir, which, target, dtype)
  else:
    _convert_files(export or source, target, dtype)


def _check_target(target: str, source: str):
  is_remote = files_lib.is_remote(target) or files_lib.is_remote(source)
  if files_lib.absolute(target) == files_lib.absolute(source) or (
    not is_remote and Path(target).resolve() == Path(source).resolve()
  ):
    raise ConfigError(f'--target={target} is the source itself')


def _check_outside(target: str, folder: Path):
  """Raises ConfigError for a GGUF file in a model folder."""
  parent = files_lib.as_path(target).parent
  is_remote = files_lib.is_remote(parent) or files_lib.is_remote(folder)
  if parent == folder if is_remote else parent.resolve() == folder.resolve():
    raise ConfigError(
      f'--target={target} is in the folder of the source, which would hold two models; give '
      'another folder'
    )


def _convert_checkpoint(workdir: str, which: str, target: str, dtype: str | None):
  """Exports a checkpoint, '' for the newest, as a run exports its model at its end."""
  # The run itself may be using the accelerators.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax
  import numpy as np

  from ftjax.experiment import saved_model
  from ftjax.hf import export, gguf_export

  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def write(saved: saved_model.SavedModel):
    model = saved.model
    if gguf_export.is_gguf(target):
      _write_checkpoint_gguf(
        saved, saved.load(lambda name: device, saved.param_dtype), target, dtype
      )
      return saved.step
    export.export(
      saved.load(lambda name: device, saved.param_dtype),
      model.arch,
      target,
      source_config=model.config,
      tokenizer_files=model.files,
      dtype=np.dtype(dtype or saved.param_dtype),
      stop_ids=model.stop_ids,
    )
    return saved.step

  step = saved_model.with_step(workdir, which, write)
  print(f'{target}: the model of {workdir} after step {step}')


def _write_checkpoint_gguf(saved, params, target: str, dtype: str | None):
  """Writes the parameters of a checkpoint as a GGUF file."""
  import numpy as np

  from ftjax.families import table
  from ftjax.hf import export, gguf_export, layout

  model = saved.model
  config = table.config(model.arch) if model.config is None else model.config
  files = dict(model.files)
  generation = export.generation_file(files.get('generation_config.json'), config, model.stop_ids)
  if generation is not None:
    files['generation_config.json'] = generation
  read = export.host_reader(params, model.arch, np.dtype(saved.param_dtype))
  dtypes = dict.fromkeys(layout.by_tensor(model.arch), dtype or saved.param_dtype)
  print(gguf_export.export(target, model.arch, config, files, read, dtypes))


def _convert_files(source: str, target: str, dtype: str | None):
  import ml_dtypes
  import numpy as np

  from ftjax.families import table
  from ftjax.families.hf_config import check_unquantized
  from ftjax.hf import export, gguf_export, load, model_folder
  from ftjax.hf.tensor_source import TensorInfo

  path = files_lib.as_path(model_folder.locate(source, weights=True))
  if not path.exists():
    raise DataError(f'--source={source}: no such file or folder{model_folder.remedy(path)}')
  weights = load.open_source(path)
  config, files = load.read_config(path), load.tokenizer_files(path)
  check_unquantized(config)
  if path.suffix == '.gguf' or table.is_known(config):
    # A part of a split model has a config too.
    load.check_tensors(weights, table.architecture(config))
  if gguf_export.is_gguf(target):
    _check_outside(target, path)
    arch = table.architecture(config)
    dtypes = {n: dtype or info.dtype.name for n, info in weights.tensors.items()}
    print(gguf_export.export(target, arch, config, files, weights.read, dtypes))
    return
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


def main() -> None:
  """Converts --source to --target."""
  if not _SOURCE.value or not _TARGET.value:
    raise ConfigError('--source and --target are needed; see --help')
  convert(_SOURCE.value, _TARGET.value, _DTYPE.value)


if __name__ == '__main__':
  cli.run(main)
