"""A toy algorithm outside of ftjax: cross-entropy weighted by (1 - p)^gamma (Lin et al. 2017).

Its evaluation also measures the mean probability of the supervised tokens."""

import jax
import jax.numpy as jnp

from ftjax.config.algorithms import Algorithm
from ftjax.experiment import fit
from ftjax.runtime.errors import ConfigError


def check(c):
  if c.custom.gamma < 0:
    raise ConfigError(f'custom.gamma={c.custom.gamma}; expected at least 0')


FOCAL = Algorithm(
  module=__name__,
  measured=lambda c: {'loss': 'min', 'probability': 'max'},
  headline=lambda c: (('loss', 'probability'), ('probability', 'loss')),
  reads=('data.packing', 'data.loss_on'),
  fixed=('custom.gamma',),
  check=check,
  keys={'gamma': 2.0},
)


def sums(logp, weights, gamma):
  """(sum of the losses, sum of the probabilities, number) of the tokens with a weight."""
  p = jnp.exp(logp)
  losses = -((1 - p) ** gamma) * logp
  return (losses * weights).sum(), (p * weights).sum(), weights.sum()


def make_loss(forward, c):
  def loss(params, batch, keys):
    logp = forward.token_logprobs(params, batch)
    total, probability, weight = sums(logp, batch['weights'], c.custom.gamma)
    return total, weight, {'probability': (jax.lax.stop_gradient(probability), weight)}

  return loss


def build(run):
  forward, gamma = run.forward.without_remat(), run.config.custom.gamma

  @jax.jit
  def measure(params, batch):
    return sums(forward.token_logprobs(params, batch), batch['weights'], gamma)

  def evaluate(params, is_cancelled):
    found = [[float(x) for x in measure(params, batch)] for batch in run.eval_batches()]
    loss, probability, count = map(sum, zip(*found, strict=True))
    return {'loss': loss / count, 'probability': probability / count}

  return fit.Parts(make_loss(run.forward, run.config), evaluate)
