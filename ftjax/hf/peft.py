"""Reads PEFT folders: which adapter they hold, of which base, and its weights.

A folder is hostile until checked. What PEFT 0.21 would compute with it is what is computed here, or
it is refused: a setting that is not known, a tensor that nothing reads, a tensor that is missing.
Pickled weights are never read. Next: `peft_config.py` for the settings, `peft_export.py` for the
way out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftjax.hf import layout, load, model_folder, peft_base, peft_config, peft_names
from ftjax.hf.peft_config import BASE_FILE, CONFIG_FILE, FEATURES, PREFIX, WEIGHTS_FILE, PeftConfig
from ftjax.hf.peft_names import Adapted
from ftjax.hf.tensor_source import RenamedSource, TensorSource
from ftjax.hf.weight_files import file_inside, parse_json
from ftjax.models import kinds
from ftjax.models.architecture import AdaptedMap, Adapter, Architecture
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

if TYPE_CHECKING:
  pass

_PICKLED = (
  ', which can run code when loaded and are never read here. Save it again where peft is '
  'installed: PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW)'
)


@dataclasses.dataclass(frozen=True)
class PeftFolder:
  """A PEFT folder whose settings are checked and whose weights are not read.

  place: the folder. base: what it is an adapter of. config: its settings. source: its tensors.
  """

  place: Path
  base: peft_base.Base
  config: PeftConfig
  source: TensorSource

  def architecture(self, plain: Architecture) -> Architecture:
    """Returns the model of base and adapter.

    Args:
      plain: of the base; with the labels of the adapter, where that gives some.

    Raises:
      DataError: the adapter does not fit this base, or is none that is computed here.
    """
    saved = self._saved(plain)
    maps = self._maps(plain, saved)
    found = dataclasses.replace(
      plain,
      adapter=Adapter(maps, self._trained(plain, saved), dora=self.config.dora),
      base=self.base.storage,
      block=self.base.block,
    )
    # PEFT corrects it for the modules that it is false of, so false is right for all.
    if self.config.transposed and not any(m.is_transposed for m in peft_names.adapted(found)):
      raise DataError(
        f'{self.config.place}: fan_in_fan_out=True is not supported for a base whose matrices are '
        'stored as [outputs, inputs]; expected false'
      )
    self._check_tensors(found, saved)
    return found

  def count_labels(self, labeled: Architecture) -> int:
    """Returns how many labels the adapter's head gives.

    labeled: the base with a head of any number of labels.

    Raises:
      DataError: the folder has no such head.
    """
    head = next(b.hf for b in layout.bindings(labeled) if b.leaf == 'score/w')
    info = self.source.tensors.get(PREFIX + head)
    if info is None or len(info.shape) != 2 or not info.shape[0]:
      shape = 'missing' if info is None else list(info.shape)
      raise DataError(
        f'{self.source.place}: {PREFIX}{head} is {shape}; the head of a model with labels, '
        '[labels, D], is expected'
      )
    return info.shape[0]

  def _saved(self, plain: Architecture) -> list[str]:
    """Returns the HF tensors of modules that are saved whole; of a tied model not the head's."""
    tensors = [b.hf for b in layout.bindings(plain)]
    saved = [n for n in dict.fromkeys(tensors) if self.config.is_saved(n)]
    if plain.num_labels:  # PEFT saves these unasked
      unasked = [n for n in tensors if n.split('.')[0] in ('score', 'classifier')]
      saved += [n for n in dict.fromkeys(unasked) if n not in saved]
    return saved

  def _maps(self, plain: Architecture, saved: list[str]) -> tuple[AdaptedMap, ...]:
    places = peft_names.places(plain)
    modules = dict.fromkeys(peft_names.module(b.hf) for b in layout.bindings(plain))
    tied = peft_names.tied_head(plain)
    heads = {'lm_head', 'score'} | ({peft_names.module(tied[1])} if tied else set())
    if tied:
      modules[peft_names.module(tied[1])] = None
    if self.config.targets == peft_config.ALL_LINEAR:
      modules = {m: None for m in modules if m in places}
    wanted = [m for m in modules if self.config.is_target(m, m in heads)]
    wanted = [m for m in wanted if not any(peft_names.module(t) == m for t in saved)]
    if other := [m for m in wanted if m not in places]:
      raise DataError(
        f'{self.config.place}: target_modules has {other[0]}, whose adapter is not supported here: '
        'it is no linear map of its own. Merge the adapter with PEFT (merge_and_unload)'
      )
    if other := [m for m in self.base.parts if m not in wanted]:
      raise DataError(f'{self.place / BASE_FILE}: parts has {other[0]}, which has no adapter')
    ranks: dict[str, dict[int, tuple[int, float]]] = {}
    for m in wanted:
      for p, found in zip(places[m], self._factors(m, len(places[m])), strict=True):
        if found[0]:
          ranks.setdefault(p.name, {})[p.layer] = found
    layers: dict[str, int] = {}
    for p in (p for parts in places.values() for p in parts):
      layers[p.name] = max(layers.get(p.name, 0), p.layer + 1)
    out = []
    for name in kinds.linear_maps(plain):
      if name in ranks:
        rows = [ranks[name].get(layer, (0, 0.0)) for layer in range(layers[name])]
        out.append(AdaptedMap(name, *(tuple(column) for column in zip(*rows, strict=True))))
    return tuple(out)

  def _factors(self, module: str, count: int) -> Sequence[tuple[int, float]]:
    """Returns (rank, scale) of the adapter of each of a module's parts. All parts share A where the
    folder does not say that they have their own.
    """
    rank, scale = self.config.factors(module)
    parts = self.base.parts.get(module, ((rank, scale),) * count)
    if module in self.base.parts:
      scales = [s / scale for r, s in parts if r]
      is_fit = len(parts) == count and sum(r for r, _ in parts) == rank and scales
      if not is_fit or abs(scales[0] - 1) > 1e-9 or not 1e-6 < min(scales) <= max(scales) < 1e6:
        raise DataError(
          f'{self.place / BASE_FILE}: parts has {parts} for {module}; expected rank and scale of '
          f'{count} parts, ranks with the sum {rank} and a first scale of {scale}, as '
          f'{self.config.place} has them'
        )
    return parts

  def is_shared(self, found: Adapted) -> bool:
    """Returns whether the parts of a module have one factor A in the file."""
    return len(found.parts) > 1 and found.module not in self.base.parts

  def _trained(self, plain: Architecture, saved: list[str]) -> tuple[str, ...]:
    """Returns the leaves that are trained whole."""
    bindings = layout.bindings(plain)
    leaves = dict.fromkeys(b.leaf for b in bindings if b.hf in saved)
    if lacking := [b for b in bindings if b.leaf in leaves and b.hf not in saved]:
      raise DataError(
        f'{self.config.place}: modules_to_save has {leaves and next(iter(leaves))} of some layers '
        f'and not {lacking[0].hf}; the layers of a stack are trained together here'
      )
    return tuple(n for n in leaves if not n.startswith('score/'))

  def _expected(self, arch: Architecture, saved: list[str]) -> Iterator[tuple[str, tuple]]:
    """Yields (name, shape) of every tensor that PEFT reads."""
    for found in peft_names.adapted(arch):
      rank = found.parts[0].rank if self.is_shared(found) else found.rank
      (inputs, outputs), (a, b, magnitude) = found.shapes, found.tensors
      yield a, (rank, inputs)
      yield b, (outputs, rank)
      if arch.adapter.dora:
        yield magnitude, (outputs,)
    shapes = {b.hf: b.hf_shape for b in layout.bindings(arch)}
    for name in saved:
      yield PREFIX + name, shapes[name]
    tied = peft_names.tied_head(arch)
    if tied and tied[0] in saved:
      yield PREFIX + tied[1], shapes[tied[0]]

  def _check_tensors(self, arch: Architecture, saved: list[str]) -> None:
    """Compares the tensors with what the settings say."""
    have = self.source.tensors
    copies = {n: shape for n, shape in peft_names.base_copies(arch).items() if n in have}
    need = dict(self._expected(arch, saved)) | copies
    problems = [f'missing {n}' for n in need if n not in have]
    problems += [f'nothing reads {n} {list(have[n].shape)}' for n in have if n not in need]
    problems += [
      f'{n} is {list(have[n].shape)}, expected {list(shape)}'
      for n, shape in need.items()
      if n in have and have[n].shape != shape
    ]
    problems += [
      f'{n} is {have[n].dtype}; expected float32, bfloat16 or float16'
      for n in need
      if n in have and have[n].dtype.name not in ('float32', 'bfloat16', 'float16')
    ]
    if problems:
      more = f'; and {len(problems) - 6} more' if len(problems) > 6 else ''
      raise DataError(
        f'{self.source.place} does not fit {self.config.place} and the base {self.base.path}: '
        f'{"; ".join(problems[:6])}{more}'
      )
    tied = peft_names.tied_head(arch)
    if tied and tied[0] in saved and self._differ(*(PREFIX + n for n in tied)):
      raise DataError(
        f'{self.source.place}: the embedding and the head are trained apart, and are one tensor in '
        f'the base {self.base.path}. Save the adapter with ensure_weight_tying, or merge it with '
        'PEFT into a model with tie_word_embeddings: false'
      )

  def _differ(self, one: str, other: str) -> bool:
    return self.source.read(one).tobytes() != self.source.read(other).tobytes()


def find(path: str | os.PathLike) -> PeftFolder | None:
  """Returns the PEFT folder at a path or under a hub name; None where that is something else.

  Raises:
    ConfigError, DataError: see `read` and `hub.pin`.
  """
  folder = model_folder.find_adapter(path)
  return None if folder is None else read(folder)


def read(path: str | os.PathLike) -> PeftFolder:
  """Returns a PEFT folder after checking its settings and the header of its weights.

  Raises:
    DataError: it is none, or has a setting that is not computed here.
  """
  folder = files.as_path(path)
  place = file_inside(folder, CONFIG_FILE)
  config = peft_config.parse(parse_json(place.read_bytes(), str(place)), str(place))
  if not files.exists(folder / WEIGHTS_FILE):
    if files.exists(folder / 'adapter_model.bin'):
      raise DataError(f'{folder}: only pickled weights (adapter_model.bin){_PICKLED}')
    raise DataError(f'{folder}: {WEIGHTS_FILE} is missing (unfinished download?)')
  if not model_folder.is_adapter(folder):
    raise DataError(f'{folder}: holds a whole model beside the adapter; move one of them away')
  source, modules = peft_names.text_part(load.open_source(folder))
  config, base = dataclasses.replace(config, modules=modules), peft_base.read(folder, config)
  if config.is_bare and not base.prefix:
    raise DataError(
      f'{place}: task_type={FEATURES!r} of another program is not supported, since its names do '
      'not state the class of the base; merge it into its base with PEFT (merge_and_unload)'
    )
  if base.prefix:
    start = PREFIX + base.prefix
    names = {start + n.removeprefix(PREFIX): n for n in source.tensors}
    source = RenamedSource(source, names)
  return PeftFolder(folder, base, config, source)


def check_base(folder: PeftFolder, path: str, sha256: str) -> None:
  """Raises DataError where the weights of a base are not those that the adapter was trained on.

  Args:
    folder: the adapter's.
    path: of the base, for the message.
    sha256: of the base's weights, see `load.fingerprint`.
  """
  if folder.base.sha256 and folder.base.sha256 != sha256:
    raise DataError(
      f'{folder.place}: the adapter was trained on {folder.base.path or "a base"} with weights of '
      f'SHA-256 {folder.base.sha256[:16]}..., and those of {path} are {sha256[:16]}...; give the '
      'base that it was trained on'
    )


def check_same(folder: PeftFolder, arch: Architecture) -> None:
  """Raises ConfigError where `arch` has another adapter than the folder, or holds the base in
  another way than the folder records, and DataError where the folder does not fit its base.
  """
  plain = arch.plain()
  if not folder.config.task:
    plain = dataclasses.replace(plain, num_labels=0)
  elif plain.num_labels:
    plain = dataclasses.replace(plain, num_labels=folder.count_labels(plain))
  else:
    raise ConfigError(
      f'{folder.place} is an adapter of a model with labels, and the algorithm trains none'
    )
  found = folder.architecture(plain)

  def facts(own: Architecture, factor: int) -> dict[tuple[str, str], Any]:
    out = {}
    for m in own.adapter.maps:
      ranks = [factor * r for r in m.ranks]
      scales = [float(np.float32(s)) for s in m.scales]
      out['lora.rank, lora.rank_pattern and lora.targets', f'ranks of {m.name}'] = ranks
      out['lora.alpha, lora.alpha_pattern and lora.rslora', f'scales of {m.name}'] = scales
    out['lora.train', 'parameters trained whole'] = sorted(own.adapter.trained)
    out['lora.dora', 'DoRA'] = own.adapter.dora
    out['algorithm', 'labels'] = own.num_labels
    if folder.base.storage:
      out['lora.base', 'base held as'] = own.base
      out['lora.block', 'weights that share a scale'] = own.block if own.base == 'nf4' else None
    return out

  wanted, have = facts(arch, 2 if arch.adapter.pissa else 1), facts(found, 1)
  if other := [k for k in {**wanted, **have} if wanted.get(k) != have.get(k)]:
    keys, what = other[0]
    raise ConfigError(
      f'{folder.place} is another adapter than the config describes: {what} '
      f'{have.get(other[0], "(none)")} there, {wanted.get(other[0], "(none)")} by the config; set '
      f'{keys} as the adapter has them'
    )
