"""PPO of SmolLM2-135M-Instruct on the sentiment of movie-review sentences.

`make assets` and `python demo/sentiment_rewards.py .cache` make the data.
"""

from ftjax import config

_DATA = '.cache/data/sentiment_rewards'


def get_config():
  c = config.default()
  c.algorithm = 'ppo'
  c.model.path = '.cache/smollm2'
  c.data.train = f'{_DATA}/prompts.jsonl'
  c.data.on_overlength = 'drop'
  c.seq_len = 48
  c.batch_size = 16  # prompts per rollout
  c.steps = 20
  c.remat = 'none'
  c.rollout.group = 4
  c.rollout.max_tokens = 3
  c.rollout.stop = ('\n',)
  c.rollout.rewards = 'label:column=label'
  c.optim.lr = 2e-5
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 4
  c.checkpoint.every = 20
  c.checkpoint.keep = 1
  c.eval.batch_size = 16
  c.eval.max_tokens = 3
  c.eval.tasks = (
    f'generated=match:{_DATA}/test_match.jsonl',
    f'likelier=choice:{_DATA}/test_choice.jsonl',
  )
  c.log.every = 1
  return c
