"""The built-in rewards: each maps one completion to a number.

Rewards that check an answer return 0 or 1. Those that shape a text (length, repetition) are
penalties from -1 to 0, so that a short or empty text is not rewarded. A verifier is a frozen
dataclass of its arguments, with

  inputs    parameters of `score`, in order: completions, prompts, token_ids, token_counts,
            is_truncated, or a column of the data; after completions the prompts are passed too, as
            the last argument: they may have opened a tag (final_answer.py)
  column    the one column among them; '' without one
  check     raises ValueError for a value of that column that no completion could equal
  isolated  whether it may hang, and so runs in a worker process with a time limit (rewards.py)
  warm      imports what the first score needs
  score     returns the reward of one completion; raises ValueError for a wrong data row

No reward executes generated text or accesses the network.
"""

import dataclasses
import difflib
import functools
import importlib.util
import json
from collections.abc import Sequence
from typing import Any, Protocol

from ftjax.grading.choice_answers import Choice
from ftjax.grading.final_answer import MAX_CHARS, final_answer, gold_text, has_text, opened
from ftjax.grading.json_text import compile_schema, read_json
from ftjax.grading.math_answers import Math
from ftjax.grading.squad import normalize
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files


class Verifier(Protocol):
  """The interface of built-in rewards; see the top of the file."""

  inputs: tuple[str, ...]
  column: str
  isolated: bool

  def check(self, gold: Any) -> None: ...

  def warm(self) -> None: ...

  def score(self, *values: Any) -> float: ...


def need(package: str, what: str) -> None:
  """Raises ConfigError with the extra to install if a package is missing."""
  if importlib.util.find_spec(package) is None:
    raise ConfigError(
      f"{what} needs the package {package}; pip install '.[rewards]' in the checkout of ftjax"
    )


def _golds(value: Any, column: str) -> list[str]:
  """Returns the gold answers: one, or a list of which any is right."""
  if isinstance(value, list) and value:
    return [gold_text(v, column) for v in value]
  return [gold_text(value, column)]


@dataclasses.dataclass(frozen=True)
class Quick:
  """A verifier of linear time, which needs no worker process and no column."""

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
  """A quick verifier that compares with a column of the data."""

  column: str = 'answer'

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('completions', self.column)

  def check(self, gold: Any) -> None:
    """Raises ValueError unless it is a text, a number, or a list of them."""
    _golds(gold, self.column)


@dataclasses.dataclass(frozen=True)
class Exact(Answer):
  """Reward 1 if the answer equals a gold answer exactly, except for surrounding white space."""

  def score(self, completion: str, gold: Any, prompt: str = '') -> float:
    text = final_answer(completion, prompt)
    return float(text is not None and text in _golds(gold, self.column))


@dataclasses.dataclass(frozen=True)
class Normalized(Answer):
  """Reward 1 if the answer equals a gold answer after `normalize`."""

  def score(self, completion: str, gold: Any, prompt: str = '') -> float:
    text = final_answer(completion, prompt)
    if text is None:
      return 0.0
    given = normalize(text)
    for wanted in _golds(gold, self.column):
      # A gold answer of articles or punctuation only would equal an empty text.
      if (given == normalize(wanted)) if normalize(wanted) else (text == wanted):
        return 1.0
    return 0.0


@dataclasses.dataclass(frozen=True)
class Label(Answer):
  """Reward 1 if the answer is the gold label; case and surrounding punctuation are ignored.

  Attributes:
    labels: all labels; any other gold label is an error in the data. Empty: not checked.
  """

  column: str = 'label'
  labels: tuple[str, ...] = ()

  def check(self, gold: Any) -> None:
    """Raises ValueError for a gold label that is none of the labels."""
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
  """Reward 1 if the whole completion, stripped, matches an RE2 pattern (linear time), by itself or
  after the tags that the end of the prompt opened. A blank completion gets 0."""

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


@functools.lru_cache(maxsize=16)
def _validator(path: str):
  need('jsonschema', 'the reward json_schema')
  try:
    return compile_schema(json.loads(files.read_bytes(path)))
  except (OSError, ValueError) as error:
    raise ConfigError(f'the reward json_schema: {path}: {error}') from error


@dataclasses.dataclass(frozen=True)
class JsonSchema:
  """Reward 1 if the answer is JSON that a schema accepts. Its `pattern`s are Python regular
  expressions, which may take exponential time, hence the worker process."""

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
  """A penalty in [-1, 0]: (distinct n-grams of tokens) / (all n-grams) - 1. The whole-sequence form
  of the per-token n-gram penalty of Yeo et al. 2025 (arXiv:2502.03373)."""

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
  """Reward 1 if each tag occurs once, closed, in the given order, with text in it.

  Attributes:
    tags: think,answer means <think>..</think> and then <answer>..</answer>.
    only: whether only white space is allowed outside of the tags.
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
      if not (found and closed and has_text(inside)):
        return 0.0
      outside += before
    return float(not (self.only and (outside + rest).strip()))


# The class, and the field that takes arguments without a name: for a str the rest of the text, else
# comma-separated values.
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
  """Returns '; did you mean X?' for a message, or ''."""
  found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f'; did you mean {found[0]}?' if found else ''


def build(name: str, text: str) -> Verifier:
  """Returns a built-in reward from the text after its name: 'think,answer,only=true'.

  Raises:
    ConfigError: an unknown argument, or a value of another type.
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
