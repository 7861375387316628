"""What a kind of task is: what a row holds, what the model is asked, what its response is worth.

kinds.py has the table of the built-in ones. A user's own is a `Kind` too, named in the config as
'module:OBJECT':

  def score(row, answer):
    return {'short': len(answer.text) <= row.columns['limit']}

  SHORT = Kind(score, (metric.proportion('short', 'short enough'),), reads=('limit',))
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax.evaluation.metric import Metric
from ftjax.evaluation.model import Likelihood
from ftjax.evaluation.rows import Row

# What a model is asked for: a completion, the log-probabilities of each choice after the prompt, or
# those of whole texts.
COMPLETE, CHOOSE, READ = 'complete', 'choose', 'read'


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model responded to one row.

  Attributes:
    text: the completion; '' where choices were scored.
    prediction: what `parse` made of the completion; the likeliest choice.
    prompt: everything that the model read, whose end may have opened a thought.
    tokens: of the completion, or of all choices.
    is_cut: whether the completion was cut at the most tokens.
    likelihoods: of each choice, in the row's order.
    priors: of each choice after a prompt without content, where the kind asks for them.
  """

  text: str = ''
  prediction: str = ''
  prompt: str = ''
  tokens: int = 0
  is_cut: bool = False
  likelihoods: tuple[Likelihood, ...] = ()
  priors: tuple[Likelihood, ...] = ()


Values = Mapping[str, bool | float | tuple[float, ...]]


Choose = Callable[[Row, tuple[Likelihood, ...], tuple[Likelihood, ...]], int]


def likeliest(row: Row, likelihoods: tuple[Likelihood, ...], priors: tuple[Likelihood, ...]) -> int:
  """Returns the index of the most probable choice, the first of equal ones."""
  del row, priors
  logps = [x.logp for x in likelihoods]
  return logps.index(max(logps))


def _same(row: Mapping[str, Any]) -> Mapping[str, Any]:
  return row


def _accept(row: Row) -> None:
  del row


def _text(completion: str, prompt: str, row: Row) -> str:
  del prompt, row
  return completion


@dataclasses.dataclass(frozen=True)
class Kind:
  """How the rows of a task are read, and how a model's response to one is scored.

  Attributes:
    score: (row, answer) -> {name: a number, or several}, the same names for every row.
    metrics: figures of these values; the first is the one that decides.
    details: further figures, which reports show beneath.
    class_metrics, class_details: the same, where all rows offer the same choices.
    class_score: values that these need, beside those of `score`.
    respond: 'complete', 'choose' or 'read', see above.
    choices: a row of the source -> (the choices or texts, the right one). Raises ValueError. None:
      rows have no choices; a kind that responds by 'choose' reads them from "choices" and "label".
    read: a row of the source, {column: value} -> a row with the columns that ftjax knows. Raises
      ValueError with the reason for a row that cannot be used.
    check: raises ValueError for a row that no response could get right.
    parse: (completion, prompt, row) -> the prediction.
    choose: (row, likelihoods, priors) -> index of the predicted choice.
    has_answer: whether a row must have an answer.
    has_priors: whether choices are scored after a prompt without content too.
    reads: columns that `score`, `parse` and `check` find in row.columns.
    reads_all: whether row.columns has all columns of the source.
    score_all: (rows, answers) -> what `score` returns for each, in place of it.
    judge: (prompt, first response, second response) -> share of a win of the second, 0 to 1, in
      place of `score`: of each model against the first one, in both orders.
  """

  score: Callable[[Row, Answer], Values]
  metrics: tuple[Metric, ...]
  respond: str = COMPLETE
  choices: Callable[[Mapping[str, Any]], tuple[tuple[str, ...], str]] | None = None
  read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _same
  check: Callable[[Row], None] = _accept
  parse: Callable[[str, str, Row], str] = _text
  choose: Choose = likeliest
  has_answer: bool = True
  has_priors: bool = False
  reads: tuple[str, ...] = ()
  details: tuple[Metric, ...] = ()
  class_metrics: tuple[Metric, ...] = ()
  class_details: tuple[Metric, ...] = ()
  class_score: Callable[[Row, Answer], Values] | None = None
  reads_all: bool = False
  score_all: Callable[[Sequence[Row], Sequence[Answer]], Sequence[Values]] | None = None
  judge: Callable[[str, str, str], float] | None = None
