"""Vectors of texts from scratch: a small model with random initialization learns that a sum in
digits and the same sum in words belong together. Runs in seconds on a CPU.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'embedding'
  c.steps = 30
  c.batch_size = 8
  c.seq_len = 128
  c.model.random = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    tie_word_embeddings=True,
    max_position_embeddings=256,
  )
  c.data.train = 'similar:400'
  c.data.eval_fraction = 0.1
  c.optim.lr = 1e-3
  c.optim.warmup_steps = 5
  c.eval.every = 10
  c.eval.batch_size = 8
  c.checkpoint.every = 10
  return c
