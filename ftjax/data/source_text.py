"""What the encoder of an encoder-decoder reads of a prompt: its text, and its ids with what the
tokenizer's own post-processor puts around them (T5: EOS behind it).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.data import spans
from ftjax.data.formats import Chat, Completion, Example, Text
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError


def read(example: Example, tokenizer: Tokenizer) -> tuple[str, str]:
  """Returns (prompt, answer) of a training row; of a conversation the answer is its last message.

  Raises:
    ValueError: a document, or a conversation that cannot be written as a text.
  """
  if isinstance(example, Completion):
    return example.prompt, example.completion
  if isinstance(example, Text):
    raise ValueError(
      'a document has no prompt for the encoder; give rows with a prompt and an answer, or set '
      'algorithm=span_corruption'
    )
  *before, last = example.messages
  if last['role'] != 'assistant' or not isinstance(last.get('content'), str):
    raise ValueError(
      f'the last message is of {last["role"]!r}; expected a text of the assistant, which the '
      'decoder learns'
    )
  return prompt(Chat(tuple(before), example.tools, None, example.template_kwargs), tokenizer), last[
    'content'
  ]


def prompt(asked: Chat | str, tokenizer: Tokenizer) -> str:
  """Returns the text of a prompt: of a conversation what the chat template renders, or without one
  its messages line by line.

  Raises:
    ValueError: the template refuses the conversation, or without one it holds other than texts.
  """
  if isinstance(asked, str):
    return asked
  if tokenizer.template is not None:
    text, unrendered = spans.prompt(asked, tokenizer)
    if unrendered:
      raise ValueError(f'the chat template does not render {", ".join(unrendered)}')
    return text
  if asked.tools:
    raise ValueError('a conversation with tools needs a chat template, and the model has none')
  return '\n'.join(map(_content, asked.messages))


def _content(message: Mapping[str, Any]) -> str:
  if not isinstance(message.get('content'), str) or message.get('tool_calls'):
    raise ValueError(
      f'a message of {message["role"]!r} is no plain text; the model has no chat template for it'
    )
  return message['content']


def ids(text_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
  """Returns the ids of a prompt with what belongs around them; EOS behind them where the tokenizer
  adds nothing there.
  """
  behind = tokenizer.suffix_ids or (end(tokenizer),)
  return [*tokenizer.prefix_ids, *text_ids, *behind]


def end(tokenizer: Tokenizer) -> int:
  """Returns the token that ends what a decoder writes. Raises DataError where there is none."""
  if tokenizer.eos_id is None:
    raise DataError(
      f'{tokenizer.name} names no eos_token (tokenizer_config.json) and no eos_token_id '
      '(generation_config.json, config.json); a decoder could never learn to stop'
    )
  return tokenizer.eos_id


def encode_prompt(asked: Chat | str, tokenizer: Tokenizer) -> list[int]:
  """Returns the ids that the encoder reads of a prompt, as in training.

  Raises:
    ValueError: as `prompt`.
  """
  return ids(tokenizer.encode(prompt(asked, tokenizer)), tokenizer)
