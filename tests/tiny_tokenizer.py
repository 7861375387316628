"""A small byte-level BPE tokenizer made on the spot, as the files of a HF folder."""

import functools
import json

import tokenizers

SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')

CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
  "+ '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = [
  'The quick brown fox jumps over the lazy dog. What is the capital of France? It is Paris.',
  'system user assistant tool Yes, of course! I can help you with that; here are the steps:',
  '1 + 1 = 2, 12 times 12 is 144. def f(x):\n  return x * x\n\nhello hello world world',
]


@functools.cache
def _model(special: tuple[str, ...], vocab_size: int) -> str:
  tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokens.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(special),
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokens.train_from_iterator(_CORPUS, trainer)
  return tokens.to_str()


def tiny_files(
  template: str | None = CHATML,
  *,
  bos: str | None = '<|im_start|>',
  eos: str = '<|im_end|>',
  adds_bos: bool = False,
  extra_special: tuple[str, ...] = (),
  vocab_size: int = 384,
) -> dict[str, bytes]:
  """Files of a tokenizer folder: byte-level BPE, ChatML unless told otherwise.

  `adds_bos` gives tokenizer.json a post-processor that puts `bos` before every text (and, like that
  of real models, trims the offsets of leading spaces).
  """
  model = json.loads(_model(SPECIAL + extra_special, vocab_size))
  if adds_bos:
    at = {t['content']: t['id'] for t in model['added_tokens']}[bos]
    model['post_processor'] = {
      'type': 'Sequence',
      'processors': [
        {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True},
        {
          'type': 'TemplateProcessing',
          'single': [
            {'SpecialToken': {'id': bos, 'type_id': 0}},
            {'Sequence': {'id': 'A', 'type_id': 0}},
          ],
          'pair': [
            {'Sequence': {'id': 'A', 'type_id': 0}},
            {'Sequence': {'id': 'B', 'type_id': 1}},
          ],
          'special_tokens': {bos: {'id': bos, 'ids': [at], 'tokens': [bos]}},
        },
      ],
    }
  config = {'bos_token': bos, 'eos_token': eos, 'pad_token': eos, 'chat_template': template}
  return {
    'tokenizer.json': json.dumps(model).encode(),
    'tokenizer_config.json': json.dumps(config).encode(),
  }
