"""A small T5 with random weights learns to write the spans that are missing in sums of numbers
below 20, T5's pretraining. Seconds on a CPU.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'span_corruption'
  c.steps = 600
  c.batch_size = 8
  c.seq_len = 64  # of the decoder
  c.seq2seq.source_len = 128  # of the encoder
  c.model.random = dict(
    model_type='t5',
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_heads=4,
    num_layers=2,
    tie_word_embeddings=True,
  )
  c.model.add_special_tokens = tuple(f'<extra_id_{i}>' for i in range(8))
  c.data.train = 'texts:400:20'
  c.data.eval_fraction = 0.1
  c.optim.lr = 3e-3
  c.optim.warmup_steps = 20
  c.eval.every = 100
  c.eval.batch_size = 8
  c.eval.prompts = ('7 + 5 = <extra_id_0>',)
  c.eval.max_tokens = 8
  c.checkpoint.every = 200
  return c
