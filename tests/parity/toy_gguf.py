"""Small GGUF files made on the spot: a llama model with random weights and a byte-level or
SentencePiece vocabulary.

Used by make_goldens.py and by the tests of gguf.py: both build the same file.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
from pathlib import Path

import gguf
import numpy as np

from parity.mixed_strings import mixed_strings


@dataclasses.dataclass(frozen=True)
class Toy:
  """Sizes of the toy model; widths are multiples of 32: rows fill whole quantization blocks."""

  model_dim: int = 64
  num_layers: int = 2
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 16
  ffn_dim: int = 96
  theta: float = 10000.0
  tied: bool = True
  rope_factors: tuple[float, ...] = ()
  original_len: int | None = None
  types: tuple[str, ...] = ('F32',)  # given to the matrices in turn


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """float32 weights that depend on the name alone."""
  seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'little')
  values = np.random.default_rng(seed).normal(0, 0.2, shape)
  return (1 + values if 'norm' in name else values).astype(np.float32)


def toy_tensors(toy: Toy, vocab_size: int) -> dict[str, tuple[int, ...]]:
  """{GGUF name: shape [out, in]}."""
  d, f = toy.model_dim, toy.ffn_dim
  q, k = toy.num_heads * toy.head_dim, toy.num_kv_heads * toy.head_dim
  layer = {
    'attn_norm': (d,),
    'attn_q': (q, d),
    'attn_k': (k, d),
    'attn_v': (k, d),
    'attn_output': (d, q),
    'ffn_norm': (d,),
    'ffn_gate': (f, d),
    'ffn_up': (f, d),
    'ffn_down': (d, f),
  }
  tensors = {'token_embd.weight': (vocab_size, d), 'output_norm.weight': (d,)}
  if not toy.tied:
    tensors['output.weight'] = (vocab_size, d)
  for i in range(toy.num_layers):
    tensors |= {f'blk.{i}.{name}.weight': shape for name, shape in layer.items()}
  return tensors


def byte_alphabet() -> dict[int, str]:
  """GPT-2's printable character for each byte: itself where printable, else 256 and up in order."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [b for b in range(256) if b not in shown]
  return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@functools.cache
def merge_rules(words: tuple[tuple[str, ...], ...], count: int) -> list[tuple[str, str]]:
  """The first `count` BPE merges of a corpus: the most frequent pair, ties by spelling."""
  rules = []
  for _ in range(count):
    pairs = collections.Counter(p for word in words for p in itertools.pairwise(word))
    pair = min(pairs, key=lambda p: (-pairs[p], p))
    rules.append(pair)
    words = tuple(_merge(word, pair) for word in words)
  return rules


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
  out: list[str] = []
  for piece in word:
    if out and (out[-1], piece) == pair:
      out[-1] += piece
    else:
      out.append(piece)
  return tuple(out)


CORPUS = [text for text in mixed_strings(60, ()) for _ in range(2)] + [
  'the they this that 12 123 2024  x   y'
] * 9


def write_toy(
  path: Path,
  toy: Toy,
  vocabulary: str,
  pre: str = 'gpt-2',
  split: int = 0,
  **fields: int | bool | str,
) -> None:
  """Writes a toy model with a 'gpt2' (byte-level, pre-tokenizer `pre`) or 'llama' (SentencePiece)
  vocabulary.

  With `split`, in parts of so many tensors. `fields` are added to the metadata, with '.' written as
  '__': llama__rope__scaling__type.
  """
  writer = gguf.GGUFWriter(str(path), 'llama', split_max_tensors=split)
  writer.add_context_length(256)
  writer.add_embedding_length(toy.model_dim)
  writer.add_block_count(toy.num_layers)
  writer.add_feed_forward_length(toy.ffn_dim)
  writer.add_head_count(toy.num_heads)
  writer.add_head_count_kv(toy.num_kv_heads)
  writer.add_rope_dimension_count(toy.head_dim)
  writer.add_rope_freq_base(toy.theta)
  writer.add_layer_norm_rms_eps(1e-5)
  if toy.original_len:
    writer.add_uint32('llama.rope.scaling.original_context_length', toy.original_len)
  tokens = (_byte_level if vocabulary == 'gpt2' else _sentencepiece)(writer)
  if vocabulary == 'gpt2':
    writer.add_tokenizer_pre(pre)
  for key, value in fields.items():
    key = key.replace('__', '.')
    {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)](key, value)
  shapes = toy_tensors(toy, len(tokens))
  for i, (name, shape) in enumerate(shapes.items()):
    kind = gguf.GGMLQuantizationType[toy.types[i % len(toy.types)] if len(shape) > 1 else 'F32']
    writer.add_tensor(name, gguf.quants.quantize(weight(name, shape), kind), raw_dtype=kind)
  if toy.rope_factors:
    writer.add_tensor('rope_freqs.weight', np.array(toy.rope_factors, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _byte_level(writer) -> list[str]:
  alphabet = byte_alphabet()
  words = tuple(tuple(alphabet[b] for b in text.encode()) for text in CORPUS)
  rules = merge_rules(words, 150)
  merged = sorted({''.join(rule) for rule in rules})
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  tokens = [*special, *alphabet.values(), *merged, '<think>']
  writer.add_tokenizer_model('gpt2')
  writer.add_token_list(tokens)
  writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 4) + [4])
  writer.add_token_merges([' '.join(rule) for rule in rules])
  for key, i in {'bos': 1, 'eos': 2, 'unknown': 0, 'padding': 2}.items():
    writer.add_uint32(f'tokenizer.ggml.{key}_token_id', i)
  return tokens


def _sentencepiece(writer) -> list[str]:
  words = tuple(tuple('▁' + text.replace(' ', '▁')) for text in CORPUS)
  rules = merge_rules(words, 150)
  merged = list(dict.fromkeys(''.join(rule) for rule in rules))
  letters = sorted({c for word in words for c in word})[:150]
  tokens = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *merged]
  tokens += [c for c in letters if c not in merged]
  scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
  writer.add_tokenizer_model('llama')
  writer.add_token_list(tokens)
  writer.add_token_scores(scores)
  writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
  for key, i in {'bos': 1, 'eos': 2, 'unknown': 0}.items():
    writer.add_uint32(f'tokenizer.ggml.{key}_token_id', i)
  return tokens
