"""models/quantize.py: the ways to unpack give the same bits."""

import jax.numpy as jnp
import numpy as np

from ftjax.models import quantize


def test_both_look_ups_of_nf4_are_the_published_table():
  """A TPU selects, other devices read a table: a run gives the same weights on both."""
  codes = jnp.arange(16, dtype=jnp.uint8).reshape(4, 4)
  wanted = np.asarray(quantize.NF4, np.float32).reshape(4, 4)
  np.testing.assert_array_equal(quantize._looked_up(codes), wanted)
  np.testing.assert_array_equal(quantize._selected(codes), wanted)
