"""Makes a small T5 with random weights and a vocabulary of its own, to train from scratch:

  python demo/t5_folder.py TARGET_DIR ROWS.jsonl [--vocab_size=4000] [--sentinels=100]
      [--d_model=256] [--d_kv=32] [--d_ff=512] [--num_heads=8] [--num_layers=3] [--seed=0]

The vocabulary is SentencePiece's Unigram (Kudo 2018) with T5's layout, made of all texts in the
rows: <pad> is 0, </s> 1, <unk> 2, and the sentinels <extra_id_0>, ... are the last ids, counted
down. TARGET_DIR is a HF folder that transformers opens too. No pretrained T5 is fetched.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

_SPECIAL = ('<pad>', '</s>', '<unk>')


def texts(value: Any) -> Iterator[str]:
  """Yields the texts in a row: of its columns and messages, but no names of roles."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, list):
    for part in value:
      yield from texts(part)
  elif isinstance(value, dict):
    for key, part in value.items():
      if key != 'role':
        yield from texts(part)


def _pieces() -> pre_tokenizers.Sequence:
  space = pre_tokenizers.Metaspace(replacement='\u2581', prepend_scheme='always', split=True)
  return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])


def vocabulary(corpus: Iterable[str], size: int, sentinels: int) -> dict[str, bytes]:
  """Returns the files of a tokenizer: `size` pieces with the special ones, then the sentinels.

  Args:
    corpus: texts.
    size: pieces without sentinels; fewer where the texts have no more.
    sentinels: how many.
  """
  made = tokenizers.Tokenizer(models.Unigram())
  made.normalizer, made.pre_tokenizer = normalizers.NFKC(), _pieces()
  trainer = trainers.UnigramTrainer(
    vocab_size=size, special_tokens=list(_SPECIAL), unk_token='<unk>', show_progress=False
  )
  made.train_from_iterator(corpus, trainer)
  found = json.loads(made.to_str())
  own = [f'<extra_id_{i}>' for i in reversed(range(sentinels))]
  found['model']['vocab'] += [[name, 0.0] for name in own]
  first = len(found['model']['vocab']) - sentinels
  special = [*enumerate(_SPECIAL), *enumerate(own, first)]
  flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
  found['added_tokens'] = [{'id': i, 'content': n, 'special': True} | flags for i, n in special]
  whole = tokenizers.Tokenizer.from_str(json.dumps(found))
  whole.decoder = decoders.Metaspace(replacement='\u2581', prepend_scheme='always', split=True)
  whole.post_processor = processors.TemplateProcessing(
    single=['$A', '</s>'], special_tokens=[('</s>', _SPECIAL.index('</s>'))]
  )
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'pad_token': '<pad>',
    'additional_special_tokens': own[::-1],
  }
  return {
    'tokenizer.json': whole.to_str().encode(),
    'tokenizer_config.json': json.dumps(config, indent=1).encode(),
  }


def write(target: str, files: dict[str, bytes], sizes: dict[str, int], seed: int) -> int:
  """Writes the folder of a T5 v1.1 with random weights; returns its number of parameters."""
  import jax
  import numpy as np

  from ftjax.families import table
  from ftjax.hf import export
  from ftjax.models import counts, kinds
  from ftjax.runtime import sharding

  count = tokenizers.Tokenizer.from_buffer(files['tokenizer.json']).get_vocab_size()
  config = sizes | {
    'architectures': ['T5ForConditionalGeneration'],
    'model_type': 't5',
    'vocab_size': -(-count // 64) * 64,
    'feed_forward_proj': 'gated-gelu',
    'tie_word_embeddings': False,
    'is_encoder_decoder': True,
    'decoder_start_token_id': 0,
    'pad_token_id': 0,
    'eos_token_id': 1,
    'dropout_rate': 0.0,
  }
  arch = table.architecture(config)
  jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1]))
  params = jax.jit(kinds.init, static_argnums=(0, 2))(arch, jax.random.key(seed), np.float32)
  files = files | {'config.json': json.dumps(config, indent=1).encode()}
  export.export(
    params,
    arch,
    target,
    source_config=config,
    tokenizer_files=files,
    dtype=np.dtype(np.float32),
    stop_ids=(1,),
  )
  return counts.num_params(arch)


def main() -> None:
  """Reads the rows, makes the vocabulary and writes the folder."""
  parser = argparse.ArgumentParser(description='A small T5 with random weights.')
  parser.add_argument('target')
  parser.add_argument('rows')
  numbers = {'vocab_size': 4000, 'sentinels': 100, 'seed': 0}
  sizes = {'d_model': 256, 'd_kv': 32, 'd_ff': 512, 'num_heads': 8, 'num_layers': 3}
  for name, usual in (numbers | sizes).items():
    parser.add_argument(f'--{name}', type=int, default=usual)
  given = vars(parser.parse_args())
  lines = Path(given['rows']).read_text().splitlines()
  corpus = [text for line in lines if line for text in texts(json.loads(line))]
  files = vocabulary(corpus, given['vocab_size'], given['sentinels'])
  count = write(given['target'], files, {n: given[n] for n in sizes}, given['seed'])
  print(f'{given["target"]}: {count:,} parameters, made of {len(corpus):,} texts')


if __name__ == '__main__':
  main()
