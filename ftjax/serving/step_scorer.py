"""Scores of solutions in steps from one process reward model; generate.py --steps is the entry."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data import step_rows
from ftjax.data.formats import Bad, Chat
from ftjax.data.messages import read_text
from ftjax.data.step_rows import Steps
from ftjax.grading import step_scores
from ftjax.models.forward import Forward
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.serving import generator, loaded_model, text_batches


def read_rows(path: str) -> list[tuple[str, dict]]:
  """Returns (file:line, row) of every line of --prompts, which are JSON rows.

  Raises:
    DataError: a file or a line that cannot be read.
  """
  return generator.read_rows(path, 'prompt', lambda row: None)


class StepScorer:
  """A process reward model, with its tokenizer.

  Args:
    path: HF folder, PEFT folder, or workdir[@STEP].
    separator: text after each step, that of its training (prm.separator).
    dtype: compute dtype, by name.
    family: value of model.family.
    base: of an adapter; '': the one that its folder names.
    batch_size: solutions that are scored together.

  Raises:
    DataError: there is no model.
    ConfigError: it gives no two labels to tokens.
  """

  def __init__(
    self,
    path: str,
    separator: str = '\n',
    dtype: str = 'float32',
    family: str = '',
    base: str = '',
    batch_size: int = 8,
  ):
    own = (dtype, family, base, loaded_model.LABELS)
    model, self._params = text_batches.open_model(path, *own)
    arch = self._arch = model.arch
    if arch.task != 'token' or arch.num_labels != 2:
      raise ConfigError(
        f'--model={path} is no process reward model, which gives two labels to tokens; train one '
        'with algorithm=prm'
      )
    self._tokenizer, self._size, self._separator = model.tokenizer, batch_size, separator
    forward = Forward(arch, jnp.dtype(dtype))
    self._probabilities = jax.jit(
      lambda params, batch: jax.nn.softmax(forward.label_logits(params, batch))[..., 1]
    )

  def score_rows(self, rows: Sequence[tuple[str, dict]], how: str) -> Iterator[dict]:
    """Yields the rows with `step_scores`, the probability that each step is right, and `score`.

    Args:
      rows: (place, row); a row has a prompt, and `completions`, the steps, or one `completion`,
        which is split at the separator.
      how: a name in step_scores.REDUCERS.

    Raises:
      DataError: a row that cannot be used, or is too long, before any is scored.
    """
    parsed = [self._parse(place, row) for place, row in rows]
    found = self.score_steps(parsed, [place for place, _ in rows])
    reduce = step_scores.REDUCERS[how]
    for (_, row), one in zip(rows, found, strict=True):
      yield row | {'step_scores': one.tolist(), 'score': reduce(one)}

  def _parse(self, place: str, row: Mapping[str, Any]) -> tuple[str | Chat, Sequence[str]]:
    try:
      prompt = step_rows.read_prompt(row)
      if row.get('completions') is not None:
        return prompt, step_rows.read_steps(row)
      steps = step_scores.split(read_text(row, 'completion'), self._separator)
      if not steps:
        raise ValueError("'completion' is blank")
      return prompt, steps
    except ValueError as error:
      raise DataError(f'{place}: {error}') from error

  def score_steps(
    self, solutions: Sequence[tuple[str | Chat, Sequence[str]]], places: Sequence[str] = ()
  ) -> list[np.ndarray]:
    """Returns the probability that each step is right, float64[steps] of each (prompt, steps).

    Args:
      solutions: what is scored.
      places: of them, for messages; () for their numbers.

    Raises:
      DataError: a solution that cannot be tokenized, or is too long, before any is scored.
    """
    rows = [Steps(prompt, tuple(steps), (1.0,) * len(steps)) for prompt, steps in solutions]
    encoded = []
    for i, one in enumerate(step_rows.encode(rows, self._tokenizer, self._separator)):
      place = places[i] if places else f'solution {i}'
      if isinstance(one, Bad):
        raise DataError(f'{place}: {one.reason}')
      text_batches.check_length(one[0].tokens, place, self._arch.max_len)
      encoded.append(one[0])
    out: list[np.ndarray] = []
    for start in range(0, len(encoded), self._size):
      some = encoded[start : start + self._size]
      batch = text_batches.padded([e.tokens for e in some], self._size, self._arch.max_len)
      found = np.asarray(self._probabilities(self._params, batch), np.float64)
      out += [p[np.flatnonzero(e.labels >= 0)] for p, e in zip(found, some, strict=False)]
    return out
