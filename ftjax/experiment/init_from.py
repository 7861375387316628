"""What `init_from` names: a finished run whose model training starts from. It may be an adapter,
which training continues, or merges before it begins a new one."""

import dataclasses

import ml_collections

from ftjax.hf import model_folder, run_export
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files


@dataclasses.dataclass(frozen=True)
class Start:
  """The folders of the weights that training starts from.

  base: model folder; '' for model.path. adapter: PEFT folder, '' for a new adapter or none.
  """

  base: str = ''
  adapter: str = ''


def find(c: ml_collections.ConfigDict) -> Start:
  """Returns what training starts from.

  Raises:
    ConfigError: init_from holds no export, or an adapter that was not merged where that is needed.
  """
  if not c.init_from:
    return Start()
  export = run_export.find(c.init_from)
  if export is None and model_folder.find_adapter(c.init_from) is not None:
    export = c.init_from
  if export is None:
    raise ConfigError(
      f'init_from={c.init_from}: there is no export/ in it; it is written when a run ends'
    )
  if model_folder.find_adapter(export) is None:
    return Start(base=export)
  if c.lora.rank and c.lora.on_init_from == 'continue':
    return Start(adapter=export)
  merged = files.join(c.init_from, run_export.MERGED)
  if not files.exists(files.join(merged, 'config.json')):
    why = 'lora.on_init_from=merge' if c.lora.rank else 'lora.rank=0'
    raise ConfigError(
      f'init_from={c.init_from} is an adapter run, and {why} starts from its merged model, which '
      f'is not there. Write it: python -m ftjax.convert --source={c.init_from} --target={merged}'
    )
  written = [model_folder.find_config(f).stat().st_mtime_ns for f in (merged, export)]
  if written[0] < written[1]:  # the run was continued with lora.merge=False
    raise ConfigError(
      f'init_from={c.init_from}: {merged} is older than the adapter in {export}, and may be of '
      f'fewer steps. Write it again: python -m ftjax.convert --source={c.init_from} '
      f'--target={merged}'
    )
  return Start(base=merged)
