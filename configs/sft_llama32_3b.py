"""Full fine-tuning of Llama-3.2-3B on chats, 64 sequences of 8,192 tokens per step.

`python -m ftjax.plan --config=sft_llama32_3b --topology=v5e:8x8` prints the memory it needs.
Set model.path and data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/Llama-3.2-3B-Instruct'
  c.model.compute_dtype = 'bfloat16'
  c.data.train = 'data/train.jsonl'
  c.data.on_overlength = 'truncate_right'
  c.epochs = 2.0
  c.batch_size = 64
  c.seq_len = 8192
  c.remat = 'full'
  c.optim.lr = 1e-5
  c.optim.b2 = 0.95
  c.optim.warmup_steps = 50
  c.eval.batch_size = 64
  c.checkpoint.every = 200
  return c
