"""Labels of texts from one model with a label head; generate.py --classify is the entry."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data import annotated_examples, annotated_rows
from ftjax.data.annotated_rows import Annotation, LabeledText, TaggedWords
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad
from ftjax.experiment.model import label_names
from ftjax.models.forward import Forward
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.serving import generator, loaded_model, text_batches

THRESHOLD = 0.5  # of a probability from which a text has one of several labels


def read_rows(path: str) -> list[tuple[str, dict]]:
  """Returns (file:line, row) of every line of --prompts; a line of text is {'text': line}.

  Raises:
    DataError: a file or a line that cannot be read.
  """
  return generator.read_rows(path, 'text', lambda row: None)


class Classifier:
  """A model with labels, with its tokenizer.

  Args:
    path: HF folder, PEFT folder, or workdir[@STEP].
    dtype: compute dtype, by name.
    family: value of model.family.
    base: of an adapter; '': the one that its folder names.
    batch_size: texts that are labeled together.

  Raises:
    DataError: there is no model.
    ConfigError: it has no labels, or begins and ends of answers.
  """

  def __init__(
    self, path: str, dtype: str = 'float32', family: str = '', base: str = '', batch_size: int = 8
  ):
    own = (dtype, family, base, loaded_model.LABELS)
    model, self._params = text_batches.open_model(path, *own)
    arch = self._arch = model.arch
    if arch.task == 'span':
      raise ConfigError(f'--model={path} finds answers in a text; --classify gives labels to texts')
    self.tokenizer, self._size = model.tokenizer, batch_size
    self.names = label_names(arch)
    self._problem = model.config.get('problem_type') or ''
    forward = Forward(arch, jnp.dtype(dtype))
    of_tokens = arch.task == 'token'

    @jax.jit
    def logits(params, batch):
      if of_tokens:
        return forward.label_logits(params, batch)
      return forward.sequence_logits(params, batch, 1)[0]

    self._logits = logits

  def label_rows(self, rows: Sequence[tuple[str, dict]]) -> Iterator[dict]:
    """Yields the rows with their labels: 'label', or 'labels' of a model that gives several, with
    'scores', the probability of each; 'score' of a model of one number; 'tags' of words.

    Args:
      rows: (place, row). A row has one of the columns of annotated_rows.SINGLE, two of PAIRS, or
        tokens.

    Raises:
      DataError: a row without a text, or one that is too long, before any is labeled.
    """
    encoded = [self._encode(place, row) for place, row in rows]
    for start in range(0, len(rows), self._size):
      some = encoded[start : start + self._size]
      found = np.asarray(self._logits(self._params, self._batch(some)))
      for (_, row), example, values in zip(rows[start:], some, found, strict=False):
        yield row | self._labels(example, values)

  def _encode(self, place: str, row: Mapping[str, Any]) -> Encoded:
    try:
      if self._arch.task == 'token':
        words = annotated_rows.words(row)
        parsed: Any = TaggedWords(words, (0,) * len(words))
        annotation = Annotation('tags', self.names)
      else:
        parsed, annotation = LabeledText(annotated_rows.texts(row), (0.0,)), Annotation('single')
    except ValueError as error:
      raise DataError(f'{place}: {error}') from error
    (found,) = annotated_examples.encode([parsed], self.tokenizer, annotation)
    if isinstance(found, Bad):
      raise DataError(f'{place}: {found.reason}')
    text_batches.check_length(found[0].tokens, place, self._arch.max_len)
    return found[0]

  def _batch(self, examples: Sequence[Encoded]) -> dict[str, np.ndarray]:
    texts = [e.tokens for e in examples]
    batch = text_batches.padded(texts, self._size, self._arch.max_len)
    types = np.zeros_like(batch['tokens'])
    for i, example in enumerate(examples):
      n = len(example.tokens)
      types[i, example.boundary or n : n] = 1
    return batch | {'token_types': types}

  def _labels(self, example: Encoded, logits: np.ndarray) -> dict[str, Any]:
    logits = logits.astype(np.float64)
    if self._arch.task == 'token':
      firsts = np.flatnonzero(example.labels != annotated_examples.NONE)
      return {'tags': [self.names[i] for i in logits[firsts].argmax(-1)]}
    if self._arch.num_labels == 1:
      value = float(logits[0])
      # As sentence-transformers reads rerankers: a number without a problem is a logit.
      return {'score': value if self._problem == 'regression' else 1 / (1 + math.exp(-value))}
    if self._problem == 'multi_label_classification':
      probs = 1 / (1 + np.exp(-logits))
      scores = dict(zip(self.names, probs.tolist(), strict=True))
      return {'labels': [n for n, p in scores.items() if p >= THRESHOLD], 'scores': scores}
    probs = np.exp(logits - logits.max())
    scores = dict(zip(self.names, (probs / probs.sum()).tolist(), strict=True))
    return {'label': max(scores, key=scores.__getitem__), 'scores': scores}
