"""A model kind outside the package: the decoder with an adapter (a bias on the hidden states) and a
derived leaf (the mean row of the embedding table), both float32 whatever the run's dtype is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ftjax.models import kinds
from ftjax.models.layers import Declared

ADAPTER, DERIVED = 'adapter/b', 'derived/mean'


def _declared(arch):
  shape, axes = (arch.model_dim,), ('act_embed',)
  own = {
    ADAPTER: Declared(shape, axes, 0, 0.5, origin='adapter', dtype='float32'),
    DERIVED: Declared(shape, axes, 0, 0.0, origin='derived', dtype='float32'),
  }
  return kinds.DECODER.declared(arch) | own


def _derive(arch, params):
  del arch
  return {DERIVED: params['embed']['w'].astype(jnp.float32).mean(0)}


def _apply(arch, params, tokens, where, *, dtype, remat, noise):
  own = {k: v for k, v in params.items() if k not in ('adapter', 'derived')}
  x = kinds.DECODER.apply(arch, own, tokens, where, dtype=dtype, remat=remat, noise=noise)
  alike = functools.partial(jax.sharding.reshard, out_shardings=jax.P(None))
  more = alike(params['adapter']['b']) + alike(params['derived']['mean'])
  return x + more.astype(dtype)[None, None]


KIND = dataclasses.replace(
  kinds.DECODER, declared=_declared, apply=_apply, decode=None, derive=_derive
)
