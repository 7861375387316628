"""SmolLM2-135M-Instruct learns to describe a software package in one line.

It is compared with its base, and with the base that sees 3 examples.

`make assets eval-data` fetches model and rows; benchmarks/evaluation_tables.py runs this config.
"""

from ftjax import config

_DATA = '.cache/eval/summary'


def get_config():
  c = config.default()
  c.model.path = '.cache/smollm2'
  c.data.train = f'{_DATA}/train.jsonl'
  c.steps = 160
  c.batch_size = 2  # packed sequences
  c.data.on_overlength = 'drop'  # 2 of 8,000 rows are longer
  c.seq_len = 512
  c.optim.lr = 1e-4
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 10
  c.checkpoint.every = 80
  c.checkpoint.keep = 1
  c.eval.batch_size = 16
  c.eval.tasks = (f'summarization=summarization:{_DATA}/test.jsonl',)
  c.eval.max_tokens = 32
  c.eval.shots = 3
  return c
