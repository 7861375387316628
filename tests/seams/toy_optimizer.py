"""A toy optimizer and a toy schedule outside of ftjax: the sign of a momentum, and a sawtooth."""

import jax
import jax.numpy as jnp
import optax


def sign_momentum(config, leaves):
  del leaves
  sign = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
  return optax.chain(optax.trace(config.b1), sign)


def sawtooth(config):
  return lambda k: config.lr * (1 - k % 4 / 4)


def no_optimizer(config, leaves):
  return 'adam'


def no_schedule(config):
  return 0.1
