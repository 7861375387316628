"""Layers as stacks of patterns: as few blocks as possible, in the order of the layers."""

import numpy as np
import pytest

from ftjax.families import layer_types


def shape(layers):
  return [(''.join(pattern), repeats) for pattern, repeats in layer_types.stacks(list(layers))]


@pytest.mark.parametrize(
  ('layers', 'expected'),
  [
    ('L' * 80, [('L', 80)]),
    ('LLLLLG' * 4 + 'LL', [('LLLLLG', 4), ('L', 2)]),  # Gemma 3 1B
    ('DDD' + 'MLMM' * 5, [('D', 3), ('MLMM', 5)]),
    ('LG' * 13, [('LG', 13)]),
    ('ABC', [('A', 1), ('B', 1), ('C', 1)]),
  ],
)
def test_the_shortest_patterns_are_found(layers, expected):
  found = shape(layers)
  assert sum(len(p) for p, _ in found) == sum(len(p) for p, _ in expected)
  assert ''.join(p * n for p, n in found) == layers
  assert len(set(layers)) > 2 or found == expected


def test_any_list_comes_back_in_order():
  rng = np.random.default_rng(0)
  for _ in range(50):
    layers = ''.join(rng.choice(list('AB'), rng.integers(1, 30)))
    assert ''.join(p * n for p, n in shape(layers)) == layers
