"""Writes the commit that a package is built from into it, as ftjax/commit.json.

Run by hatchling for each wheel and source archive. Sources that hold the file already, such as
those of an unpacked source archive, keep it.
"""

import pathlib
import sys
import tempfile

from hatchling.builders.hooks.plugin import interface


class CommitHook(interface.BuildHookInterface):
  """Adds ftjax/commit.json to what is built."""

  PLUGIN_NAME = 'custom'

  def initialize(self, version: str, build_data: dict) -> None:
    """Writes the file outside of the sources, and adds it.

    Args:
      version: of the build: 'standard', or 'editable', which needs no file.
      build_data: hatchling's; its 'force_include' is changed.
    """
    root = pathlib.Path(self.root)
    sys.path.insert(0, self.root)
    from ftjax.runtime import build_commit

    sys.path.remove(self.root)
    if version == 'editable' or (root / 'ftjax' / build_commit.FILE).exists():
      return
    self._folder = tempfile.TemporaryDirectory()
    file = pathlib.Path(self._folder.name) / build_commit.FILE
    file.write_text(build_commit.find(root).to_json(), encoding='utf-8')
    build_data['force_include'][str(file)] = f'ftjax/{build_commit.FILE}'
