"""python -m ftjax.generate --model=DIR_OR_WORKDIR --prompt=TEXT | --prompts=FILE | (neither: chat
on the terminal)

DIR is a HF folder, a GGUF file, or a workdir whose export/ is used. --prompts reads one prompt a
line, or JSON lines with "prompt" or "messages", and prints a JSON line for each. A prompt is a user
turn where the model has a chat template, unless --raw."""

import json
import sys

from absl import flags

from ftjax import command
from ftjax.runtime.errors import ConfigError, DataError

_MODEL = flags.DEFINE_string('model', None, 'HF folder, GGUF file or workdir.', required=True)
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
_RAW = flags.DEFINE_bool('raw', False, 'Continue the text as it stands, without the chat template.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Compute dtype.')


class Speaker:
  """A model with its tokenizer, ready to answer."""

  def __init__(self):
    import jax
    import jax.numpy as jnp

    from ftjax import experiment
    from ftjax.hf import load
    from ftjax.models import transformer
    from ftjax.rollout.sampler import Sampler, Sampling
    from ftjax.runtime import files, sharding

    path = _MODEL.value
    if inside := load.exported(path):
      path = inside
    elif files.exists(files.join(path, 'manifest.json')):
      raise ConfigError(
        f'--model={path}: there is no export/ in it yet; training writes it at its end'
      )
    model = experiment.open_model(path, {}, 0, weights=False)
    self.tokenizer, self._max_len = model.tokenizer, model.arch.max_len
    dtype = jnp.dtype(_DTYPE.value)
    jax.config.update(
      'jax_default_matmul_precision', 'highest' if dtype == jnp.float32 else 'default'
    )
    sizes = dict.fromkeys(sharding.AXES, 1) | {'fsdp': -1}
    mesh = sharding.make_mesh(sizes)
    jax.set_mesh(mesh)
    self._params = load.load_params(
      path, model.arch, sharding.shardings(mesh, transformer.axes(model.arch)), dtype
    )
    self._sampler = Sampler(
      *(model.arch, dtype, model.stop_ids, self.tokenizer.pad_id),
      vocab_size=self.tokenizer.vocab_size,
    )
    self._sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)

  def encode(self, row: dict) -> list[int]:
    """Ids of {'prompt': text} or {'messages': [...]}."""
    from ftjax.data import encode, formats

    if 'messages' in row:
      return encode.encode_prompt(formats.Chat(tuple(row['messages']), None), self.tokenizer)
    if _RAW.value or self.tokenizer.template is None:
      return encode.encode_prompt(row['prompt'], self.tokenizer)
    return self.encode({'messages': [{'role': 'user', 'content': row['prompt']}]})

  def _text(self, ids: list[int]) -> str:
    text = self.tokenizer.decode(ids)
    cuts = [text.find(s) for s in _STOP.value if s in text]
    return text[: min(cuts)] if cuts else text

  def answer(self, prompts: list[list[int]], first_row: int, show=None) -> list[str]:
    """Texts; `show` is called with the first row's text as it grows."""
    longest = max(map(len, prompts))
    most = _MAX_TOKENS.value or max(1, min(256, self._max_len - longest))
    if longest + most > self._max_len:
      raise ConfigError(
        f'{longest} tokens and --max_tokens={most} more; the model was made for {self._max_len} '
        'positions'
      )
    ids = self._sampler.generate(
      self._params,
      prompts,
      most,
      self._sampling,
      seed=_SEED.value,
      row_ids=range(first_row, first_row + len(prompts)),
      ended=lambda ids: any(s in self.tokenizer.decode(ids) for s in _STOP.value),
      stream=show and (lambda answers: show(self._text(answers[0]))),
    )
    return [self._text(i) for i in ids]


def _checked(row, place: str) -> dict:
  """A row of --prompts; messages are checked as those of training are."""
  from ftjax.data import formats

  known = isinstance(row, dict) and (row.get('messages') or row.get('prompt'))
  if not isinstance(known, list if isinstance(row, dict) and 'messages' in row else str):
    raise DataError(f'{place}: expected "prompt", a text, or "messages", a list')
  try:
    return row | {'messages': formats.parse_prompt(known)} if 'messages' in row else row
  except ValueError as error:
    raise DataError(f'{place}: {error}') from error


def _read_prompts(path: str) -> list[dict]:
  from ftjax.runtime import files

  rows = []
  try:
    lines = files.read_text(path).split('\n')
  except OSError as error:
    raise DataError(f'--prompts={path}: {error.strerror}') from error
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    row = {'prompt': line}
    if line.lstrip().startswith('{'):
      try:
        row = json.loads(line)
      except ValueError as error:
        raise DataError(f'{path}:{number}: not JSON: {error}') from error
      row = _checked(row, f'{path}:{number}')
    rows.append(row)
  return rows


def _chat(speaker: Speaker) -> None:
  """Turns on the terminal until end of input."""
  messages, turn = [], 0
  while True:
    try:
      said = input('> ')
    except EOFError:
      return
    if not said.strip():
      continue
    messages.append({'role': 'user', 'content': said})
    shown = 0

    def show(text):
      nonlocal shown
      print(text[shown:], end='', flush=True)
      shown = max(shown, len(text))

    (text,) = speaker.answer([speaker.encode({'messages': messages})], turn, show)
    print(text[shown:], flush=True)
    messages.append({'role': 'assistant', 'content': text.strip()})
    turn += 1


def main() -> None:
  """Answers one prompt, a file of them, or a person."""
  rows = [] if _PROMPTS.value is None else _read_prompts(_PROMPTS.value)
  speaker = Speaker()
  if _PROMPT.value is not None:
    print(speaker.answer([speaker.encode({'prompt': _PROMPT.value})], 0)[0])
  elif _PROMPTS.value is not None:
    for start in range(0, len(rows), _BATCH.value):
      some = rows[start : start + _BATCH.value]
      for row, text in zip(
        some, speaker.answer([speaker.encode(r) for r in some], start), strict=True
      ):
        print(json.dumps(row | {'answer': text}, ensure_ascii=False), flush=True)
  else:
    if sys.stdin.isatty():
      print('Type a message; end with Ctrl-D.')
    _chat(speaker)


if __name__ == '__main__':
  command.run(main)
