"""Numbers of parameters, and of those that enter FLOP counts, from what a model declares.

Padding of the vocabulary is not counted.
"""

import math

from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.models.layers import Declared


def num_params(arch: Architecture) -> int:
  """Returns the number of parameters, a tied head counted once, without derived leaves."""
  return sum(map(weights, kinds.declared(arch).values()))


def weights(p: Declared) -> int:
  """Returns the numbers of the model that a leaf holds, also where they are packed."""
  return 0 if p.origin == 'derived' or p.is_fixed else math.prod(p.file_shape) * p.weights


def head_params(arch: Architecture) -> int:
  """Returns the number of parameters of the head, which may be the embedding table."""
  return math.prod(kinds.declared(arch)[kinds.of(arch).head_leaf(arch)].file_shape)


def matmul_params(arch: Architecture) -> int:
  """Returns the number of parameters that a token is multiplied with: matrices of the blocks and
  the head, without norms, biases and the embedding look-up.
  """
  declared = kinds.declared(arch)
  matrices = [p for p in declared.values() if p.fan_in and 'vocab' not in p.axes]
  if 'vocab' in declared[kinds.of(arch).head_leaf(arch)].axes:
    return sum(map(weights, matrices)) + head_params(arch)
  return sum(map(weights, matrices))


def attention_width(arch: Architecture) -> int:
  """Returns the sum over layers of heads times head size: the queries of a token, in numbers."""
  declared = kinds.declared(arch.plain()).values()
  queries = [p for p in declared if p.fan_in and p.axes[-2:] == ('heads', 'head_dim')]
  return sum(math.prod((p.shape[0], *p.shape[-2:])) for p in queries)
