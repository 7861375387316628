"""Sentiment of movie reviews with MiniLM, a sentence encoder of 22 M parameters, on a CPU: minutes.

make minilm eval-data
python -m ftjax.train --config=minilm_reviews --workdir=runs/minilm_reviews
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'classification'
  c.classification.labels = ('negative', 'positive')
  c.model.path = '.cache/minilm'
  c.model.compute_dtype = 'float32'
  c.data.train = '.cache/eval/reviews/train.jsonl'
  c.data.eval = '.cache/eval/reviews/test.jsonl'
  c.epochs = 2.0
  c.seq_len = 128
  c.batch_size = 8  # some 38 sentences
  c.optim.lr = 1e-4
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 50
  c.optim.weight_decay = 0.01
  c.eval.every = 250
  c.checkpoint.every = 250
  return c
