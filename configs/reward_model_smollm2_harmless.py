"""A reward model: SmolLM2-135M-Instruct on 300 short pairs of HH-RLHF's harmlessness data.

`python demo/preference_data.py hh_harmless_pairs.jsonl.gz .cache/data/harmless` picks the pairs,
after demo/assets.py has put the model into .cache. It has not been run to the end
yet.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'reward_model'
  c.model.path = '.cache/smollm2'
  c.data.train = '.cache/data/harmless/train.jsonl'
  c.data.eval = '.cache/data/harmless/test.jsonl'
  c.epochs = 1.0
  c.batch_size = 4  # pairs
  c.seq_len = 256
  c.remat = 'none'
  c.reward_model.centring = 0.01
  c.optim.lr = 2e-5
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 8
  c.checkpoint.every = 0
  c.checkpoint.keep = 1
  c.eval.batch_size = 8
  return c
