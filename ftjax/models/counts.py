"""Numbers and bytes of parameters, and model FLOPs of a step, from what a model declares.
Padding of the vocabulary is not counted.

Model FLOPs are the products that the mathematics needs, as published figures count them: the head
for every token although unsupervised ones are skipped, attention over the keys that a query can see
only. Recomputation (remat), unpacking of a packed base and the norms of DoRA are not counted."""

import dataclasses
import math
from collections.abc import Container
from typing import Self

from ftjax.models import kinds
from ftjax.models.architecture import Architecture, DeltaNetSpec
from ftjax.models.layers import Declared


def num_params(arch: Architecture) -> int:
  """Returns the number of parameters, a tied head counted once, without derived leaves."""
  return sum(map(weights, kinds.declared(arch).values()))


def num_trained(arch: Architecture) -> int:
  """Returns the number of parameters that are trained: all, or with an adapter those of it."""
  found = kinds.declared(arch).values()
  return sum(weights(p) for p in found if not arch.adapter or p.origin == 'adapter')


def weights(p: Declared) -> int:
  """Returns the numbers of the model that a leaf holds, also where they are packed."""
  return 0 if p.origin == 'derived' or p.is_fixed else math.prod(p.file_shape) * p.weights


def head_params(arch: Architecture) -> int:
  """Returns the number of parameters of the head, which may be the embedding table."""
  return math.prod(kinds.declared(arch)[kinds.of(arch).head_leaf(arch)].file_shape)


def matmul_params(arch: Architecture, left_out: Container[str] = ()) -> int:
  """Returns the number of parameters that a token is multiplied with: matrices of the blocks,
  adapters and the head, without norms, biases and the look-ups of embeddings and positions. Of
  experts those that a token is computed by count.

  left_out: names of leaves that do not count.
  """
  head = kinds.of(arch).head_leaf(arch)
  return sum(
    round(weights(p) * p.share)
    for name, p in kinds.declared(arch).items()
    if p.fan_in
    and name not in left_out
    and not {'position', 'token_type'} & {*p.axes}
    and (name == head or 'vocab' not in p.axes or 'rank' in p.axes)
  )


def attention_width(arch: Architecture) -> int:
  """Returns the sum over layers of heads times head size: the queries of a token, in numbers."""
  queries = [
    p
    for name, p in kinds.declared(arch.plain()).items()
    if p.fan_in and p.axes[-2:] == ('heads', 'head_dim') and not name.endswith('/gate/w')
  ]
  return sum(math.prod((p.shape[0], *p.shape[-2:])) for p in queries)


def state_size(arch: Architecture) -> int:
  """Returns the sum over delta nets of the numbers of their state."""
  nets = ((spec.mixer, n) for _, spec, n in arch.blocks() if isinstance(spec.mixer, DeltaNetSpec))
  return sum(n * net.state_size for net, n in nets)


@dataclasses.dataclass(frozen=True)
class Flops:
  """Model FLOPs: of a token, in products with parameters and with the states of delta nets; of a
  (query, key) pair within the attention mask, in QK^T and AV, summed over layers and heads.
  """

  token: float = 0.0
  pair: float = 0.0

  def __add__(self, other: Self) -> Self:
    return dataclasses.replace(self, token=self.token + other.token, pair=self.pair + other.pair)

  def __call__(self, tokens: float, pairs: float) -> float:
    """Returns the FLOPs of `tokens` tokens that attend to `pairs` keys in all."""
    return self.token * tokens + self.pair * pairs


def forward_flops(arch: Architecture) -> Flops:
  """Returns 2 P + 6 S a token and 4 L N H a pair, P as `matmul_params` counts. Of the S numbers of
  the states each is multiplied with the key, corrected, and multiplied with the query.
  """
  token = 2.0 * matmul_params(arch) + 6.0 * state_size(arch)
  return _on_both_sides(arch, Flops(token, 4.0 * attention_width(arch)))


def _on_both_sides(arch: Architecture, flops: Flops) -> Flops:
  """Returns the FLOPs of an encoder, whose tokens attend to later ones too: a document of n tokens
  has n n pairs, where callers count the n (n + 1) / 2 of a decoder. The terms of positions in
  DeBERTa's scores are not counted.
  """
  if not arch.is_encoder:
    return flops
  return Flops(flops.token - flops.pair, 2.0 * flops.pair)


def train_flops(arch: Architecture) -> Flops:
  """Returns the FLOPs of forward and backward: a token is multiplied with a trained matrix three
  times (forward, and the gradients of its input and of the matrix), with a frozen one twice. Under
  an adapter the base is frozen. 4 P + 2 P_trained + 18 S a token, 12 L N H a pair.
  """
  frozen = kinds.names(arch, 'base') if arch.adapter else ()
  trained = matmul_params(arch, left_out=frozen)
  token = 4.0 * matmul_params(arch) + 2.0 * trained + 18.0 * state_size(arch)
  return _on_both_sides(arch, Flops(token, 12.0 * attention_width(arch)))
