"""Reads prompts to sample from, with the columns of their rows for the rewards.

A row has a prompt (prompt_rows.py) and any other columns. The text of an answer in the row (a last
message by the assistant, `completion`, `output`) becomes the column `answer` unless there is one.
All prompts are kept in memory. `order.py` orders them, one a row.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from typing import Any

import numpy as np

from ftjax.data import encode, prompt_rows, row_counts, sources
from ftjax.data.formats import PROMPT_KEYS, Bad, Chat
from ftjax.data.row_counts import Reasons
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime import strict_json
from ftjax.runtime.errors import ConfigError, DataError

log = logging.getLogger(__name__)

ON_OVERLENGTH = ('error', 'drop')
# Columns of the prompt that are kept for writing the row again with another answer.
_KEPT = ('tools', 'functions', 'chat_template_kwargs')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt.

  Attributes:
    ids: its tokens.
    columns: the other columns of its row, JSON values.
    place: file and line, 'file.jsonl:17'.
    text: the prompt as text, or as messages.
  """

  ids: list[int]
  columns: dict[str, Any]
  place: str
  text: str | list[dict[str, Any]] = ''


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The prompts of one source, in its order.

  Attributes:
    name: the source's name.
    rows: its prompts.
    dropped: number of rows left out for their length.
    fingerprint: sha256 hex of ids and columns in order.
    bad: number of rows left out by data.on_bad_row='drop'. bad_reasons: `Reasons.as_list`.
    unrendered: number of rows with content that the template does not render, kept by 'warn'.
    unread: columns that are not JSON values and so reach no reward, sorted.
    file_names: the files that `bad_reasons` refers to.
  """

  name: str
  rows: tuple[Prompt, ...]
  dropped: int
  fingerprint: str
  bad: int = 0
  bad_reasons: tuple[dict[str, Any], ...] = ()
  unrendered: int = 0
  unread: tuple[str, ...] = ()
  file_names: tuple[str, ...] = ()

  @property
  def lengths(self) -> np.ndarray:
    """The number of tokens of each prompt, int32[n]."""
    return np.array([len(p.ids) for p in self.rows], np.int32)

  @property
  def columns(self) -> tuple[str, ...]:
    """The names of the columns that every row has, sorted."""
    return tuple(sorted(set.intersection(*(set(p.columns) for p in self.rows))))


class _Reader:
  """One pass over the rows of a source."""

  def __init__(self, spec: Spec, tokenizer: Tokenizer, room: int, policies: dict[str, str]):
    self._spec, self._tokenizer, self._room, self._policies = spec, tokenizer, room, policies
    self.rows: list[Prompt] = []
    self.bad, self.refused = Reasons(), Reasons()
    self.dropped = self.unrendered = self.seen = 0
    self.unread: set[str] = set()
    self._digest = hashlib.sha256(b'ftjax prompts 1\n')

  @property
  def fingerprint(self) -> str:
    return self._digest.hexdigest()

  def add(self, row: sources.Row | Bad, at: tuple[int, int], place: str) -> None:
    """Reads one row; `at` is its (file number, line)."""
    self.seen += 1
    if isinstance(row, Bad):
      self.bad.add(row.reason, at)
      return
    try:
      found = prompt_rows.read_prompt(row, self._tokenizer.template is not None, self._spec.format)
      ids, hidden = self._encode(found.asked)
      if not ids:
        raise ValueError('the prompt has no tokens')
    except ValueError as error:
      self.bad.add(str(error), at)
      return
    if hidden:
      if self._policies['on_unrendered'] == 'error':
        self.refused.add(hidden, at)
        return
      self.unrendered += 1
    if len(ids) > self._room:
      self._too_long(len(ids), at)
      return
    columns, line = self._columns(row, found, ids)
    text = list(found.asked.messages) if isinstance(found.asked, Chat) else found.asked
    self.rows.append(Prompt(ids, columns, place, text))
    self._digest.update(line.encode() + b'\n')

  def _encode(self, asked: Chat | str) -> tuple[list[int], str | None]:
    """Returns (ids, reason why the template does not render all of it, or None)."""
    try:
      return encode.encode_prompt(asked, self._tokenizer), None
    except ValueError as error:
      # A conversation that the template refuses raises again; content that it drops does not.
      return encode.encode_prompt(asked, self._tokenizer, on_unrendered='warn'), str(error)

  def _too_long(self, tokens: int, at: tuple[int, int]) -> None:
    if self._policies['on_overlength'] == 'drop':
      self.dropped += 1
      return
    self.refused.add(
      f'a prompt of {tokens} tokens, and rollout.max_tokens leaves {self._room} of seq_len; '
      "raise seq_len or set data.on_overlength='drop'",
      at,
    )

  def _columns(
    self, row: sources.Row, found: prompt_rows.Prompt, ids: list[int]
  ) -> tuple[dict[str, Any], str]:
    """Returns (columns for the rewards, line of the fingerprint)."""
    columns = {
      k: v for k, v in row.items() if (k not in found.read and k != 'prompt') or k in _KEPT
    }
    if found.answer is not None:
      columns.setdefault('answer', found.answer)
    try:
      return columns, json.dumps([ids, columns], sort_keys=True)
    except (TypeError, ValueError):  # for example bytes of an image
      good = {k: v for k, v in columns.items() if strict_json.is_json(v)}
      self.unread |= columns.keys() - good.keys()
      return good, json.dumps([ids, good], sort_keys=True)


def _check_policies(spec: Spec, policies: dict[str, str]) -> None:
  if (got := policies['on_overlength']) not in ON_OVERLENGTH:
    raise ConfigError(
      f'data.on_overlength={got!r}; prompts are not cut, expected one of {ON_OVERLENGTH}'
    )
  for key, choices in (('on_bad_row', ('error', 'drop')), ('on_unrendered', ('error', 'warn'))):
    if policies[key] not in choices:
      raise ConfigError(f'data.{key}={policies[key]!r}; expected one of {choices}')
  if spec.format not in (None, *PROMPT_KEYS):
    raise ConfigError(
      f"data: {spec.path}::{spec.format} holds no prompts; expected rows with 'prompt' or "
      f"'messages', or one of the formats {list(PROMPT_KEYS)}"
    )


def read(
  spec: Spec,
  tokenizer: Tokenizer,
  room: int,
  on_overlength: str,
  limit: int | None = None,
  *,
  on_bad_row: str = 'error',
  on_unrendered: str = 'error',
) -> Prompts:
  """Reads all prompts of a source.

  Args:
    spec: a source; formats other than those of PROMPT_KEYS are refused.
    tokenizer: the tokenizer, with a template where there are messages.
    room: the most tokens of a prompt.
    on_overlength: 'error' or 'drop'.
    limit: the most rows to read; None: all.
    on_bad_row: policy for unusable rows: 'error', or 'drop', counted and listed.
    on_unrendered: policy for rows with content that the template does not render: 'error', or
      'warn' to use the rest of them, counted.

  Raises:
    ConfigError: another policy, or a format without prompts.
    DataError: unusable rows, by reason, file and line; no prompt left.
  """
  policies = {
    'on_overlength': on_overlength, 'on_bad_row': on_bad_row, 'on_unrendered': on_unrendered
  }  # fmt: skip
  _check_policies(spec, policies)
  names = sources.source_names(spec)
  reader = _Reader(spec, tokenizer, room, policies)
  for number, line, row in itertools.islice(sources.scan(spec), limit):
    reader.add(row, (number, line), f'{names[number]}:{line}')
  errors = Reasons(reader.refused.as_list())
  if on_bad_row == 'error':
    errors.update(reader.bad)
  if errors.rows:
    found = sorted(errors.as_list(), key=lambda entry: entry['places'][0])
    raise DataError(
      f'{spec.path}: rows that cannot be used: {errors.rows:,} of {reader.seen:,}:\n'
      + row_counts.listing(found, names)
    )
  reasons = reader.bad.as_list()
  if not reader.rows:
    listed = '\n' + row_counts.listing(reasons, names) if reasons else ''
    raise DataError(
      f'{spec.path}: no prompt in it ({reader.dropped} were longer than {room} tokens, '
      f'{reader.bad.rows} could not be used){listed}'
    )
  result = Prompts(
    spec.path,
    tuple(reader.rows),
    reader.dropped,
    reader.fingerprint,
    bad=reader.bad.rows,
    bad_reasons=tuple(reasons),
    unrendered=reader.unrendered,
    unread=tuple(sorted(reader.unread)),
    file_names=tuple(names),
  )
  _log(result)
  return result


def _log(found: Prompts) -> None:
  """Logs which columns reach the rewards, and which rows were left out."""
  log.info('%s: columns for rewards: %s', found.name, ', '.join(found.columns) or 'none')
  if found.unread:
    log.warning('%s: columns not read: %s', found.name, ', '.join(found.unread))
  if found.unrendered:
    log.warning(
      "%s: data.on_unrendered='warn': the chat template does not render all content of %d prompts",
      *(found.name, found.unrendered),
    )
  if found.bad:
    listed = row_counts.listing(found.bad_reasons, found.file_names)
    log.warning("%s: data.on_bad_row='drop': %d rows left out:\n%s", found.name, found.bad, listed)
