"""Generates synthetic rows and a byte tokenizer, so that every algorithm runs without files.

A source 'sums:N' is N questions like "7 + 5 =" with their answers; 'pairs:N' has a right and a
wrong answer to each, 'labels:N' one of the two with its label, 'scores:N' one with a score by its
distance from the right one. 'classes:N' has each question with the label 'even' or 'odd' of its
second term, 'tags:N' its words with a tag for even and odd terms, 'texts:N' question and answer
as one text, 'similar:N' the question with the same one and another one in other words, 'steps:N'
its terms as two steps, of which an odd second one is wrong. 'sums:N:BELOW', and likewise the
others, has terms below BELOW instead of 100. The tokenizer has one token a byte and a ChatML
template.
"""

import dataclasses
import functools
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ftjax.data.sources import Spec
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files

_SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
BELOW = 100  # upper bound of the terms, unless the source has a smaller one
VOCAB_SIZE = 256 + len(_SPECIAL)
_TEMPLATE = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
  "{{ message['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def sums(count: int, below: int = BELOW) -> list[dict]:
  """Returns `count` different conversations about a + b, 0 <= a, b < below, in a fixed order.

  Raises:
    ConfigError: there are fewer.
  """
  if not 0 < below <= BELOW:
    raise ConfigError(
      f'terms below {below}; expected 1 to {BELOW}, as in data.train=sums:90:10 for terms below 10'
    )
  pairs = sorted(
    ((a, b) for a in range(below) for b in range(below)),
    key=lambda p: (p[0] * 7919 + p[1] * 104729) % 10007,
  )
  if not 0 < count <= len(pairs):
    raise ConfigError(
      f'{count} synthetic rows; expected 1 to {len(pairs)} with terms below {below}, as in '
      'data.train=sums:400'
    )
  return [
    {
      'messages': [
        {'role': 'user', 'content': f'{a} + {b} ='},
        {'role': 'assistant', 'content': str(a + b)},
      ]
    }
    for a, b in pairs[:count]
  ]


def _labeled(kind: str, count: int, below: int) -> list[dict]:
  """Returns the rows of `sums` with wrong answers, as pairs or instead of every other right one.

  A wrong answer begins with 'about', so that a model can learn the preference without addition.
  """
  rows = []
  for i, row in enumerate(sums(count, below)):
    prompt, right = row['messages'][:1], row['messages'][1]
    off = 1 + i % 9
    wrong = right | {'content': f'about {int(right["content"]) + off}'}
    if kind == 'pairs':
      rows.append({'prompt': prompt, 'chosen': [right], 'rejected': [wrong]})
      continue
    is_right = i % 2 == 0
    verdict = {'label': is_right} if kind == 'labels' else {'score': 0.0 if is_right else -off / 9}
    rows.append({'messages': [*prompt, right if is_right else wrong]} | verdict)
  return rows


def _in_steps(question: str, words: list[str]) -> dict:
  """Returns a question with its two terms as steps, the second of which is wrong if it is odd."""
  first, second = words[0], words[2]
  return {
    'prompt': question,
    'completions': [f'first {first}', f'then {second}'],
    'labels': [True, int(second) % 2 == 0],
  }


def _annotated(kind: str, count: int, below: int) -> list[dict]:
  """Returns the questions of `sums` with labels, as words with tags, or with other texts."""
  rows = []
  for row in sums(count, below):
    text = row['messages'][0]['content']
    words = text.split()
    if kind == 'similar':
      other = (int(words[0]) + 1) % below
      texts = (f'add {term} to {words[2]}' for term in (words[0], other))
      rows.append(dict(zip(('anchor', 'positive', 'negative'), (text, *texts), strict=True)))
      continue
    if kind == 'texts':
      rows.append({'text': f'{text} {row["messages"][1]["content"]}'})
      continue
    if kind == 'steps':
      rows.append(_in_steps(text, words))
      continue
    if kind == 'classes':
      rows.append({'text': text, 'label': ('even', 'odd')[int(words[2]) % 2]})
      continue
    tags = [('B-EVEN', 'B-ODD')[int(w) % 2] if w.isdigit() else 'O' for w in words]
    rows.append({'tokens': words, 'tags': tags})
  return rows


_KINDS = {'sums': sums} | {
  kind: functools.partial(make, kind)
  for make, kinds in (
    (_labeled, ('pairs', 'labels', 'scores')),
    (_annotated, ('classes', 'tags', 'texts', 'similar', 'steps')),
  )
  for kind in kinds
}


def resolve(spec: Spec, folder: str) -> Spec:
  """Writes the rows of a synthetic source to a file in `folder`, and returns the file as source.

  For gs:// the file is in the local mirror of the folder. Other sources are returned unchanged.
  """
  kind, *sizes = spec.path.split(':')
  is_synthetic = kind in _KINDS and len(sizes) in (1, 2)
  if not is_synthetic or not all(size.isdigit() for size in sizes):
    return spec
  count, below = [*map(int, sizes), BELOW][:2]
  name = f'{kind}-{count}' if below == BELOW else f'{kind}-{count}-below-{below}'
  path = files.local_mirror(folder) / f'{name}.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = _KINDS[kind](count, below)
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  # Other processes may be reading the file: it is replaced atomically, and only where it differs.
  if not (path.exists() and path.read_text() == text):
    files.write_text(path, text)
  return dataclasses.replace(spec, path=str(path))


def byte_tokenizer() -> dict[str, bytes]:
  """Returns the files of a tokenizer with a token for each byte and three special ones."""
  # ByteLevel writes every byte as one printable character; its alphabet in a fixed order is the
  # vocabulary.
  vocab = {s: i for i, s in enumerate(_SPECIAL)}
  vocab |= {c: len(_SPECIAL) + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(_SPECIAL))
  config = {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>', 'chat_template': _TEMPLATE}
  config['tokenizer_class'] = 'PreTrainedTokenizerFast'
  return {
    'tokenizer.json': tokenizer.to_str().encode(),
    'tokenizer_config.json': json.dumps(config).encode(),
  }
