"""What the auxiliary models of a run (algorithms.Auxiliary) mean for architectures and passes."""

import dataclasses

import ml_collections

from ftjax.config import algorithms
from ftjax.models.architecture import Architecture


def value_arch(arch: Architecture) -> Architecture:
  """Returns the architecture of a value model: the policy's with a score in place of the head."""
  return dataclasses.replace(arch, num_labels=1)


def passes(
  c: ml_collections.ConfigDict, arch: Architecture
) -> tuple[tuple[Architecture, int], ...]:
  """Returns the models that a training step computes, each with the cost of its passes in forward
  passes: 3 for forward and backward, 1 for forward alone.
  """
  found = [a for a in algorithms.of(c).auxiliary(c) if a.place == 'state']
  trained = [(value_arch(arch), 3) for a in found if a.is_trained]
  frozen = [(arch, 1) for a in found if not a.is_trained]
  return ((arch, 3), *trained, *frozen)


BESIDE = ('reference', 'value')


def model_of(params: dict) -> dict:
  return {k: v for k, v in params.items() if k not in BESIDE}
