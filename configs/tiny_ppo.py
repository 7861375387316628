"""PPO with a value model, from scratch: a small model with random initialization learns to stop
after about eight tokens, which is all that the reward measures. Well under a minute on a CPU.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'ppo'
  c.steps = 48  # two on each rollout
  c.batch_size = 8  # prompts per rollout
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
  c.data.train = 'sums:400'
  c.rollout.group = 16
  c.rollout.updates = 2
  c.rollout.max_tokens = 16
  c.rollout.slots = 128
  c.rollout.rewards = 'length:target=8'
  c.optim.lr = 3e-3
  c.optim.schedule = 'constant'
  c.eval.prompts = ('7 + 5 =',)
  c.eval.max_tokens = 16
  c.checkpoint.every = 12
  return c
