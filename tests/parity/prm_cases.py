"""The rows and the small model of the golden numbers of process reward models."""

from pathlib import Path

GOLDEN = Path(__file__).parent / 'golden' / 'prm'
ROWS = [
  {'prompt': '7 + 5 =', 'completions': ['first 7', 'then 5', '12'], 'labels': [True, False, True]},
  {'prompt': 'a b', 'completions': ['x'], 'labels': [False]},
  {'prompt': '9 - 4 =', 'completions': ['take 4\nfrom 9', ' 5 '], 'labels': [1, 0]},
]
SEPARATOR = '\n\n'
SIZES = dict(
  vocab_size=259,
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=3,
  num_key_value_heads=1,
  intermediate_size=40,
  max_position_embeddings=96,
)
# In the names of the files.
GRADIENTS = ('score.weight', 'score.bias', 'model.layers.0.self_attn.q_proj.weight')
