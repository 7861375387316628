"""A small T5 with random weights learns sums of numbers below 20: its encoder reads the question,
its decoder writes the answer. Seconds on a CPU.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'seq2seq'
  c.steps = 600
  c.batch_size = 8
  c.seq_len = 32  # of the decoder
  c.seq2seq.source_len = 256  # of the encoder
  c.model.random = dict(
    model_type='t5',
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_heads=4,
    num_layers=2,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
  )
  c.data.train = 'sums:400:20'
  c.data.eval_fraction = 0.1
  c.optim.lr = 3e-3
  c.optim.warmup_steps = 20
  c.eval.every = 100
  c.eval.batch_size = 8
  c.eval.prompts = ('7 + 5 =',)
  c.eval.max_tokens = 8
  c.eval.num_beams = 2
  c.checkpoint.every = 200
  return c
