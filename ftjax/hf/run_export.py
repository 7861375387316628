"""The model or adapter folder that a run writes to its workdir."""

import logging
import os

from ftjax.hf import model_folder
from ftjax.storage import files, snapshots

log = logging.getLogger(__name__)


def find(workdir: str | os.PathLike) -> str | None:
  """Returns the model or adapter folder that a run wrote to its workdir; None before it is
  complete.

  In a bucket its config is written last: without it the folder is incomplete.
  """
  folder = files.join(workdir, 'export')
  return folder if model_folder.find_config(folder) else None


def find_newest(workdir: str) -> str | None:
  """Returns the export of a workdir; None without one, or where a newer checkpoint is there: a run
  that ended and was continued.
  """
  export = find(workdir)
  if export is None:
    return None
  steps = snapshots.steps(workdir)
  written = model_folder.find_config(export).stat().st_mtime_ns
  if steps and snapshots.committed_ns(workdir, steps[-1]) > written:
    log.warning('%s is older than checkpoint %d, which is used', export, steps[-1])
    return None
  return export
