"""docs/packing_delta_net.md: its code prints influences of exactly 0; what the page has of
transformers is what the parity environment wrote.
"""

import json
import pathlib
import re

import pytest
from packing_page import PAGE, blocks, printed

GOLDEN = pathlib.Path(__file__).parent / 'parity' / 'golden' / 'packing_page.json'
ZEROS = ['influence on values: 0', 'influence on gradients: 0']


def numbers(text):
  """(packed - alone, largest state, what the influences are)."""
  first, *rest = text.splitlines()
  found = re.fullmatch(r'packed - alone: (\S+) of (\S+)', first)
  return float(found[1]), float(found[2]), [line.partition(' of ')[0] for line in rest]


@pytest.mark.full
def test_documents_have_no_influence():
  """Rounding is another on other machines; an influence of 0 is not."""
  test, ours, _ = blocks('python')
  assert len(test.splitlines()) == 10
  for text in (printed(ours, test), blocks('text')[0]):
    apart, largest, influences = numbers(text)
    assert apart <= 3e-5 * largest and influences == ZEROS


def test_what_the_page_has_of_transformers():
  _, theirs, refused = blocks('text')
  golden = json.loads(GOLDEN.read_text())
  assert (theirs, refused) == (golden['printed'], golden['error'])
  assert golden['versions'].replace('+cpu', '') in PAGE.read_text()
  assert numbers(theirs)[0] > 0.01 and not set(numbers(theirs)[2]) & set(ZEROS)
