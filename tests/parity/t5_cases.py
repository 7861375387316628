"""Small encoder-decoders, which transformers and ftjax both compute; see family_cases.py, whose
`draw` makes their weights. Reads neither torch nor jax.

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_t5_goldens.py tests/parity/golden CASE

writes golden/t5/CASE.npz.
"""

from pathlib import Path

import numpy as np

from parity.family_cases import Case

FOLDER = Path(__file__).parent / 'golden' / 't5'
ROWS, SOURCE, TARGET = 2, 48, 33
# Rows of the encoder and the decoder that are no padding.
SOURCE_LENGTHS, TARGET_LENGTHS = (48, 31), (33, 20)
START, NEW_TOKENS, PROMPTS = 0, 14, 6
# Tokens that end a completion: with one of 67 no random model would stop.
STOPS = tuple(range(3, 67, 7))

# Distances beyond 20 are in the last bucket: rows have twice as many tokens.
_T5 = {
  'model_type': 't5',
  'vocab_size': 67,
  'd_model': 24,
  'd_kv': 10,
  'd_ff': 40,
  'num_layers': 3,
  'num_decoder_layers': 2,
  'num_heads': 6,
  'relative_attention_num_buckets': 12,
  'relative_attention_max_distance': 20,
  'decoder_start_token_id': START,
}
# Scores are not divided by sqrt(d_kv): smaller queries, or each token would see one other alone.
_RULES = (('Attention.q.weight', 0.0, 0.1), ('relative_attention_bias', 0.0, 0.7))
CASES = {
  't5': Case(_T5, rules=_RULES),
  't5_v1_1': Case(
    _T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}, rules=_RULES
  ),
  'mt5': Case(
    _T5
    | {
      'model_type': 'mt5',
      'feed_forward_proj': 'gated-gelu',
      'tie_word_embeddings': False,
      'num_layers': 2,
      'd_ff': 20,
    },
    rules=_RULES,
  ),
}
# Settings of beam search: num_beams, length_penalty, early_stopping.
BEAMS = (
  (2, 1.0, False),
  (3, 0.6, False),
  (4, 2.0, True),
  (3, -1.0, False),
  (4, 0.0, 'never'),
  (3, 1.5, 'never'),
)


def rows(lengths: tuple[int, ...], width: int, seed: int, vocab: int = 67) -> np.ndarray:
  """Returns tokens int32[ROWS, width], with START as padding behind each row's length."""
  rng = np.random.RandomState(seed)
  found = rng.randint(1, vocab, (len(lengths), width)).astype(np.int32)
  return np.where(np.arange(width)[None] < np.array(lengths)[:, None], found, START)


def prompts() -> list[list[int]]:
  """Returns PROMPTS prompts of 1 to SOURCE tokens."""
  lengths = np.linspace(1, SOURCE, PROMPTS).round().astype(int)
  rng = np.random.RandomState(7)
  return [rng.randint(1, 67, n).tolist() for n in lengths]
