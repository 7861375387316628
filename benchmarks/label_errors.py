"""How many flipped labels the audit of training data finds, and how many of its doubts are right.

  PYTHONPATH=. python benchmarks/label_errors.py ROWS.jsonl [SHARE]

Flips SHARE (0.05) of the labels of rows with two labels, at random with seed 0, and prints
precision and recall at several confidences as JSON lines; the last line is of the unchanged labels.
Needs scikit-learn, of the extra eval.
"""

import json
import sys

import numpy as np

from ftjax.audit import labels as label_checks

CONFIDENCES = (0.0, 0.7, 0.8, 0.85, 0.9, 0.95)


def read(path):
  """(inputs, labels) of rows {"messages": [..., the answer]}."""
  with open(path, encoding='utf-8') as file:
    rows = [json.loads(line)['messages'] for line in file if line.strip()]
  inputs = ['\n'.join(m['content'] for m in row[:-1]) for row in rows]
  return inputs, [row[-1]['content'].strip() for row in rows]


def measure(texts, given, flipped):
  """One line for each confidence; `flipped` bool[n]."""
  probs = label_checks.out_of_fold(texts, given, 2, label_checks.FOLDS, 0)
  doubted = label_checks.suspects(given, probs)
  other = probs[doubted, 1 - given[doubted]]
  for least in CONFIDENCES:
    chosen = doubted[other >= least]
    hits = int(flipped[chosen].sum())
    print(
      json.dumps(
        {
          'flipped': int(flipped.sum()),
          'confidence': least,
          'doubted': len(chosen),
          'share_doubted': round(len(chosen) / len(texts), 4),
          'precision': round(hits / len(chosen), 3) if len(chosen) else None,
          'recall': round(hits / flipped.sum(), 3) if flipped.any() else None,
          'accuracy_out_of_fold': round(float((probs.argmax(1) == given).mean()), 4),
        }
      ),
      flush=True,
    )


def main():
  texts, names = read(sys.argv[1])
  share = float(sys.argv[2]) if len(sys.argv) > 2 else 0.05
  known = sorted(set(names))
  if len(known) != 2:
    sys.exit(f'{sys.argv[1]} has the labels {known[:5]}; expected two different ones')
  true = np.array([known.index(name) for name in names])
  flipped = np.zeros(len(true), bool)
  flipped[np.random.default_rng(0).choice(len(true), int(share * len(true)), replace=False)] = True
  measure(texts, np.where(flipped, 1 - true, true), flipped)
  measure(texts, true, np.zeros(len(true), bool))


if __name__ == '__main__':
  main()
