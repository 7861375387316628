"""Layers of several kinds: `layer_types` of a config.json, and layers as stacks of patterns."""

from collections.abc import Sequence

from ftjax.families.hf_config import HfConfig, class_defaults
from ftjax.models.architecture import Architecture, BlockSpec
from ftjax.runtime.errors import DataError

FULL, SLIDING = 'full_attention', 'sliding_attention'
Stacks = tuple[tuple[tuple[BlockSpec, ...], int], ...]


def read(
  c: HfConfig, derived: Sequence[str], known: Sequence[str] = (FULL, SLIDING)
) -> tuple[str, ...]:
  """Returns the type of each layer: those of layer_types, else `derived`, which older files and
  the family's class make from other keys.

  Raises:
    DataError: no list of as many `known` types as there are layers.
  """
  types, layers = c.get('layer_types'), c.size('num_hidden_layers')
  if types is None:
    return tuple(derived)
  if not isinstance(types, list):
    raise DataError(f'config.json: layer_types={types!r}; expected a list of {", ".join(known)}')
  for kind in types:
    if kind not in known:
      raise DataError(
        f'config.json: layer_types has {kind!r}, which model_type={c.model_type!r} does not have '
        f'here; expected {" or ".join(map(repr, known))}'
      )
  if len(types) != layers:
    raise DataError(
      f'config.json: layer_types has {len(types)} entries and num_hidden_layers={layers}'
    )
  return tuple(types)


def read_window(c: HfConfig, types: Sequence[str]) -> int | None:
  """Returns sliding_window, of transformers' class where it is absent; None where no layer has a
  window.

  Raises:
    DataError: no positive whole number, also where no layer has a window.
  """
  if c.get('sliding_window') is None and SLIDING not in types:
    return None
  default = None
  if 'sliding_window' not in c.content:
    # Qwen's classes have the number where windows are switched on.
    known = class_defaults(str(c.model_type), use_sliding_window=True)
    default = known.get('sliding_window')
  window = c.count('sliding_window', default)
  return window if SLIDING in types else None


def of(arch: Architecture) -> list[str]:
  """Returns the layer types of a decoder whose layers attend to all tokens or to a window."""
  return [SLIDING if block.mixer.window is not None else FULL for block in arch.layers()]


def window(arch: Architecture) -> int | None:
  """Returns the window of the layers that have one; None where none has."""
  return next((b.mixer.window for b in arch.layers() if b.mixer.window is not None), None)


def stacks(layers: Sequence[BlockSpec]) -> Stacks:
  """Returns layers as stacks with as few blocks as possible, each of which is compiled once:
  (LLLLLG)x4 + (L)x2 for the 26 layers of Gemma 3 1B.
  """
  kinds = list(dict.fromkeys(layers))
  ids = [kinds.index(block) for block in layers]
  n = len(ids)
  # best[i]: (blocks, length of the pattern, repeats) of the layers from i on.
  best: list[tuple[int, int, int]] = [(0, 0, 0)] * (n + 1)
  for i in reversed(range(n)):
    found = []
    for size in range(1, n - i + 1):
      pattern, repeats = ids[i : i + size], 1
      while ids[i + repeats * size : i + (repeats + 1) * size] == pattern:
        repeats += 1
      found.append((size + best[i + repeats * size][0], size, repeats))
    best[i] = min(found)
  out, i = [], 0
  while i < n:
    _, size, repeats = best[i]
    out.append((tuple(layers[i : i + size]), repeats))
    i += size * repeats
  return tuple(out)
