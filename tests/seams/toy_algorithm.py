"""A toy algorithm outside of ftjax: cross-entropy weighted by (1 - p)^gamma (Lin et al. 2017).

Its evaluation also measures the mean probability of the supervised tokens."""

import jax
import jax.numpy as jnp

from ftjax.config.algorithms import Algorithm
from ftjax.experiment import fit
from ftjax.experiment import run as experiment
from ftjax.models import head, transformer
from ftjax.models.forward import hidden_states
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


def log_probs(arch, c, params, batch, remat):
  x = hidden_states(arch, params, batch, jnp.dtype(c.model.compute_dtype), remat)
  table = transformer.head_weights(arch, params)
  return head.token_logprobs(x, table, batch['labels'], batch['weights'])


def sums(logp, weights, gamma):
  """(sum of the losses, sum of the probabilities, number) of the tokens with a weight."""
  p = jnp.exp(logp)
  losses = -((1 - p) ** gamma) * logp
  return (losses * weights).sum(), (p * weights).sum(), weights.sum()


def make_loss(arch, c):
  def loss(params, batch, keys):
    logp = log_probs(arch, c, params, batch, c.remat)
    total, probability, weight = sums(logp, batch['weights'], c.custom.gamma)
    return total, weight, {'probability': (jax.lax.stop_gradient(probability), weight)}

  return loss


def run(c, workdir):
  r = experiment.start(c, workdir)

  @jax.jit
  def measure(params, batch):
    return sums(log_probs(r.arch, c, params, batch, 'none'), batch['weights'], c.custom.gamma)

  def evaluate(params, is_cancelled):
    found = [[float(x) for x in measure(params, batch)] for batch in r.eval_batches()]
    loss, probability, count = map(sum, zip(*found, strict=True))
    return {'loss': loss / count, 'probability': probability / count}

  fit.fit(r, make_loss(r.arch, c), evaluate)
