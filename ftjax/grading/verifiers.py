"""The built-in rewards: each looks at one completion and returns a number.

What checks an answer pays 0 or 1. What shapes a text (length, repetition) is a penalty from -1 to
0, so that nothing is earned by being short or empty. A verifier is a frozen dataclass of its
arguments, with

  inputs    names of what `score` takes, in order: completions, prompts, token_ids, token_counts,
            is_truncated, or a column of the data; one that takes completions is also given the
            prompts, last: they may have opened a tag (final_answer.py)
  column    the one column among them; '' without one
  check     ValueError for a value of that column that no completion could equal
  isolated  whether it may hang, and so runs in a worker process with a time limit (rewards.py)
  warm      imports what the first score needs
  score     one completion's reward; ValueError where the data row is at fault

None runs model text as code, and none reads the network.
"""

import dataclasses
import difflib
import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from ftjax.grading.choice_answers import Choice
from ftjax.grading.final_answer import MAX_CHARS, final_answer, gold_text, opened, says_something
from ftjax.grading.math_answers import Math
from ftjax.grading.squad import normalize
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files


class Verifier(Protocol):
  """What every built-in is; see the top of the file."""

  inputs: tuple[str, ...]
  column: str
  isolated: bool

  def check(self, gold: Any) -> None: ...

  def warm(self) -> None: ...

  def score(self, *values: Any) -> float: ...


def need(package: str, what: str) -> None:
  """Raises ConfigError with the extra to install where a package is missing."""
  if importlib.util.find_spec(package) is None:
    raise ConfigError(
      f"{what} needs the package {package}; pip install '.[rewards]' in the checkout of ftjax"
    )


def _golds(value: Any, column: str) -> list[str]:
  """One gold answer, or a list of answers that are all right."""
  if isinstance(value, list) and value:
    return [gold_text(v, column) for v in value]
  return [gold_text(value, column)]


@dataclasses.dataclass(frozen=True)
class Quick:
  """A verifier that takes linear time and needs no worker, and asks for no column."""

  @property
  def column(self) -> str:
    return ''

  def check(self, gold: Any) -> None:
    """Nothing to check."""

  @property
  def isolated(self) -> bool:
    return False

  def warm(self) -> None:
    """Nothing to import."""


@dataclasses.dataclass(frozen=True)
class Answer(Quick):
  """A quick one that compares with a column of the data."""

  column: str = 'answer'

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('completions', self.column)

  def check(self, gold: Any) -> None:
    """Raises ValueError where it is neither a text or number nor a list of them."""
    _golds(gold, self.column)


@dataclasses.dataclass(frozen=True)
class Exact(Answer):
  """1 where the answer equals a gold one letter by letter, but for white space around."""

  def score(self, completion: str, gold: Any, prompt: str = '') -> float:
    text = final_answer(completion, prompt)
    return float(text is not None and text in _golds(gold, self.column))


@dataclasses.dataclass(frozen=True)
class Normalized(Answer):
  """1 where the answer equals a gold one after `normalize`."""

  def score(self, completion: str, gold: Any, prompt: str = '') -> float:
    text = final_answer(completion, prompt)
    if text is None:
      return 0.0
    given = normalize(text)
    for wanted in _golds(gold, self.column):
      # A gold of articles or marks alone would be matched by nothing at all.
      if (given == normalize(wanted)) if normalize(wanted) else (text == wanted):
        return 1.0
    return 0.0


@dataclasses.dataclass(frozen=True)
class Label(Answer):
  """1 where the answer is one label, the gold one: case and marks around it do not count.

  Attributes:
    labels: all there are; a gold label outside is an error of the data. Empty: not checked.
  """

  column: str = 'label'
  labels: tuple[str, ...] = ()

  def check(self, gold: Any) -> None:
    """Raises ValueError for a gold that is none of the labels."""
    self._gold(gold)

  def _gold(self, value: Any) -> str:
    wanted = gold_text(value, self.column)
    if self.labels and wanted not in self.labels:
      raise ValueError(f'column {self.column!r}: {wanted!r} is none of {self.labels}')
    return wanted

  def score(self, completion: str, gold: Any, prompt: str = '') -> float:
    wanted = self._gold(gold)
    text = final_answer(completion, prompt)
    if text is None:
      return 0.0
    given, wanted = (t.strip(' \t\n.,:;!*_`"\'').casefold() for t in (text, wanted))
    return float(bool(wanted) and given == wanted)


@functools.lru_cache(maxsize=64)
def _compile(pattern: str):
  need('re2', 'the reward regex')
  import re2

  options = re2.Options()
  options.log_errors = False
  try:
    return re2.compile(pattern, options)
  except re2.error as error:
    raise ConfigError(
      f'the reward regex: RE2 cannot read {pattern!r}: {error}; RE2 runs in linear time and has no '
      'look-around and no back-references'
    ) from error


@dataclasses.dataclass(frozen=True)
class Regex(Quick):
  """1 where the whole completion, stripped, matches a pattern of RE2 (linear time), as it stands or
  behind the tags that the end of the prompt opened. A blank completion matches no pattern."""

  pattern: str

  def __post_init__(self):
    _compile(self.pattern)

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('completions',)

  def score(self, completion: str, prompt: str = '') -> float:
    text = completion.strip()
    if not text or len(text) > MAX_CHARS:
      return 0.0
    texts = dict.fromkeys((text, (opened(prompt) + completion).strip()))
    return float(any(_compile(self.pattern).fullmatch(t) is not None for t in texts))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  out = dict(pairs)
  if len(out) != len(pairs):
    raise ValueError('a key stands twice')
  return out


def _no_constant(name: str) -> None:
  raise ValueError(f'{name} is no JSON')


_FENCE = re.compile(r'```[ \t]*[\w+.-]{0,20}[ \t]*\r?\n')


def read_json(text: str) -> Any:
  """RFC 8259 and no more: duplicate keys, NaN and Infinity are ValueErrors; a number too large for
  a float64, or nesting too deep, likewise. One ``` fence may stand around the whole, with the name
  of a language."""
  text = text.strip()
  if (fence := _FENCE.match(text)) and text.endswith('```'):
    text = text[fence.end() : -3]
  try:
    out = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    json.dumps(out, allow_nan=False)
  except RecursionError as error:
    raise ValueError('nested too deeply') from error
  return out


def _compile_patterns(schema: Any) -> None:
  """Raises re.error for a pattern that no text could be compared with; check_schema reads none."""
  if isinstance(schema, list):
    for item in schema:
      _compile_patterns(item)
  elif isinstance(schema, dict):
    if isinstance(schema.get('pattern'), str):
      re.compile(schema['pattern'])
    if isinstance(schema.get('patternProperties'), dict):
      for pattern in schema['patternProperties']:
        re.compile(pattern)
    for value in schema.values():
      _compile_patterns(value)


@functools.lru_cache(maxsize=16)
def _validator(path: str):
  need('jsonschema', 'the reward json_schema')
  import jsonschema
  import referencing

  try:
    schema = json.loads(files.read_bytes(path))
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    _compile_patterns(schema)
  except (OSError, ValueError, re.error, jsonschema.SchemaError) as error:
    raise ConfigError(f'the reward json_schema: {path}: {error}') from error
  # An empty registry of our own: the default one fetches a remote $ref.
  return kind(schema, registry=referencing.Registry())


@dataclasses.dataclass(frozen=True)
class JsonSchema:
  """1 where the answer is JSON that a schema accepts. Its `pattern`s are Python's and may take
  exponential time, hence the worker."""

  path: str

  def __post_init__(self):
    _validator(self.path)

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('completions',)

  @property
  def column(self) -> str:
    return ''

  def check(self, gold: Any) -> None:
    """Nothing to check."""

  @property
  def isolated(self) -> bool:
    return True

  def warm(self) -> None:
    self.score('{}')

  def score(self, completion: str, prompt: str = '') -> float:
    text = final_answer(completion, prompt)
    if text is None:
      return 0.0
    try:
      value = read_json(text)
    except ValueError:
      return 0.0
    return float(_validator(self.path).is_valid(value))


@dataclasses.dataclass(frozen=True)
class Length(Quick):
  """A penalty in [-1, 0] on the number of tokens n, stop token included.

  target: -min(1, |n - target| / target). at_most: -min(1, max(0, n - at_most) / at_most).
  """

  target: int = 0
  at_most: int = 0

  def __post_init__(self):
    if (self.target > 0) == (self.at_most > 0) or self.target < 0 or self.at_most < 0:
      raise ConfigError(
        f'the reward length: target={self.target}, at_most={self.at_most}; expected one of them, a '
        'positive number of tokens: length:at_most=256'
      )

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('token_counts',)

  def score(self, count: int) -> float:
    goal = self.target or self.at_most
    over = abs(count - goal) if self.target else max(0, count - goal)
    return -min(1.0, over / goal)


@dataclasses.dataclass(frozen=True)
class Repetition(Quick):
  """A penalty in [-1, 0]: minus the share of n-grams of tokens that stood before already,
  distinct / all - 1. A whole-sequence form of the n-gram penalty of Yeo et al. 2025
  (arXiv:2502.03373), which charges single tokens."""

  ngram: int = 3

  def __post_init__(self):
    if self.ngram < 1:
      raise ConfigError(f'the reward repetition: ngram={self.ngram}; expected at least 1')

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('token_ids',)

  def score(self, ids: Sequence[int]) -> float:
    grams = [tuple(ids[i : i + self.ngram]) for i in range(len(ids) - self.ngram + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


@dataclasses.dataclass(frozen=True)
class Format(Quick):
  """1 where each tag stands once, closed, one after the other, with words in it.

  Attributes:
    tags: think,answer means <think>..</think> and then <answer>..</answer>.
    only: nothing but white space may stand outside of them.
  """

  tags: tuple[str, ...]
  only: bool = False

  def __post_init__(self):
    names = [t.replace('_', '').replace('-', '') for t in self.tags]
    if not names or len(set(self.tags)) != len(names) or not all(n.isalnum() for n in names):
      raise ConfigError(
        f'the reward format: tags {self.tags}; expected different names like format:think,answer'
      )

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('completions',)

  def score(self, completion: str, prompt: str = '') -> float:
    if len(completion) > MAX_CHARS:
      return 0.0
    begun = opened(prompt)
    if any(f'<{tag}>' in begun for tag in self.tags):
      completion = begun + completion
    rest, outside = completion, ''
    for tag in self.tags:
      start, end = f'<{tag}>', f'</{tag}>'
      if completion.count(start) != 1 or completion.count(end) != 1:
        return 0.0
      before, found, after = rest.partition(start)
      inside, closed, rest = after.partition(end)
      if not (found and closed and says_something(inside)):
        return 0.0
      outside += before
    return float(not (self.only and (outside + rest).strip()))


# The class, and the field that takes arguments without a name: the rest of the text as it stands
# for a str, else comma-separated ones.
BUILTINS = {
  'math': (Math, 'mode'),
  'exact': (Exact, 'column'),
  'normalized': (Normalized, 'column'),
  'choice': (Choice, 'letters'),
  'label': (Label, 'labels'),
  'regex': (Regex, 'pattern'),
  'json_schema': (JsonSchema, 'path'),
  'length': (Length, None),
  'repetition': (Repetition, 'ngram'),
  'format': (Format, 'tags'),
}
# Their argument is one text, commas and equals signs included.
_WHOLE = ('regex', 'json_schema')


def nearest(name: str, known: Sequence[str]) -> str:
  """'; did you mean X?' for a message, or ''."""
  found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f'; did you mean {found[0]}?' if found else ''


def build(name: str, text: str) -> Verifier:
  """A built-in from what stands behind its name: 'think,answer,only=true'.

  Raises:
    ConfigError: an argument that it does not have, or a value of another type.
  """
  kind, unnamed = BUILTINS[name]
  types = {f.name: f.type for f in dataclasses.fields(kind)}
  if name in _WHOLE:
    if not text:
      raise ConfigError(f'the reward {name} needs its {unnamed}: {name}:{unnamed.upper()}')
    return kind(text)
  values, loose = {}, []
  for item in filter(None, (t.strip() for t in text.split(','))):
    key, equals, value = (t.strip() for t in item.partition('='))
    if not equals:
      loose.append(item)
    elif key not in types or key == unnamed == 'tags' or key in values:
      raise ConfigError(
        f'the reward {name}: {item!r}; expected arguments among {sorted(types)}, each once'
        f'{nearest(key, list(types))}'
      )
    else:
      values[key] = _read(name, key, value, types[key])
  if loose:
    many = unnamed is not None and types[unnamed] == tuple[str, ...]
    if unnamed is None or unnamed in values or (len(loose) > 1 and not many):
      raise ConfigError(
        f'the reward {name}: cannot place {loose}; expected NAME=VALUE with names among '
        f'{sorted(types)}'
      )
    values[unnamed] = tuple(loose) if many else _read(name, unnamed, loose[0], types[unnamed])
  if name == 'format' and 'tags' not in values:
    raise ConfigError('the reward format needs its tags: format:think,answer')
  return kind(**values)


def _read(name: str, key: str, text: str, kind: type) -> Any:
  try:
    if kind is bool:
      return {'true': True, 'false': False}[text.lower()]
    return (text,) if kind == tuple[str, ...] else kind(text)
  except (ValueError, KeyError) as error:
    raise ConfigError(f'the reward {name}: {key}={text!r}; expected {kind.__name__}') from error
