"""Best-of-n of SmolLM2-135M-Instruct on the sentiment of movie-review sentences.

`make assets` and `python demo/sentiment_rewards.py .cache` make the data.
"""

from ftjax import config

_DATA = '.cache/data/sentiment_rewards'


def get_config():
  c = config.default()
  c.algorithm = 'best_of_n'
  c.model.path = '.cache/smollm2'
  c.data.train = f'{_DATA}/prompts.jsonl'
  c.data.on_overlength = 'drop'
  c.seq_len = 48
  c.batch_size = 16  # prompts per rollout
  c.steps = 40
  c.remat = 'none'
  c.rollout.group = 8
  c.rollout.max_tokens = 3
  c.rollout.stop = ('\n',)
  c.rollout.rewards = 'label:column=label'
  c.best_of_n.min_reward = 1.0
  c.optim.lr = 5e-5
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
