"""Google Cloud's names of TPU slices (v5litepod-16, v5p-8, ct6e-standard-4t) as topologies.

The card of names, launch/tpus.tsv, is shared with the launchers. Needs no jax."""

import dataclasses
import difflib
import functools
import math
import pathlib
import re

from ftjax.runtime.errors import ConfigError

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
# Inside an installed package, and next to it in a checkout.
_CARDS = (_PACKAGE / 'launch' / 'tpus.tsv', _PACKAGE.parent / 'launch' / 'tpus.tsv')


@dataclasses.dataclass
class Generation:
  """Names of one generation. hosts: {machine type: (chips of a host, its topologies)}."""

  prefix: str = ''
  counts: str = 'chips'
  hosts: dict[str, tuple[int, list[str]]] = dataclasses.field(default_factory=dict)


@functools.cache
def generations() -> dict[str, Generation]:
  """Returns the generations of the card by their names in ftjax.plan."""
  card = next(p for p in _CARDS if p.is_file())
  out: dict[str, Generation] = {}
  for line in card.read_text(encoding='utf-8').splitlines():
    if not line or line.startswith('#'):
      continue
    kind, key, value = line.split('\t')
    row = out.setdefault(kind, Generation())
    if key in ('prefix', 'counts'):
      setattr(row, key, value)
    elif key == 'host':
      machine, chips, *topologies = value.split()
      row.hosts[machine] = (int(chips), topologies)
  return out


def topology(text: str) -> str | None:
  """Returns the topology that a name of Google Cloud stands for, like 'v5e:4x4' for
  'v5litepod-16'; a leading 'Nx' (slices) is kept. None if `text` is not such a name.

  Raises:
    ConfigError: the prefix is known, but there is no such size; names the nearest sizes. Or the
      card has no shapes of the generation (v2, v3).
  """
  slices, name = re.fullmatch(r'(\d+x(?=[a-z]))?(.*)', text).groups(default='')
  for kind, row in generations().items():
    for machine, (chips, topologies) in row.hosts.items():
      if name == machine:
        shape = next(t for t in topologies if _chips(t) == chips)
        return f'{slices}{kind}:{shape}'
    found = re.fullmatch(rf'(?:{kind}|{row.prefix})-(\d+)', name)
    if found and not row.hosts:
      raise ConfigError(f'--topology={text}: {kind} can be launched, but its shapes are not known')
    if found:
      return f'{slices}{kind}:{_shape(text, row, int(found[1]))}'
  return None


def nearest(text: str) -> str:
  """Returns the name of the card that is most like `text`, '' where none is near."""
  names = [n for row in generations().values() for n in row.hosts]
  for row in generations().values():
    names += [f'{row.prefix}-{size}' for size in _sizes(row)]
  return next(iter(difflib.get_close_matches(text, names, 1, 0.75)), '')


def _chips(shape: str) -> int:
  return math.prod(int(n) for n in shape.split('x'))


def _sizes(row: Generation) -> dict[int, str]:
  """Returns the topologies of a generation by the number in its accelerator types."""
  per_chip = 2 if row.counts == 'cores' else 1
  shapes = [t for _, topologies in row.hosts.values() for t in topologies]
  return {_chips(t) * per_chip: t for t in shapes}


def _shape(text: str, row: Generation, size: int) -> str:
  sizes = _sizes(row)
  if size in sizes:
    return sizes[size]
  near = sorted(sorted(sizes, key=lambda n: abs(n - size))[:3])
  raise ConfigError(
    f'--topology={text}: there is no {row.prefix} slice of {size} {row.counts}; near it are '
    + ', '.join(f'{row.prefix}-{n}' for n in near)
  )
