"""Reads sources of data as the texts that an audit compares, with the settings of a config."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from ftjax.audit.finding import Finding, excerpt
from ftjax.audit.rows import Row
from ftjax.config import algorithms
from ftjax.data import (
  annotated_examples,
  annotated_rows,
  embedding_examples,
  embedding_rows,
  encode,
  formats,
  labeled_examples,
  preference_rows,
  prompt_rows,
  source_target,
  sources,
  span_corruption,
  step_rows,
)
from ftjax.data.formats import Bad, Chat, Completion, Text
from ftjax.data.policy import TEXT_SHAPES
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment.data import annotation

_CHUNK = 250  # rows tokenized at once, or fewer long ones:
_CHUNK_CHARACTERS = 200_000

Example = (
  formats.Example
  | preference_rows.Pair
  | preference_rows.LabeledExample
  | prompt_rows.Prompt
  | annotated_rows.LabeledText
  | annotated_rows.TaggedWords
  | step_rows.Steps
  | embedding_rows.TextGroup
)


def read(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, specs: Sequence[sources.Spec]
) -> tuple[list[Row], list[Finding]]:
  """Reads sources as texts.

  Returns:
    (rows; findings of those that cannot be used: 'empty_answer' where that is the reason, else
    'unusable').
  """
  rows: list[Row] = []
  unusable: list[Finding] = []
  reader = _Reader(c, tokenizer)
  for spec in specs:
    for found in reader.read(spec):
      (unusable if isinstance(found, Finding) else rows).append(found)
  return rows, unusable


def read_first(
  c: ml_collections.ConfigDict,
  tokenizer: Tokenizer,
  specs: Sequence[sources.Spec],
  most_rows: int,
  most_characters: int,
) -> tuple[list[Row], list[Finding], bool]:
  """Reads the first rows of sources, each its share of `most_rows`, and of `most_characters` of
  text; which rows they are depends on nothing else.

  Returns:
    (rows; findings of those that cannot be used; whether these are all rows).
  """
  rows: list[Row] = []
  unusable: list[Finding] = []
  reader, is_whole = _Reader(c, tokenizer), True
  for spec in specs:
    share, text = max(1, most_rows // len(specs)), most_characters // len(specs)
    for found in reader.read(spec):
      if share == 0 or text <= 0:
        is_whole = False
        break
      share -= 1
      if isinstance(found, Finding):
        unusable.append(found)
      else:
        text -= sum(map(len, found.texts))
        rows.append(found)
  return rows, unusable, is_whole


def _unusable(place: tuple[str, int], reason: str, row: Any) -> Finding:
  kind = 'empty_answer' if 'empty' in reason else 'unusable'
  shown = '' if isinstance(row, Bad) else excerpt(json.dumps(row, ensure_ascii=False, default=str))
  return Finding(kind, -1, *place, shown, reason)


class _Reader:
  """Reads the rows of sources with the settings of a config."""

  def __init__(self, c: ml_collections.ConfigDict, tokenizer: Tokenizer):
    record = algorithms.of(c)
    self._shape = 'prompt' if record.on_rollouts else record.example(c)
    self._source_len = algorithms.source_len(c)
    self._loss_on, self._tokenizer = c.data.loss_on, tokenizer
    self._annotation = annotation(c)
    self._most = (
      algorithms.max_example(c) - c.rollout.max_tokens if record.on_rollouts else c.seq_len
    )
    if self._shape == 'label':
      self._most //= 2

  def read(self, spec: sources.Spec) -> Iterator[Row | Finding]:
    """Yields the rows of a source in order, or findings of those that cannot be used."""
    names = sources.source_names(spec)
    waiting: list[tuple[tuple[str, int], Any, Example | Bad]] = []
    form, size = spec.format, 0
    for number, line, row in sources.scan(spec):
      example: Example | Bad = row if isinstance(row, Bad) else Bad('')
      if not isinstance(row, Bad):
        try:
          if self._shape in TEXT_SHAPES:
            form = form or formats.detect(row)
          example = self._parse(row, form, spec)
        except ValueError as error:
          example = Bad(str(error))
      waiting.append(((names[number], line), row, example))
      if not isinstance(example, Bad):
        size += sum(len(text) for own in texts_of(example) for text in own)
      if len(waiting) >= _CHUNK or size >= _CHUNK_CHARACTERS:
        yield from self._rows(waiting, spec.path)
        waiting, size = [], 0
    yield from self._rows(waiting, spec.path)

  def _parse(self, row: Mapping[str, Any], form: str | None, spec: sources.Spec) -> Example:
    has_template = self._tokenizer.template is not None
    if self._shape == 'texts':
      return embedding_rows.parse(row, self._annotation)
    if self._shape in annotated_rows.SHAPES:
      return annotated_rows.parse(row, self._shape, self._annotation)
    if self._shape == 'prompt':
      return prompt_rows.read_prompt(row, has_template, spec.format)
    if self._shape in TEXT_SHAPES:
      return formats.parse(row, form, has_template, is_named=spec.format is not None)
    return preference_rows.parse(row, self._shape, spec.format, has_template)

  def _rows(
    self, waiting: Sequence[tuple[tuple[str, int], Any, Any]], source: str
  ) -> Iterator[Row | Finding]:
    good = [example for _, _, example in waiting if not isinstance(example, Bad)]
    counted = iter(self._tokens(good))
    for place, row, example in waiting:
      tokens = example if isinstance(example, Bad) else next(counted)
      if isinstance(tokens, Bad):
        yield _unusable(place, tokens.reason, row)
      else:
        if self._shape in ('class', 'tags'):
          prompt, label = self._annotated(example)
          answers = () if label is None else (label,)
        elif self._shape == 'masked':
          prompt, answers, label = (), example.texts, None
        else:
          prompt, answers = texts_of(example)
          label = _label(row) if self._shape in TEXT_SHAPES else None
        is_pair = isinstance(example, preference_rows.Pair)
        yield Row(*place, prompt, answers, label, is_pair, source, tokens, self._most)

  def _annotated(
    self, example: annotated_rows.LabeledText | annotated_rows.TaggedWords
  ) -> tuple[tuple[str, ...], str | None]:
    """Returns (texts, label) of a row with labels; None for a number, for words and without one."""
    if isinstance(example, annotated_rows.TaggedWords):
      return texts_of(example)[0], None
    names = self._annotation.names
    found = [names[int(v)] for v in example.values] if names else []
    return example.texts, ', '.join(found) or None

  def _tokens(self, parsed: Sequence[Any]) -> list[int | Bad]:
    """Returns the number of tokens of each example, or Bad where it cannot be encoded."""
    if self._shape == 'prompt':
      return [_count_prompt(p, self._tokenizer) for p in parsed]
    if self._shape == 'source_target':
      found = source_target.encode(parsed, self._tokenizer)
      return [x if isinstance(x, Bad) else self._places(*x) for x in found]
    if self._shape == 'document':
      found = span_corruption.encode(parsed, self._tokenizer, self._most)
    elif self._shape == 'text':
      found = encode.encode(parsed, self._tokenizer, self._loss_on)
    elif self._shape == 'texts':
      found = embedding_examples.encode(parsed, self._tokenizer)
    elif self._shape in annotated_rows.SHAPES:
      found = annotated_examples.encode(parsed, self._tokenizer, self._annotation)
    else:
      found = labeled_examples.encode(parsed, self._tokenizer)
    return [x if isinstance(x, Bad) else max(len(e.tokens) for e in x) for x in found]

  def _places(self, example: encode.Encoded) -> int:
    """Returns the places that an example takes of a row; see data/sides.py."""
    target = len(example.tokens) - example.boundary
    return max(target, -(-example.boundary * self._most // self._source_len))


def _count_prompt(prompt: prompt_rows.Prompt, tokenizer: Tokenizer) -> int | Bad:
  try:
    return len(encode.encode_prompt(prompt.asked, tokenizer, 'warn'))
  except ValueError as error:
    return Bad(str(error))


def _label(row: Mapping[str, Any]) -> str | None:
  """Returns the column `label` as text; None without one."""
  value = row.get('label')
  return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def texts_of(example: Example) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns (texts before the answer, answers) of a parsed row; see audit.rows.Row."""
  if isinstance(example, preference_rows.Pair):
    prompt, chosen = texts_of(example.chosen)
    return prompt, (*chosen[-1:], *texts_of(example.rejected)[1][-1:])
  if isinstance(example, preference_rows.LabeledExample):
    return texts_of(example.answer)
  if isinstance(example, annotated_rows.LabeledText):
    return example.texts, ()
  if isinstance(example, annotated_rows.TaggedWords):
    return (' '.join(example.words),), ()
  if isinstance(example, step_rows.Steps):
    asked = example.prompt
    return (asked,) if isinstance(asked, str) else _contents(asked.messages), example.steps
  if isinstance(example, embedding_rows.TextGroup):  # the anchor, and the others
    return example.texts[:1], example.texts[1:]
  if isinstance(example, prompt_rows.Prompt):
    asked = example.asked
    prompt = (asked,) if isinstance(asked, str) else _contents(asked.messages)
    return prompt, () if example.answer is None else (example.answer,)
  if isinstance(example, Completion):
    return (example.prompt,), (example.completion,)
  if isinstance(example, Text):
    return (), (example.text,)
  return _of_chat(example)


def _contents(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
  found = (m.get(key) for m in messages for key in ('reasoning_content', 'content'))
  return tuple(text for text in found if isinstance(text, str) and text)


def _of_chat(chat: Chat) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the texts of all but the assistant, and those of the assistant's turns, tool calls
  among them as JSON.
  """
  given, own = [], []
  for message in chat.messages:
    (own if message['role'] == 'assistant' else given).extend(_contents([message]))
    if calls := message.get('tool_calls'):
      own.append(json.dumps(calls, ensure_ascii=False, default=str))
  return tuple(given), tuple(own)
