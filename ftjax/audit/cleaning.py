"""Chooses the rows that cleaning removes; nothing else goes, and each removal has its reason."""

from collections.abc import Collection, Sequence

from ftjax.audit.finding import KINDS, OF_THE_SET, REMOVED, Finding
from ftjax.runtime.errors import ConfigError


def kinds_of(names: Sequence[str]) -> frozenset[str]:
  """Returns the kinds that are removed: those named, or the usual ones without any.

  Raises:
    ConfigError: an unknown kind, or one of the set as a whole.
  """
  for name in names:
    if name not in KINDS:
      raise ConfigError(f'--clean_kinds: {name!r}; expected some of {", ".join(KINDS)}')
    if name in OF_THE_SET:
      raise ConfigError(
        f'--clean_kinds: {name} is a fault of the whole set, and no row of it is to be removed'
      )
  return frozenset(names or REMOVED)


def removals(
  findings: Sequence[Finding], kinds: Collection[str]
) -> dict[tuple[str, int], list[Finding]]:
  """Returns {(file, line): its findings of these kinds} of the rows that go; rows that cannot be
  read always do, since training refuses them.
  """
  out: dict[tuple[str, int], list[Finding]] = {}
  for found in findings:
    if found.row < 0 or (found.kind in kinds and found.kind not in OF_THE_SET):
      out.setdefault((found.file, found.line), []).append(found)
  return out
