"""Writes an adapter as a PEFT folder: adapter_config.json, adapter_model.safetensors, the files of
the tokenizer, and ftjax_base.json with the hash of the base and how it was held.

What PEFT 0.21 computes with the folder is what was trained. The scale of each map is written as
alpha / rank, whatever made it: loaders that ignore `use_rslora` are right too. An adapter that
began as principal components is written as their difference, of twice the rank, so that it fits the
untouched base. The adapters of the parts of a fused matrix are written as one of that matrix;
ftjax_base.json has the parts' ranks and scales. Next: `peft.py`, which reads such folders.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.cluster import processes
from ftjax.families import multimodal, table, tensor_map
from ftjax.families.tensor_map import Binding
from ftjax.hf import model_card, peft_names, safetensors
from ftjax.hf.export import edited_card, generation_file, on_host, whole_folder
from ftjax.hf.gguf_tokenizer import dump_json
from ftjax.hf.peft_config import BASE_FILE, CONFIG_FILE, FEATURES, PREFIX, TASKS, WEIGHTS_FILE
from ftjax.hf.peft_names import Adapted, Part, Place
from ftjax.hf.tensor_source import TensorInfo
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.runtime import trees
from ftjax.storage import files as files_lib
from ftjax.storage import hub

log = logging.getLogger(__name__)

_FLOAT = np.dtype(np.float32)


def check(arch: Architecture) -> None:
  """Raises ConfigError where an adapter has no form as a PEFT folder; warns where PEFT will not
  read the one that it has.
  """
  peft_names.adapted(arch)
  peft_names.trained(arch)
  if why := peft_names.obstacle(arch):
    log.warning(
      'PEFT 0.21 with transformers 5 will not load this adapter: %s. With lora.merge=True the run '
      'writes the merged model too, and python -m ftjax.convert merges the adapter later; or leave '
      'these out of lora.targets and lora.train',
      why,
    )


def export(
  params: Mapping,
  arch: Architecture,
  target: str | os.PathLike,
  *,
  base: str,
  sha256: str,
  modules: str = multimodal.MODULES,
  source_config: Mapping[str, Any],
  tokenizer_files: Mapping[str, bytes],
  stop_ids: tuple[int, ...],
  card: bytes | None = None,
) -> None:
  """Writes the adapter in `params` as a PEFT folder, completely or not at all.

  Every process of a run calls this, since gathering a tensor needs all of them; process 0 writes.

  Args:
    params: nested dict of (possibly sharded) arrays, of which adapter leaves are read.
    arch: the model, with its adapter.
    target: folder to write, replaced if it is a model or adapter folder.
    base: the base's path as the user gave it, a hub name with its commit; '': a random model.
    sha256: of the base's weights, see `load.fingerprint`.
    modules: what begins the names of the base's layers, see `load.module_prefix`; '' for a base
      without a head, as transformers' AutoModel opens it.
    source_config: the base's config.json.
    tokenizer_files: as `load.tokenizer_files` gave them; written byte for byte, but for the stop
      tokens.
    stop_ids: token ids that end a completion.
    card: README.md; None for none.

  Raises:
    ConfigError: the adapter has no form as a PEFT folder.
    NonFiniteError: a tensor holds NaN or infinity. Nothing is left behind, an older target stays.
  """
  leaves = trees.flatten(params)
  tensors = _Tensors(arch, leaves)
  prefix = '' if modules else table.of(arch).prefix or multimodal.MODULES
  if prefix:
    tensors.rename(lambda name: name.removeprefix(prefix))
  else:
    tensors.rename(lambda name: multimodal.own_name(name, modules))
  config = _config(arch, base, tensors) | ({'task_type': FEATURES} if prefix else {})
  if not processes.is_main():
    for read in tensors.readers.values():
      read()
    return
  files = {n: content for n, content in tokenizer_files.items() if n != 'config.json'}
  generation = generation_file(files.get('generation_config.json'), source_config, stop_ids)
  if generation is not None:
    files['generation_config.json'] = generation
  files[CONFIG_FILE] = dump_json(config)
  if card is not None:
    files[model_card.FILE] = card
  held = {'sha256': sha256, 'storage': arch.base, 'block': arch.block}
  held |= {'parts': tensors.parts} if tensors.parts else {}
  held |= {'prefix': prefix} if prefix else {}
  if arch.labels:  # which PEFT takes from the code that loads the folder
    held |= {'labels': arch.labels, 'problem': source_config.get('problem_type') or ''}
  files[BASE_FILE] = dump_json(held)
  with whole_folder(target) as folder:
    for name, content in (files | edited_card(files_lib.as_path(target))).items():
      place = folder / name
      place.parent.mkdir(exist_ok=True)
      place.write_bytes(content)
    infos = {name: TensorInfo(shape, _FLOAT) for name, shape in tensors.shapes.items()}
    safetensors.write_file(folder / WEIGHTS_FILE, infos, lambda name: tensors.readers[name]())


class _Tensors:
  """The tensors of the folder, all float32: their shapes, and what reads each. The processes of a
  run call the readers in one order.
  """

  def __init__(self, arch: Architecture, leaves: Mapping):
    self.arch, self.leaves, self.declared = arch, leaves, kinds.declared(arch)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.readers: dict[str, Callable[[], np.ndarray]] = {}
    self.adapted: dict[str, tuple[int, float]] = {}  # {module: (rank, scale)}
    self.saved: list[str] = []  # modules
    self.parts: dict[str, list[list[int | float]]] = {}  # [rank, scale] of a fused module's parts
    self.is_transposed = False
    for found in peft_names.adapted(arch):
      self._add_module(found)
    for hf, parts in peft_names.trained(arch).items():
      self._add(PREFIX + hf, parts[0].hf_shape, lambda parts=parts: self._whole(parts))
      if peft_names.module(hf) not in self.saved:
        self.saved.append(peft_names.module(hf))
    self.saved = peft_names.outermost(self.saved)
    tied = peft_names.tied_head(arch)
    self.ties = tied is not None and PREFIX + tied[0] in self.readers
    if self.ties:  # PEFT reads it twice
      embed, head = (PREFIX + name for name in tied)
      self._add(head, self.shapes[embed], self.readers[embed])

  def rename(self, change: Callable[[str], str]) -> None:
    """Gives all modules and their tensors the names in the class of the base."""
    renamed = {name: PREFIX + change(name.removeprefix(PREFIX)) for name in self.shapes}
    self.shapes = {renamed[n]: x for n, x in self.shapes.items()}
    self.readers = {renamed[n]: x for n, x in self.readers.items()}
    self.adapted = {change(m): x for m, x in self.adapted.items()}
    self.saved = [change(m) for m in self.saved]

  def _add(self, name: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
    self.shapes[name] = shape
    self.readers[name] = lambda: np.ascontiguousarray(read(), _FLOAT)

  def _whole(self, parts: Sequence[Binding]) -> np.ndarray:
    """Returns the HF tensor that parts make."""
    return tensor_map.whole_tensor((b, on_host(self.leaves[b.leaf], b.at)) for b in parts)

  def _add_module(self, found: Adapted) -> None:
    times = 2 if self.arch.adapter.pissa else 1
    rank, (inputs, outputs) = times * found.rank, found.shapes
    self.adapted[found.module] = rank, found.scale
    self.is_transposed |= found.is_transposed
    if len(found.parts) > 1:
      self.parts[found.module] = [[times * p.rank, p.scale] for p in found.parts]
    a, b, magnitude = found.tensors
    self._add(a, (rank, inputs), lambda: self._first(found))
    self._add(b, (outputs, rank), lambda: self._second(found))
    if self.arch.adapter.dora:
      self._add(magnitude, (outputs,), lambda: self._magnitude(found))

  def _first(self, found: Adapted) -> np.ndarray:
    """Returns A [R, inputs] of a module."""
    rows = [self._factor(p, 'lora_a', 1) for p in found.parts if p.rank]
    return np.concatenate(rows)

  def _second(self, found: Adapted) -> np.ndarray:
    """Returns B [outputs, R] of a module."""
    times = 2 if self.arch.adapter.pissa else 1
    blocks = []
    for part in found.parts:
      sizes = part.place.binding.sizes
      outputs = math.prod(sizes[a] for a in part.place.sides[1].hf)
      block = np.zeros((outputs, times * found.rank), np.float32)
      if part.rank:
        begin = times * found.begin(part)
        own = self._factor(part, 'lora_b', -1).T * found.ratio(part)
        block[:, begin : begin + times * part.rank] = own
      blocks.append(block)
    return found.joined(blocks)

  def _factor(self, part: Part, leaf: str, sign: int) -> np.ndarray:
    """Returns a factor of a part, [R, ...] in HF's order; of one that began as principal components
    those of the difference, [A; A0] and [B, -B0].
    """
    own = [self._rows(part, leaf)]
    if self.arch.adapter.pissa:
      own.append(sign * self._rows(part, f'{leaf}0'))
    return peft_names.to_hf(np.concatenate(own), part.place.sides[leaf == 'lora_b'])

  def _magnitude(self, found: Adapted) -> np.ndarray:
    def of_part(place: Place) -> np.ndarray:
      return peft_names.to_hf(self._own(place, 'lora_m')[None], place.sides[1])[0]

    return found.joined([of_part(p.place) for p in found.parts])

  def _own(self, place: Place, leaf: str) -> np.ndarray:
    name = f'{place.name}/{leaf}'
    whole = on_host(self.leaves[name], place.binding.at)
    sizes = self.declared[name].file_shape[len(place.binding.at) :]
    return whole[tuple(slice(n) for n in sizes)]

  def _rows(self, part: Part, leaf: str) -> np.ndarray:
    """Returns the rows of the layer's own rank of a factor."""
    whole, place = self._own(part.place, leaf), part.place
    if whole[part.rank :].any():
      raise ValueError(
        f'{place.name}/{leaf}: rows beyond the rank {part.rank} of layer {place.layer}'
      )
    return whole[: part.rank]


def _task_type(arch: Architecture) -> str | None:
  """Returns PEFT's name of a model's task; it has none for masked language models."""
  if arch.is_encoder_decoder:
    return 'SEQ_2_SEQ_LM'
  return TASKS.get(arch.task, None if arch.is_encoder else 'CAUSAL_LM')


def _config(arch: Architecture, base: str, tensors: _Tensors) -> dict[str, Any]:
  """Returns the adapter_config.json: what PEFT needs, and no keys that older versions do not know.

  rank_pattern and alpha_pattern name the modules that differ from the usual pair.
  """
  adapted = tensors.adapted
  usual = Counter(adapted.values()).most_common(1)
  rank, scale = usual[0][0] if usual else (1, 1.0)
  alphas = {m: peft_names.alpha(s, r) for m, (r, s) in adapted.items()}
  alpha = peft_names.alpha(scale, rank)
  if len({s for _, s in adapted.values()}) > 1:
    log.warning(
      'the adapted maps have different scales (alpha / rank); PEFT applies each to its own, vLLM '
      'one of them to all: serve the merged model there'
    )
  name, revision = hub.split(base) if base and hub.is_name(base) else (base, '')
  return {
    'peft_type': 'LORA',
    'task_type': _task_type(arch),
    'base_model_name_or_path': name or None,
    'revision': revision or None,
    'inference_mode': True,
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': arch.adapter.dropout,
    'target_modules': list(adapted),
    'rank_pattern': {m: r for m, (r, _) in adapted.items() if r != rank},
    'alpha_pattern': {m: a for m, a in alphas.items() if a != alpha},
    'use_rslora': False,
    'use_dora': arch.adapter.dora,
    'modules_to_save': tensors.saved or None,
    'bias': 'none',
    'fan_in_fan_out': tensors.is_transposed,
    'init_lora_weights': True,
  } | ({'ensure_weight_tying': True} if tensors.ties else {})
