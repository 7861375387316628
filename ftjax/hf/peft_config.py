"""The adapter_config.json of a PEFT folder: what it says of a LoRA adapter, and what is refused.

Names are resolved as PEFT 0.21 does (tuners/tuners_utils.py, utils/other.py): `target_modules` are
ends of module names or one regex over whole names, the patterns are regexes over their ends.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex

from ftjax.families import multimodal
from ftjax.runtime.errors import DataError

CONFIG_FILE, WEIGHTS_FILE = 'adapter_config.json', 'adapter_model.safetensors'
# PEFT's names of what labels are given to.
FEATURES = 'FEATURE_EXTRACTION'  # of a model without a head
TASKS = {'sequence': 'SEQ_CLS', 'token': 'TOKEN_CLS', 'span': 'QUESTION_ANS'}
BASE_FILE = 'ftjax_base.json'  # what the base was; PEFT would warn of keys of ours in its own file
SMALL_FILES = (CONFIG_FILE, BASE_FILE)
PREFIX = 'base_model.model.'  # of every tensor's name
ALL_LINEAR = 'all-linear'

_MERGE = 'merge it into its base with PEFT (merge_and_unload) and take the whole model'
# What an adapter may be initialized with that leaves the base as it is.
_PLAIN_STARTS = (None, True, False, 'gaussian', 'eva', 'orthogonal')
_READ = {
  *('peft_type', 'task_type', 'base_model_name_or_path', 'revision', 'r', 'lora_alpha'),
  *('target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern', 'rank_pattern'),
  *('alpha_pattern', 'use_rslora', 'use_dora', 'modules_to_save', 'init_lora_weights', 'bias'),
  'fan_in_fan_out',
}
# They change nothing that the saved adapter computes.
_IDLE = {
  *('auto_mapping', 'peft_version', 'inference_mode', 'lora_dropout', 'megatron_core'),
  *('qalora_group_size', 'runtime_config', 'eva_config', 'ensure_weight_tying'),
}


_LARGEST_RANK = 1 << 20
_SECONDS = 5.0  # of matching the patterns of a file with all names


class Pattern:
  """A regular expression of a file, which may be made to take forever.

  Args:
    text: the expression.
    key: that it belongs to, for messages.
    clock: one for all patterns of a file.

  Raises:
    DataError: it is none.
  """

  def __init__(self, text: str, key: str, clock: 'Clock'):
    self._key, self._clock = key, clock
    try:
      self._regex = regex.compile(text)
    except (regex.error, OverflowError, RecursionError) as error:
      raise DataError(f'{key}: {text[:200]!r} is no regular expression: {error}') from error

  def match(self, name: str) -> regex.Match | None:
    """Returns the match at the beginning of a name."""
    return self._run(self._regex.match, name)

  def fullmatch(self, name: str) -> regex.Match | None:
    """Returns the match with a whole name."""
    return self._run(self._regex.fullmatch, name)

  def _run(self, call: Callable, name: str) -> regex.Match | None:
    begun = time.monotonic()
    try:
      if self._clock.left <= 0:
        raise TimeoutError
      return call(name, timeout=self._clock.left)
    except TimeoutError as error:
      raise DataError(
        f'{self._key}: its patterns take more than {_SECONDS:g} s; expected plain names'
      ) from error
    finally:
      self._clock.left -= time.monotonic() - begun


@dataclasses.dataclass
class Clock:
  """The seconds that are left for matching."""

  left: float = _SECONDS


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """A LoRA adapter by its adapter_config.json, checked.

  place: the file. base, revision: of the base model, '' where they are not named. task: what it
  gives labels to, one of architecture.TASKS, '' for a language model. targets: a pattern, ends of
  names, or ALL_LINEAR. ranks, alphas: (pattern, value) pairs, before the usual ones. transposed:
  the matrices of the base are stored as [inputs, outputs], as GPT-2's are. modules: what begins the
  names of layers in the file; in what the methods take it is 'model.'. is_bare: whether the base
  is used without a head.
  """

  place: str
  base: str
  revision: str
  task: str
  rank: int
  alpha: float
  rslora: bool
  dora: bool
  targets: str | Pattern | tuple[str, ...]
  excluded: str | Pattern | tuple[str, ...]
  layers: tuple[int, ...] | None
  layers_patterns: tuple[Pattern, ...]
  ranks: tuple[tuple[Pattern, int], ...]
  alphas: tuple[tuple[Pattern, float], ...]
  saved: tuple[str, ...]
  transposed: bool
  modules: str = multimodal.MODULES
  is_bare: bool = False

  def is_saved(self, tensor: str) -> bool:
    """Returns whether a HF tensor belongs to a module that is saved whole."""
    parts = multimodal.own_name(tensor, self.modules).split('.')
    modules = ['.'.join(parts[:n]) for n in range(1, len(parts))]
    return any(m.endswith(end) for m in modules for end in self.saved)

  def is_target(self, module: str, is_head: bool) -> bool:
    """Returns whether PEFT gives a linear map an adapter; is_head: it makes logits or scores."""
    module = multimodal.own_name(module, self.modules)
    if _is_named(module, self.excluded):
      return False
    if any(f'.{m}.' in f'.{module}.' for m in self.saved):
      return False
    if self.targets == ALL_LINEAR:
      return not is_head
    if isinstance(self.targets, Pattern) or not _is_named(module, self.targets):
      return _is_named(module, self.targets)
    if self.layers is None or module in self.targets:
      return True
    found = next((m for m in (p.match(module) for p in self.layers_patterns) if m), None)
    return found is not None and int(found['layer']) in self.layers

  def factors(self, module: str) -> tuple[int, float]:
    """Returns (rank, scale) of a module's adapter."""
    module = multimodal.own_name(module, self.modules)
    rank = next((v for p, v in self.ranks if p.match(module)), self.rank)
    alpha = next((v for p, v in self.alphas if p.match(module)), self.alpha)
    return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _is_named(module: str, names: Pattern | Sequence[str]) -> bool:
  if isinstance(names, Pattern):
    return names.fullmatch(module) is not None
  return any(module == n or module.endswith(f'.{n}') for n in names)


def parse(content: Any, place: str) -> PeftConfig:
  """Returns the checked content of an adapter_config.json.

  Raises:
    DataError: it is no LoRA adapter, or one that is not computed here in the same way.
  """
  if not isinstance(content, dict):
    raise DataError(f'{place}: expected a JSON object')
  kind = content.get('peft_type')
  if kind != 'LORA':
    raise DataError(f"{place}: peft_type={kind!r} is not supported; expected 'LORA'. Else {_MERGE}")
  _check_idle(content, place)
  task = content.get('task_type')
  if task not in (None, 'CAUSAL_LM', FEATURES, *TASKS.values()):
    known = ', '.join(map(repr, ('CAUSAL_LM', FEATURES, *TASKS.values())))
    raise DataError(f'{place}: task_type={task!r}; expected one of {known}')
  get = _Reader(content, place, Clock())
  layers = content.get('layers_to_transform')
  layers = (layers,) if type(layers) is int else get.list('layers_to_transform', int)
  around = content.get('layers_pattern')
  around = (around,) if isinstance(around, str) else get.list('layers_pattern', str)
  return PeftConfig(
    place=place,
    base=get.text('base_model_name_or_path'),
    revision=get.text('revision'),
    task=next((own for own, name in TASKS.items() if name == task), ''),
    is_bare=task == FEATURES,
    rank=get.rank('r', content.get('r', 8)),
    alpha=get.alpha('lora_alpha', content.get('lora_alpha', 8)),
    rslora=get.flag('use_rslora'),
    dora=get.flag('use_dora'),
    targets=get.names('target_modules'),
    excluded=get.names('exclude_modules'),
    layers=layers or None,
    layers_patterns=tuple(
      get.compile('layers_pattern', rf'(?:^|.*?\.){p}\.(?P<layer>\d+)\.')
      for p in around or (r'[^.]*',)
    ),
    ranks=get.patterns('rank_pattern', get.rank),
    alphas=get.patterns('alpha_pattern', get.alpha),
    saved=get.list('modules_to_save', str),
    transposed=get.flag('fan_in_fan_out'),
  )


def _check_idle(content: Mapping[str, Any], place: str) -> None:
  """Refuses settings that change what the adapter computes, in a way that is not computed here."""
  start = content.get('init_lora_weights')
  # 1 == True: compared with its type.
  if not any(start == s and type(start) is type(s) for s in _PLAIN_STARTS):
    raise DataError(
      f'{place}: init_lora_weights={start!r} goes with a base that was changed at its '
      'initialization, and the folder has only the adapter. Save it as plain LoRA with PEFT: '
      'save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)'
    )
  if content.get('bias', 'none') not in ('none', None):
    raise DataError(f"{place}: bias={content['bias']!r}; expected 'none'. Else {_MERGE}")
  for key, value in content.items():
    if key not in _READ | _IDLE and value not in (None, False, [], {}, ''):
      raise DataError(f'{place}: {key}={value!r} is not supported here; {_MERGE}')


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Reads values of a certain type from an adapter_config.json."""

  content: Mapping[str, Any]
  place: str
  clock: Clock

  def text(self, key: str) -> str:
    value = self.content.get(key)
    if not isinstance(value, str | None):
      raise self._wrong(key, value, 'text')
    return value or ''

  def flag(self, key: str) -> bool:
    value = self.content.get(key, False)
    if not isinstance(value, bool):
      raise self._wrong(key, value, 'true or false')
    return value

  def list(self, key: str, kind: type) -> tuple:
    value = self.content.get(key)
    if value is None:
      return ()
    is_fit = isinstance(value, list) and all(
      isinstance(v, kind) and not isinstance(v, bool) and v != '' for v in value
    )
    if not is_fit:
      raise self._wrong(key, value, f'a list of {kind.__name__}')
    return tuple(value)

  def names(self, key: str) -> str | Pattern | tuple[str, ...]:
    value = self.content.get(key)
    if not isinstance(value, str):
      return self.list(key, str)
    if key == 'target_modules' and value == ALL_LINEAR:
      return ALL_LINEAR
    return self.compile(key, value) if value else ()

  def patterns(self, key: str, read) -> tuple[tuple[Pattern, Any], ...]:
    value = self.content.get(key)
    if value is not None and not isinstance(value, dict):
      raise self._wrong(key, value, 'an object')
    return tuple(
      (self.compile(key, rf'(.*\.)?({p})$'), read(f'{key}[{p!r}]', v))
      for p, v in (value or {}).items()
    )

  def rank(self, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_RANK:
      raise self._wrong(key, value, f'a whole number from 1 to {_LARGEST_RANK}')
    return value

  def alpha(self, key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 1e-30 <= value <= 1e30):  # in float32, divided by a rank
      raise self._wrong(key, value, 'a positive number')
    return float(value)

  def compile(self, key: str, text: str) -> Pattern:
    return Pattern(text, f'{self.place}: {key}', self.clock)

  def _wrong(self, key: str, value: Any, expected: str) -> DataError:
    return DataError(f'{self.place}: {key}={repr(value)[:200]}; expected {expected}')
