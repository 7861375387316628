"""Full fine-tuning of Llama-3.2-1B on chats, 64 sequences of 4,096 tokens per step.

`python -m ftjax.plan --config=sft_llama32_1b --topology=v5e:4x4` prints the memory it needs.
Set model.path and data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/Llama-3.2-1B-Instruct'
  c.model.compute_dtype = 'bfloat16'
  c.data.train = 'data/train.jsonl'
  c.data.on_overlength = 'truncate_right'
  c.epochs = 2.0
  c.batch_size = 64
  c.seq_len = 4096
  c.remat = 'full'
  c.optim.lr = 2e-5
  c.optim.b2 = 0.95
  c.optim.warmup_steps = 50
  c.eval.batch_size = 64
  c.checkpoint.every = 200
  return c
