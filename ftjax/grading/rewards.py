"""Computes the rewards of sampled completions: parsed from the config, run with limits, weighted
sum.

A reward is a built-in (verifiers.py), a user's function `module:function` over a whole batch, or
`model`: scores of a reward model that the caller passes in. See docs/rewards.md.
"""

import collections
import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.grading import verifiers
from ftjax.grading.reward_batch import GIVEN, Batch, Scores
from ftjax.grading.worker_pool import Pool
from ftjax.runtime import strict_json
from ftjax.runtime.errors import ConfigError, DataError

log = logging.getLogger(__name__)

KEY = 'rollout.rewards'
# Most bad rows in one message.
_MAX_REPORTED = 20
# Bytes of address space of a worker that runs built-ins.
_MEMORY = 4 << 30
_MAX_WORKERS = 8
_WEIGHTED = re.compile(r'@([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(?:,|$)')
_FUNCTION = re.compile(r'[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*')


@dataclasses.dataclass(frozen=True)
class Part:
  """One reward of the sum.

  Attributes:
    name: unique, for logs.
    spec: as written in the config: 'format:think,answer'.
    weight: at least 0; with 0 it is only logged.
    verifier: the built-in reward, else None.
  """

  name: str
  spec: str
  weight: float
  verifier: verifiers.Verifier | None


def parse(value: Any) -> tuple[Part, ...]:
  """Parses a config value: ('math', ('format:think,answer', 0.2)), or as one text
  'math@1,format:think,answer@0.2', in which a weight ends an entry.

  Raises:
    ConfigError: an unknown name, a bad argument or weight; a missing package.
  """
  pairs = _split(value) if isinstance(value, str) else list(map(_pair, value))
  if not pairs:
    raise ConfigError(f"{KEY} is empty; expected rewards like (('math', 1.0),) or 'math@1'")
  parts, seen = [], {}
  for spec, weight in pairs:
    if not math.isfinite(weight) or weight < 0:
      raise ConfigError(
        f'{KEY}: {spec!r} has the weight {weight}; expected at least 0: a penalty is a reward that '
        'returns numbers below 0'
      )
    verifier = _built_in(spec)
    head, _, rest = spec.partition(':')
    name = rest if verifier is None and rest else head
    seen[name] = seen.get(name, 0) + 1
    parts.append(Part(name if seen[name] == 1 else f'{name}_{seen[name]}', spec, weight, verifier))
  if not any(p.weight for p in parts):
    raise ConfigError(f'{KEY}: every weight is 0, so that every reward is 0')
  return tuple(parts)


def _split(text: str) -> list[tuple[str, float]]:
  out, start = [], 0
  for m in _WEIGHTED.finditer(text):
    out.append((text[start : m.start()].strip(), _weight(m.group(1), text)))
    start = m.end()
  rest = text[start:].strip()
  if rest and out:
    raise ConfigError(f'{KEY}: {rest!r} has no weight; in a list each has one: math@1,{rest}@1')
  return out + ([(rest, 1.0)] if rest else [])


def _weight(value: Any, entry: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError) as error:
    raise ConfigError(f'{KEY}: the weight of {entry!r} is {value!r}; expected a number') from error


def _pair(entry: Any) -> tuple[str, float]:
  if isinstance(entry, str):
    return entry, 1.0
  if isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str):
    return entry[0], _weight(entry[1], entry)
  raise ConfigError(f"{KEY}: got {entry!r}; expected 'NAME' or ('NAME', weight)")


def _built_in(spec: str) -> verifiers.Verifier | None:
  """Returns the built-in reward of a spec; None for `model` and for module:function."""
  name, _, text = spec.partition(':')
  if name in verifiers.BUILTINS:
    return verifiers.build(name, text)
  if spec == 'model' or _FUNCTION.fullmatch(spec):
    return None
  known = [*verifiers.BUILTINS, 'model']
  weights = '; in a text, give each reward its weight: math@1,length:at_most=99@1'
  raise ConfigError(
    f'{KEY}: there is no reward {spec!r}{verifiers.nearest(name, known)} Expected one of '
    f'{", ".join(known)}, or module:function{weights if "," in spec else ""}'
  )


class Rewards:
  """Parts with the processes that run them; `close` it, or use it in a `with`.

  Args:
    parts: from `parse`.
    columns: names of the data's columns, or {source: names of its columns}.
    has_model: whether `score` is given the scores of the part `model`.
    completion_limit: seconds for one completion by a built-in that may hang.
    call_limit: seconds for one call of a user's function, a whole batch.
    workers: processes for built-ins; 0: the machine's cores, at most 8.

  Raises:
    ConfigError: a function that cannot be imported or used, a column that is not there, or the
      part `model` without `has_model`.
  """

  def __init__(
    self,
    parts: Sequence[Part],
    columns: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    has_model: bool = False,
    completion_limit: float = 1.0,
    call_limit: float = 60.0,
    workers: int = 0,
  ):
    self.parts = tuple(parts)
    self._columns = dict(columns) if isinstance(columns, Mapping) else {'': columns}
    self._has_model = has_model
    self._pools: dict[str, Pool] = {}
    self._inputs: dict[str, tuple[str, ...]] = {}
    self._is_warned: set[str] = set()  # of columns that no function can be given
    self._isolated = [p.name for p in self.parts if p.verifier and p.verifier.isolated]
    try:
      self._start(completion_limit, call_limit, workers)
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> 'Rewards':
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Ends the worker processes."""
    for pool in self._pools.values():
      pool.close()
    self._pools = {}

  def _start(self, completion_limit: float, call_limit: float, workers: int) -> None:
    if hidden := sorted({*GIVEN}.intersection(self._names())):
      log.warning(
        '%s: no reward sees the columns %s of the data: these names mean what was sampled; rename '
        'the columns',
        *(KEY, ', '.join(hidden)),
      )
    for part in self.parts:
      if part.verifier:
        inputs = part.verifier.inputs
        more = ('prompts',) if 'completions' in inputs and 'prompts' not in inputs else ()
        self._check(part, [(name, True) for name in (*inputs, *more)])
      elif part.spec == 'model' and not self._has_model:
        raise ConfigError(
          f'{KEY}: the part model needs a reward model: name its folder in rollout.reward_model'
        )
      elif part.spec != 'model':
        self._pools[part.name] = Pool({'function': part.spec}, 1, call_limit)
    if self._isolated:
      isolated = [p for p in self.parts if p.name in self._isolated]
      specs = [(p.spec.partition(':')[0], p.spec.partition(':')[2]) for p in isolated]
      count = workers or min(_MAX_WORKERS, os.cpu_count() or 1)
      load = {'verifiers': specs, 'memory': _MEMORY}
      self._pools[''] = Pool(load, count, completion_limit)
    for name, pool in self._pools.items():
      if reason := pool.load():
        spec = next((p.spec for p in self.parts if p.name == name), ', '.join(self._isolated))
        raise ConfigError(f'{KEY}: {spec}: {reason}')
    for part in self.parts:
      if part.name in self._pools:
        ready = self._pools[part.name].ready
        self._check(part, ready['parameters'])
        if ready['takes_all']:
          known = ('prompts', 'completions', 'completion_ids', *self._names())
          self._inputs[part.name] = tuple(dict.fromkeys((*self._inputs[part.name], *known)))

  def _names(self) -> list[str]:
    """Returns the columns of all sources."""
    return sorted({name for names in self._columns.values() for name in names})

  def _check(self, part: Part, parameters: Sequence[tuple[str, bool]]) -> None:
    """Stores the inputs of a part; a column whose parameter has a default may be missing."""
    for source, names in self._columns.items():
      known = (*GIVEN, *names)
      missing = [name for name, required in parameters if required and name not in known]
      if missing:
        raise ConfigError(
          f'{KEY}: {part.spec} asks for {", ".join(missing)}, which the data lacks'
          f'{verifiers.nearest(missing[0], known) or "."} {source or "Its columns"}'
          f'{" has the columns" if source else ""}: {", ".join(sorted(names)) or "none"}; always '
          f'there: {", ".join(GIVEN)}'
        )
    known = (*GIVEN, *self._names())
    self._inputs[part.name] = tuple(name for name, _ in parameters if name in known)

  def check_rows(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Checks the gold answer of every row with the built-in rewards that use it.

    Args:
      rows: (place like 'train.jsonl:17', columns).

    Raises:
      DataError: rows without the column, or with a value that no completion could equal.
    """
    checked = [p for p in self.parts if p.verifier and p.verifier.column]
    places: dict[str, list[str]] = collections.defaultdict(list)
    for place, columns in rows if checked else ():
      for part in checked:
        if reason := _fault(part.verifier, columns):
          places[f'{part.spec}: {reason}'].append(place)
    if not places:
      return
    count = len({place for some in places.values() for place in some})
    lines = [
      f'{some[0]}: {reason}' + (f' (and {len(some) - 1} more rows)' if len(some) > 1 else '')
      for reason, some in places.items()
    ]
    if len(lines) > _MAX_REPORTED:
      lines[_MAX_REPORTED:] = [f'... and {len(lines) - _MAX_REPORTED} more']
    raise DataError(
      f'{KEY}: {count} {"row has" if count == 1 else "rows have"} no answer to compare completions '
      'with; correct the data, or name another column (column=NAME):\n  ' + '\n  '.join(lines)
    )

  def score(self, batch: Batch, model_scores: np.ndarray | None = None) -> Scores:
    """Returns the rewards of n completions; model_scores: float32[n] of the part `model`.

    A part that raises or runs out of time scores 0 there, and is counted. A part that returns None
    is left out of that completion's sum.

    Raises:
      ConfigError: a function, or a reward model, that did not give n finite numbers.
      DataError: a column value that is no JSON, or sequences of different lengths.
    """
    n = len(batch.completions)
    parts = np.zeros((n, len(self.parts)), np.float32)
    failures: dict[str, int] = {p.name: 0 for p in self.parts}
    reasons: dict[str, str] = {}
    logged: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    for i, part in enumerate(self.parts):
      if part.spec == 'model':
        answer = {'scores': _checked(model_scores, n)}
      else:
        answer = self._run(part, batch, n)
      logged |= {f'reward/{part.name}/{k}': v for k, v in answer.get('metrics', {}).items()}
      extra |= answer.get('extra', {})
      for row, value in enumerate(answer['scores']):
        if isinstance(value, str):
          failures[part.name] += 1
          reasons.setdefault(part.name, value)
        else:
          parts[row, i] = np.nan if value is None else value
    total = _total(parts, [p.weight for p in self.parts])
    if np.isinf(total).any():
      raise ConfigError(f'{KEY}: the weighted sum leaves the range of float32; lower the weights')
    return Scores(total, parts, tuple(p.name for p in self.parts), failures, reasons, logged, extra)

  def _column(self, batch: Batch, name: str, as_given: bool) -> list[Any]:
    n = len(batch.completions)
    values = list(batch.as_given(name) if as_given else batch.values(name))
    if len(values) != n:
      raise DataError(f'{KEY}: {name} has {len(values)} values for {n} completions')
    is_ids = name in ('token_ids', 'completion_ids')
    return [[int(t) for t in v] for v in values] if is_ids else values

  def _run(self, part: Part, batch: Batch, n: int) -> dict[str, Any]:
    """Returns {'scores': for each completion a number, None, or the reason of its failure}, and the
    metrics and columns that a function logged.
    """
    if part.verifier is None:
      request = {'score': self._arguments(part, batch), 'n': n, 'state': dict(batch.state)}
      [answer] = self._ask(part, part.name, [request])
      return answer if 'scores' in answer else {'scores': [answer['failure']] * n}
    columns = [self._column(batch, k, as_given=False) for k in self._inputs[part.name]]
    rows = list(zip(*columns, strict=True))
    if part.name in self._isolated:
      index = self._isolated.index(part.name)
      answers = self._ask(part, '', [{'score': [index, row]} for row in rows])
      return {'scores': [a['scores'] if 'scores' in a else a['failure'] for a in answers]}
    return {'scores': [_safely(part.verifier, row) for row in rows]}

  def _arguments(self, part: Part, batch: Batch) -> dict[str, list[Any]]:
    """Returns the arguments of a function. A column that it takes only by **kwargs is left out if
    it is not JSON.
    """
    named = {name for name, _ in self._pools[part.name].ready['parameters']}
    out = {k: self._column(batch, k, as_given=True) for k in self._inputs[part.name]}
    for name in [k for k in out if k not in named and k not in GIVEN]:
      if not strict_json.is_json(out[name]):
        del out[name]
        if name not in self._is_warned:
          log.warning('%s: column %s is not JSON and is passed to no function', KEY, name)
        self._is_warned.add(name)
    return out

  def _ask(self, part: Part, pool: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
      answers = self._pools[pool].run(requests)
    except TypeError as error:
      raise DataError(f'{KEY}: {part.spec}: a column is not JSON: {error}') from error
    if wrong := [a['wrong'] for a in answers if 'wrong' in a]:
      raise ConfigError(f'{KEY}: {part.spec} {wrong[0]}')
    return answers


def _checked(scores: np.ndarray, n: int) -> list[float]:
  """Returns the scores of a reward model, which must be n finite numbers."""
  if scores.shape != (n,) or not np.isfinite(scores).all():
    raise ConfigError(
      f'{KEY}: the reward model returned {scores.dtype}{list(scores.shape)}, finite: '
      f'{bool(np.isfinite(scores).all())}; expected {n} finite numbers'
    )
  return scores.tolist()


def _total(parts: np.ndarray, weights: Sequence[float]) -> np.ndarray:
  """Returns float32[n], the sums of float32[n, P] times float[P] without NaN; NaN for completions
  that no part with a weight scored.
  """
  weights = np.asarray(weights, np.float64)
  total = (np.nan_to_num(parts.astype(np.float64)) @ weights).astype(np.float32)
  is_scored = (~np.isnan(parts) & (weights > 0)).any(1)
  return np.where(is_scored, total, np.float32(np.nan))


def _fault(verifier: verifiers.Verifier, columns: Mapping[str, Any]) -> str:
  """Returns why a row's gold answer cannot be used, '' where it can."""
  if verifier.column not in columns:
    return f'no column {verifier.column!r}'
  try:
    verifier.check(columns[verifier.column])
  except ValueError as error:
    return str(error)
  return ''


def _safely(verifier: verifiers.Verifier, row: Sequence[Any]) -> float | str:
  try:
    return verifier.score(*row)
  except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
    return f'{type(error).__name__}: {error}'
