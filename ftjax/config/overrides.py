"""`--config.KEY=VALUE` on a command line: removed from the arguments, parsed by the type of
the key, and set in a config.
"""

import ast
import dataclasses
from typing import Any

from ftjax.config import custom_keys, keys
from ftjax.config import section as config_section
from ftjax.runtime.errors import ConfigError

_TRUE = ('true', 't', '1', 'yes', 'y', 'on')
_FALSE = ('false', 'f', '0', 'no', 'n', 'off')
_PREFIXES = ('--config.', '-config.')
_NEGATED = ('--noconfig.', '-noconfig.')
# Keys that take several short names, which may be separated by commas without brackets.
_LISTS = ('log.sinks', 'eval.tasks')


@dataclasses.dataclass(frozen=True)
class Override:
  """One `--config.key=text`; text is None for `--config.key` alone."""

  key: str
  text: str | None


def split(arguments: list[str]) -> tuple[list[str], list[Override]]:
  """Returns a command line without its overrides, and the overrides. Arguments after '--' stay.

  Raises:
    ConfigError: an override without a value, or with blanks around '='.
  """
  kinds = {k: type(v) for k, v in config_section.flat(keys.default()).items()}
  rest, overrides, words = [], [], list(arguments)
  while words:
    word = words.pop(0)
    if word == '--':
      return [*rest, word, *words], overrides
    if word.startswith(_NEGATED):
      key, equals, _ = word.partition('.')[2].partition('=')
      if equals or kinds.get(key) is not bool:
        raise ConfigError(f'{word}: expected --noconfig.KEY, of a key that is True or False')
      overrides.append(Override(key, 'false'))
    elif word.startswith(_PREFIXES):
      key, equals, text = word.partition('.')[2].partition('=')
      if not equals:
        text = _next_value(key, kinds.get(key), words)
      elif not text and kinds.get(key) in (int, float, bool):
        following = f'={words[0]}' if words and not words[0].startswith('--') else '=VALUE'
        raise ConfigError(
          f'--config.{key}= has no value; write --config.{key}{following}, without blanks'
        )
      overrides.append(Override(key, text))
    else:
      rest.append(word)
  return rest, overrides


def _next_value(key: str, kind: type | None, words: list[str]) -> str | None:
  """Removes the value of `--config.key VALUE` from `words` and returns it; None for a bool without
  one.
  """
  following = words[0] if words else '--'
  if following.startswith('='):
    value = following[1:] or (words[1] if len(words) > 1 else 'VALUE')
    raise ConfigError(f'--config.{key} {following}: write --config.{key}={value}, without blanks')
  if kind is bool and following.lower() not in (*_TRUE, *_FALSE):
    return None
  if following.startswith('--'):
    raise ConfigError(f'--config.{key} has no value; write --config.{key}=VALUE')
  return words.pop(0)


def apply(c: config_section.Section, overrides: list[Override]) -> None:
  """Sets the keys. A tuple's flag that is given several times joins its values; of every other flag
  the last one counts.

  Raises:
    ConfigError: no such key, or a value that it cannot take.
  """
  joined: dict[str, tuple] = {}
  # Those of `custom` last: their types are in the module of the algorithm, which is imported then.
  for override in sorted(overrides, key=lambda o: o.key.startswith('custom.')):
    if override.key.startswith('custom.'):
      custom_keys.complete(c)
    value = _read(c, override)
    if isinstance(value, tuple) and not _is_object(c, override.key):
      value = joined[override.key] = joined.get(override.key, ()) + value
    _set(c, override, value)


def _set(c: config_section.Section, override: Override, value: Any) -> None:
  section, _, name = override.key.rpartition('.')
  try:
    (c[section] if section else c)[name] = value
  except ConfigError as error:
    raise ConfigError(f'--config.{override.key}: {error}') from error
  c.places()[override.key] = ''  # no line of a file


def _read(c: config_section.Section, override: Override) -> Any:
  """Returns the value that a text means for its key."""
  key, text = override.key, override.text
  shown = f'--config.{key}' + ('' if text is None else f'={text}')
  if key in config_section.RANDOM_KEYS or key == 'model.random':
    return _literal(text or '', shown, wants='a literal such as 32, or a dict for all keys')
  known = config_section.flat(c)
  if key not in known:
    if any(k.startswith(f'{key}.') for k in known):
      example = next(k for k in known if k.startswith(f'{key}.'))
      raise ConfigError(
        f'{shown}: {key} is a section; set one of its keys, such as --config.{example}='
        f'{known[example]}{config_section.hint(key, c) if key == "optim" else ""}'
      )
    raise ConfigError(f'--config.{key}: there is no such key{config_section.hint(key, c)}')
  usual = known[key]
  if isinstance(usual, bool):
    return _bool(text, shown)
  if isinstance(usual, int | float):
    return _number(text, shown, usual)
  if isinstance(usual, tuple) and not _is_object(c, key):
    return _tuple(key, text, shown)
  if text in ('None', 'null'):
    raise ConfigError(f'{shown}; expected a text; an empty one, --config.{key}=, means none')
  if _is_object(c, key) and text.startswith(('(', '[')):
    return _literal(text, shown, wants='a tuple')
  return text


def _is_object(c: config_section.Section, key: str) -> bool:
  """Returns whether a key takes a text or a tuple."""
  section, _, name = key.rpartition('.')
  return (c[section] if section else c).get_type(name) is object


def _bool(text: str | None, shown: str) -> bool:
  if text is None or text.lower() in _TRUE:
    return True
  if text.lower() in _FALSE:
    return False
  raise ConfigError(f'{shown}; expected true or false')


def _number(text: str, shown: str, usual: int | float) -> int | float:
  """Returns the number of a text; an integer may be written 1e3 or 8.0, and with underscores."""
  try:
    if isinstance(usual, float):
      return float(text)
    try:
      return int(text, 0)
    except ValueError:
      number = float(text)
      if number.is_integer():
        return int(number)
  except (ValueError, OverflowError):
    pass
  what = 'an integer' if isinstance(usual, int) else 'a number'
  raise ConfigError(f'{shown}; expected {what} such as {usual!r}')


def _literal(text: str, shown: str, wants: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
    if text[:1] not in ('(', '[', '{', '') and wants != 'a tuple':
      return text
    raise ConfigError(
      f"{shown}; expected {wants}, with its texts in quotes, such as \"('a', 'b')\""
    ) from error


def _tuple(key: str, text: str, shown: str) -> tuple:
  """Returns the tuple of a Python tuple or list, of a quoted text, or of one unquoted text."""
  if not text:
    return ()
  if text.startswith(('(', '[', "'", '"')):
    value = _literal(text, shown, wants='a tuple') if text[0] in '([' else _quoted(text)
    if isinstance(value, str):
      return (value,) if value else ()
    if isinstance(value, tuple | list):
      return tuple(value)
    return (text,)
  return tuple(text.split(',')) if key in _LISTS else (text,)


def _quoted(text: str) -> Any:
  """Returns the Python text or tuple in quotes; a text that only begins with a quote, unchanged."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
