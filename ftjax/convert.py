"""python -m ftjax.convert --source=SRC --target=DIR [--dtype=float32|bfloat16] [--base=BASE]

Writes a model as a Hugging Face folder.

SRC is a HF folder, a .gguf file (of several parts, the first), a PEFT folder, a workdir of
ftjax.train, or a model or adapter on the Hugging Face hub, org/name or org/name@REVISION, which is
downloaded into the hub's cache. Without --dtype tensors stay as they are stored; GGUF weights
become float32, which holds them exactly.

An adapter is merged into its base, the one that its folder names or --base: in float32, rounded
once to the dtype of the base's weights. That needs jax and runs on the CPU, in host memory.

For a workdir, `export/` is copied, or merged where it is an adapter. If the run has not ended, or
was continued after its export, its newest checkpoint is exported as the run itself would;
WORKDIR@STEP, WORKDIR@last and WORKDIR@best select a checkpoint. The run may still be running:
nothing in its workdir is changed. Exporting a checkpoint needs jax and runs on the CPU; the
parameters must fit into host memory.
"""

import os
from pathlib import Path

from absl import flags

from ftjax import cli
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files as files_lib

_SOURCE = flags.DEFINE_string('source', None, 'HF folder, .gguf file, workdir[@STEP] or hub id.')
_TARGET = flags.DEFINE_string('target', None, 'Folder to write; replaced if it is a model folder.')
_BASE = flags.DEFINE_string('base', '', 'The base of an adapter; by default the one that it names.')
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], 'dtype of the weights; default: as stored.'
)


def convert(source: str, target: str, dtype: str | None, base: str = ''):
  """Writes the model at `source` as a HF folder, weights in `dtype` (None: as stored); base: of an
  adapter, '' for the one that it names.
  """
  from ftjax.hf import load, model_folder
  from ftjax.storage import snapshots

  workdir, which = snapshots.parse(source)
  if which and not snapshots.is_workdir(workdir):
    raise DataError(f'--source={source}: {workdir} is not a workdir of ftjax.train')
  export = None if which else load.newest_export(workdir)
  _check_target(target, export or source)
  if model_folder.find_adapter(export or source) is not None:
    _merge_adapter(export or source, target, dtype, base)
    return
  if base:
    raise ConfigError(f'--base={base}: --source={source} is no adapter and needs no base')
  if export is None and snapshots.is_workdir(workdir):
    _convert_checkpoint(workdir, which, target, dtype)
  else:
    _convert_files(export or source, target, dtype)


def _check_target(target: str, source: str):
  is_remote = files_lib.is_remote(target) or files_lib.is_remote(source)
  if files_lib.absolute(target) == files_lib.absolute(source) or (
    not is_remote and Path(target).resolve() == Path(source).resolve()
  ):
    raise ConfigError(f'--target={target} is the source itself, or the base of it')


def _convert_checkpoint(workdir: str, which: str, target: str, dtype: str | None):
  """Exports a checkpoint, '' for the newest, as a run exports its model at its end."""
  # The run itself may be using the accelerators.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax
  import numpy as np

  from ftjax.experiment import saved_model
  from ftjax.hf import export

  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def write(saved: saved_model.SavedModel):
    model = saved.model
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


def _merge_adapter(source: str, target: str, dtype: str | None, base: str):
  """Writes the adapter of a PEFT folder, merged into its base."""
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax
  import numpy as np

  from ftjax.experiment import adapter_folder
  from ftjax.hf import export, load, peft
  from ftjax.models import kinds
  from ftjax.runtime import sharding

  folder = peft.find(source)
  model = adapter_folder.open_adapter(folder, base, '')
  _check_target(target, model.source)
  mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
  jax.set_mesh(mesh)
  stored = {
    i.dtype for i in load.open_source(model.source).tensors.values() if i.dtype.kind in 'fV'
  }
  widest = np.dtype(np.float32) if len(stored) > 1 else stored.pop()
  dtype = np.dtype(dtype or widest)
  arch = kinds.with_merged(model.arch, dtype.name)

  def places(arch):
    return sharding.shardings(mesh, kinds.axes(arch))

  params = peft.load_params(folder, model.source, arch, places, widest)
  export.export(
    params,
    arch,
    target,
    source_config=model.config,
    tokenizer_files=model.files,
    dtype=dtype,
    stop_ids=(),
  )
  print(f'{target}: {model.source} with the adapter of {folder.place}, in {dtype.name}')


def _convert_files(source: str, target: str, dtype: str | None):
  import ml_dtypes
  import numpy as np

  from ftjax.families import table
  from ftjax.families.hf_config import check_unquantized
  from ftjax.hf import export, load, model_folder
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
  convert(_SOURCE.value, _TARGET.value, _DTYPE.value, _BASE.value)


if __name__ == '__main__':
  cli.run(main)
