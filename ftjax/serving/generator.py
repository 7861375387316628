"""Text from one model: of a prompt, of a file of prompts, of a conversation.

The model is a folder, a file, or a checkpoint of a run (saved_model.py). generate.py is the entry,
terminal_chat.py the conversation on a terminal.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.data import encode, formats, prompt_rows, stop_texts
from ftjax.generation.batch import Conversation
from ftjax.generation.beam_search import Beams, Writer
from ftjax.generation.completion import stops
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.serving import loaded_model, terminal_chat
from ftjax.storage import files


@dataclasses.dataclass(frozen=True)
class Settings:
  """How text is generated; the flags of generate.py.

  max_tokens: longest completion; 0: 256, or what fits. stop: strings that end a completion and are
  left out. raw: continue a text as it stands, without the chat template. dtype: compute dtype.
  family: as model.family of a config; a workdir has its own. base: of an adapter; '': the one that
  its folder names. beams: of an encoder-decoder.
  """

  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  max_tokens: int = 0
  stop: tuple[str, ...] = ()
  seed: int = 0
  system: str = ''
  raw: bool = False
  batch_size: int = 8
  dtype: str = 'float32'
  family: str = ''
  base: str = ''
  beams: Beams = Beams()  # noqa: RUF009 - frozen


class Generator:
  """A model with its tokenizer, ready to generate.

  Args:
    path: HF folder, GGUF file, PEFT folder, or workdir[@STEP].
    settings: how text is generated.

  Raises:
    DataError: there is no model.
    ConfigError: a reward model, a system message without a chat template, or a stop text that
      cannot occur.
  """

  def __init__(self, path: str, settings: Settings):
    self._settings = settings
    dtype = jnp.dtype(settings.dtype)
    jax.config.update(
      'jax_default_matmul_precision', 'highest' if dtype == jnp.float32 else 'default'
    )
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | {'fsdp': -1})
    jax.set_mesh(mesh)
    model, self._params = loaded_model.load(path, mesh, dtype, settings.family, settings.base)
    self.tokenizer, self._max_len = model.tokenizer, model.arch.max_len
    most = settings.max_tokens or self._max_len
    stop_texts.check(settings.stop, self.tokenizer, most, '--stop')
    ends = (*model.stop_ids, *stop_texts.token_ids(settings.stop, self.tokenizer))
    self._engine = Engine(
      *(model.arch, dtype, ends, self.tokenizer.pad_id),
      slots=settings.batch_size,
      vocab_size=self.tokenizer.vocab_size,
      writer=Writer(self.tokenizer.start_id, settings.beams),
    )
    self._ended = stops(settings.stop, self.tokenizer)
    self._conversation = Conversation()
    if settings.system and not self._has_turns:
      raise ConfigError('--system needs a model with a chat template, and not --raw')

  @property
  def _has_turns(self) -> bool:
    """Whether a text is a user turn, and not a text to continue."""
    return self.tokenizer.template is not None and not self._settings.raw

  def encode(self, row: dict) -> list[int]:
    """Returns the ids of a row with "prompt" or "messages".

    Raises:
      ValueError: a row that is no prompt, or that the template refuses.
    """
    return encode.encode_prompt(read_prompt(row, self._has_turns), self.tokenizer)

  def encode_text(self, text: str) -> list[int]:
    """Returns the ids of --prompt. Raises DataError where the template refuses it."""
    (found,) = self._encode_rows([('--prompt', {'prompt': text, 'system': self._settings.system})])
    return found

  def _text(self, tokens: list[int]) -> str:
    """Returns the text of a completion before its stop token or text."""
    if tokens[-1] in self._engine.stop_ids:
      tokens = tokens[:-1]
    return stop_texts.text_before(tokens, self._settings.stop, self.tokenizer)

  def answer(self, prompts: list[list[int]], first_row: int) -> list[str]:
    """Returns the completions of prompts, which leave room for one token at least."""
    longest = max(map(len, prompts))
    most = self._settings.max_tokens or max(1, min(256, self._max_len - longest))
    found = self._engine.generate_at_once(
      self._params,
      prompts,
      max_tokens=most,
      sampling=self._settings.sampling,
      seed=self._settings.seed,
      prompt_ids=range(first_row, first_row + len(prompts)),
      ended=self._ended,
    )
    return [self._text(c.tokens) for c in found]

  def _encode_rows(self, rows: Sequence[tuple[str, dict]]) -> list[list[int]]:
    """Returns the ids of (place, row). Raises DataError with the place of one that is no prompt."""
    out, room = [], self._max_len - max(1, self._settings.max_tokens)
    for place, row in rows:
      try:
        ids = self.encode(row)
      except ValueError as error:
        raise DataError(f'{place}: {error}') from error
      if not ids:
        raise DataError(f'{place}: the prompt has no tokens')
      if len(ids) > room:
        raise DataError(
          f'{place}: {len(ids)} tokens and --max_tokens={self._settings.max_tokens or 1} more; the '
          f'model was made for {self._max_len} positions'
        )
      out.append(ids)
    return out

  def answer_rows(self, rows: Sequence[tuple[str, dict]]) -> Iterator[dict]:
    """Yields the rows of `read_prompts`, each with the generated text under 'completion'.

    Raises:
      DataError: a row that cannot be rendered, before any text is generated.
    """
    encoded, size = self._encode_rows(rows), self._settings.batch_size
    for start in range(0, len(rows), size):
      some = rows[start : start + size]
      texts = self.answer(encoded[start : start + len(some)], start)
      for (_, row), text in zip(some, texts, strict=True):
        yield row | {'completion': text}

  def respond(self, messages: list, number: int, show) -> terminal_chat.Reply:
    """Returns the next turn of a conversation; see terminal_chat.

    Raises:
      ValueError: no room is left for a response, or the template refuses the conversation.
    """
    prompt = self.encode({'messages': messages} if self._has_turns else _transcript(messages))
    room = self._max_len - len(prompt)
    if room < 1:
      raise ValueError(
        f'the conversation has {len(prompt)} tokens, the model was made for {self._max_len} '
        'positions: /reset begins a new one'
      )
    most = min(self._settings.max_tokens or 256, room)

    found = self._engine.respond(
      self._params,
      prompt,
      self._conversation,
      max_tokens=most,
      sampling=self._settings.sampling,
      seed=self._settings.seed,
      prompt_id=number,
      ended=self._ended,
      stream=lambda tokens: show(_settled(self._text(tokens), self._settings.stop)),
    )
    hint = ''
    if found.truncated:
      why = 'the context is full; /reset begins a new one' if most == room else '--max_tokens'
      hint = f'[cut after {most} tokens: {why}]'
    return terminal_chat.Reply(self._text(found.tokens), hint)


def _transcript(messages: list) -> dict:
  """Returns a conversation for a model without a chat template: its texts, line by line."""
  return {'prompt': '\n'.join(m['content'] for m in messages)}


def _settled(text: str, stops: tuple[str, ...]) -> str:
  """Returns the text so far without an end that the next token may change: half a character, or
  the beginning of a stop string.
  """
  text = text.rstrip('\ufffd')
  ends = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
  return text[: len(text) - max(ends, default=0)]


def read_prompt(row: dict, has_turns: bool) -> formats.Chat | str:
  """Returns the prompt of a row, by the rules of training rows: a conversation, or a text.

  Args:
    row: with one of the columns of formats.PROMPT_KEYS.
    has_turns: whether a text is a user turn.

  Raises:
    ValueError: the row holds no prompt, or a response already.
  """
  if row.get('completion') is not None:
    raise ValueError(
      'the row has a "completion", which the generated text would overwrite: it is a row for '
      'training. Leave the completion out or rename it'
    )
  key = prompt_rows.prompt_key(row)
  if prompt_rows.ends_with_assistant(row):
    raise ValueError(f'"{key}" ends with the assistant; the model is to answer: leave it out')
  if isinstance(row[key], str) and not row[key].strip():
    raise ValueError(f'"{key}" is empty')
  if has_turns and key == 'prompt' and isinstance(row[key], str):
    messages = [{'role': 'user', 'content': row[key]}]
    row = {k: v for k, v in row.items() if k != 'prompt'} | {'messages': messages}
  return prompt_rows.read_prompt(row, has_turns).asked


def read_prompts(path: str) -> list[tuple[str, dict]]:
  """Returns (file:line, row) of every line of --prompts; a line of text is {'prompt': line}.

  Raises:
    DataError: a file or a line that cannot be read.
  """
  return read_rows(path, 'prompt', lambda row: read_prompt(row, has_turns=True))


def read_rows(path: str, key: str, check: Callable[[dict], Any]) -> list[tuple[str, dict]]:
  """Returns (file:line, row) of every line of --prompts; a line of text is {key: line}.

  check: raises ValueError for a row that is none.

  Raises:
    DataError: a file or a line that cannot be read.
  """
  rows = []
  try:
    lines = files.read_text(path).removeprefix('\ufeff').split('\n')
  except OSError as error:
    raise DataError(f'--prompts={path}: {error.strerror}') from error
  except UnicodeDecodeError as error:
    raise DataError(f'--prompts={path}: not UTF-8 at byte {error.start}') from error
  for number, line in enumerate(lines, 1):
    line, place = line.removesuffix('\r'), f'{path}:{number}'
    if not line.strip():
      continue
    row = {key: line}
    if line.lstrip().startswith('{'):
      try:
        row = json.loads(line)
      except ValueError as error:
        raise DataError(f'{place}: not JSON: {error}') from error
    try:
      check(row)
    except ValueError as error:
      raise DataError(f'{place}: {error}') from error
    rows.append((place, row))
  if not rows:
    raise DataError(f'--prompts={path}: no row in it')
  return rows
