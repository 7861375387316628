"""The intervals of a run by its config: when it logs, evaluates, saves and ends."""

import ml_collections

from ftjax.experiment.run import Run
from ftjax.training.loop import Cadence
from ftjax.training.plateau import Plateau


def of(run: Run, steps: int) -> Cadence:
  """Returns the intervals of a run that ends after `steps`."""
  c = run.config
  return Cadence(
    steps=steps,
    log_every=c.log.every,
    eval_every=c.eval.every,
    save_every=c.checkpoint.every,
    patience=c.checkpoint.patience,
    metric=c.checkpoint.best_metric,
    mode=c.checkpoint.best_mode,
    max_bad_steps=c.max_bad_steps,
    profile_start=c.profile.start,
    profile_stop=c.profile.stop,
    plateau=_plateau(c),
  )


def _plateau(c: ml_collections.ConfigDict) -> Plateau | None:
  o = c.optim
  if o.plateau_factor == 1:
    return None
  return Plateau(o.plateau_factor, o.plateau_patience, o.plateau_min)
