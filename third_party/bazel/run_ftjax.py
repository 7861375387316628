"""Runs ftjax as `python -m ftjax` does, in the folder where Bazel was called.

bazel run //:ftjax -- train --config=tiny_sft --workdir=runs/tiny
"""

import os
import sys


def main() -> None:
  """Runs the entry that the first argument names."""
  # Bazel starts programs in a folder of its own.
  os.chdir(os.environ.get('BUILD_WORKING_DIRECTORY', '.'))
  # For the processes that entries start by sys.executable.
  of_bazel = [path for path in sys.path if '.runfiles' in path]
  os.environ['PYTHONPATH'] = os.pathsep.join(of_bazel)
  from ftjax import __main__ as entry

  entry.main()


if __name__ == '__main__':
  main()
