"""Full fine-tuning of Llama-3.1-70B on chats, 256 sequences of 8,192 tokens per step.

`python -m ftjax.plan --config=sft_llama3_70b --topology=v6e:16x16` prints the memory it needs.
Set model.path and data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/Llama-3.1-70B-Instruct'
  c.model.compute_dtype = 'bfloat16'
  c.data.train = 'data/train.jsonl'
  c.data.on_overlength = 'truncate_right'
  c.epochs = 2.0
  c.batch_size = 256
  c.seq_len = 8192
  c.remat = 'full'
  c.optim.lr = 5e-6
  c.optim.b2 = 0.95
  c.optim.warmup_steps = 50
  c.eval.batch_size = 256
  c.checkpoint.every = 200
  return c
