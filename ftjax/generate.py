"""python -m ftjax.generate --model=DIR_OR_WORKDIR --prompt=TEXT | --prompts=FILE | (neither: chat
on the terminal)

DIR is a HF folder, a GGUF file, or a workdir: its export/ is used, or, where the run has not ended,
its newest checkpoint; WORKDIR@STEP, WORKDIR@last and WORKDIR@best name one. --prompts reads one
prompt a line, or JSON lines with "prompt" or "messages", and prints each row as a JSON line with
the generated text under "completion". A prompt is a user turn where the model has a chat template,
unless --raw."""

import json
import logging
import os

from absl import flags

from ftjax import command, terminal_chat
from ftjax.runtime.errors import ConfigError, DataError

_MODEL = flags.DEFINE_string(
  'model', None, 'HF folder, GGUF file or workdir[@STEP].', required=True
)
_PROMPT = flags.DEFINE_string('prompt', None, 'One prompt.')
_PROMPTS = flags.DEFINE_string('prompts', None, 'A file of prompts.')
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Longest answer, in tokens; by default 256, or what fits.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.0, '0: always the likeliest token.', lower_bound=0
)
_TOP_K = flags.DEFINE_integer(
  'top_k', 0, 'Sample among the k likeliest tokens; 0: all.', lower_bound=0
)
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Sample among the likeliest tokens of this probability.')
flags.register_validator('top_p', lambda p: 0 < p <= 1, 'expected a number above 0 and not above 1')
_STOP = flags.DEFINE_multi_string(
  'stop', [], 'A string that ends the answer and is left out; may be given again.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of sampling.')
_BATCH = flags.DEFINE_integer('batch_size', 8, 'Prompts at once.', lower_bound=1)
_SYSTEM = flags.DEFINE_string('system', '', 'System message of a chat and of --prompt.')
_HISTORY = flags.DEFINE_string('history', '', 'File that keeps the questions of a chat.')
_RAW = flags.DEFINE_bool('raw', False, 'Continue the text as it stands, without the chat template.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Compute dtype.')


class Speaker:
  """A model with its tokenizer, ready to answer."""

  def __init__(self):
    # Of slow compiles XLA would warn in the middle of an answer.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    import jax
    import jax.numpy as jnp

    from ftjax.rollout.sampler import Sampler, Sampling
    from ftjax.runtime import sharding

    dtype = jnp.dtype(_DTYPE.value)
    jax.config.update(
      'jax_default_matmul_precision', 'highest' if dtype == jnp.float32 else 'default'
    )
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | {'fsdp': -1})
    jax.set_mesh(mesh)
    model, self._params = _load(_MODEL.value, mesh, dtype)
    self.tokenizer, self._max_len = model.tokenizer, model.arch.max_len
    self._sampler = Sampler(
      *(model.arch, dtype, model.stop_ids, self.tokenizer.pad_id),
      vocab_size=self.tokenizer.vocab_size,
    )
    self._sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    if _SYSTEM.value and not self._has_turns:
      raise ConfigError('--system needs a model with a chat template, and not --raw')

  @property
  def _has_turns(self) -> bool:
    """Whether a text is a user turn, and not a text to continue."""
    return self.tokenizer.template is not None and not _RAW.value

  def encode(self, row: dict) -> list[int]:
    """Ids of a row with "prompt" or "messages".

    Raises:
      ValueError: a row that is no prompt, or that the template refuses.
    """
    from ftjax.data import encode

    return encode.encode_prompt(read_prompt(row, self._has_turns), self.tokenizer)

  def encode_text(self, text: str) -> list[int]:
    """Ids of --prompt."""
    return self.encode({'prompt': text} | ({'system': _SYSTEM.value} if _SYSTEM.value else {}))

  def _text(self, ids: list[int]) -> str:
    text = self.tokenizer.decode(ids)
    cuts = [text.find(s) for s in _STOP.value if s in text]
    return text[: min(cuts)] if cuts else text

  def answer(self, prompts: list[list[int]], first_row: int) -> list[str]:
    """Texts that follow the prompts.

    Raises:
      ConfigError: they do not fit into the model's positions.
    """
    longest = max(map(len, prompts))
    most = _MAX_TOKENS.value or max(1, min(256, self._max_len - longest))
    if longest + most > self._max_len:
      raise ConfigError(
        f'{longest} tokens and --max_tokens={most} more; the model was made for {self._max_len} '
        'positions'
      )
    return [self._text(ids) for ids in self._generate(prompts, first_row, most)]

  def respond(self, messages: list, number: int, show) -> terminal_chat.Reply:
    """The next turn of a conversation; see terminal_chat.

    Raises:
      ValueError: no room is left for an answer, or the template refuses the conversation.
    """
    prompt = self.encode({'messages': messages} if self._has_turns else _transcript(messages))
    room = self._max_len - len(prompt)
    if room < 1:
      raise ValueError(
        f'the conversation has {len(prompt)} tokens, the model was made for {self._max_len} '
        'positions: /reset begins a new one'
      )
    most = min(_MAX_TOKENS.value or 256, room)

    def stream(answers):
      show(_settled(self._text(answers[0]), _STOP.value))

    (ids,) = self._generate([prompt], number, most, stream)
    hint = ''
    if len(ids) >= most:
      why = 'the context is full; /reset begins a new one' if most == room else '--max_tokens'
      hint = f'[cut after {most} tokens: {why}]'
    return terminal_chat.Reply(self._text(ids), hint)

  def _generate(self, prompts, first_row: int, most: int, stream=None) -> list[list[int]]:
    return self._sampler.generate(
      self._params,
      prompts,
      most,
      self._sampling,
      seed=_SEED.value,
      row_ids=range(first_row, first_row + len(prompts)),
      ended=lambda ids: any(s in self.tokenizer.decode(ids) for s in _STOP.value),
      stream=stream,
    )


def _transcript(messages: list) -> dict:
  """A conversation for a model without a chat template: its texts in a row."""
  return {'prompt': '\n'.join(m['content'] for m in messages)}


def _settled(text: str, stops: list[str]) -> str:
  """The text so far without an end that the next token may change: half a character, or what may
  become a stop string.
  """
  text = text.rstrip('\ufffd')
  ends = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
  return text[: len(text) - max(ends, default=0)]


def _load(path: str, mesh, dtype) -> tuple:
  """(experiment.Model, parameters) of --model."""
  from ftjax import experiment, saved_model
  from ftjax.hf import load
  from ftjax.models import transformer
  from ftjax.runtime import sharding, snapshots, trees

  def places(model):
    return sharding.shardings(mesh, transformer.axes(model.arch))

  def from_checkpoint(saved):
    saved_model.check_generates(saved.model, f'--model={path}')
    found = trees.flatten(places(saved.model))
    return saved.model, saved.load(found.__getitem__, dtype.name)

  workdir, which = snapshots.parse(path)
  if which and not snapshots.is_workdir(workdir):
    raise DataError(f'--model={path}: {workdir} is not a workdir of ftjax.train')
  export = None if which else load.newest_export(workdir)
  if export is None and snapshots.is_workdir(workdir):
    return saved_model.with_step(workdir, which, from_checkpoint)
  model = experiment.open_model(export or path, {}, 0, weights=False)
  return model, load.load_params(export or path, model.arch, places(model), dtype)


def read_prompt(row: dict, has_turns: bool):
  """Returns what a row asks: a formats.Chat, or the plain text to continue.

  Args:
    row: with "prompt" (a text or messages) or "messages", and perhaps "tools" and "system".
    has_turns: whether a text is a user turn.

  Raises:
    ValueError: the row holds no prompt, or an answer already.
  """
  from ftjax.data import formats

  given = [k for k in ('messages', 'prompt') if row.get(k) is not None]
  if len(given) != 1:
    raise ValueError(f'expected one of "messages" and "prompt", got {given or "neither"}')
  if row.get('completion') is not None:
    raise ValueError(
      'the row has a "completion", which the generated text would overwrite: it is a row for '
      'training. Leave the completion out or rename it'
    )
  (key,) = given
  value, system, tools = row[key], row.get('system'), row.get('tools')
  if row.get('chat_template_kwargs'):
    raise ValueError('"chat_template_kwargs" is not read here; leave it out')
  if isinstance(tools, str) and tools.strip():
    tools = json.loads(tools)
  if tools and (not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools)):
    raise ValueError('"tools": expected a list of objects')
  if system is not None and not isinstance(system, str):
    raise ValueError(f'"system": expected a text, got {system!r}')
  if isinstance(value, str) and key == 'prompt' and value.strip():
    if not has_turns:
      if system or tools:
        name = 'system' if system else 'tools'
        raise ValueError(f'"{name}" belongs to a conversation, and here a text is continued')
      return value
    value = [{'role': 'user', 'content': value}]
  if not isinstance(value, list) or not value:
    expected = 'a list that is not empty' if key == 'messages' else 'a text, or messages'
    raise ValueError(f'"{key}": expected {expected}, got {str(value)[:60]!r}')
  messages = formats.parse_prompt(value)
  if messages[-1]['role'] == 'assistant':
    raise ValueError(f'"{key}" ends with the assistant; the model is to answer: leave it out')
  if system:
    if messages[0]['role'] in ('system', 'developer'):
      raise ValueError(f'"system" stands beside a {messages[0]["role"]} message; keep one of them')
    messages = [{'role': 'system', 'content': system}, *messages]
  return formats.Chat(tuple(messages), tuple(tools) if tools else None)


def read_prompts(path: str) -> list[tuple[str, dict]]:
  """Returns (file:line, row) of every line of --prompts; a line of text is {'prompt': line}.

  Raises:
    DataError: a file or a line that cannot be read.
  """
  from ftjax.runtime import files

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
    row = {'prompt': line}
    if line.lstrip().startswith('{'):
      try:
        row = json.loads(line)
      except ValueError as error:
        raise DataError(f'{place}: not JSON: {error}') from error
    try:
      read_prompt(row, has_turns=True)
    except ValueError as error:
      raise DataError(f'{place}: {error}') from error
    rows.append((place, row))
  if not rows:
    raise DataError(f'--prompts={path}: no prompt in it')
  return rows


def _answer_rows(speaker: Speaker, rows: list[tuple[str, dict]]) -> None:
  """Prints every row with the text generated for it."""
  encoded = []
  for place, row in rows:
    try:
      encoded.append(speaker.encode(row))
    except ValueError as error:
      raise DataError(f'{place}: {error}') from error
  for start in range(0, len(rows), _BATCH.value):
    some = rows[start : start + _BATCH.value]
    texts = speaker.answer(encoded[start : start + len(some)], start)
    for (_, row), text in zip(some, texts, strict=True):
      print(json.dumps(row | {'completion': text}, ensure_ascii=False), flush=True)


def main() -> None:
  """Answers one prompt, a file of them, or a person."""
  if _PROMPT.value is not None and _PROMPTS.value is not None:
    raise ConfigError('--prompt and --prompts: give one of them')
  if _SYSTEM.value and _PROMPTS.value is not None:
    raise ConfigError('--system: rows of --prompts have a system message, or a column "system"')
  rows = [] if _PROMPTS.value is None else read_prompts(_PROMPTS.value)
  logging.getLogger().setLevel(logging.WARNING)
  speaker = Speaker()
  if _PROMPT.value is not None:
    print(speaker.answer([speaker.encode_text(_PROMPT.value)], 0)[0])
  elif _PROMPTS.value is not None:
    _answer_rows(speaker, rows)
  else:
    logging.getLogger().setLevel(logging.ERROR)
    terminal_chat.run(speaker.respond, _SYSTEM.value, _HISTORY.value)


if __name__ == '__main__':
  command.run(main)
