"""python -m ftjax.convert --source=SRC --target=DIR|FILE.gguf [--dtype=DTYPE] [--base=BASE]
[--average=SRC ...] [--push=org/name]

Writes a model as a Hugging Face folder, which --push uploads to the hub, or as a GGUF file for
llama.cpp and Ollama.

SRC is a HF folder, a .gguf file (of several parts, any), a PEFT folder, a workdir of
ftjax.train, or a model or adapter on the Hugging Face hub, org/name or org/name@REVISION, which is
downloaded into the hub's cache. Without --dtype tensors stay as they are stored; GGUF weights
become float32, which holds them exactly. DTYPE is float32 or bfloat16; for a GGUF file also float16
or q8_0.

A GGUF file is written for the families that llama.cpp names (docs/families.md), with norms and
biases in float32, and a Modelfile beside it: `ollama create NAME -f Modelfile`.

An adapter is merged into its base, the one that its folder names or --base: in float32, rounded
once to the dtype of the base's weights. That needs jax and runs on the CPU, in host memory.

For a workdir, `export/` is copied, or merged where it is an adapter. If the run has not ended, or
was continued after its export, its newest checkpoint is exported as the run itself would;
WORKDIR@STEP, WORKDIR@last and WORKDIR@best select a checkpoint. The run may still be running:
nothing in its workdir is changed. Exporting a checkpoint needs jax and runs on the CPU; the
parameters must fit into host memory.

With --average=SRC, which may be repeated, the weights of all sources are averaged: those of several
runs of one base (a model soup), or of checkpoints of one run, where WORKDIR@all stands for all that
are kept. With --greedy=TASK/METRIC and --config the models are tried from the best to the worst on
that figure of eval.tasks, and only those are averaged that do not lower it. average.json in the
target lists them.

--push creates a private model, or with --public a public one, and uploads the folder as one commit,
with the token of `hf auth login` or HF_TOKEN. Without --target it uploads SRC itself, a finished
model folder, or the export of a workdir. Of an adapter --base=org/name is then the name of its base
on the hub, which is uploaded in place of the path that adapter_config.json records.
"""

import collections
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ftjax import cli
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files as files_lib

cli.define_config(is_required=False)
_SOURCE = flags.DEFINE_string('source', None, 'HF folder, .gguf file, workdir[@STEP] or hub id.')
_TARGET = flags.DEFINE_string(
  'target', None, 'Folder or .gguf file to write; replaced if it is a model.'
)
_BASE = flags.DEFINE_string(
  'base', '', 'The base of an adapter, or its name on the hub; by default the one that it names.'
)
_FOLDER_DTYPES = ('float32', 'bfloat16')
_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  [*_FOLDER_DTYPES, 'float16', 'q8_0'],
  'dtype of the weights, float16 and q8_0 in GGUF files alone; default: as stored.',
)
_AVERAGE = flags.DEFINE_multi_string(
  'average', [], 'A further source, whose weights are averaged with those of --source; repeatable.'
)
_GREEDY = flags.DEFINE_string(
  'greedy', '', 'With --average: TASK/METRIC of eval.tasks of --config; leaves out what lowers it.'
)
_PUSH = flags.DEFINE_string('push', None, 'org/name of a model on the hub to upload the folder to.')
_PUBLIC = flags.DEFINE_boolean('public', False, 'With --push: everybody may read the model.')


def convert(source: str, target: str, dtype: str | None, base: str = ''):
  """Writes the model at `source` as a HF folder or GGUF file.

  Args:
    source: see the head of this file.
    target: folder, or a file that ends in .gguf.
    dtype: of the weights; None: as stored.
    base: of an adapter; '': the one that it names.

  Raises:
    ConfigError: the target is in the source, or has no such dtype.
    DataError, NonFiniteError: see `export.export` and `gguf_export.export`.
  """
  from ftjax.hf import model_copy, model_folder, run_export
  from ftjax.storage import snapshots

  _check_dtype(target, dtype)
  workdir, which = snapshots.parse(source)
  if which and not snapshots.is_workdir(workdir):
    raise DataError(f'--source={source}: {workdir} is not a workdir of ftjax.train')
  export = None if which else run_export.find_newest(workdir, base)
  _check_target(target, export or source)
  if snapshots.is_workdir(workdir):  # it would lose what the run wrote at its end
    _check_target(target, files_lib.join(workdir, 'export'))
  if (folder := model_folder.find_adapter(export or source)) is not None:
    _merge_adapter(str(folder), target, dtype, base, workdir if export else '')
    return
  if base:
    raise ConfigError(f'--base={base}: --source={source} is no adapter and needs no base')
  if export is None and snapshots.is_workdir(workdir):
    _convert_checkpoint(workdir, which, target, dtype)
  else:
    path = files_lib.as_path(model_folder.locate(export or source, weights=True))
    if not path.exists():
      raise DataError(
        f'--source={export or source}: no such file or folder{model_folder.remedy(path)}'
      )
    print(model_copy.write(path, target, dtype))


def average(
  sources: Sequence[str],
  target: str,
  dtype: str | None,
  base: str = '',
  figure: str = '',
  c: Any = None,
) -> None:
  """Writes the mean of the weights of several models as a HF folder or GGUF file.

  Args:
    sources: as of `convert`; WORKDIR@all stands for all checkpoints of a run.
    target, dtype, base: see `convert`.
    figure: TASK/METRIC of a greedy soup; '': all models count.
    c: a config, whose eval.tasks has the task.

  Raises:
    ConfigError: one model alone. DataError: models that cannot be averaged.
  """
  from ftjax.hf import gguf_export, model_soup

  _check_dtype(target, dtype)
  names = [name for source in sources for name in _expanded(source)]
  if len(names) < 2:
    raise ConfigError(f'--average: {names} is one model alone; give at least two')
  for name in names:
    _check_target(target, name)
  # Beside the target: the models may be larger than the disk of temporary files.
  is_remote = files_lib.is_remote(target)
  parent = None if is_remote else files_lib.as_path(target).absolute().parent
  if parent:
    parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix='.average-', dir=parent) as scratch:
    folders = [_as_folder(name, Path(scratch, str(i)), base) for i, name in enumerate(names)]
    model_soup.check_same(folders)
    report: dict[str, Any] = {'models': names}
    if figure:
      from ftjax.experiment import soup_score

      score = soup_score.scorer(c, figure, folders[0], scratch)
      kept, report = model_soup.greedy(folders, names, score, print)
      folders, report = [folders[i] for i in kept], {'figure': figure} | report
    if gguf_export.is_gguf(target):
      model_soup.write(folders, mean := Path(scratch, 'mean'))
      convert(str(mean), target, dtype)
    else:
      model_soup.write(folders, target, dtype, report)
  print(f'{target}: the average of {", ".join(report["models"])}')


def _expanded(source: str) -> list[str]:
  """Returns a source, or of WORKDIR@all each of its checkpoints."""
  from ftjax.storage import locations, snapshots

  if not source.strip():
    raise ConfigError('--average= is empty; give a model')
  locations.check('--average', source)
  source = os.path.expanduser(source)
  workdir = source.removesuffix('@all')
  if workdir == source or not snapshots.is_workdir(workdir):
    return [source]
  if not (steps := snapshots.steps(workdir)):
    raise DataError(f'{source}: no checkpoint is finalized yet')
  return [f'{workdir}@{step}' for step in steps]


def _as_folder(source: str, scratch: Path, base: str) -> Path:
  """Returns a HF folder with a source's model: its own, or a copy in `scratch`."""
  from ftjax.hf import model_folder, run_export
  from ftjax.storage import snapshots

  workdir, which = snapshots.parse(source)
  export = None if which else run_export.find_newest(workdir, base)
  is_folder = export or not (which or snapshots.is_workdir(workdir))
  if is_folder and model_folder.find_adapter(export or source) is None:
    found = files_lib.as_path(model_folder.locate(export or source, weights=True))
    if found.is_dir() and model_folder.gguf_file(found) is None:
      return found
  convert(source, str(scratch), None, base)
  return scratch


def _check_dtype(target: str, dtype: str | None):
  """Refuses a GGUF file that is a part of a model, and a dtype that the target cannot have."""
  from ftjax.hf import gguf_export

  if gguf_export.is_gguf(target):
    gguf_export.check_target(target)
  elif dtype and dtype not in _FOLDER_DTYPES:
    raise ConfigError(
      f'--dtype={dtype} is of GGUF files; expected {" or ".join(_FOLDER_DTYPES)}, or a --target '
      'that ends in .gguf'
    )


def _check_target(target: str, source: str):
  is_remote = files_lib.is_remote(target) or files_lib.is_remote(source)
  if files_lib.absolute(target) == files_lib.absolute(source) or (
    not is_remote and Path(target).resolve() == Path(source).resolve()
  ):
    raise ConfigError(
      f'--target={target} is the source itself, the export of it, or the base of it; give another '
      'place'
    )


def _convert_checkpoint(workdir: str, which: str, target: str, dtype: str | None):
  """Exports a checkpoint, '' for the newest, as a run exports its model at its end."""
  # The run itself may be using the accelerators.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax

  from ftjax.experiment import run_card, saved_model
  from ftjax.models import kinds
  from ftjax.runtime import sharding, trees

  mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
  jax.set_mesh(mesh)

  def write(saved: saved_model.SavedModel):
    model, kind = saved.model, saved.param_dtype
    places = trees.flatten(sharding.shardings(mesh, kinds.axes(model.arch)))
    params = saved.load(places.__getitem__, kind)
    if model.arch.adapter:
      kind = dtype if dtype in _FOLDER_DTYPES else kind  # rounded once
      model = dataclasses.replace(model, arch=kinds.with_merged(model.arch, kind))
    _write(model, params, target, dtype, kind, run_card.of_checkpoint(workdir, model, saved.step))
    return saved.step

  step = saved_model.with_step(workdir, which, write)
  print(f'{target}: the model of {workdir} after step {step}')


def _write(
  model: Any, params: Any, target: str, dtype: str | None, stored: str, card: bytes | None
):
  """Writes parameters as a HF folder or GGUF file.

  Args:
    model: of the parameters, see experiment.model.Model; an adapter of its architecture is merged.
    params: nested dict of arrays.
    target: the folder or file.
    dtype: of the weights in it; None: `stored`.
    stored: dtype that the weights are read in.
    card: README.md of a folder; None for none.
  """
  import numpy as np

  from ftjax.families import table
  from ftjax.hf import export, gguf_export, layout

  if not gguf_export.is_gguf(target):
    export.export(
      params,
      model.arch,
      target,
      source_config=model.config,
      tokenizer_files=model.files,
      dtype=np.dtype(dtype or stored),
      stop_ids=model.stop_ids,
      card=card,
    )
    return
  config = table.config(model.arch) if model.config is None else model.config
  files = dict(model.files)
  generation = export.generation_file(files.get('generation_config.json'), config, model.stop_ids)
  if generation is not None:
    files['generation_config.json'] = generation
  arch = table.in_gguf(model.arch)
  read = export.host_reader(params, arch, np.dtype(stored))
  dtypes = dict.fromkeys(layout.by_tensor(arch), dtype or stored)
  print(gguf_export.export(target, arch, config, files, read, dtypes))


def _merge_adapter(source: str, target: str, dtype: str | None, base: str, workdir: str):
  """Writes the adapter of a PEFT folder, merged into its base; workdir: of the run that wrote it,
  '' where it is not known.
  """
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax
  import numpy as np

  from ftjax.experiment import adapter_folder, run_card, saved_model
  from ftjax.hf import gguf_export, load, model_card, model_folder, peft, peft_weights
  from ftjax.models import kinds
  from ftjax.runtime import sharding

  folder = peft.find(source)
  model = adapter_folder.open_adapter(folder, base, saved_model.family(workdir) if workdir else '')
  _check_target(target, model.source)
  if gguf_export.is_gguf(target):
    for place in (folder.place, model.source):
      gguf_export.check_outside(target, files_lib.as_path(place))
  mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
  jax.set_mesh(mesh)
  stored = _usual_dtype(load.open_source(model.source).tensors.values())
  merged = np.dtype(dtype) if dtype in _FOLDER_DTYPES else stored
  model = dataclasses.replace(model, arch=kinds.with_merged(model.arch, merged.name))

  def places(arch):
    return sharding.shardings(mesh, kinds.axes(arch))

  step = model_card.step_of(model_folder.readme(folder.place)) if workdir else None
  card = None if step is None else run_card.of_checkpoint(workdir, model, step)
  params = peft_weights.load_params(folder, model.source, model.arch, places, stored)
  _write(model, params, target, dtype, merged.name, card)
  print(f'{target}: {model.source} with the adapter of {folder.place}, in {dtype or merged.name}')


def _usual_dtype(tensors: Iterable[Any]) -> Any:
  """Returns the float dtype of most bytes of a model's tensors; float32 for rare ones."""
  import numpy as np

  sizes = collections.Counter()
  for info in tensors:
    sizes[info.dtype] += info.nbytes if info.dtype.kind in 'fV' else 0
  usual = max(sizes, key=sizes.__getitem__)
  is_usual = usual.name in ('float32', 'bfloat16', 'float16')
  return usual if is_usual else np.dtype(np.float32)


def _finished(source: str) -> str:
  """Returns the model folder that a source already is, or holds.

  Raises:
    ConfigError: it has to be written first.
  """
  from ftjax.hf import run_export
  from ftjax.storage import snapshots

  workdir, which = snapshots.parse(source)
  found = source if os.path.isdir(source) else None
  if snapshots.is_workdir(workdir):
    found = None if which else run_export.find_newest(workdir)
  if found is None or _DTYPE.value:
    raise ConfigError(
      f'--source={source} is not uploaded as it is; give --target=DIR for the folder to upload'
    )
  return found


def _greedy_config():
  """Returns the config of a greedy soup; None for none."""
  c, figure = flags.FLAGS.config, _GREEDY.value
  if bool(figure) != (c is not None) or (figure and not _AVERAGE.value):
    raise ConfigError(
      '--average, --greedy=TASK/METRIC and --config=FILE make a greedy soup together'
    )
  if c is not None:
    from ftjax.config import validation

    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    validation.validate(c)
    if not c.eval.tasks:
      raise ConfigError(f'--greedy={figure} needs eval.tasks in --config')
  return c


def _write_to(target: str, base: str, c: Any) -> None:
  """Writes --source, or its average with others."""
  source, dtype = _SOURCE.value, _DTYPE.value
  if _AVERAGE.value:
    average([source, *_AVERAGE.value], target, dtype, base, _GREEDY.value, c)
  else:
    convert(source, target, dtype, base)


def main() -> None:
  """Converts --source to --target, and uploads that."""
  source, target, name = _SOURCE.value, _TARGET.value, _PUSH.value
  if not source or not (target or name):
    raise ConfigError('--source and --target are needed, or --source and --push; see --help')
  if _PUBLIC.value and not name:
    raise ConfigError('--public belongs to an upload; give --push=org/name too')
  c = _greedy_config()
  if _AVERAGE.value and not target:
    raise ConfigError('--average needs --target: the folder or .gguf file of the average')
  if name is None:
    _write_to(target, _BASE.value, c)
    return
  from ftjax.hf import pushed_folder
  from ftjax.storage import hub_push

  # Before anything is written.
  hub_push.check(name)
  folder, base = target or _finished(source), _BASE.value
  if target:
    # Before anything is written: what is written has no base.
    pushed_folder.check_place(folder)
    _write_to(target, base, c)
    base = ''
  print(f'{name}: {pushed_folder.push(folder, name, _PUBLIC.value, base)}')


if __name__ == '__main__':
  cli.run(main)
