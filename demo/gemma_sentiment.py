"""Movie-review sentences for a base model, which has no chat template: gemma_sentiment.py CACHE

From CACHE/data/sentiment (demo/assets.py) it makes CACHE/data/sentiment_text: train.jsonl and
heldout.jsonl, rows {prompt, completion}, and test.jsonl, the held-out rows with both choices. The
held-out rows are sentences of the demo's test set, which no training row repeats.
"""

import json
import sys
from pathlib import Path

ASK = 'Review: {}\nSentiment:'
QUESTION = 'Is this review positive or negative?\n\n'
HELD_OUT = 100


def sentence(row: dict) -> str:
  """The review of a demo row."""
  (asked,) = (m['content'] for m in row['messages'] if m['role'] == 'user')
  return asked.removeprefix(QUESTION)


def write(path: Path, rows: list[dict]) -> None:
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  path.write_text(text, encoding='utf-8')
  print(f'{path}: {len(rows)} rows')


def main(cache: Path) -> None:
  source, target = cache / 'data' / 'sentiment', cache / 'data' / 'sentiment_text'
  train, test = (
    [json.loads(line) for line in (source / f'{name}.jsonl').open(encoding='utf-8')]
    for name in ('train', 'test')
  )
  # The test set is in the order of the sentences' hashes: its first rows are a random sample.
  test = test[:HELD_OUT]
  target.mkdir(parents=True, exist_ok=True)
  answers = [row['messages'][-1]['content'] for row in train]
  write(
    target / 'train.jsonl',
    [
      {'prompt': ASK.format(sentence(row)), 'completion': f' {answer}'}
      for row, answer in zip(train, answers, strict=True)
    ],
  )
  asked = [ASK.format(sentence(row)) for row in test]
  write(
    target / 'heldout.jsonl',
    [
      {'prompt': prompt, 'completion': f' {row["label"]}'}
      for prompt, row in zip(asked, test, strict=True)
    ],
  )
  write(
    target / 'test.jsonl',
    [
      {'prompt': prompt, 'choices': [' positive', ' negative'], 'label': f' {row["label"]}'}
      for prompt, row in zip(asked, test, strict=True)
    ],
  )


if __name__ == '__main__':
  main(Path(sys.argv[1]))
