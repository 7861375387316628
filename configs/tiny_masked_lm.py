"""Masked tokens from scratch: a small encoder with random initialization learns to predict hidden
bytes of sums. Runs in seconds on a CPU.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'masked_lm'
  c.steps = 30
  c.batch_size = 8
  c.seq_len = 128
  c.model.random = dict(
    model_type='bert',
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=128,
  )
  c.masked_lm.mask_id = 0  # the byte tokenizer has no mask
  c.data.train = 'texts:400'
  c.data.eval_fraction = 0.1
  c.optim.lr = 3e-3
  c.optim.warmup_steps = 5
  c.eval.every = 10
  c.eval.batch_size = 8
  c.checkpoint.every = 10
  return c
