"""Online DPO from scratch: a small model with random initialization is trained to prefer the best
of its own completions to the worst, and learns to stop after about eight tokens. Well under a
minute on a CPU.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'online_dpo'
  c.steps = 24
  c.batch_size = 8  # prompts per rollout
  c.seq_len = 128  # a sequence holds both completions
  c.model.random = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    tie_word_embeddings=True,
    max_position_embeddings=256,
  )
  c.data.train = 'sums:400'
  c.rollout.group = 16
  c.rollout.max_tokens = 16
  c.rollout.slots = 128
  c.rollout.rewards = 'length:target=8'
  c.optim.lr = 3e-3
  c.optim.schedule = 'constant'
  c.eval.prompts = ('7 + 5 =',)
  c.eval.max_tokens = 16
  c.checkpoint.every = 12
  return c
