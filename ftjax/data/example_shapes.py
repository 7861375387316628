"""Tokenizes rows as the shape of the examples asks for, and fits them to the length of a row."""

from collections.abc import Sequence
from typing import Any

from ftjax.data import (
  annotated_examples,
  annotated_rows,
  embedding_examples,
  labeled_examples,
  source_target,
  span_corruption,
)
from ftjax.data import encode as texts
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad
from ftjax.data.policy import Policy
from ftjax.data.tokenizer import Tokenizer


def encode(rows: Sequence[Any], tokenizer: Tokenizer, policy: Policy) -> list[list[Encoded] | Bad]:
  """Returns the examples of each row, or Bad. Raises DataError where the tokenizer lacks what all
  rows need (a template, an EOS).
  """
  if policy.shape == 'texts':
    return embedding_examples.encode(rows, tokenizer)
  if policy.shape in annotated_rows.SHAPES:
    return annotated_examples.encode(rows, tokenizer, policy.annotation, policy.seq_len)
  if policy.shape == 'text':
    return texts.encode(rows, tokenizer, policy.loss_on)
  if policy.shape == 'source_target':
    return source_target.encode(rows, tokenizer)
  if policy.shape == 'document':
    return span_corruption.encode(rows, tokenizer, policy.seq_len)
  return labeled_examples.encode(rows, tokenizer)


def fit(example: Encoded, policy: Policy) -> Encoded | None:
  """Returns an example that fits, None if it is dropped. Raises ValueError if it is refused."""
  if policy.shape == 'source_target':
    return source_target.fit(example, policy.source_len, policy.seq_len, policy.on_overlength)
  if policy.shape == 'texts':
    return embedding_examples.fit(example, policy.seq_len, policy.on_overlength)
  if policy.shape in annotated_rows.SHAPES:
    settings = (policy.seq_len, policy.on_overlength, policy.shape)
    return annotated_examples.fit(example, *settings)
  own = labeled_examples.fit if example.boundary else texts.fit
  return own(example, policy.seq_len, policy.on_overlength)
