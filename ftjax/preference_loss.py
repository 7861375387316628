"""The loss of preference tuning on rows of two segments, for dpo.py and online_dpo.py: log-probs of
both answers under the policy and, where the loss compares with it, under the reference. That is the
model as it was at the start, under `reference/` of the parameters, or its log-probs come with the
batch (reference_cache.py). The formulas are the table in losses/preference.py."""

import logging

import jax
import jax.numpy as jnp
import ml_collections

from ftjax import pairs
from ftjax.algorithms import REFERENCE_FIELDS
from ftjax.forward import hidden_states, model_of
from ftjax.losses import masked, preference
from ftjax.models import head, transformer
from ftjax.models.architecture import Architecture

log = logging.getLogger(__name__)

_ALARM_STEPS = 5


def settings(c: ml_collections.ConfigDict) -> preference.Settings:
  """The coefficients of a config."""
  names = ('beta', 'label_smoothing', 'gamma', 'nll_coef', 'desirable', 'undesirable')
  return preference.Settings(**{n: c.dpo[n] for n in names})


def side_logps(
  arch: Architecture, params: dict, batch: dict, dtype, remat: str
) -> tuple[jax.Array, jax.Array]:
  """(float32[B], float32[B]) nats: log pi of the answers in segments 1 and 2 of each row."""
  x = hidden_states(arch, params, batch, dtype, remat)
  table = transformer.head_weights(arch, params)
  logp = head.token_logprobs(x, table, batch['labels'], batch['weights'])
  return pairs.side_sum(logp, batch, 1), pairs.side_sum(logp, batch, 2)


def measured(arch: Architecture, params: dict, batch: dict, dtype, remat, with_reference) -> dict:
  """Per row: `first` and `second` log-probs, their `ref_`, `first_tokens`, `second_tokens`."""
  first, second = side_logps(arch, model_of(params), batch, dtype, remat)
  ref_first = ref_second = jnp.zeros_like(first)
  if set(REFERENCE_FIELDS) <= set(batch):
    ref_first, ref_second = (batch[k] for k in REFERENCE_FIELDS)
  elif with_reference:
    reference = jax.lax.stop_gradient(params['reference'])
    ref_first, ref_second = side_logps(arch, reference, batch, dtype, remat)
  return {
    'first': first,
    'second': second,
    'ref_first': ref_first,
    'ref_second': ref_second,
    'first_tokens': pairs.side_sum(batch['weights'], batch, 1),
    'second_tokens': pairs.side_sum(batch['weights'], batch, 2),
    'values': batch['values'],
    'weights': pairs.present(batch),
  }


def table_batch(name: str, m: dict) -> preference.Pairs | preference.Singles:
  """What a row of the loss table takes, from what `measured` found of all rows of a step."""
  if preference.LOSSES[name].paired:
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
  # Segment 2 is the prompt with another row's answer.
  mismatched = preference.kto_reference_point(m['second'], m['ref_second'], m['weights'])
  z = preference.kto_z(*mismatched)
  return preference.Singles(m['first'], m['ref_first'], m['values'] > 0, z)


def make_loss(arch: Architecture, c: ml_collections.ConfigDict):
  """loss(params, batch, keys) -> (sum over pairs or answers, their number, metrics as sums)."""
  dtype, coefficients, name = jnp.dtype(c.model.compute_dtype), settings(c), c.dpo.loss
  row, remat = preference.LOSSES[name], c.remat

  def loss(params, batch, keys):
    del keys
    m = measured(arch, params, batch, dtype, remat, row.needs_reference)
    total, weight, metrics = preference.loss(name, table_batch(name, m), m['weights'], coefficients)
    first, second = jax.lax.stop_gradient((m['first'], m['second']))
    if row.paired:
      metrics['logps/chosen'] = masked.mean(first, m['weights'])
      metrics['logps/rejected'] = masked.mean(second, m['weights'])
    else:
      good = m['weights'] * m['values']
      metrics['logps/chosen'] = masked.mean(first, good)
      metrics['logps/rejected'] = masked.mean(first, m['weights'] - good)
    return total, weight, metrics

  return loss


class Alarm:
  """Says it when the policy stays at the reference: it is then the same object, or not trained.
  Of a cached reference it says how far it is from the policy of the first step, which it should be.
  """

  def __init__(self, is_cached: bool = False):
    self._is_told, self._is_cached = False, is_cached

  def __call__(self, done: int, values: dict[str, float]) -> None:
    if self._is_cached and done == 1:
      log.info(
        'step 1: policy and reference are one model; rounding makes a reward of %.3g (chosen), '
        '%.3g (rejected), a margin of %.3g',
        *(values[f'rewards/{k}'] for k in ('chosen', 'rejected', 'margin')),
      )
    updates = done - 1 - values['skipped']
    margin = values.get('rewards/margin')
    if not values.get('supervised_tokens', 1):
      return  # no pair in it
    if updates >= _ALARM_STEPS and margin == 0.0 and not self._is_told:
      self._is_told = True
      log.warning(
        'step %d: after %d updates the reward margin is still exactly 0, so policy and reference '
        'give the same log-probs. Look at optim.lr and optim.freeze, and with python -m '
        'ftjax.preview at whether the two answers of a pair differ',
        *(done, updates),
      )
