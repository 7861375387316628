"""The rows that an audit reads: texts with their place, without any format of files."""

import dataclasses
from collections.abc import Sequence

from ftjax.audit import finding
from ftjax.audit.finding import Finding
from ftjax.evaluation import ngrams


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """A training or evaluation row.

  Attributes:
    file, line: where it stands.
    prompt: its texts before the answer: of each message its content; the last is the question.
    answers: its answer; of a pair the chosen and the rejected one; of a conversation those of all
      turns; of a document its text; () for a prompt alone.
    label: the label that the row names; None where it names none.
    is_pair: whether `answers` are the two sides of a pair.
    source: name of its source; lengths, labels and languages are compared within a source.
    tokens: after the template; None where that is not known.
    most_tokens: so many it may have; 0: any number.
  """

  file: str
  line: int
  prompt: tuple[str, ...]
  answers: tuple[str, ...]
  label: str | None = None
  is_pair: bool = False
  source: str = ''
  tokens: int | None = None
  most_tokens: int = 0

  @property
  def place(self) -> str:
    """File and line."""
    return f'{self.file}:{self.line}'

  @property
  def question(self) -> str:
    """The last text before the answer; '' for a document."""
    return self.prompt[-1] if self.prompt else ''

  @property
  def content(self) -> str:
    """The question without the instruction in front of it: its last paragraph if that is the longer
    part, else the whole question.
    """
    before, _, last = self.question.rpartition('\n\n')
    return last if len(last) >= len(before) else self.question

  @property
  def shown(self) -> str:
    """The text by which a reader knows the row."""
    return self.content or self.answer

  @property
  def answer(self) -> str:
    """The last answer, of a pair the chosen one; '' for a prompt alone."""
    if not self.answers:
      return ''
    return self.answers[0] if self.is_pair else self.answers[-1]

  @property
  def texts(self) -> tuple[str, ...]:
    """All its texts."""
    return (*self.prompt, *self.answers)


def found(
  kind: str, rows: Sequence[Row], index: int, text: str, detail: str = '', start: int = 0
) -> Finding:
  """Returns a finding of a row; `start`: where in the text it is."""
  row = rows[index]
  shown = finding.masked(text) if finding.KINDS[kind].is_hidden else finding.excerpt(text, start)
  return Finding(kind, index, row.file, row.line, shown, detail)


def input_key(row: Row) -> str:
  """Returns the text by which two inputs are equal: NFKC, case folded, single spaces."""
  return '\0'.join(map(ngrams.whole, row.prompt or row.answers))


def answer_key(row: Row) -> str:
  """Returns the text by which two answers are equal; the label where the row names one."""
  if row.label is not None:
    return row.label
  return '\0'.join(map(ngrams.whole, row.answers))
