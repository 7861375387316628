"""A reward model of SmolLM2-135M-Instruct on the sentiment of movie-review sentences.

`make assets` and `python demo/sentiment_rewards.py .cache` make the data. Results of a
run: docs/preference.md.
"""

from ftjax import config

_DATA = '.cache/data/sentiment_rewards'


def get_config():
  c = config.default()
  c.algorithm = 'reward_model'
  c.model.path = '.cache/smollm2'
  c.data.train = f'{_DATA}/pairs.jsonl'
  c.data.eval = f'{_DATA}/test_pairs.jsonl'
  c.epochs = 2.0
  c.batch_size = 4  # pairs
  c.seq_len = 128
  c.remat = 'none'
  c.reward_model.centring = 0.01
  c.optim.lr = 3e-5
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 8
  c.checkpoint.every = 50
  c.checkpoint.keep = 1
  c.eval.every = 50
  c.eval.batch_size = 8
  return c
