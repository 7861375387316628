"""Successive halving: all runs train to the first rung, the best of them to the next, and so on.

Every rung compares runs after the same number of steps, and the next one begins when the last run
has reached it, so that the steps of a study are known before it starts. Source: Jamieson and
Talwalkar 2016, AISTATS 51:240; rungs of Li et al. 2020, MLSys 2:230, without its asynchrony.
"""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Rung:
  """A step at which runs are compared.

  stop_at: step at which runs end; 0: the last step of the runs.
  step: the same, with the number of the last step.
  runs: how many train to it.
  """

  stop_at: int
  step: int
  runs: int


def plan(trials: int, steps: int, rungs: Sequence[int], reduction: int) -> tuple[Rung, ...]:
  """Returns the rungs of a study; one of all runs where there are no rungs.

  Args:
    trials: number of runs.
    steps: of a whole run; 0: unknown, without rungs.
    rungs: ascending steps below `steps`.
    reduction: of so many runs one is promoted, at least one.
  """
  out, left = [], trials
  for step in (*rungs, steps):
    out.append(Rung(0 if step == steps else step, step, left))
    left = max(1, left // reduction)
  return tuple(out)


def total_steps(rungs: Sequence[Rung]) -> int:
  """Returns the optimizer steps that a plan takes in all, each run's counted once."""
  before, out = 0, 0
  for rung in rungs:
    out += rung.runs * (rung.step - before)
    before = rung.step
  return out


def promoted(orders: Mapping[str, float], count: int) -> list[str]:
  """Returns the names of the best runs of a rung, in the order in which they were made.

  Args:
    orders: {name: a number, smaller is better} of the runs that did not fail, in that order.
    count: how many go on, if there are so many. Of equal runs the earlier ones do.
  """
  names = list(orders)
  best = set(sorted(names, key=lambda n: (orders[n], names.index(n)))[:count])
  return [name for name in names if name in best]
