"""Imports transformers where it is needed (config defaults, tokenizer conversion), not at start.

transformers imports torch wherever torch is installed, some seconds and hundreds of MB that nothing
here uses. It looks once whether torch is there, so torch is hidden from it while it is imported.
Code of the user that wants both in this process imports torch first.
"""

import os
import sys
from types import ModuleType


def load(*names: str) -> ModuleType:
  """Imports transformers without torch and returns it.

  Args:
    names: what will be used of it, such as 'AutoTokenizer'; its modules are imported one by one.
  """
  # Read at import; its advice on torch would go to the user's terminal.
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  hidden = 'torch' not in sys.modules
  if hidden:
    sys.modules['torch'] = None  # type: ignore[assignment]
  try:
    import transformers

    for name in names:
      getattr(transformers, name)
  finally:
    if hidden:
      del sys.modules['torch']
  return transformers
