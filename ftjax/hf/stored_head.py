"""Whether the head of a T5 is its embedding, by its files: transformers 5 writes
tie_word_embeddings=true into every config.json of T5 and mT5, and ties those without a head.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ftjax.families import t5, table
from ftjax.hf.tensor_source import TensorSource, row_blocks
from ftjax.runtime.errors import DataError


def settle(
  config: Mapping[str, Any], names: Callable[[], list[str]], source: Callable[[], TensorSource]
) -> dict[str, Any]:
  """Returns a config.json with tie_word_embeddings as the files are; others than T5's as they are.

  Args:
    config: the config.json.
    names: returns the names of the tensors in the files.
    source: returns the tensors themselves, which are read where the files have both tables.
  """
  kinds = (*t5.T5.model_types, *t5.MT5.model_types)
  if config.get('model_type') not in kinds or not table.is_known(config):
    return dict(config)
  embed, head = t5.T5.tied
  try:
    has_head = head in (stored := names())
  except DataError:  # a folder without weights, which a plan may be made of
    return dict(config)
  if has_head and config.get(t5.TIED_KEY, True):
    return t5.with_head(config, embed not in stored or _same(source(), embed, head))
  return t5.with_head(config, not has_head)


def _same(source: TensorSource, first: str, second: str) -> bool:
  """Returns whether two tensors have the same bytes."""
  if source.tensors[first] != source.tensors[second]:
    return False
  blocks = row_blocks(source.tensors[first])
  return all(
    source.read(first, (b,)).tobytes() == source.read(second, (b,)).tobytes() for b in blocks
  )
