"""The kinds of faults that an audit finds, and the record of one that it found."""

import dataclasses
import re
from typing import Any

ERROR, WARNING, INFO = 'error', 'warning', 'info'
SEVERITIES = (ERROR, WARNING, INFO)
_EXCERPT = 80  # characters


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of fault.

  Attributes:
    severity: one of SEVERITIES.
    title: what it is, for tables.
    remedy: what to do about it.
    is_removed: whether cleaning removes such rows where no kinds are named.
    is_hidden: whether the text that was found is masked wherever it is printed.
  """

  severity: str
  title: str
  remedy: str
  is_removed: bool = False
  is_hidden: bool = False


_MASK = 'replace it by a placeholder such as <EMAIL>, or remove the row'
_REVOKE = 'revoke the key, and remove the row'

KINDS: dict[str, Kind] = {
  'unusable': Kind(
    ERROR, 'row that cannot be read', 'repair the row; data.on_bad_row=drop leaves it out', True
  ),
  'exact_duplicate': Kind(WARNING, 'exact duplicate', 'keep one of the rows', True),
  'near_duplicate': Kind(
    WARNING, 'near duplicate', 'keep the better one of the rows, or both if they differ in meaning'
  ),
  'eval_overlap': Kind(
    ERROR, 'text of an evaluation row', 'remove it from the training data', True
  ),
  'empty_answer': Kind(ERROR, 'empty answer', 'write the answer, or remove the row', True),
  'truncated_answer': Kind(
    WARNING, 'answer cut in mid-sentence', 'write the end of the answer, or remove the row', True
  ),
  'over_length': Kind(
    WARNING, 'longer than seq_len', 'raise seq_len, shorten the row, or set data.on_overlength'
  ),
  'rare_label': Kind(
    WARNING, 'rare label', 'collect more rows of it, or set data.balance to sqrt or equal'
  ),
  'conflicting_labels': Kind(
    ERROR, 'another label for an equal input', 'decide for one label, or remove all of the rows',
    True,
  ),
  'label_error': Kind(
    WARNING, 'likely label error', 'look at the row again, and correct its label'
  ),
  'length_outlier': Kind(WARNING, 'length far from the others', 'look whether it belongs here'),
  'language': Kind(
    WARNING, 'another language than the others', 'remove it, or add more rows of this language'
  ),
  'garbage': Kind(WARNING, 'broken characters', 'repair the text, or remove the row', True),
  'repetition': Kind(
    WARNING, 'the same text again and again', 'remove the repetition, or the row', True
  ),
  'mojibake': Kind(
    WARNING, 'text decoded with a wrong encoding', 'repair the text: ftfy.fix_text', True
  ),
  'template_leak': Kind(
    ERROR, 'marker of a chat template in a text', 'remove the marker; the template writes it', True
  ),
  'assistant_phrase': Kind(
    WARNING, 'the assistant describes itself as a model', 'rewrite the answer, or remove the row'
  ),
  'prompt_repeated': Kind(
    WARNING, 'the answer repeats the prompt', 'remove the prompt from the answer', True
  ),
  'equal_sides': Kind(ERROR, 'chosen equals rejected', 'remove the pair', True),
  'email': Kind(WARNING, 'e-mail address', _MASK, is_hidden=True),
  'phone': Kind(WARNING, 'phone number', _MASK, is_hidden=True),
  'iban': Kind(ERROR, 'bank account (IBAN)', _MASK, True, is_hidden=True),
  'credit_card': Kind(ERROR, 'card number', _MASK, True, is_hidden=True),
  'ip_address': Kind(WARNING, 'public IP address', _MASK, is_hidden=True),
  'api_key': Kind(ERROR, 'key of a service', _REVOKE, True, is_hidden=True),
  'private_key': Kind(ERROR, 'private key', _REVOKE, True, is_hidden=True),
  'low_diversity': Kind(
    WARNING, 'the answers resemble each other', 'add rows of other kinds, remove near duplicates'
  ),
}  # fmt: skip
# Faults of the whole set: they stand at the first row that shows them, which cleaning keeps.
OF_THE_SET = ('rare_label', 'low_diversity')
REMOVED = tuple(name for name, kind in KINDS.items() if kind.is_removed)


@dataclasses.dataclass(frozen=True)
class Finding:
  """One fault.

  Attributes:
    kind: a key of KINDS.
    row: index of its row in the training rows; -1 for a row that cannot be read.
    file, line: of its row.
    excerpt: the text that shows it, shortened; masked for kinds that are hidden.
    detail: what exactly was found; '' where the kind is enough.
  """

  kind: str
  row: int
  file: str
  line: int
  excerpt: str
  detail: str = ''

  @property
  def severity(self) -> str:
    """The severity of its kind."""
    return KINDS[self.kind].severity

  def to_json(self) -> dict[str, Any]:
    """Returns the finding as an object for a file."""
    kind = KINDS[self.kind]
    return {
      'kind': self.kind, 'severity': kind.severity, 'file': self.file, 'line': self.line,
      'excerpt': self.excerpt, 'detail': self.detail, 'remedy': kind.remedy,
    }  # fmt: skip


def excerpt(text: str, start: int = 0) -> str:
  """Returns a part of a text in one line, from a bit before `start`."""
  begin = max(0, start - 20)
  part = re.sub(r'\s+', ' ', text[begin : begin + 2 * _EXCERPT]).strip()
  cut = part if len(part) <= _EXCERPT else part[: _EXCERPT - 3] + '...'
  return ('...' if begin else '') + cut


def masked(text: str) -> str:
  """Returns the first characters of a secret, the rest as stars."""
  kept = min(4, len(text) // 4)
  return text[:kept] + '*' * min(len(text) - kept, 12)
