"""The config object: sections of named values that refuse an unknown key, a wrong type and a value
that no file can hold at the line where they are assigned, and remember that line.
"""

import difflib
import json
import numbers
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from ftjax.config import hints
from ftjax.runtime.errors import ConfigError

# Of model.random, in the keys of a HF config.json.
RANDOM_REQUIRED = (
  'hidden_size',
  'num_hidden_layers',
  'num_attention_heads',
  'intermediate_size',
)
_RANDOM_OPTIONAL = (
  'model_type',
  'vocab_size',
  'num_key_value_heads',
  'head_dim',
  'rms_norm_eps',
  'rope_theta',
  'rope_scaling',
  'tie_word_embeddings',
  'max_position_embeddings',
  # Of some families, which check them.
  'hidden_act', 'attention_bias', 'mlp_bias', 'layer_types', 'use_sliding_window', 'sliding_window',
  'max_window_layers', 'no_rope_layers', 'no_rope_layer_interval', 'partial_rotary_factor',
  'original_max_position_embeddings', 'rope_parameters', 'embedding_multiplier',
  'attention_multiplier', 'residual_multiplier', 'logits_scaling', 'shared_intermediate_size',
  'num_local_experts', 'position_embedding_type',
)  # fmt: skip
_RANDOM_GPT2 = ('n_embd', 'n_layer', 'n_head')  # required
_RANDOM_GPT2_OPTIONAL = (
  'n_inner', 'n_positions', 'activation_function', 'layer_norm_epsilon', 'scale_attn_weights',
  'scale_attn_by_inverse_layer_idx',
)  # fmt: skip
_RANDOM_T5 = ('d_model', 'd_kv', 'd_ff', 'num_heads', 'num_layers')  # required
_RANDOM_T5_OPTIONAL = (
  'num_decoder_layers', 'feed_forward_proj', 'layer_norm_epsilon', 'scale_decoder_outputs',
  'relative_attention_num_buckets', 'relative_attention_max_distance',
)  # fmt: skip
RANDOM_KEYS = tuple(
  f'model.random.{k}'
  for keys in (
    *(RANDOM_REQUIRED, _RANDOM_OPTIONAL, _RANDOM_GPT2, _RANDOM_GPT2_OPTIONAL),
    *(_RANDOM_T5, _RANDOM_T5_OPTIONAL),
  )
  for k in keys
)


def random_required(model_type: str) -> tuple[str, ...]:
  """Returns the keys that model.random must have."""
  own = {'gpt2': _RANDOM_GPT2, 't5': _RANDOM_T5, 'mt5': _RANDOM_T5}
  return own.get(model_type, RANDOM_REQUIRED)


# Sections that take keys which `default()` does not have. Those of `custom` are checked when the
# algorithm's module is imported, by validation.py.
_OPEN_SECTIONS = ('model.random', 'custom')
_CUSTOM = 'custom.'

_EXPECTED = {
  bool: 'True or False',
  int: 'an integer',
  float: 'a number',
  str: 'a text',
  tuple: 'a tuple',
}
_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_HERE)
_CONFIGS = os.path.join(_PACKAGE, 'configs')
_LIBRARIES = tuple(
  os.path.abspath(path) + os.sep
  for path in {_PACKAGE, *(sysconfig.get_path(n) for n in ('stdlib', 'platstdlib', 'purelib'))}
)


class NoSuchKey(ConfigError, AttributeError, KeyError):
  """A key or section that does not exist was read or assigned.

  Attributes:
    key: its dotted name.
  """

  def __init__(self, key: str, c: ml_collections.ConfigDict):
    super().__init__(f'{key}: there is no such key{hint(key, c)}')
    self.key = key

  __str__ = ConfigError.__str__  # KeyError's is a repr


class Section(ml_collections.ConfigDict):
  """A ConfigDict whose mistakes are ConfigErrors with the dotted key, at the assignment."""

  def __init__(self, initial_dictionary: Mapping[str, Any] | None = None, type_safe: bool = True):
    for name, value in (('_parent', None), ('_name', ''), ('_places', {})):
      object.__setattr__(self, name, value)
    super().__init__(initial_dictionary, type_safe)

  def root(self) -> 'Section':
    """Returns the whole config that this section is part of."""
    return self if self._parent is None else self._parent.root()

  def dotted(self, key: str) -> str:
    """Returns the name of one of its keys from the root."""
    above = '' if self._parent is None else self._parent.dotted(self._name)
    return f'{above}.{key}' if above else str(key)

  def places(self) -> dict[str, str]:
    """Returns {dotted key: 'FILE:LINE' of the user's file that assigned it last}; '' for other
    assignments.
    """
    return self.root()._places

  def __getattr__(self, attribute):
    if attribute.startswith('_'):  # probes of copy, pickle and notebooks
      raise AttributeError(attribute)
    return self[attribute]

  def __setattr__(self, attribute, value):
    if attribute.startswith('_'):
      raise NoSuchKey(self.dotted(attribute), self.root())
    self[attribute] = value

  def __getitem__(self, key):
    if isinstance(key, str) and '.' not in key and key not in self._fields:
      raise NoSuchKey(self.dotted(key), self.root())
    return super().__getitem__(key)

  def __setitem__(self, key, value):
    name = self.dotted(key)
    is_open = name in RANDOM_KEYS or name.startswith(_CUSTOM)
    if self.is_locked and key not in self._fields and not is_open:
      raise NoSuchKey(name, self.root())
    if name in _OPEN_SECTIONS and key in self._fields:
      value = self._open_section(name, value)
    elif is_open:
      _check_open(name, value)
      if isinstance(value, Mapping):
        value = ml_collections.ConfigDict(value)
    elif key in self._fields and self.is_type_safe:
      value = self._checked(name, value, self._fields[key])
    if is_open and self.is_locked:
      with self.unlocked():
        super().__setitem__(key, value)
    else:
      super().__setitem__(key, value)
    if isinstance(value, Section):
      object.__setattr__(value, '_parent', self)
      object.__setattr__(value, '_name', key)
    self.places()[name] = _assigned_at()

  def _open_section(self, name: str, value: Mapping[str, Any]) -> 'Section':
    """Returns a section of _OPEN_SECTIONS with the keys of a dict; raises NoSuchKey for a key that
    model.random does not have.
    """
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
      wanted = f' with the keys {", ".join(RANDOM_REQUIRED)}' if name == 'model.random' else ''
      raise ConfigError(f'{name}={_shown(value)}; expected a dict{wanted}')
    out = Section()
    for key, item in value.items():
      if name == 'model.random' and f'model.random.{key}' not in RANDOM_KEYS:
        raise NoSuchKey(f'model.random.{key}', self.root())
      _check_open(f'{name}.{key}', item)
      out[key] = item
    return out

  @staticmethod
  def _checked(name: str, value: Any, held: Any) -> Any:
    """Returns the value as it is kept, of the type of the one that is `held`."""
    if isinstance(value, config_dict.FieldReference):
      return value
    kind = held.get_type() if isinstance(held, config_dict.FieldReference) else type(held)
    if kind is Section:
      if isinstance(value, Section) and set(value.keys()) == set(held.keys()):
        return value
      key = min(held.keys())
      raise ConfigError(
        f'{name} is a section: assign its keys one by one, such as {name}.{key} = {held[key]!r}'
        f'{hints.find(name)}'
      )
    return checked(name, value, kind, held)


def checked(name: str, value: Any, kind: type, usual: Any) -> Any:
  """Returns `value` as it is kept under the key `name`, whose values have the type `kind`.

  Integers become floats, lists become tuples and paths become texts where those types are expected;
  nothing else is converted.

  Raises:
    ConfigError: another type; names the key, what was got and what was expected.
  """
  if value is None:
    usual = usual.get() if isinstance(usual, config_dict.FieldReference) else usual
    raise ConfigError(f'{name}=None; expected a value like the default, {usual!r}')
  if kind is bool and isinstance(value, bool):
    return value
  if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
    return int(value)
  if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
    return float(value)
  if kind is str and isinstance(value, str | os.PathLike):
    return os.fspath(value)
  if kind is tuple and isinstance(value, tuple | list):
    _check_plain(name, value)
    return tuple(value)
  if kind not in _EXPECTED:
    _check_plain(name, value)
    return value
  raise ConfigError(
    f'{name}={_shown(value)}; expected {_EXPECTED[kind]}{_remedy(value, kind, usual)}'
  )


def _remedy(value: Any, kind: type, usual: Any) -> str:
  """Returns a hint on what to write instead of a value of the wrong type."""
  if isinstance(value, tuple) and len(value) == 1 and kind in (int, float, bool, str):
    return ': a comma at the end of the line makes a tuple; remove it'
  if isinstance(value, str) and kind in (int, float, bool):
    try:
      return f', without quotes: {kind(float(value)) if kind is not bool else bool(_BOOLS[value])}'
    except (ValueError, OverflowError, KeyError):
      return f' like the default, {usual!r}'
  if kind is int and isinstance(value, float) and value.is_integer():
    return f': write {int(value)}'
  if kind is bool and isinstance(value, int) and value in (0, 1):
    return f': write {bool(value)}'
  if kind is tuple and isinstance(value, str):
    return f': write ({value!r},), with a comma'
  return f' like the default, {usual!r}'


_BOOLS = {'True': 1, 'true': 1, 'yes': 1, 'on': 1, 'False': 0, 'false': 0, 'no': 0, 'off': 0}


def _shown(value: Any) -> str:
  """Returns a value as one line for a message; other than numbers, texts and lists by type."""
  if callable(value) or not isinstance(value, str | int | float | tuple | list | dict):
    name = getattr(value, '__name__', '')
    return f'{name} (a {type(value).__name__})' if name else f'<a {type(value).__name__}>'
  text = ' '.join(repr(value).split())
  return text if len(text) <= 80 else f'{text[:77]}...'


def _check_plain(name: str, value: Any) -> None:
  """Raises ConfigError for what config.json cannot hold: functions, arrays, sets, None inside."""
  if isinstance(value, str | bool | int | float):
    return
  if isinstance(value, tuple | list):
    for i, item in enumerate(value):
      _check_plain(f'{name}[{i}]', item)
    return
  if isinstance(value, Mapping | ml_collections.ConfigDict):
    for key, item in value.items():
      _check_plain(f'{name}[{key!r}]', item)
    return
  remedy = ''
  if callable(value):
    remedy = "; name a function as the text 'module:function'"
  elif isinstance(value, os.PathLike):
    remedy = '; write str(path)'
  raise ConfigError(
    f'{name}={_shown(value)}; expected texts, numbers, True, False, and tuples of these{remedy}'
  )


def _check_open(name: str, value: Any) -> None:
  """Runs `_check_plain` for a key of _OPEN_SECTIONS. In a config.json null is a value."""
  if value is not None or name.startswith(_CUSTOM):
    _check_plain(name, value)


def is_library_code(filename: str) -> bool:
  """Returns whether a file of a traceback belongs to Python, a package or ftjax, and not to the
  user. The shipped configs count as the user's.
  """
  path = os.path.abspath(filename)
  if filename.startswith('<') or path.startswith(_CONFIGS + os.sep):
    return filename.startswith('<')
  return path.startswith(_LIBRARIES)


def _assigned_at() -> str:
  """Returns FILE:LINE in the user's code of the current assignment; '' for one of ftjax itself."""
  frame = sys._getframe(2)
  while frame is not None:
    name = frame.f_code.co_filename
    if not is_library_code(name):
      return f'{name}:{frame.f_lineno}'
    if frame.f_code.co_name == 'default' and os.path.dirname(name) == _HERE:
      return ''
    frame = frame.f_back
  return ''


def place_of(message: str, c: Section) -> str:
  """Returns FILE:LINE that set the first key in a message of `validate`; '' where none did."""
  known = sorted(c.places(), key=len, reverse=True)
  pattern = '|'.join(re.escape(k) for k in known if '.' in k)
  pattern += '|(?:' + '|'.join(re.escape(k) for k in known if '.' not in k) + ')(?==)'
  found = re.search(rf'(?<![\w.])({pattern})(?!\w|\.\w)', message) if known else None
  return c.places().get(found[1], '') if found else ''


def flat(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns {dotted key: value}."""
  out = {}
  for key, value in c.items():
    if isinstance(value, ml_collections.ConfigDict) and key != 'random':
      out |= {f'{key}.{k}': v for k, v in flat(value).items()}
    else:
      out[key] = value
  return out


def plain(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns `flat` in JSON values, for config.json and for comparisons."""
  return json.loads(json.dumps(flat(c), default=lambda v: v.to_dict()))


def nearest(key: str, c: ml_collections.ConfigDict) -> str:
  """Returns the known key most similar to a misspelt one, for a message; '' when none is."""
  known = [*flat(c), *RANDOM_KEYS]
  known += [k for k, v in c.items() if isinstance(v, ml_collections.ConfigDict)]
  head, _, last = key.rpartition('.')
  same = [k for k in known if k.rpartition('.')[2] == last]  # under another section
  by_section = {k.rpartition('.')[0]: k for k in same}
  if same:
    section = difflib.get_close_matches(head, by_section, n=1, cutoff=0.5)
    found = [by_section[section[0]]] if section else [by_section.get('', same[0])]
  else:
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  if not found:
    found = [
      k for k in known if difflib.get_close_matches(last, [k.rsplit('.', 1)[-1]], cutoff=0.75)
    ][:1]
  return f'; did you mean {found[0]}?' if found else ''


def hint(key: str, c: ml_collections.ConfigDict) -> str:
  """Returns a hint for a name that is no key here: the key of that meaning where other tools have
  the name, else the nearest key; '' for neither.
  """
  return hints.find(key) or nearest(key, c)
