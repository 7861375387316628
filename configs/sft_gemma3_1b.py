"""Full fine-tuning of Gemma 3 1B on chats, 16 sequences of 2,048 tokens per step.

`python -m ftjax.plan --config=sft_gemma3_1b --topology=v5e:2x2` prints the memory it needs.
Set model.path and data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/gemma-3-1b-it'
  c.model.compute_dtype = 'bfloat16'
  c.data.train = 'data/train.jsonl'
  c.data.on_overlength = 'truncate_right'
  c.epochs = 2.0
  c.batch_size = 16
  c.grad_accum = 2
  c.seq_len = 2048
  c.remat = 'full'
  c.optim.lr = 1e-5
  c.optim.b2 = 0.95
  c.optim.warmup_steps = 50
  c.eval.batch_size = 8
  c.checkpoint.every = 200
  return c
