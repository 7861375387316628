"""python -m ftjax.generate --model=DIR_OR_WORKDIR --prompt=TEXT | --prompts=FILE | (neither: chat
on the terminal) [--classify | --embed | --steps=min]

DIR is a HF folder, a GGUF file, a PEFT folder (an adapter, used on the base that it names or on
--base), or a workdir, of which export/ is loaded, or the newest checkpoint if the run has not
ended; WORKDIR@STEP, WORKDIR@last and WORKDIR@best select one. --prompts reads one prompt per line,
or JSON lines with "prompt" or "messages", and prints each as a JSON line with the generated text
under "completion". If the model has a chat template, a prompt is a user turn unless --raw is
given. --classify is for models with labels: it prints the labels of texts, with their
probabilities. Its rows have "text", or two texts that are read together, or "tokens". --embed
prints the vectors of texts, of length 1, under "embedding". --steps is
for process reward models: rows have "prompt" and "completions", the steps of a solution, or one
"completion"; it prints them with the scores of the steps and of the whole."""

import json
import logging
import os

from absl import flags

from ftjax import cli
from ftjax.runtime.errors import ConfigError

_MODEL = flags.DEFINE_string(
  'model', None, 'HF folder, GGUF file, PEFT folder or workdir[@STEP].', required=True
)
_BASE = flags.DEFINE_string('base', '', 'The base of an adapter; by default the one that it names.')
_PROMPT = flags.DEFINE_string('prompt', None, 'One prompt.')
_PROMPTS = flags.DEFINE_string('prompts', None, 'A file of prompts.')
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Most tokens of a completion; by default 256, or what fits.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.0, 'Sampling temperature; 0: greedy.', lower_bound=0
)
_TOP_K = flags.DEFINE_integer(
  'top_k', 0, 'Sample from the k most likely tokens; 0: all.', lower_bound=0
)
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Nucleus sampling: total probability of the candidates.')
flags.register_validator('top_p', lambda p: 0 < p <= 1, 'expected a number above 0 and not above 1')
_BEAMS = flags.DEFINE_integer(
  'num_beams', 1, 'Completions that a beam search extends together, of an encoder-decoder; 1: none.'
)
_PENALTY = flags.DEFINE_float(
  'length_penalty', 1.0, 'Beam search: log-probability / tokens**length_penalty is compared.'
)
_EARLY = flags.DEFINE_enum(
  'early_stopping',
  'false',
  ['false', 'true', 'never'],
  'When a beam search ends: no completion at its present length could be better, enough are '
  'finished, or none could be better at any length.',
)
_STOP = flags.DEFINE_multi_string(
  'stop', [], 'A string that ends the completion and is left out; may be repeated.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of sampling.')
_BATCH = flags.DEFINE_integer('batch_size', 8, 'Prompts per batch.', lower_bound=1)
_SYSTEM = flags.DEFINE_string('system', '', 'System message of a chat and of --prompt.')
_HISTORY = flags.DEFINE_string('history', '', 'File for the input history of a chat.')
_RAW = flags.DEFINE_bool('raw', False, 'Continue the text itself, without the chat template.')
_FAMILY = flags.DEFINE_string(
  'family', '', 'package.module:FAMILY, a model family of your own, as in model.family of a config.'
)
_CLASSIFY = flags.DEFINE_bool(
  'classify', False, 'Print the labels of --prompt, or of the rows of --prompts.'
)
_EMBED = flags.DEFINE_bool(
  'embed', False, 'Print the vectors of --prompt, or of the rows of --prompts.'
)
_STEPS = flags.DEFINE_enum(
  'steps',
  None,
  ['min', 'product', 'last'],
  'Score the solutions in --prompts with a process reward model: by the least, the product or the '
  'last of the scores of their steps.',
)
_SEPARATOR = flags.DEFINE_string(
  'separator', '\\n', 'With --steps: the text after each step, prm.separator of the training.'
)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Compute dtype.')


def main() -> None:
  """Generates for one prompt, for a file of prompts, or in a chat."""
  if _PROMPT.value is not None and _PROMPTS.value is not None:
    raise ConfigError('--prompt and --prompts: give one of them')
  if _SYSTEM.value and _PROMPTS.value is not None:
    raise ConfigError('--system: rows of --prompts have a system message, or a column "system"')
  # XLA would warn of slow compilations in the middle of a completion.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  logging.getLogger().setLevel(logging.WARNING)
  if sum((_CLASSIFY.value, _EMBED.value, _STEPS.value is not None)) > 1:
    raise ConfigError('--classify, --embed and --steps: give one of them')
  if _CLASSIFY.value or _EMBED.value:
    _classify_or_embed()
    return
  if _STEPS.value:
    _score_steps()
    return
  from ftjax.generation.beam_search import Beams
  from ftjax.generation.sampling import Sampling
  from ftjax.serving import generator, terminal_chat

  rows = [] if _PROMPTS.value is None else generator.read_prompts(_PROMPTS.value)
  model = generator.Generator(
    _MODEL.value,
    generator.Settings(
      sampling=Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value),
      max_tokens=_MAX_TOKENS.value or 0,
      stop=tuple(_STOP.value),
      seed=_SEED.value,
      system=_SYSTEM.value,
      raw=_RAW.value,
      batch_size=_BATCH.value,
      dtype=_DTYPE.value,
      family=_FAMILY.value,
      base=_BASE.value,
      beams=Beams(_BEAMS.value, _PENALTY.value, _EARLY.value),
    ),
  )
  if _PROMPT.value is not None:
    print(model.answer([model.encode_text(_PROMPT.value)], 0)[0])
  elif _PROMPTS.value is not None:
    for row in model.answer_rows(rows):
      print(json.dumps(row, ensure_ascii=False), flush=True)
  else:
    logging.getLogger().setLevel(logging.ERROR)
    terminal_chat.run(model.respond, _SYSTEM.value, _HISTORY.value)


def _classify_or_embed() -> None:
  """Prints each text with its labels or its vector, a JSON line each."""
  from ftjax.serving import classifier, embedder

  flag = '--embed' if _EMBED.value else '--classify'
  if _PROMPT.value is None and _PROMPTS.value is None:
    raise ConfigError(f'{flag} needs a text in --prompt, or a file of texts in --prompts')
  where = (_DTYPE.value, _FAMILY.value, _BASE.value)
  rows = [('--prompt', {'text': _PROMPT.value})]
  if _PROMPTS.value is not None:
    rows = classifier.read_rows(_PROMPTS.value)
  if _EMBED.value:
    found = embedder.Embedder(_MODEL.value, *where, batch_size=_BATCH.value).embed_rows(rows)
  else:
    found = classifier.Classifier(_MODEL.value, *where, batch_size=_BATCH.value).label_rows(rows)
  for row in found:
    print(json.dumps(row, ensure_ascii=False), flush=True)


def _score_steps() -> None:
  """Prints each solution with the scores of its steps, a JSON line each."""
  from ftjax.serving import step_scorer

  if _PROMPTS.value is None:
    raise ConfigError('--steps needs a file of solutions in --prompts')
  separator = _SEPARATOR.value.replace('\\n', '\n')
  if not separator:
    raise ConfigError('--separator is empty; expected the text after each step')
  rows = step_scorer.read_rows(_PROMPTS.value)
  model = step_scorer.StepScorer(
    *(_MODEL.value, separator, _DTYPE.value, _FAMILY.value, _BASE.value), batch_size=_BATCH.value
  )
  for row in model.score_rows(rows, _STEPS.value):
    print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == '__main__':
  cli.run(main)
