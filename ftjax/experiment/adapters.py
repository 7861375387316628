"""The adapter of a run: which linear maps it has, of which rank, and what else it trains, from the
section `lora` of the config."""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections

from ftjax.models import kinds
from ftjax.models.architecture import AdaptedMap, Adapter, Architecture
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError

# What makes an adapter: not to be changed by a resume.
FIXED = tuple(
  f'lora.{n}'
  for n in (
    *('rank', 'alpha', 'targets', 'rank_pattern', 'alpha_pattern', 'rslora', 'dora', 'init'),
    *('train', 'base', 'block', 'on_init_from'),
  )
)
ALL_LINEAR = 'all-linear'
# Linear maps by their names in PEFT.
_IN_PEFT = {
  **{f'{n}_proj': f'attn/{n}' for n in 'qkvo'},
  **{f'{n}_proj': f'mlp/{n}' for n in ('gate', 'up', 'down')},
  'lm_head': 'head',
}


def adapted(
  arch: Architecture, c: ml_collections.ConfigDict, continued: bool = False
) -> Architecture:
  """Returns the architecture with the adapter of a config; as it is where lora.rank is 0.

  continued: whether training starts from the adapter of another run.

  Raises:
    ConfigError: a pattern that does not parse or matches nothing, or parameters that cannot be
      trained whole.
  """
  lora = c.lora
  if not lora.rank:
    return arch
  names = _by_layer(arch, kinds.linear_maps(arch))
  wanted = _targets(lora.targets, [n for own in names.values() for n in own], arch)
  ranks = _by_pattern(lora.rank_pattern, wanted, lora.rank, 'lora.rank_pattern')
  ranks = {n: r for n, r in ranks.items() if r}  # 0: no adapter
  if not ranks:
    raise ConfigError('lora.rank_pattern gives every linear map rank 0; nothing is left to train')
  alphas = _by_pattern(lora.alpha_pattern, wanted, lora.alpha, 'lora.alpha_pattern')
  scales = {n: alphas[n] / (math.sqrt(r) if lora.rslora else r) for n, r in ranks.items()}
  maps = tuple(
    AdaptedMap(m, tuple(ranks.get(n, 0) for n in own), tuple(scales.get(n, 0.0) for n in own))
    for m, own in names.items()
    if any(n in ranks for n in own)
  )
  adapter = Adapter(
    maps=maps,
    trained=_trained(lora.train, arch, lora.base),
    dropout=lora.dropout,
    dora=lora.dora,
    pissa=lora.init == 'pissa',
    continued=continued,
  )
  return dataclasses.replace(arch, adapter=adapter, base=lora.base, block=lora.block)


def merged_dtype(base: str) -> str:
  """Returns the dtype of the weights after merging, by how the base is held."""
  return 'float32' if base == 'float32' else 'bfloat16'


def _by_layer(arch: Architecture, names: Sequence[str]) -> dict[str, list[str]]:
  """Returns {name: its names by layer, `layer3/attn/q`}; one outside of the blocks is its own."""
  layers: dict[str, list[int]] = {}
  for layer, (slot, _) in enumerate(arch.layer_slots()):
    layers.setdefault(slot, []).append(layer)
  out = {}
  for name in names:
    slot, rest = '/'.join(name.split('/')[:2]), name.split('/', 2)[2:]
    out[name] = [f'layer{i}/{rest[0]}' for i in layers[slot]] if slot in layers else [name]
  return out


def _pattern(text: str, key: str) -> re.Pattern:
  try:
    return re.compile(text)
  except re.error as error:
    raise ConfigError(f'{key}: {text!r} is no regular expression: {error}') from error


def _targets(text: str, names: Sequence[str], arch: Architecture) -> list[str]:
  """Returns the linear maps, by layer, that get an adapter. As in PEFT, the head is none of
  all-linear.
  """
  if text == ALL_LINEAR:
    head = kinds.of(arch).head_leaf(arch)
    return [n for n in names if f'{n}/w' != head]
  pattern = _pattern(text, 'lora.targets')
  found = [n for n in names if pattern.fullmatch(n)]
  if not found:
    own = dict.fromkeys(n.split('/', 1)[-1] for n in names)
    raise ConfigError(
      f'lora.targets={text!r} matches no linear map; it must match a whole name, such as '
      f'{names[0]!r}. The maps are {", ".join(own)}; {_others(arch)}{_hint(text, own)}'
    )
  return found


def _others(arch: Architecture) -> str:
  """Returns what may be trained without being a linear map."""
  if arch.num_labels:
    return 'embed/w may be trained whole, see lora.train; the score always is'
  if arch.tied:
    return 'the head is the table of the embedding; embed/w may be trained whole, see lora.train'
  return 'embed/w and head/w may be trained whole, see lora.train'


def _hint(text: str, own: Collection[str]) -> str:
  """Returns what to add to a message where targets are written as for PEFT; else ''.

  own: the names of the model's linear maps, without those of layers.
  """
  words = re.findall(r'[a-z_]+', text)
  found = [_IN_PEFT[w] for w in words if _IN_PEFT.get(w) in own]
  if not found or not all(w in _IN_PEFT for w in words):
    return ''
  return f". PEFT's names are here: lora.targets='(.*/)?({'|'.join(found)})'"


def _by_pattern(
  table: Sequence[tuple[str, Any]], names: Sequence[str], usual: Any, key: str
) -> dict:
  """Returns {name: value of the first row whose regex matches it, else `usual`}."""
  return trees.match_table((*table, ('.*', usual)), names, key)


def _trained(text: str, arch: Architecture, base: str) -> tuple[str, ...]:
  """Returns the leaves that are trained whole."""
  if not text:
    return ()
  pattern, out = _pattern(text, 'lora.train'), []
  declared = kinds.declared(arch)
  for name, own in _by_layer(arch, list(declared)).items():
    matched = [n for n in own if pattern.fullmatch(n)]
    if matched and len(matched) < len(own):
      other = next(n for n in own if n not in matched)
      raise ConfigError(
        f'lora.train={text!r} matches {matched[0]} and not {other}; the layers of a stack are '
        'trained together'
      )
    out += [name] if matched else []
  if not out:
    raise ConfigError(
      f'lora.train={text!r} matches no parameter; it must match a whole name, such as embed/w, '
      'head/w, final_norm/scale or layer0/attn_norm/scale'
    )
  packed = kinds.declared(dataclasses.replace(arch, base=base))
  if wrong := [n for n in out if n not in packed]:
    raise ConfigError(
      f'lora.train={text!r} matches {wrong[0]}, which lora.base={base} packs; give it an adapter '
      '(lora.targets), or take lora.base=bfloat16'
    )
  return tuple(out)
