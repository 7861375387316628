"""What the test of docs/packing_delta_net.md prints for transformers. Runs in the parity
environment (make parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_packing_goldens.py FOLDER

FOLDER is tests/parity/golden to replace it; FOLDER/packing_page.json has what the page's code
prints with position_ids alone, and the error with the lengths of the documents too.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from packing_page import blocks, printed


def main(target: Path) -> None:
  test, _, theirs = blocks('python')
  found = {'printed': printed(theirs, test)}
  lengths = theirs.replace('GIVES_LENGTHS = False', 'GIVES_LENGTHS = True')
  assert lengths != theirs
  try:
    printed(lengths, test)
  except ValueError as error:
    found['error'] = f'ValueError: {error}\n'
  found['versions'] = f'transformers {transformers.__version__} and torch {torch.__version__}'
  (target / 'packing_page.json').write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  main(Path(sys.argv[1]))
