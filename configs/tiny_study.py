"""A search from nothing: three small models with other learning rates and batch sizes learn sums of
numbers below 10, and the best of them trains to the end. Well under a minute on a CPU.

python -m ftjax.study --config=tiny_study --workdir=DIR
"""

from ftjax import config


def get_config():
  c = config.default()
  c.steps = 120
  c.batch_size = 8
  c.seq_len = 64
  c.model.random = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    tie_word_embeddings=True,
    max_position_embeddings=64,
  )
  c.data.train = 'sums:90:10'
  c.data.eval_fraction = 0.2
  c.optim.warmup_steps = 5
  c.eval.batch_size = 8
  c.checkpoint.every = 0
  c.study.kind = 'sobol'
  c.study.space = ('optim.lr=log:1e-4:3e-2', 'batch_size=4,8')
  c.study.trials = 3
  c.study.rungs = (30,)
  return c
