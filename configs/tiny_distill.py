"""Distillation: a small model with random weights learns sums of numbers below 20 and stays near
its start, which is its own teacher. Seconds on a CPU. Name a folder in distill.teacher for another.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'distill'
  c.steps = 200
  c.batch_size = 8
  c.seq_len = 64
  c.model.random = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    tie_word_embeddings=True,
    max_position_embeddings=256,
  )
  c.data.train = 'sums:400:20'
  c.data.eval_fraction = 0.1
  c.distill.share = 0.2
  c.distill.divergence = 'js'
  c.optim.lr = 3e-3
  c.optim.warmup_steps = 5
  c.eval.every = 100
  c.eval.batch_size = 8
  c.eval.prompts = ('7 + 5 =',)
  c.eval.max_tokens = 8
  c.checkpoint.every = 100
  return c
