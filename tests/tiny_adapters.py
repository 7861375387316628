"""Adapters on the decoder of tiny_model.py, whose values are random: no factor is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model

from ftjax.config import keys
from ftjax.experiment import adapters
from ftjax.models import kinds
from ftjax.runtime import trees

# Ranks that differ by layer and by map; a layer without an adapter among them.
RANKS = (('layer0/attn/q', 0), ('layer1/.*', 2), ('.*/mlp/down', 3))


def config(**lora):
  """A config with an adapter of rank 4 on a float32 base."""
  c = keys.default()
  c.lora.update({'rank': 4, 'alpha': 8.0, 'base': 'float32'} | lora)
  return c


def adapted(arch, **lora):
  return adapters.adapted(arch, config(**lora))


def begin(arch, base, seed=0):
  """{leaf: value} on the current mesh where training begins, of the nested dict of a plain model's
  parameters.
  """

  @jax.jit
  def start(base):
    held = {}
    for name, leaf in base.items():
      held |= kinds.packed(arch, name, leaf, jnp.float32)
    whole = kinds.completed(arch, trees.unflatten(held), lambda name: None, seed, jnp.float32)
    return trees.flatten(whole)

  return start(trees.flatten(base))


def init(arch, seed=0):
  """Random parameters on the current mesh: the base of `tiny_model.init` as `arch` holds it,
  adapters as they begin, and moved as `move` does.
  """
  return move(arch, begin(arch, tiny_model.init(arch.plain(), seed), seed), seed)


def move(arch, begun, seed=0):
  """Parameters in which adapters are moved by random numbers from where they begin, but for what is
  fixed and for rows beyond a layer's rank.
  """
  rng, out = np.random.default_rng(seed), dict(begun)
  for name, p in sorted(kinds.declared(arch).items()):
    is_added = 'lora_' in name and p.origin == 'adapter' and not p.is_fixed
    if is_added:
      moved = 0.1 * rng.normal(size=p.shape).astype(np.float32) * kept_rows(arch, name)
      out[name] = out[name] + tiny_model.place(moved, *p.axes)
  return trees.unflatten({n: out[n] for n in sorted(out)})


def kept_rows(arch, name):
  """1 for the numbers of a leaf that belong to a layer's own rank and to no padding, else 0."""
  p = kinds.declared(arch)[name]
  kept = np.ones(p.shape, np.float32)
  if p.padding:
    kept[..., -p.padding :] = 0  # the vocabulary is the last axis of an adapter's leaves
  own, _, last = name.rpartition('/')
  found = arch.adapter.find(own)
  if last in ('lora_a', 'lora_b') and found.is_stacked:
    for layer, rank in enumerate(found.ranks):
      kept[layer, rank:] = 0
  return kept
