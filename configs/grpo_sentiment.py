"""SmolLM2-135M-Instruct learns to tell the sentiment of movie-review sentences from a reward alone:
one point for the right word and nothing else. Data and model as for sft_sentiment (make demo)."""

from ftjax import config

_ASK = 'Is this review positive or negative?\n\n'


def get_config():
  c = config.default()
  c.algorithm = 'grpo'
  c.model.path = '.cache/smollm2'
  c.data.train = '.cache/data/sentiment/train.jsonl'  # its answers become the column `answer`
  c.steps = 60
  c.batch_size = 4  # prompts
  c.seq_len = 128
  c.data.on_overlength = 'drop'
  c.rollout.group = 8
  c.rollout.max_tokens = 8
  c.rollout.slots = 32
  c.rollout.rewards = 'label:positive,negative,column=answer'
  c.optim.lr = 5e-6
  c.optim.schedule = 'constant'
  c.grpo.clip_high = 0.28
  c.checkpoint.every = 20
  c.checkpoint.keep = 1
  c.eval.tasks = ('sentiment=choice:.cache/data/sentiment/test.jsonl',)
  c.eval.prompts = (
    _ASK + 'Two hours of my life that nobody will give back to me.',
    _ASK + 'I left the cinema smiling and went in again the next day.',
  )
  c.eval.max_tokens = 8
  return c
