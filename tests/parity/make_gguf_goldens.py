"""Writes golden/gguf_perplexity.npz: log-probabilities that real GGUF models give to a text, by a
forward pass in numpy that shares no line with ftjax.

  PYTHONPATH=tests python tests/parity/make_gguf_goldens.py tests/parity/golden

It needs numpy, the `gguf` package, .cache/ from `make assets` and `make gemma`, and llama.cpp for
the token ids (llama_cpp.py). For each model: the ids, BOS first where the file asks for it, and the
log-probability of each id but the first, given those before it. About a minute on two cores.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

from parity.llama_cpp import LlamaCpp

CACHE = Path(__file__).parents[2] / '.cache'
MODELS = {
  'smollm2': CACHE / 'SmolLM2-135M-Instruct.Q4_1.gguf',
  'gemma3': CACHE / 'gemma-3-270m-q4_k_m.gguf',
}
TOKENS = 256
TEXT = """The ferry across the upper lake has run since 1911, and for most of that time it has been
late. In summer the boat carries walkers, farmers and the schoolchildren of the eastern shore; in
winter, when the ice is too thin to bear a sledge and too thick for the hull, it carries nobody, and
the village on the far side lives on what its cellars hold. My grandfather was its engineer for
thirty years. He used to say that the engine had two moods, sulking and working, and that both of
them sounded alike to a stranger. On the morning of the great storm he kept it running for nine
hours while the captain circled the broken pier, looking for a place to land forty passengers and a
cow. All of them got ashore. The cow, he told us, was the only one who thanked him.

When the road tunnel was opened in 1974, the county wanted to sell the boat for scrap. Instead, the
people of the village bought it with the money they had saved for a new school roof, which is why
the roof still leaks and the ferry still runs. A crossing takes twenty-five minutes and costs less
than a cup of coffee. There is no timetable: you ring the bell at the landing, and if the wind is
right someone will hear it. Scientists from the university come every spring to measure how clear
the water is. They lower a white disk on a rope and write down the depth at which it disappears.
"""


class Decoder:
  """A `llama` or `gemma3` file, computed in float32; weights are dequantized when first used."""

  def __init__(self, path: Path):
    reader = gguf.GGUFReader(path)
    self.tensors = {t.name: t for t in reader.tensors}
    self.fields, self.arch = reader.fields, reader.fields['general.architecture'].contents()
    self.weights: dict[str, np.ndarray] = {}
    self.gemma = self.arch == 'gemma3'
    assert self.gemma or self.arch == 'llama'
    self.dim, self.layers = self.setting('embedding_length'), self.setting('block_count')
    self.heads, self.kv_heads = (self.setting(f'attention.head_count{kv}') for kv in ('', '_kv'))
    self.head_dim = self.setting('attention.key_length', self.dim // self.heads)

  def setting(self, name, default=None):
    field = self.fields.get(f'{self.arch}.{name}')
    assert field is not None or default is not None, name
    return default if field is None else field.contents()

  def weight(self, name: str) -> np.ndarray:
    if name not in self.weights:
      t = self.tensors[f'{name}.weight']
      value = gguf.quants.dequantize(t.data, t.tensor_type)
      self.weights[name] = value.reshape([int(n) for n in t.shape[::-1]]).astype(np.float32)
    return self.weights[name]

  def norm(self, x: np.ndarray, name: str) -> np.ndarray:
    eps = self.setting('attention.layer_norm_rms_epsilon')
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + eps) * self.weight(name)

  def rotate(self, x: np.ndarray, theta: float) -> np.ndarray:
    """x: [T, heads, H]. `llama` rotates neighbours, `gemma3` coordinates half a head apart."""
    half = self.head_dim // 2
    turn = np.exp(1j * np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half)))[:, None]
    pairs = x.reshape(*x.shape[:2], half, 2)
    if self.gemma:
      pairs = np.stack([x[..., :half], x[..., half:]], -1)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    out = [turned.real, turned.imag]
    out = np.concatenate(out, -1) if self.gemma else np.stack(out, -1).reshape(x.shape)
    return out.astype(np.float32)

  def attention(self, x: np.ndarray, layer: int) -> np.ndarray:
    name, t = f'blk.{layer}.attn_', len(x)
    q, k, v = (
      (x @ self.weight(name + part).T).reshape(t, -1, self.head_dim) for part in ('q', 'k', 'v')
    )
    theta, window = self.setting('rope.freq_base', 10000.0), t
    if self.gemma:
      q, k = self.norm(q, f'{name}q_norm'), self.norm(k, f'{name}k_norm')
      if (layer + 1) % 6:
        theta, window = 10000.0, self.setting('attention.sliding_window')
    q, k = self.rotate(q, theta), self.rotate(k, theta)
    distance = np.arange(t)[:, None] - np.arange(t)
    seen = (distance >= 0) & (distance < window)
    out = np.empty_like(q)
    for head in range(self.heads):
      kv = head // (self.heads // self.kv_heads)
      scores = np.where(seen, q[:, head] @ k[:, kv].T / self.head_dim**0.5, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
    return out.reshape(t, -1) @ self.weight(f'{name}output').T

  def mlp(self, x: np.ndarray, layer: int) -> np.ndarray:
    gate, up, down = (self.weight(f'blk.{layer}.ffn_{part}') for part in ('gate', 'up', 'down'))
    a = x @ gate.T
    if self.gemma:
      a = a / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))
    else:
      a = a / (1 + np.exp(-a))
    return (a * (x @ up.T)) @ down.T

  def logits(self, ids: np.ndarray) -> np.ndarray:
    """float32[T, V]."""
    x = self.weight('token_embd')[ids]
    x = x * np.float32(self.dim**0.5) if self.gemma else x
    for layer in range(self.layers):
      block = f'blk.{layer}.'
      for branch, before, after in (
        (self.attention, 'attn_norm', 'post_attention_norm'),
        (self.mlp, 'ffn_norm', 'post_ffw_norm'),
      ):
        out = branch(self.norm(x, block + before), layer)
        x = x + (self.norm(out, block + after) if self.gemma else out)
    head = 'output' if 'output.weight' in self.tensors else 'token_embd'
    return self.norm(x, 'output_norm') @ self.weight(head).T


def logps(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """float64[T - 1] of the ids behind the first."""
  x = logits.astype(np.float64)
  top = x.max(-1, keepdims=True)
  norm = top + np.log(np.exp(x - top).sum(-1, keepdims=True))
  return (x - norm)[np.arange(len(ids) - 1), ids[1:]]


def main(folder: str) -> None:
  out = {}
  for name, path in MODELS.items():
    with LlamaCpp(path) as model:
      found = model.tokenize(' '.join(TEXT.split('\n')), adds_special=True)
    ids = np.array(found[:TOKENS], np.int32)
    assert len(ids) == TOKENS
    found = logps(Decoder(path).logits(ids), ids)
    print(f'{name}: perplexity {np.exp(-found.mean()):.4f} of {len(found)} tokens')
    out |= {f'{name}_ids': ids, f'{name}_logps': found.astype(np.float32)}
  np.savez_compressed(Path(folder) / 'gguf_perplexity.npz', **out)


if __name__ == '__main__':
  main(sys.argv[1])
