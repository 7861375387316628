"""What became of a source's rows, and when that is nothing to train on."""

import dataclasses

from ftjax.runtime.errors import DataError

_MIN_SUPERVISED = 0.001  # share of tokens below which a mask is taken for a mistake


@dataclasses.dataclass
class Counts:
  """What became of a source's rows. Examples and tokens are those kept."""

  rows: int = 0
  examples: int = 0
  tokens: int = 0
  supervised: int = 0
  dropped: int = 0  # over seq_len, policy 'drop'
  truncated: int = 0  # over seq_len, shortened and kept
  unsupervised: int = 0  # shortened until nothing supervised was left, and dropped
  chosen_over: int = 0  # of pairs over seq_len: sides longer than half a row
  rejected_over: int = 0
  straddled: int = 0  # tokens on a border of prompt and answer
  chat_tokens: int = 0
  chat_supervised: int = 0
  chat_examples: int = 0


def check(name: str, counts: Counts, loss_on: str) -> None:
  """Refuses a corpus that would train on nothing, or whose mask is no mask."""
  if not counts.rows:
    raise DataError(f'{name}: no row in it')
  if not counts.examples:
    raise DataError(
      f'{name}: none of {counts.rows} rows is left ({counts.dropped} dropped as longer than '
      f'seq_len, {counts.unsupervised} without a supervised token after truncation); raise seq_len'
    )
  if counts.supervised < _MIN_SUPERVISED * counts.tokens:
    raise DataError(
      f'{name}: {counts.supervised} of {counts.tokens} tokens are supervised, less than '
      f'{_MIN_SUPERVISED:.1%}; look at the rows with `python -m ftjax.preview`'
    )
  predictable = counts.chat_tokens - counts.chat_examples
  if loss_on == 'assistant' and counts.chat_examples and counts.chat_supervised >= predictable:
    raise DataError(
      f'{name}: every token of the conversations is supervised although data.loss_on is '
      "'assistant'; if that is meant, set data.loss_on='all'"
    )
