"""What a family is in llama.cpp's GGUF files: its name there, its metadata, and its tensors.

For both directions: hf/gguf.py reads with it, hf/gguf_export.py writes. What llama.cpp computes
without asking the file (a pattern of windows, a scale) is in the `read` of a family, so reading
what was written shows whether llama.cpp would compute the same model. Rotary embeddings are in
gguf_rope.py.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax.families import hf_rope
from ftjax.families.gguf_file import GgufFile
from ftjax.families.gguf_rope import read_rope, write_rope
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import (
  Architecture,
  AttentionSpec,
  BlockSpec,
  GatedMlpSpec,
  MlpSpec,
  MoeSpec,
)
from ftjax.models.rope_spec import Rope
from ftjax.runtime.errors import DataError


def read_sizes(file: GgufFile) -> dict[str, Any]:
  """Returns the keys of a config.json that Llama-like decoders share, but those of the rope.

  Raises:
    DataError: a key is missing or makes no sense.
  """
  heads, head_dim = file.count('attention.head_count'), file.head_dim()
  if (values := file.count('attention.value_length', head_dim)) != head_dim:
    raise DataError(
      f'{file.place}: {file.key("attention.value_length")}={values} differs from the width of '
      f'queries and keys, {head_dim}, which is not supported'
    )
  return {
    'max_position_embeddings': file.count('context_length'),
    'hidden_size': file.count('embedding_length'),
    'num_hidden_layers': file.count('block_count'),
    'intermediate_size': file.count('feed_forward_length'),
    'num_attention_heads': heads,
    'num_key_value_heads': file.count('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'rms_norm_eps': file.number('attention.layer_norm_rms_epsilon'),
  }


def read_decoder(file: GgufFile) -> dict[str, Any]:
  """Returns the keys of a config.json of a decoder that differs from Llama in its `fixed` alone."""
  sizes = read_sizes(file)
  return sizes | hf_rope.write(read_rope(file), sizes['max_position_embeddings'])


def read_biased(file: GgufFile) -> dict[str, Any]:
  """Returns the keys of a decoder whose files may have biases."""
  return read_decoder(file) | {
    'attention_bias': 'blk.0.attn_q.bias' in file.shapes,
    'mlp_bias': 'blk.0.ffn_up.bias' in file.shapes,
  }


# Settings that llama.cpp reads for some architectures, with the values that change nothing.
_CHANGING: dict[str, tuple[Any, ...]] = {
  'attention.causal': (True,),
  'attention.clamp_kqv': (0,),
  'attention.max_alibi_bias': (0,),
  'attention.scale': (0,),
  'attn_logit_softcapping': (0,),
  'final_logit_softcapping': (0,),
  'embedding_scale': (0, 1),
  'residual_scale': (0, 1),
  'logit_scale': (0, 1),
  'use_parallel_residual': (False,),
}


def check_settings(file: GgufFile, arch: Architecture, known: 'Gguf') -> None:
  """Refuses a setting of another architecture in a file: it would be ignored.

  Args:
    file: the header.
    arch: what was read of it.
    known: its family in GGUF files.

  Raises:
    DataError: names the setting.
  """
  stated = [n for n, off in _CHANGING.items() if file.has(n) and file.get(n) not in off]
  own = known.write(arch) if stated else {}
  if other := [n for n in stated if n not in own]:
    raise DataError(
      f'{file.place}: metadata {file.key(other[0])}={file.get(other[0])!r} is not computed with '
      f'general.architecture={file.arch!r}; is it the architecture of the model?'
    )


def attention(arch: Architecture) -> BlockSpec:
  """Returns the first layer with attention, whose sizes are those in metadata.

  Raises:
    DataError: there is none.
  """
  found = next((b for b in arch.layers() if isinstance(b.mixer, AttentionSpec)), None)
  if found is None:
    raise DataError('a model without a layer of attention has no form in GGUF files')
  return found


def file_rope(arch: Architecture) -> Rope | None:
  """Returns the rotary embedding that files state: of a layer without a window, where there is one
  that rotates.
  """
  mixers = [b.mixer for b in arch.layers() if isinstance(b.mixer, AttentionSpec)]
  rotating = [m for m in mixers if m.rope is not None]
  whole = [m for m in rotating if m.window is None]
  return next((m.rope for m in (*whole, *rotating)), None)


def has_windows(file: GgufFile, period: int) -> list[bool]:
  """Returns for each layer whether it has the window of a file: all but each `period`-th one, or as
  the file says.

  Raises:
    DataError: no positive whole number.
  """
  period = file.count('attention.sliding_window_pattern', period)
  return [(i + 1) % period != 0 for i in range(file.count('block_count'))]


def write_windows(arch: Architecture, period: int) -> dict[str, Any]:
  """Returns the metadata of the windows of a decoder; period: as llama.cpp has it by itself."""
  found = [b.mixer.window for b in arch.layers()]
  window = next((w for w in found if w is not None), None)
  if window is None:
    return {}
  out = {'attention.sliding_window': window}
  first = found.index(None) + 1 if None in found else len(found) + 1
  usual = [(i + 1) % period != 0 for i in range(len(found))]
  if [w is not None for w in found] != usual:
    out['attention.sliding_window_pattern'] = first
  return out


def read_experts(file: GgufFile) -> dict[str, Any]:
  """Returns the numbers of experts, under the keys that transformers 5 writes."""
  return {
    'num_local_experts': file.count('expert_count'),
    'num_experts_per_tok': file.count('expert_used_count'),
  }


def write_experts(arch: Architecture) -> dict[str, Any]:
  """Returns the metadata of a decoder with experts."""
  spec = arch.mixtures()[0]
  return write_decoder(arch) | {
    'expert_count': spec.num_experts,
    'expert_used_count': spec.top_k,
    'expert_feed_forward_length': spec.ffn_dim,
  }


def write_decoder(arch: Architecture, *, scaled_queries: bool = False) -> dict[str, Any]:
  """Returns the metadata that Llama-like decoders share, without the architecture's name;
  scaled_queries: as in gguf_rope.
  """
  block = attention(arch)
  width = block.mlp.ffn_dim if isinstance(block.mlp, GatedMlpSpec | MlpSpec | MoeSpec) else 0
  out = {
    'vocab_size': arch.vocab_size,
    'context_length': arch.max_len,
    'embedding_length': arch.model_dim,
    'block_count': arch.num_layers,
    'feed_forward_length': width,
    'attention.head_count': block.mixer.num_heads,
    'attention.head_count_kv': block.mixer.num_kv_heads,
    'attention.key_length': block.mixer.head_dim,
    'attention.value_length': block.mixer.head_dim,
    'attention.layer_norm_rms_epsilon': block.norm.eps,
  }
  rope = file_rope(arch)
  if rope is None:
    return out
  return out | write_rope(rope, block.mixer.head_dim, scaled_queries=scaled_queries)


@dataclasses.dataclass(frozen=True)
class Form:
  """How a tensor is stored, where a change of names does not say it.

  axis, order: for each place along this axis of HF's, the place in the file; () where it is the
  same. squeezed: whether HF's second axis, of one, is left out. decay: whether the file has
  -exp(x).
  """

  axis: int = 0
  order: tuple[int, ...] = ()
  squeezed: bool = False
  decay: bool = False


def _no_forms(arch: Architecture) -> Mapping[str, Form]:
  del arch
  return {}


@dataclasses.dataclass(frozen=True)
class Gguf:
  """A family as llama.cpp knows it.

  arch: value of general.architecture. fixed: (key, value) of config.json that the files do not say,
  because llama.cpp computes nothing else. read: the other keys of config.json of a file, without
  vocab_size and tie_word_embeddings. write: the metadata, without the architecture's name. mark: a
  setting that its files have, and those of another family of the same name have not. interleaved:
  endings of the HF names whose rows are stored, head by head, in the order of an interleaved rotary
  embedding. transposed: endings of the HF names whose matrices are stored transposed. shifted: of
  those of norm weights which HF stores around 0, and files with the 1 that is added to them. forms:
  (architecture) -> {ending of HF names: how such a tensor is stored}. surplus: the setting that
  counts the last blocks of files which are no layers of the model; they are left out, '' for none.
  rope_tensors: those of gguf_rope.TENSORS that llama.cpp applies. square: whether it requires that
  the heads are together as wide as the model. tied: None where a file may have a head of its own
  and need not; else what llama.cpp requires. normalizes: whether the family's own tokenizers
  normalize text (NFC) where llama.cpp does not.
  """

  arch: str
  fixed: tuple[tuple[str, Any], ...] = ()
  read: Callable[[GgufFile], dict[str, Any]] = read_decoder
  write: Callable[[Architecture], dict[str, Any]] = write_decoder
  mark: str = ''
  interleaved: tuple[str, ...] = ()
  transposed: tuple[str, ...] = ()
  shifted: tuple[str, ...] = ()
  forms: Callable[[Architecture], Mapping[str, Form]] = _no_forms
  surplus: str = ''
  rope_tensors: tuple[str, ...] = ()
  square: bool = False
  tied: bool | None = None
  normalizes: bool = False


def surplus(file: GgufFile, known: Gguf) -> range:
  """Returns the numbers of a file's blocks that are no layers of the model.

  Raises:
    DataError: their count is no whole number.
  """
  extra = file.count(known.surplus, 0, least=0) if known.surplus else 0
  if not extra:
    return range(0)
  blocks = file.count('block_count')
  if extra >= blocks:
    raise DataError(
      f'{file.place}: metadata {file.key(known.surplus)} is {extra} of {blocks} blocks; expected '
      'fewer'
    )
  return range(blocks - extra, blocks)


def form(forms: Mapping[str, Form], name: str) -> Form | None:
  """Returns the form of a tensor by its HF name; None where it is stored as it is."""
  return next((f for ending, f in forms.items() if name.endswith(ending)), None)


# HF names of families whose rows of Q and K llama.cpp rotates in neighbouring pairs.
INTERLEAVED = (
  '.self_attn.q_proj.weight',
  '.self_attn.k_proj.weight',
  '.self_attn.q_proj.bias',
  '.self_attn.k_proj.bias',
)


def hf_name(rows: Sequence[Row], name: str) -> str | None:
  """Returns the HF name of a tensor of a GGUF file, with '{e}' for the number of an expert where
  it holds those of all; None where there is none.
  """
  return _renamed(name, {row.gguf: row.hf for row in rows if row.gguf})


def gguf_name(rows: Sequence[Row], name: str) -> str | None:
  """Returns the name in a GGUF file of a HF tensor; None where there is none."""
  return _renamed(name, {row.hf: row.gguf for row in rows if row.gguf})


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
  numbers = re.findall(r'(?<=\.)\d+(?=\.)', name)
  letters = iter(('{l}', '{e}'))
  pattern = re.sub(r'(?<=\.)\d+(?=\.)', lambda _: next(letters, ''), name)
  found = names.get(pattern)
  return found.replace('{l}', numbers[0]) if found and numbers else found
