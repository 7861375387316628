"""Prompts of GSM8K: python demo/gsm8k.py TARGET_DIR TRAIN [TEST]

TRAIN and TEST are the data set's own files, JSON lines {"question", "answer"}, plain or .gz (from
the repository grade-school-math of its authors, MIT). Without TEST the last 500 rows of TRAIN are
kept out and judge instead, which is not the published test set.

  train.jsonl  {"messages", "answer"}: what a policy is sampled on
  dev.jsonl    the same, 200 rows of TRAIN: what it is watched on
  test.jsonl   the same: what base and tuned model are compared on

The answer is the rationale as it is, which ends in "#### NUMBER"; that number is the gold one."""

import gzip
import json
import sys
from pathlib import Path

DEV, HELD_OUT = 200, 500
ASK = (
  'Work it out step by step. Write the result as a plain number on the last line, after "#### ".'
)


def read(path: Path) -> list[dict]:
  """Rows, checked."""
  opened = gzip.open if path.suffix == '.gz' else open
  with opened(path, 'rt', encoding='utf-8') as lines:
    rows = [json.loads(line) for line in lines if line.strip()]
  for number, row in enumerate(rows, 1):
    if not {'question', 'answer'} <= row.keys() or '####' not in row['answer']:
      raise SystemExit(f'{path}: row {number} has no "question", or no "answer" with "#### NUMBER"')
  return rows


def ask(row: dict) -> dict:
  """A chat of one turn."""
  message = {'role': 'user', 'content': f'{row["question"]}\n\n{ASK}'}
  return {'messages': [message], 'answer': row['answer']}


def main(target: Path, train: Path, test: Path | None = None) -> None:
  rows = read(train)
  judged = read(test) if test else rows[-HELD_OUT:]
  rows = rows if test else rows[:-HELD_OUT]
  target.mkdir(parents=True, exist_ok=True)
  for name, found in (('train', rows[DEV:]), ('dev', rows[:DEV]), ('test', judged)):
    text = ''.join(json.dumps(ask(row), ensure_ascii=False) + '\n' for row in found)
    (target / f'{name}.jsonl').write_text(text, encoding='utf-8')
    print(f'{target / name}.jsonl: {len(found)} rows')


if __name__ == '__main__':
  main(*map(Path, sys.argv[1:]))
