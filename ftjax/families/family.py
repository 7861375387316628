"""The record of a model family: how its config.json and its tensors map to an architecture."""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

from ftjax.families import hf_config, label_head, tensor_map
from ftjax.families.gguf import Gguf
from ftjax.families.hf_config import HfConfig
from ftjax.families.tensor_map import Binding, Row, Sizes
from ftjax.models.architecture import Architecture, ScoreHead


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models. One file defines one or more, as an object that table.py lists, or that a
  config names as model.family='package.module:FAMILY'.

  model_types: of the config.json files that it reads. hf_class: prefix of transformers' classes,
  'Llama' of LlamaForCausalLM. keys: of config.json that `read` reads or checks; others that may
  change the computation are refused. read: (config, family name) -> architecture. write: the
  inverse, a complete config.json. rows, sizes: see tensor_map. other_rows: the rows of another form
  of the files, which is read and not written; () for none. unused: HF tensors that may be in a
  file though nothing computes with them. tied: the HF tensors of embedding and head; the files of a
  tied model may repeat the first as the second. prefix: of the tensors of transformers' model
  without its head, which files of that model alone leave out. gguf: the family in GGUF files; None
  where it is neither read from them nor written to them. gguf_family: name of another family in
  whose form its GGUF files are, and as which they are read, '' for none. score_class: prefix of the
  class of reward models, '' for hf_class. score_head: (config, task) -> the label head, see
  architecture.ScoreHead. heads: tensors of heads, any of which the files of an encoder may lack or
  have beside those that a task needs; None where they are as strict as all others. old_names:
  (pattern, replacement) of what names of tensors end with in older files. tasks: that
  transformers has a class with labels for; see architecture.TASKS. span_prefix: what begins the
  names of tensors in place of 'model.' in its class for spans; '' for the same.
  """

  model_types: tuple[str, ...]
  hf_class: str
  keys: frozenset[str]
  read: Callable[[HfConfig, str], Architecture]
  write: Callable[[Architecture], dict[str, Any]]
  rows: tuple[Row, ...]
  unused: re.Pattern
  tied: tuple[str, str]
  other_rows: tuple[Row, ...] = ()
  sizes: Sizes = tensor_map.decoder_sizes
  gguf: Gguf | None = None
  gguf_family: str = ''
  score_class: str = ''
  prefix: str = ''
  score_head: Callable[[HfConfig, str], ScoreHead] = label_head.decoder_head
  heads: re.Pattern | None = None
  old_names: tuple[tuple[re.Pattern, str], ...] = ()
  tasks: tuple[str, ...] = ('sequence', 'token', 'span')
  span_prefix: str = ''

  @property
  def is_encoder(self) -> bool:
    """Whether models of this family generate no text."""
    return self.heads is not None

  def architecture(self, config: dict[str, Any], name: str) -> Architecture:
    """Returns the architecture of a config.json of this family, named `name`.

    Raises:
      DataError: a value of another type, a setting that the family does not compute, or a key that
        may change the computation and that it does not read.
    """
    hf_config.check_unquantized(config)
    hf_config.check_names(config, self.keys)
    c = HfConfig(config)
    found, task = self.read(c, name), label_head.task(c)
    return dataclasses.replace(found, **label_head.read(c, self.score_head(c, task)))

  def bindings(self, arch: Architecture) -> list[Binding]:
    """Returns every HF tensor of a model with the place that it fills."""
    found = tensor_map.bindings(self.rows, arch, self.sizes)
    if arch.task != 'span' or not self.span_prefix:
      return found
    return [_renamed(b, self.span_prefix) for b in found]

  def other_bindings(self, arch: Architecture) -> list[Binding]:
    """Returns the bindings of `other_rows`."""
    return tensor_map.bindings(self.other_rows, arch, self.sizes)

  def names(self, arch: Architecture, stored: Collection[str]) -> dict[str, str]:
    """Returns {name in the tensor map: stored name} of the tensors of a file, in its order."""
    known = {b.hf for b in self.bindings(arch)}
    out = {}
    for name in stored:
      own = name
      for pattern, new in self.old_names:
        own = pattern.sub(new, own)
      full = self.prefix + own
      is_known = full in known or self.unused.fullmatch(full)
      is_known = is_known or (self.heads is not None and self.heads.fullmatch(full))
      out[full if full not in stored and is_known else own] = name
    return out


def _renamed(binding: Binding, prefix: str) -> Binding:
  """Returns a binding of a tensor whose name begins otherwise."""
  if not binding.hf.startswith('model.'):
    return binding
  return dataclasses.replace(binding, hf=prefix + binding.hf.removeprefix('model.'))
