"""The loss of preference tuning on rows of two segments, for dpo.py and online_dpo.py: log-probs of
both completions under the policy and, where the loss needs it, under the reference. The reference's
parameters are under `reference/` of the state, or its log-probs come with the batch
(reference_logps.py). The formulas are the table in losses/preference_table.py."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import ml_collections

from ftjax.algorithms import pair_metrics
from ftjax.config import algorithms
from ftjax.config.algorithms import REFERENCE_FIELDS
from ftjax.losses import masked, preference
from ftjax.losses.preference_table import LOSSES
from ftjax.models.forward import Forward, segment_sum
from ftjax.runtime import named_object
from ftjax.training.step import LossFn

log = logging.getLogger(__name__)

_ALARM_STEPS = 5
# Relative rounding of a response's log-prob, by dtype of the activations: some units in the last
# place of the float32 sum; with bfloat16 what is left of its errors in a mean over many tokens.
_ROUNDING = {'float32': 2**-20, 'bfloat16': 2**-14}


def settings(c: ml_collections.ConfigDict) -> preference.Settings:
  """Returns the coefficients of a config."""
  names = [f.name for f in dataclasses.fields(preference.Settings)]
  return preference.Settings(**{n: c.dpo[n] for n in names})


def row(c: ml_collections.ConfigDict) -> preference.Row:
  """Returns the loss that dpo.loss names: of the table, or 'module:ROW' of a user's module.

  Raises:
    ConfigError: a user's object of another type.
  """
  name = c.dpo.loss
  if name in LOSSES:
    return LOSSES[name]
  return named_object.instance('dpo.loss', name, preference.Row)


def measured(forward: Forward, params: dict, batch: dict, with_reference: bool) -> dict:
  """Returns for each row the log-probs `first` and `second`, the same with `ref_`, and the tokens
  `first_tokens` and `second_tokens`.
  """
  first, second = forward.side_logprobs(params, batch, (1, 2))
  ref_first = ref_second = jnp.zeros_like(first)
  if set(REFERENCE_FIELDS) <= set(batch):
    ref_first, ref_second = (batch[k] for k in REFERENCE_FIELDS)
  elif with_reference:
    reference = forward.untrained()
    frozen = jax.lax.stop_gradient(reference.find_params(params, 'reference'))
    ref_first, ref_second = reference.side_logprobs(frozen, batch, (1, 2))
  return {
    'first': first,
    'second': second,
    'ref_first': ref_first,
    'ref_second': ref_second,
    'first_tokens': segment_sum(batch['weights'], batch, 1),
    'second_tokens': segment_sum(batch['weights'], batch, 2),
    'values': batch['values'],
    'weights': pair_metrics.present(batch),
  }


def table_batch(form: preference.Row, m: dict) -> preference.Pairs | preference.Singles:
  """Returns the input of a row of the loss table, from `measured` of all rows of a step."""
  if form.paired:
    nll = preference.nll_per_pair(m['first'], m['first_tokens'])
    return preference.Pairs(
      m['first'],
      m['second'],
      m['ref_first'],
      m['ref_second'],
      m['first_tokens'],
      m['second_tokens'],
      nll,
    )
  # Segment 2 is the prompt with another row's completion.
  mismatched = preference.kto_reference_point(m['second'], m['ref_second'], m['weights'])
  z = preference.kto_z(*mismatched)
  return preference.Singles(m['first'], m['ref_first'], m['values'] > 0, z)


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum over pairs or completions, their number, metrics as
  sums).
  """
  coefficients, form = settings(c), row(c)

  def loss(params, batch, keys):
    m = measured(forward.with_dropout(keys), params, batch, form.needs_reference)
    if form.whole_step:  # every device compares all of them
      m = {k: jax.sharding.reshard(v, jax.P(None)) for k, v in m.items()}
    total, weight, metrics = preference.loss(form, table_batch(form, m), m['weights'], coefficients)
    first, second = jax.lax.stop_gradient((m['first'], m['second']))
    if form.paired:
      metrics['logps/chosen'] = masked.mean(first, m['weights'])
      metrics['logps/rejected'] = masked.mean(second, m['weights'])
    else:
      good = m['weights'] * m['values']
      metrics['logps/chosen'] = masked.mean(first, good)
      metrics['logps/rejected'] = masked.mean(first, m['weights'] - good)
    return total, weight, metrics

  return loss


class Alarm:
  """Warns, once, when the reward margin stays within rounding: then the policy is not trained, or
  the two responses of a pair are equal. For a cached reference it logs how far it is from the
  policy of the first step, to which it should be equal.

  Rounding is relative to the log-probs whose difference is the margin; for a reward model to the
  scores.
  """

  def __init__(self, c: ml_collections.ConfigDict, is_cached: bool = False):
    self._is_warned, self._is_cached = False, is_cached
    self._steps = 0  # in a row with a margin no larger than rounding
    self._lr, self._rounding = c.optim.lr, _ROUNDING[c.model.compute_dtype]
    self._of_scores = algorithms.of(c).labels(c) is not None
    self._beta = 1.0 if self._of_scores else c.dpo.beta

  def __call__(self, done: int, values: dict[str, float]) -> None:
    """Takes the metrics of every step, in order."""
    if self._is_cached and done == 1:
      log.info(
        'step 1: policy and reference are equal; rounding alone gives a reward of %.3g (chosen), '
        '%.3g (rejected), a margin of %.3g',
        *(values[f'rewards/{k}'] for k in ('chosen', 'rejected', 'margin')),
      )
    updates = done - 1 - values['skipped'] - values['no_signal']
    if self._is_warned or updates < 1 or not values['has_signal']:
      return
    rewards = [values['rewards/chosen'], values['rewards/rejected']]
    margin = values.get('rewards/margin', max(rewards, key=abs))  # KTO has no pairs
    if not abs(margin) <= self._largest(values):
      self._steps = 0
    elif margin == 0 or self._of_scores or values['lr'] >= self._lr / 2:
      self._steps += 1  # while the rate warms up, margins are small
    if self._steps >= _ALARM_STEPS:
      self._is_warned = True
      log.warning(
        'step %d: for %d steps the reward margin has been no larger than rounding (%.2g; %s of '
        '%.4g and %.4g). Check with python -m ftjax.preview that the two responses of a pair '
        'differ, and that optim.lr and optim.freeze let the %s move',
        *(done, self._steps, margin, 'scores' if self._of_scores else 'log-probs'),
        *self._compared(values),
        'model' if self._of_scores else 'policy away from the reference',
      )

  def _compared(self, values: dict[str, float]) -> tuple[float, float]:
    prefix = 'rewards' if self._of_scores else 'logps'
    return values[f'{prefix}/chosen'], values[f'{prefix}/rejected']

  def _largest(self, values: dict[str, float]) -> float:
    """The largest margin that rounding explains, in rewards."""
    return self._rounding * self._beta * sum(map(abs, self._compared(values)))
