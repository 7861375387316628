"""A search for the learning rate and rank of lora_sentiment: nine runs, compared by the loss of
held-out sentences after 20 and 60 steps, of which one trains to the end: 400 steps in all, where
lora_sentiment takes 160. The accuracy on the test sentences chooses nothing.

python -m ftjax.study --config=study_sentiment --workdir=DIR

`python demo/assets.py .cache` puts the model and the sentences into .cache.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = '.cache/smollm2'
  c.data.train = '.cache/data/sentiment/train.jsonl'
  c.data.eval_fraction = 0.02
  c.steps = 160
  c.batch_size = 2  # packed sequences of several sentences each
  c.seq_len = 256
  c.lora.rank = 16
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 10
  c.checkpoint.every = 40
  c.checkpoint.keep = 1
  c.eval.batch_size = 16
  c.eval.tasks = ('sentiment=choice:.cache/data/sentiment/test.jsonl',)
  c.study.kind = 'tpe'
  c.study.space = ('optim.lr=log:1e-4:1e-2', 'lora.rank=4,16,64')
  c.study.trials = 9
  c.study.metric = 'eval/loss'
  c.study.rungs = (20, 60)
  return c
