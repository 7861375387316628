"""Checks of the section study, which needs no data and no models for them."""

import itertools
import re

import ml_collections

from ftjax.config import choices, search_space
from ftjax.runtime.errors import ConfigError

PLACEHOLDERS = ('config_overrides', 'workdir', 'name', 'slot')
_NEEDED = PLACEHOLDERS[:2]


def check(c: ml_collections.ConfigDict) -> None:
  """Checks a config's study.

  Raises:
    ConfigError: naming the key, what was got, and what was expected.
  """
  s = c.study
  _check_numbers(c)
  _check_launch(s.launch)
  space = search_space.parse_all(s.space, c)
  if not s.kind:
    return
  reads = choices.STUDIES[s.kind].reads
  if 'space' in reads and not space and s.kind != 'seeds':
    raise ConfigError(
      f'study.space is empty: name the keys that study.kind={s.kind} changes, such as '
      "('optim.lr=log:1e-5:1e-3',)"
    )
  if s.kind in ('grid', 'seeds'):
    for dimension in space:
      dimension.all_values()
  if 'seeds' in reads and any(d.key == 'seed' for d in space):
    raise ConfigError(f'study.space: seed is changed by study.seeds with study.kind={s.kind}')
  if s.rungs:
    _check_rungs(c, space)


def _check_numbers(c: ml_collections.ConfigDict) -> None:
  s = c.study
  if s.folds < 2:
    raise ConfigError(f'study.folds={s.folds}; expected at least 2')
  if s.reduction < 2:
    raise ConfigError(f'study.reduction={s.reduction}; expected at least 2')
  if s.seed < 0 or s.seed >= 1 << 32:  # of NumPy and scikit-learn
    raise ConfigError(f'study.seed={s.seed}; expected 0 to 2^32 - 1')
  if not s.seeds or not all(_is_whole(n) and n >= 0 for n in s.seeds):
    raise ConfigError(
      f'study.seeds={s.seeds}; expected whole numbers of at least 0, such as (0, 1)'
    )
  if len(set(s.seeds)) < len(s.seeds):
    raise ConfigError(f'study.seeds={s.seeds}; expected each seed once')
  shares = [f for f in s.fractions if _is_whole(f) or isinstance(f, float)]
  if (
    not shares
    or len(shares) < len(s.fractions)
    or not all(0 < f <= 1 for f in shares)
    or any(b <= a for a, b in itertools.pairwise(shares))
  ):
    raise ConfigError(
      f'study.fractions={s.fractions}; expected ascending shares in (0, 1], such as (0.1, 0.3, 1.0)'
    )


def _is_whole(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _check_rungs(c: ml_collections.ConfigDict, space: tuple[search_space.Dimension, ...]) -> None:
  rungs = c.study.rungs
  if not all(_is_whole(n) and n > 0 for n in rungs) or list(rungs) != sorted(set(rungs)):
    raise ConfigError(f'study.rungs={rungs}; expected ascending steps, such as (50, 150)')
  if not c.steps:
    raise ConfigError(f'study.rungs={rungs} are steps: give steps, in place of epochs')
  if rungs[-1] >= c.steps:
    raise ConfigError(
      f'study.rungs={rungs}; expected fewer than steps={c.steps}, the end of the whole runs'
    )
  if changed := [d.key for d in space if d.key in ('steps', 'epochs')]:
    raise ConfigError(
      f'study.rungs={rungs} with {changed[0]} in study.space: runs of other lengths cannot be '
      'compared at the same steps; leave one of them out'
    )
  if c.checkpoint.patience:
    raise ConfigError(
      f'study.rungs={rungs} with checkpoint.patience={c.checkpoint.patience}: a run could end '
      'before its rung; set checkpoint.patience=0'
    )


def _check_launch(launch: str) -> None:
  if not launch:
    return
  found = re.findall(r'(?<!\$)\{(\w*)\}', launch)  # ${NAME} is the shell's
  if missing := [n for n in _NEEDED if n not in found]:
    raise ConfigError(
      f'study.launch={launch!r} lacks {{{missing[0]}}}; expected a command such as '
      "'ssh host{slot} ftjax train {config_overrides} --workdir={workdir}'"
    )
  if unknown := [n for n in found if n not in PLACEHOLDERS]:
    raise ConfigError(
      f'study.launch={launch!r} has {{{unknown[0]}}}; expected '
      f'{", ".join(f"{{{n}}}" for n in PLACEHOLDERS)}'
    )
