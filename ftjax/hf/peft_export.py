"""Writes an adapter as a PEFT folder: adapter_config.json, adapter_model.safetensors, the files of
the tokenizer, and ftjax_base.json with the hash of the base and how it was held.

What PEFT 0.21 computes with the folder is what was trained. The scale of each map is written as
alpha / rank, whatever made it: loaders that ignore `use_rslora` are right too. An adapter that
began as principal components is written as their difference, of twice the rank, so that it fits the
untouched base. Next: `peft.py`, which reads such folders.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ftjax.cluster import processes
from ftjax.families import multimodal
from ftjax.hf import model_card, peft_names, safetensors
from ftjax.hf.export import edited_card, generation_file, on_host, whole_folder
from ftjax.hf.gguf_tokenizer import dump_json
from ftjax.hf.peft_config import BASE_FILE, CONFIG_FILE, PREFIX, WEIGHTS_FILE
from ftjax.hf.peft_names import Place
from ftjax.hf.tensor_source import TensorInfo
from ftjax.models.architecture import AdaptedMap, Architecture
from ftjax.runtime import trees
from ftjax.storage import files as files_lib
from ftjax.storage import hub

log = logging.getLogger(__name__)

_FLOAT = np.dtype(np.float32)


def check(arch: Architecture) -> None:
  """Raises ConfigError where an adapter has no form as a PEFT folder."""
  peft_names.adapted(arch)
  peft_names.trained(arch)


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
    modules: what begins the names of the base's layers, see `load.module_prefix`.
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
  tensors = _Tensors(arch, leaves, modules)
  config = _config(arch, base, tensors)
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

  def __init__(self, arch: Architecture, leaves: Mapping, modules: str):
    self.arch, self.leaves, self.modules = arch, leaves, modules
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.readers: dict[str, Callable[[], np.ndarray]] = {}
    self.adapted: dict[str, tuple[int, float]] = {}  # {module: (rank, scale)}
    self.saved: list[str] = []  # modules
    for place, found in peft_names.adapted(arch):
      self._add_map(place, found)
    for hf, b in peft_names.trained(arch).items():
      self._add(PREFIX + hf, b.hf_shape, lambda b=b: b.to_hf(on_host(self.leaves[b.leaf], b.at)))
      module = self._own(peft_names.module(hf))
      if module not in self.saved:
        self.saved.append(module)
    tied = peft_names.tied_head(arch)
    embed = PREFIX + self._own(tied[0]) if tied else ''
    self.ties = embed in self.readers
    if self.ties:  # PEFT reads it twice
      self._add(PREFIX + tied[1], self.shapes[embed], self.readers[embed])

  def _own(self, name: str) -> str:
    return multimodal.own_name(name, self.modules)

  def _add(self, name: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
    name = PREFIX + self._own(name.removeprefix(PREFIX))
    self.shapes[name] = shape
    self.readers[name] = lambda: np.ascontiguousarray(read(), _FLOAT)

  def _add_map(self, place: Place, found: AdaptedMap) -> None:
    rank, (inputs, outputs) = found.ranks[place.layer], place.sides
    pissa, (a, b, magnitude) = self.arch.adapter.pissa, place.tensors
    rank_of_file = rank * (2 if pissa else 1)
    self.adapted[self._own(place.module)] = rank_of_file, found.scales[place.layer]

    def factor(leaf, side, sign):
      parts = [self._rows(place, leaf, rank)]
      if pissa:
        parts.append(sign * self._rows(place, f'{leaf}0', rank))
      return peft_names.to_hf(np.concatenate(parts), side)

    self._add(a, (rank_of_file, place.shapes[0]), lambda: factor('lora_a', inputs, 1))
    self._add(b, (place.shapes[1], rank_of_file), lambda: factor('lora_b', outputs, -1).T)
    if self.arch.adapter.dora:
      lengths = lambda: peft_names.to_hf(self._leaf(place, 'lora_m')[None], outputs)[0]  # noqa: E731
      self._add(magnitude, (place.shapes[1],), lengths)

  def _leaf(self, place: Place, leaf: str) -> np.ndarray:
    return on_host(self.leaves[f'{place.name}/{leaf}'], place.binding.at)

  def _rows(self, place: Place, leaf: str, rank: int) -> np.ndarray:
    """Returns the rows of the layer's own rank of a factor."""
    whole = self._leaf(place, leaf)
    if whole[rank:].any():
      raise ValueError(f'{place.name}/{leaf}: rows beyond the rank {rank} of layer {place.layer}')
    return whole[:rank]


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
    'task_type': 'SEQ_CLS' if arch.num_labels else 'CAUSAL_LM',
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
    'fan_in_fan_out': False,
    'init_lora_weights': True,
  } | ({'ensure_weight_tying': True} if tensors.ties else {})
