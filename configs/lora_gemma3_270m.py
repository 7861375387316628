"""LoRA on a GGUF file: Gemma 3 270M, a base model, learns to say whether a movie review is positive
or negative. About ten minutes on two CPU cores; only adapters of rank 8 are trained.

`make gemma` fetches the model (Gemma Terms of Use), `make assets` the sentences, and
`python demo/gemma_sentiment.py .cache` turns them into rows without a chat template.
"""

from ftjax import config

_DATA = '.cache/data/sentiment_text'


def get_config():
  c = config.default()
  c.model.path = '.cache/gemma-3-270m-q4_k_m.gguf'
  c.data.train = f'{_DATA}/train.jsonl'
  c.data.eval = f'{_DATA}/heldout.jsonl'
  c.steps = 40
  c.batch_size = 2  # packed sequences of about five sentences each
  c.seq_len = 256
  c.lora.rank = 8
  c.optim.lr = 1e-3
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 4
  c.checkpoint.every = 40
  c.checkpoint.keep = 1
  c.eval.every = 20
  c.eval.batch_size = 4
  c.eval.tasks = (f'sentiment=choice:{_DATA}/test.jsonl',)
  return c
