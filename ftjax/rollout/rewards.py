"""Rewards of sampled completions: named in the config, run with limits, summed with weights.

A reward is a built-in (verifiers.py), a user's function `module:function` over a whole batch, or
`model`: a callable that the caller passes in. docs/rewards.md tells users about it.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.rollout import verifiers
from ftjax.rollout.workers import Pool
from ftjax.runtime.errors import ConfigError, DataError

KEY = 'rollout.rewards'
# What a function may ask for beside columns of the data.
GIVEN = ('prompts', 'completions', 'token_ids', 'token_counts', 'is_truncated')
# Bytes of address space of a worker that runs built-ins.
_MEMORY = 4 << 30
_MAX_WORKERS = 8
_WEIGHTED = re.compile(r'@([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(?:,|$)')
_FUNCTION = re.compile(r'[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*')

# (prompt token ids, completion token ids) -> a finite number for each of the n completions.
Model = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
  """One reward of the sum.

  Attributes:
    name: in logs, unique.
    spec: as written: 'format:think,answer'.
    weight: at least 0; 0 is logged and not paid.
    verifier: of a built-in, else None.
  """

  name: str
  spec: str
  weight: float
  verifier: verifiers.Verifier | None


@dataclasses.dataclass(frozen=True)
class Batch:
  """n completions. All sequences have n entries.

  Attributes:
    prompts, completions: texts, decoded without special tokens.
    prompt_ids, token_ids: their tokens; the stop token belongs to the completion.
    is_truncated: no stop token within the limit.
    columns: of the data rows, each row's value once per completion.
  """

  prompts: Sequence[str]
  completions: Sequence[str]
  prompt_ids: Sequence[Sequence[int]]
  token_ids: Sequence[Sequence[int]]
  is_truncated: Sequence[bool]
  columns: Mapping[str, Sequence[Any]]

  def values(self, name: str) -> Sequence[Any]:
    """What stands under one of GIVEN, or a column."""
    if name == 'token_counts':
      return [len(ids) for ids in self.token_ids]
    given = {
      'prompts': self.prompts,
      'completions': self.completions,
      'token_ids': self.token_ids,
      'is_truncated': self.is_truncated,
    }
    return given[name] if name in given else self.columns[name]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Rewards of a batch of n by P parts.

  Attributes:
    total: float32[n], the weighted sum.
    parts: float32[n, P], before weights; 0 where a part failed.
    names: P names.
    failures: {name: completions whose part raised or ran out of time}.
    reasons: {name: what the first failure said}, of parts that had one.
  """

  total: np.ndarray
  parts: np.ndarray
  names: tuple[str, ...]
  failures: Mapping[str, int]
  reasons: Mapping[str, str]

  def metrics(self) -> dict[str, float]:
    """{'reward': mean, 'reward/NAME': mean before its weight, 'reward/NAME/failures': count}."""
    means = {f'reward/{n}': float(m) for n, m in zip(self.names, self.parts.mean(0), strict=True)}
    counts = {f'reward/{n}/failures': float(c) for n, c in self.failures.items()}
    return {'reward': float(self.total.mean())} | means | counts


def parse(value: Any) -> tuple[Part, ...]:
  """The parts of a config value: ('math', ('format:think,answer', 0.2)), or as one text
  'math@1,format:think,answer@0.2', where a weight ends an entry.

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
    raise ConfigError(f'{KEY}: every weight is 0, so that nothing is paid')
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
  """None for `model` and for module:function."""
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
    columns: of the data rows.
    model: of the part `model`; its exceptions end the run.
    completion_limit: seconds for one completion by a built-in that may hang.
    call_limit: seconds for one call of a user's function, a whole batch.
    workers: processes for built-ins; 0: the machine's cores, at most 8.

  Raises:
    ConfigError: a function that cannot be imported or used, a column that is not there, or `model`
      without one.
  """

  def __init__(
    self,
    parts: Sequence[Part],
    columns: Sequence[str],
    *,
    model: Model | None = None,
    completion_limit: float = 1.0,
    call_limit: float = 60.0,
    workers: int = 0,
  ):
    self.parts = tuple(parts)
    self._columns, self._model = tuple(columns), model
    self._pools: dict[str, Pool] = {}
    self._inputs: dict[str, tuple[str, ...]] = {}
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
    """Ends the processes."""
    for pool in self._pools.values():
      pool.close()
    self._pools = {}

  def _start(self, completion_limit: float, call_limit: float, workers: int) -> None:
    for part in self.parts:
      if part.verifier:
        self._check(part, [(name, True) for name in part.verifier.inputs])
      elif part.spec == 'model' and self._model is None:
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
        self._check(part, self._pools[part.name].ready)

  def _check(self, part: Part, parameters: Sequence[tuple[str, bool]]) -> None:
    """Remembers what a part asks for; a column that only has a default may be missing."""
    known = (*GIVEN, *self._columns)
    missing = [name for name, required in parameters if required and name not in known]
    if missing:
      raise ConfigError(
        f'{KEY}: {part.spec} asks for {", ".join(missing)}, which the data lacks'
        f'{verifiers.nearest(missing[0], known)} Its columns: '
        f'{", ".join(self._columns) or "none"}; always there: {", ".join(GIVEN)}'
      )
    self._inputs[part.name] = tuple(name for name, _ in parameters if name in known)

  def score(self, batch: Batch) -> Scores:
    """Rewards of n completions.

    A part that raises or runs out of time scores 0 there, and is counted.

    Raises:
      ConfigError: a function that did not return n finite numbers.
      DataError: a column value that is no JSON, or sequences of different lengths.
    """
    n = len(batch.completions)
    parts = np.zeros((n, len(self.parts)), np.float32)
    failures: dict[str, int] = {p.name: 0 for p in self.parts}
    reasons: dict[str, str] = {}
    for i, part in enumerate(self.parts):
      if part.spec == 'model':
        values: list[float | str] = self._by_model(batch)
      else:
        columns = {k: self._column(batch, k, n) for k in self._inputs[part.name]}
        values = self._run(part, columns, n)
      for row, value in enumerate(values):
        if isinstance(value, str):
          failures[part.name] += 1
          reasons.setdefault(part.name, value)
        else:
          parts[row, i] = value
    weights = np.asarray([p.weight for p in self.parts], np.float64)
    total = (parts.astype(np.float64) @ weights).astype(np.float32)
    if not np.isfinite(total).all():
      raise ConfigError(f'{KEY}: the weighted sum leaves the range of float32; lower the weights')
    return Scores(total, parts, tuple(p.name for p in self.parts), failures, reasons)

  def _column(self, batch: Batch, name: str, n: int) -> list[Any]:
    values = list(batch.values(name))
    if len(values) != n:
      raise DataError(f'{KEY}: {name} has {len(values)} values for {n} completions')
    return [[int(t) for t in v] for v in values] if name == 'token_ids' else values

  def _run(self, part: Part, columns: Mapping[str, list[Any]], n: int) -> list[float | str]:
    """A number per completion, or the reason of its failure."""
    if part.verifier is None:
      [answer] = self._ask(part, part.name, [{'score': columns, 'n': n}])
      return answer['scores'] if 'scores' in answer else [answer['failure']] * n
    rows = list(zip(*columns.values(), strict=True))
    if part.name in self._isolated:
      index = self._isolated.index(part.name)
      answers = self._ask(part, '', [{'score': [index, row]} for row in rows])
      return [a['scores'] if 'scores' in a else a['failure'] for a in answers]
    return [_safely(part.verifier, row) for row in rows]

  def _ask(self, part: Part, pool: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
      answers = self._pools[pool].run(requests)
    except TypeError as error:
      raise DataError(f'{KEY}: {part.spec}: a column holds what is no JSON: {error}') from error
    if wrong := [a['wrong'] for a in answers if 'wrong' in a]:
      raise ConfigError(f'{KEY}: {part.spec} {wrong[0]}')
    return answers

  def _by_model(self, batch: Batch) -> list[float]:
    scores = np.asarray(self._model(batch.prompt_ids, batch.token_ids), np.float32)
    if scores.shape != (len(batch.completions),) or not np.isfinite(scores).all():
      raise ConfigError(
        f'{KEY}: the reward model returned {scores.dtype}{list(scores.shape)}, finite: '
        f'{bool(np.isfinite(scores).all())}; expected {len(batch.completions)} finite numbers'
      )
    return scores.tolist()


def _safely(verifier: verifiers.Verifier, row: Sequence[Any]) -> float | str:
  try:
    return verifier.score(*row)
  except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
    return f'{type(error).__name__}: {error}'
