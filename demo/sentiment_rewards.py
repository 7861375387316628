"""Prompts and pairs for the reward-based runs: python demo/sentiment_rewards.py .cache

From the sentences of demo/assets.py it makes TARGET_DIR/data/sentiment_rewards/ with

  prompts.jsonl     {"prompt", "label"}: what a policy is sampled on, and what its answer must be
  pairs.jsonl       {"prompt", "chosen", "rejected"}: 300 of them, of other sentences
  test_match.jsonl  {"prompt", "answer"}: held-out, answered freely
  test_choice.jsonl {"prompt", "choices", "label"}: the same, by the more probable answer
  test_pairs.jsonl  {"prompt", "chosen", "rejected"}: the same

Sentences have at most 24 words, so that a row of 64 tokens holds prompt and answer. The prompt asks
a language model without a chat: SmolLM2-135M-Instruct, asked in its chat for one word, hardly ever
says one, and what is never sampled cannot be rewarded."""

import json
import sys
from pathlib import Path

LABELS = ('positive', 'negative')
MOST_WORDS, PAIRS = 24, 300


def sentences(path: Path) -> list[tuple[str, str]]:
  """(sentence, label) of the short rows of a file of demo/assets.py."""
  out = []
  for line in path.read_text(encoding='utf-8').splitlines():
    row = json.loads(line)
    user = next(m['content'] for m in row['messages'] if m['role'] == 'user')
    label = row['label'] if 'label' in row else row['messages'][-1]['content']
    sentence = user.split('\n\n', 1)[1]
    if len(sentence.split()) <= MOST_WORDS:
      out.append((sentence, label))
  return out


def prompt(sentence: str) -> str:
  return f'Review: {sentence}\nSentiment (positive or negative):'


def pair(sentence: str, label: str) -> dict:
  other = LABELS[1 - LABELS.index(label)]
  return {'prompt': prompt(sentence), 'chosen': f' {label}', 'rejected': f' {other}'}


def main(cache: Path) -> None:
  train = sentences(cache / 'data' / 'sentiment' / 'train.jsonl')
  test = sentences(cache / 'data' / 'sentiment' / 'test.jsonl')
  target = cache / 'data' / 'sentiment_rewards'
  target.mkdir(parents=True, exist_ok=True)
  rows = {
    'prompts': [{'prompt': prompt(s), 'label': y} for s, y in train[PAIRS:]],
    'pairs': [pair(s, y) for s, y in train[:PAIRS]],
    'test_match': [{'prompt': prompt(s), 'answer': y} for s, y in test],
    'test_choice': [
      {'prompt': prompt(s), 'choices': [f' {x}' for x in LABELS], 'label': f' {y}'} for s, y in test
    ],
    'test_pairs': [pair(s, y) for s, y in test],
  }
  for name, found in rows.items():
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in found)
    (target / f'{name}.jsonl').write_text(text, encoding='utf-8')
    print(f'{target / name}.jsonl: {len(found)} rows')


if __name__ == '__main__':
  main(Path(sys.argv[1]))
