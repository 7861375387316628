"""What a PEFT folder says of its base: the name in adapter_config.json, and the record of ours in
ftjax_base.json, which PEFT does not read.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ftjax.hf.peft_config import BASE_FILE, PeftConfig
from ftjax.hf.weight_files import file_inside, parse_json
from ftjax.runtime.errors import DataError
from ftjax.storage import files, hub

_STORAGES = ('', 'float32', 'bfloat16', 'int8', 'nf4')


@dataclasses.dataclass(frozen=True)
class Base:
  """The base of an adapter.

  path: HF folder, GGUF file or hub name, '' where the folder names none. sha256: of its weights, ''
  where it is not recorded. storage, block: how it was held, as in architecture.Architecture. parts:
  {module: (rank, scale) of each part} of the fused matrices whose adapter is that of its parts; see
  peft_names.Adapted. labels: names of the labels of a model that gives some, problem: of those of a
  sequence, as label_files.Labels has them; () and '' where they are not recorded. prefix: what the
  names of modules lack in the files, those of a base without a head; '' for nothing.
  """

  path: str
  sha256: str = ''
  storage: str = ''
  block: int = 64
  parts: Mapping[str, tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=dict)
  labels: tuple[str, ...] = ()
  problem: str = ''
  prefix: str = ''


def read(folder: Path, config: PeftConfig) -> Base:
  """Returns the base that adapter_config.json names, with what ftjax_base.json records of it."""
  path = config.base
  if config.revision and hub.is_name(path):
    path = f'{path}@{config.revision}'
  if not files.exists(folder / BASE_FILE):
    return Base(path)
  place = file_inside(folder, BASE_FILE)
  found = parse_json(place.read_bytes(), str(place))
  is_fit = (
    isinstance(found, dict)
    and found.keys() - {'parts', 'labels', 'problem', 'prefix'} == {'sha256', 'storage', 'block'}
    and isinstance(found['sha256'], str)
    and found['storage'] in _STORAGES
    and type(found['block']) is int
    and found['block'] > 1
  )
  if not is_fit:
    raise DataError(f'{place}: {found!r}; expected sha256, storage (of {_STORAGES}) and block')
  names, others = found.get('labels', []), [found.get(k, '') for k in ('problem', 'prefix')]
  if not isinstance(names, list) or not all(isinstance(n, str) for n in [*names, *others]):
    raise DataError(f'{place}: labels={names!r}, problem and prefix are {others!r}; expected texts')
  parts = _parts(found.get('parts', {}), place)
  return Base(path, **found | {'parts': parts, 'labels': tuple(names)})


def _parts(content: object, place: Path) -> dict[str, tuple[tuple[int, float], ...]]:
  def is_part(x: object) -> bool:
    if not isinstance(x, list) or len(x) != 2 or any(isinstance(n, bool) for n in x):
      return False
    rank, scale = x
    return isinstance(rank, int) and rank >= 0 and isinstance(scale, int | float) and scale >= 0

  lists = content.values() if isinstance(content, dict) else [None]
  if not all(isinstance(parts, list) and all(map(is_part, parts)) for parts in lists):
    raise DataError(f'{place}: parts={content!r}; expected lists of [rank, scale] by module')
  return {m: tuple((r, float(s)) for r, s in parts) for m, parts in content.items()}
