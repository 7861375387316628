"""Prompts of different lengths as arrays: buckets of lengths, padding on the left."""

from collections.abc import Sequence

import numpy as np


def bucket(length: int) -> int:
  """Returns the smallest of 16, 24, 32, 48, 64, 80, 96, ... that holds `length`: few programs, at
  most a third of padding.
  """
  step = max(8, 1 << max(length.bit_length() - 3, 0))
  return max(16, -(-length // step) * step)


def left_pad(
  prompts: Sequence[Sequence[int]], rows: int, pad_id: int, length: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (tokens, segments, positions), int32[rows, length]: prompts at the right end, segment 0
  before them and in the rows beyond them.

  Args:
    prompts: token ids.
    rows: of the arrays, at least len(prompts).
    pad_id: token of the padding.
    length: of the arrays; 0: the bucket of the longest prompt.
  """
  length = length or bucket(max(len(p) for p in prompts))
  tokens = np.full((rows, length), pad_id, np.int32)
  segments, positions = np.zeros((2, rows, length), np.int32)
  for b, prompt in enumerate(prompts):
    begin = length - len(prompt)
    tokens[b, begin:], segments[b, begin:], positions[b, begin:] = prompt, 1, np.arange(len(prompt))
  return tokens, segments, positions
