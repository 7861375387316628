"""The demo: SmolLM2-135M-Instruct learns to classify the sentiment of movie-review sentences, in
about eleven minutes on two CPU cores.

`make demo` runs it, after demo/assets.py has put the model and the sentences into .cache.
"""

from ftjax import config

_ASK = 'Is this review positive or negative?\n\n'


def get_config():
  c = config.default()
  c.model.path = '.cache/smollm2'
  c.data.train = '.cache/data/sentiment/train.jsonl'
  c.steps = 160
  c.batch_size = 2  # packed sequences of several sentences each
  c.seq_len = 256
  c.optim.lr = 1e-4
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 10
  c.checkpoint.every = 40
  c.checkpoint.keep = 1
  c.eval.every = 40
  c.eval.batch_size = 16
  c.eval.tasks = ('sentiment=choice:.cache/data/sentiment/test.jsonl',)
  c.eval.in_loop = ('sentiment',)
  c.eval.general = True
  c.eval.prompts = (
    _ASK + 'Two hours of my life that nobody will give back to me.',
    _ASK + 'I left the cinema smiling and went in again the next day.',
    'Name three colours.',
  )
  c.eval.max_tokens = 24
  return c
