"""Prompts to sample from, with the columns of their rows for the rewards.

A row has a prompt as prompt_rows.py reads it, and any other columns. Where an answer stands behind
the prompt (a last message by the assistant, `completion`, `output`), its text becomes the column
`answer` unless there is one. All prompts are kept in memory. `schedule.py` orders them, one a row.
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
# Of the row's prompt, but wanted again where the row is written anew with another answer.
_KEPT = ('tools', 'functions', 'chat_template_kwargs')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """ids: what the model reads. columns: of its row, JSON values; what was the prompt is not one of
  them. place: 'file.jsonl:17'. given: the prompt as text, or as messages.
  """

  ids: list[int]
  columns: dict[str, Any]
  place: str
  given: str | list[dict[str, Any]] = ''


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The prompts of one source, in its order.

  Attributes:
    name: of the source.
    rows: its prompts.
    dropped: rows left out for their length.
    fingerprint: sha256 hex of ids and columns in order.
    bad: rows left out by data.on_bad_row='drop', and why: `Reasons.as_list`.
    unrendered: rows with content that the template does not show, kept by 'warn'.
    unread: columns that are no JSON values and so reach no reward, sorted.
    file_names: of the places in `bad`.
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
    """int32[n], tokens of each prompt."""
    return np.array([len(p.ids) for p in self.rows], np.int32)

  @property
  def columns(self) -> tuple[str, ...]:
    """Names of the columns that every row has, sorted."""
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
    said = list(found.asked.messages) if isinstance(found.asked, Chat) else found.asked
    self.rows.append(Prompt(ids, columns, place, said))
    self._digest.update(line.encode() + b'\n')

  def _encode(self, asked: Chat | str) -> tuple[list[int], str | None]:
    """(ids, why the template does not show all of it)."""
    try:
      return encode.encode_prompt(asked, self._tokenizer), None
    except ValueError as error:
      # What the template refuses altogether it refuses again; what it leaves out is another policy.
      return encode.encode_prompt(asked, self._tokenizer, on_unrendered='warn'), str(error)

  def _too_long(self, tokens: int, at: tuple[int, int]) -> None:
    if self._policies['on_overlength'] == 'drop':
      self.dropped += 1
      return
    self.refused.add(
      f'a prompt of {tokens} tokens leaves no room: {self._room} tokens beside rollout.max_tokens; '
      "raise seq_len or set data.on_overlength='drop'",
      at,
    )

  def _columns(
    self, row: sources.Row, found: prompt_rows.Prompt, ids: list[int]
  ) -> tuple[dict[str, Any], str]:
    """(columns for the rewards, the line of the fingerprint)."""
    columns = {
      k: v for k, v in row.items() if (k not in found.read and k != 'prompt') or k in _KEPT
    }
    if found.answer is not None:
      columns.setdefault('answer', found.answer)
    try:
      return columns, json.dumps([ids, columns], sort_keys=True)
    except (TypeError, ValueError):  # bytes of an image, say
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
  """All prompts of a source.

  Args:
    spec: a source; formats other than those of PROMPT_KEYS are refused.
    tokenizer: with a template where there are messages.
    room: tokens that a prompt may have.
    on_overlength: 'error' or 'drop'.
    limit: most rows that are read; None: all.
    on_bad_row: what becomes of rows that cannot be used: 'error', or 'drop', counted and listed.
    on_unrendered: what becomes of rows whose content the template does not show: 'error', or 'warn'
      to use the rest of them, counted.

  Raises:
    ConfigError: another policy, or a format that holds no prompts.
    DataError: rows that cannot be used, by reason, file and line; no prompt left.
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
  """Says what of the source's rows reaches the rewards, and what was left out."""
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
