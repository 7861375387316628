"""Compares a model with what its GGUF file says: what llama.cpp would compute.

What llama.cpp computes without asking the file is in the `read` of a family (families/gguf.py). So
a setting that files cannot state comes back as llama.cpp has it, and is refused here by its name.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ftjax.families import table
from ftjax.families.gguf_file import GgufFile
from ftjax.families.gguf_rope import FREQS
from ftjax.models.architecture import Architecture, AttentionSpec, BlockSpec
from ftjax.models.rope_spec import RopeScaling
from ftjax.runtime.errors import DataError

# Numbers are float32 in files.
_TOLERANCE = 1e-6
# Of training alone, or of memory.
_NOT_IN_FILES = ('family', 'stacks', 'balance', 'vocab_multiple')


def check(arch: Architecture, file: GgufFile) -> None:
  """Raises DataError where the model that a file states differs from `arch`; names the settings.

  The tensor of the `llama3` rule is no part of it: it is the rule's divisors themselves, of which
  the rule cannot always be found again.
  """
  file = dataclasses.replace(file, rope={k: v for k, v in file.rope.items() if k != FREQS})
  family = table.of_gguf(file.arch, file.values)
  if family is None:
    raise ValueError(f'no family of {file.arch!r}')
  found = table.gguf_architecture(family, file)
  wanted, got = dict(_settings(arch.plain())), dict(_settings(found))
  wrong = [
    f'{name}={wanted.get(name)!r} would be {got.get(name)!r}'
    for name in dict.fromkeys((*wanted, *got))
    if not _is_same(wanted.get(name), got.get(name))
  ]
  if wrong:
    more = f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise DataError(
      f'llama.cpp computes another model for the architecture {file.arch!r}: '
      f'{"; ".join(wrong[:3])}{more}. Export a Hugging Face folder'
    )


def _settings(arch: Architecture) -> Iterator[tuple[str, Any]]:
  """Yields (name, value) of all settings of a model and its layers."""
  yield from _flat('', arch)
  for i, block in enumerate(arch.layers()):
    yield from _flat(f'layer {i}', _in_metadata(block))


def _in_metadata(block: BlockSpec) -> BlockSpec:
  """Returns a block with a rotary embedding as metadata have it: a partial rotation is a whole
  number of coordinates, and nothing records `llama3`.
  """
  rope = block.mixer.rope if isinstance(block.mixer, AttentionSpec) else None
  if rope is None:
    return block
  share = rope.size(block.mixer.head_dim) / block.mixer.head_dim
  scaling = None if isinstance(rope.scaling, RopeScaling) else rope.scaling
  rope = dataclasses.replace(rope, fraction=share, scaling=scaling)
  return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, rope=rope))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
  """Yields the name of a value with it, of a record with its class, and those of its fields."""
  if not dataclasses.is_dataclass(value):
    yield name, value
    return
  yield name, type(value).__name__
  for field in dataclasses.fields(value):
    if field.name not in _NOT_IN_FILES:
      inner = f'{name}.{field.name}' if name else field.name
      yield from _flat(inner, getattr(value, field.name))


def _is_same(a: Any, b: Any) -> bool:
  if isinstance(a, tuple) and isinstance(b, tuple):
    return len(a) == len(b) and all(map(_is_same, a, b))
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=_TOLERANCE)
  return a == b
