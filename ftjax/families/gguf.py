"""What a family is in llama.cpp's GGUF files: its name there, its metadata, and its tensors.

One table for both directions: hf/gguf.py reads with it, hf/gguf_export.py writes.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.families.tensor_map import Row

# {metadata key behind the architecture's name: key of config.json}.
KEYS = {
  'context_length': 'max_position_embeddings',
  'embedding_length': 'hidden_size',
  'block_count': 'num_hidden_layers',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'rope.freq_base': 'rope_theta',
}
ROPE_TENSOR = 'rope_freqs.weight'  # divisors of the rotary frequencies


@dataclasses.dataclass(frozen=True)
class Gguf:
  """A family as llama.cpp knows it.

  arch: value of general.architecture. fixed: (key, value) of config.json that the files do not say,
  because llama.cpp computes nothing else. interleaved: endings of the HF names whose rows are
  stored, head by head, in the order of an interleaved rotary embedding. scales_rope: whether
  llama.cpp applies ROPE_TENSOR. normalizes: whether the family's own tokenizers normalize text
  (NFC) where llama.cpp does not.
  """

  arch: str
  fixed: tuple[tuple[str, Any], ...]
  interleaved: tuple[str, ...] = ()
  scales_rope: bool = False
  normalizes: bool = False


def hf_name(rows: Sequence[Row], name: str) -> str | None:
  """Returns the HF name of a tensor of a GGUF file; None where there is none."""
  return _renamed(name, {row.gguf: row.hf for row in rows if row.gguf})


def gguf_name(rows: Sequence[Row], name: str) -> str | None:
  """Returns the name in a GGUF file of a HF tensor; None where there is none."""
  return _renamed(name, {row.hf: row.gguf for row in rows if row.gguf})


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
  layer = re.search(r'(?<=\.)\d+(?=\.)', name)
  if layer is None:
    return names.get(name)
  found = names.get(f'{name[: layer.start()]}{{l}}{name[layer.end() :]}')
  return None if found is None else found.replace('{l}', layer[0])
