"""Loss of the right choices of an evaluation task, before and after tuning: python
demo/held_out_loss.py WORKDIR TASK

Reads WORKDIR/eval/TASK.jsonl, which a run with a task of kind `choice` writes at its end: the
summed log-probability, in nats, of each choice with its stop token. The interval of the difference
is a bootstrap over the rows; a row is drawn with the values of both models.
"""

import sys
from pathlib import Path

import numpy as np

from ftjax.evaluation import result
from ftjax.evaluation.statistics import bootstrap


def losses(results: list, choices: list[str]) -> np.ndarray:
  """float64[rows] of one model; choices: the task's, in the order of its scores."""
  return np.array([-r.scores[choices.index(r.label)] for r in results])


def main(workdir: str, task: str) -> None:
  found = result.load(str(Path(workdir) / 'eval' / f'{task}.jsonl'))
  # A prediction is the choice with the largest score: that tells which score is whose.
  order = {int(np.argmax(r.scores)): r.prediction for results in found.values() for r in results}
  choices = [order[i] for i in range(len(found['base'][0].scores))]
  base, tuned = (losses(found[model], choices) for model in ('base', 'tuned'))
  difference = bootstrap.bootstrap(
    lambda weights: weights @ (tuned - base) / weights.sum(-1),
    range(len(base)),
    seed=0,
    resamples=10_000,
  )
  print(
    f'{task}: {len(base)} rows, held-out loss {base.mean():.4f} before, {tuned.mean():.4f} after; '
    f'difference {float(difference.value):+.4f} '
    f'[{float(difference.low):+.4f}, {float(difference.high):+.4f}] (95 %, paired bootstrap); '
    f'{int((tuned < base).sum())} rows lower'
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
