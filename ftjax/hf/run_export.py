"""The model and adapter folders that a run writes to its workdir."""

import logging
import os

from ftjax.hf import model_folder
from ftjax.storage import files, snapshots

log = logging.getLogger(__name__)

MERGED = 'merged'  # folder of the merged model of an adapter run
MERGE_REPORT = 'merge.json'  # how far it is from the adapter


def find(workdir: str | os.PathLike) -> str | None:
  """Returns the model or adapter folder that a run wrote to its workdir; None before it is
  complete.

  In a bucket its config is written last: without it the folder is incomplete.
  """
  folder = files.join(workdir, 'export')
  return folder if model_folder.find_config(folder) else None


def find_newest(workdir: str, base: str = '') -> str | None:
  """Returns the export of a workdir; None where its newest checkpoint is to be read instead:
  without an export, where a run ended and was continued, and for an adapter that names no base,
  since the run knows how its random base was made.

  base: of an adapter; '': the one that it names.
  """
  export = find(workdir)
  if export is None:
    return None
  steps = snapshots.steps(workdir)
  written = model_folder.find_config(export).stat().st_mtime_ns
  if steps and snapshots.committed_ns(workdir, steps[-1]) > written:
    log.warning('%s is older than checkpoint %d, which is used', export, steps[-1])
    return None
  if model_folder.is_adapter(files.as_path(export)) and not base:
    from ftjax.hf import peft  # imports jax

    return export if peft.read(export).base.path else None
  return export
