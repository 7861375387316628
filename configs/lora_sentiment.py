"""The demo's task with LoRA: SmolLM2-135M-Instruct learns to classify the sentiment of movie-review
sentences; only adapters of rank 16 are trained. sft_sentiment is the same with full fine-tuning.

`python demo/assets.py .cache` puts the model and the sentences into .cache.
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
  c.lora.rank = 16
  c.optim.lr = 1e-3
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 10
  c.checkpoint.every = 40
  c.checkpoint.keep = 1
  c.eval.batch_size = 16
  c.eval.tasks = ('sentiment=choice:.cache/data/sentiment/test.jsonl',)
  c.eval.prompts = (
    _ASK + 'Two hours of my life that nobody will give back to me.',
    _ASK + 'I left the cinema smiling and went in again the next day.',
    'Name three colours.',
  )
  c.eval.max_tokens = 24
  return c
