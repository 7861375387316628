"""A toy preference loss outside of ftjax: the squared distance of the margin from 1."""

import jax.numpy as jnp

from ftjax.losses.preference import Row


def margins(pairs, settings):
  chosen = settings.beta * (pairs.chosen - pairs.ref_chosen)
  return chosen, settings.beta * (pairs.rejected - pairs.ref_rejected)


def square(pairs, settings):
  chosen, rejected = margins(pairs, settings)
  return jnp.square(chosen - rejected - 1)


SQUARE = Row(
  function=square,
  reward=margins,
  needs_reference=True,
  paired=True,
  formula='(beta (r_w - r_l) - 1)^2',
  paper='none; IPO without the means over tokens',
)
