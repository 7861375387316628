"""What a model made of one row of a task, and files of such results."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from ftjax.runtime.errors import DataError
from ftjax.storage import files


@dataclasses.dataclass(frozen=True)
class Result:
  """The response of a model to one row.

  Attributes:
    id: the row's. With several samples a prompt, results with the same id are of one prompt.
    label: the right text; of several right ones the first, '' where there is none.
    prediction: what the response comes to: the choice, or what was parsed from a completion.
    values: {name: numbers}, what metrics read of this result: {'right': (1.0,)}, counts of n-grams,
      a reward. All results of a task have the same names and lengths.
    scores: log-probability in nats of each choice, in the row's order; empty for a completion.
    response: the whole completion; '' where there is none.
    sample: 0, 1, ... of the completions of one prompt.
    tokens: of the completion.
    is_cut: whether the completion was cut at the most tokens.
  """

  id: str
  label: str
  prediction: str
  values: Mapping[str, tuple[float, ...]]
  scores: tuple[float, ...] = ()
  response: str = ''
  sample: int = 0
  tokens: int = 0
  is_cut: bool = False

  @property
  def right(self) -> bool:
    """Returns whether the result counts as right; False where that means nothing."""
    return self.values.get('right') == (1.0,)


def save(path: str, results: Mapping[str, Sequence[Result]]) -> None:
  """Writes `eval/<task>.jsonl`, a row per model and result.

  Args:
    results: by model, 'base' and 'tuned'.
  """
  rows = [{'model': m, **dataclasses.asdict(r)} for m, rs in results.items() for r in rs]
  text = ''.join(json.dumps(r, ensure_ascii=False, allow_nan=False) + '\n' for r in rows)
  files.write_text(path, text)


def load(path: str) -> dict[str, list[Result]]:
  """Returns what `save` wrote, bitwise the same numbers.

  Raises:
    DataError: a line that is no result; names it.
  """
  out: dict[str, list[Result]] = {}
  for number, line in enumerate(files.read_text(path).split('\n'), 1):
    if not line:
      continue
    try:
      row = json.loads(line)
      model = row.pop('model')
      values = {str(k): tuple(map(float, v)) for k, v in row.pop('values').items()}
      result = Result(**(row | {'scores': tuple(row['scores']), 'values': values}))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
      raise DataError(f'{path}:{number}: not a result ({e}); delete the file to score anew') from e
    out.setdefault(model, []).append(result)
  return out
