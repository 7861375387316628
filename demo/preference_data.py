"""Picks short pairs out of a preference file: python demo/preference_data.py SOURCE TARGET_DIR

SOURCE holds preference rows (HH-RLHF's dialogues, for example), as .jsonl or .jsonl.gz.
Written are TARGET_DIR/{train,test}.jsonl: the first 300 and the next 200 pairs of which each side
has at most 128 tokens under .cache/smollm2's tokenizer and template. No prompt is in both. The
texts of HH-RLHF are offensive by design."""

import json
import sys
from pathlib import Path

from ftjax.data import labeled_examples, preference_rows
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad
from ftjax.data.sources import parse_spec, scan
from ftjax.data.tokenizer import Tokenizer
from ftjax.hf import load

LONGEST, TRAIN, TEST = 128, 300, 200


def encode(row: dict | Bad, tokenizer: Tokenizer) -> Encoded | Bad:
  """A row's pair in tokens, or why there is none."""
  try:
    parsed = row if isinstance(row, Bad) else preference_rows.parse(row, 'pair', None)
  except ValueError as error:
    return Bad(str(error))
  if isinstance(parsed, Bad):
    return parsed
  (found,) = labeled_examples.encode([parsed], tokenizer)
  return found if isinstance(found, Bad) else found[0]


def main(source: str, target: Path) -> None:
  tokenizer = Tokenizer(load.tokenizer_files('.cache/smollm2'), 'smollm2')
  sides: dict[str, list[dict]] = {'train': [], 'test': []}
  prompts: set[bytes] = set()
  skipped = 0
  for _, _, row in scan(parse_spec(source)):
    pair = encode(row, tokenizer)
    if isinstance(pair, Bad):
      skipped += 1
      continue
    prompt = pair.tokens[: pair.supervised.argmax()].tobytes()
    if max(pair.boundary, len(pair.tokens) - pair.boundary) > LONGEST or prompt in prompts:
      continue
    prompts.add(prompt)
    side = 'train' if len(sides['train']) < TRAIN else 'test'
    if len(sides[side]) < (TRAIN if side == 'train' else TEST):
      sides[side].append(row)
  target.mkdir(parents=True, exist_ok=True)
  for name, rows in sides.items():
    (target / f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    print(f'{target / name}.jsonl: {len(rows)} pairs')
  print(f'{skipped} rows could not be used')


if __name__ == '__main__':
  main(sys.argv[1], Path(sys.argv[2]))
