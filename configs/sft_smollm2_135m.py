"""Full fine-tuning of SmolLM2-135M on chats, 64 sequences of 2,048 tokens per step.

`python -m ftjax.plan --config=sft_smollm2_135m --topology=v5e:2x4` prints the memory it needs.
Set model.path and data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/SmolLM2-135M-Instruct'
  c.model.compute_dtype = 'bfloat16'
  c.data.train = 'data/train.jsonl'
  c.data.on_overlength = 'truncate_right'
  c.epochs = 2.0
  c.batch_size = 64
  c.seq_len = 2048
  c.remat = 'dots'
  c.optim.lr = 1e-4
  c.optim.b2 = 0.95
  c.optim.warmup_steps = 50
  c.eval.batch_size = 64
  c.checkpoint.every = 200
  return c
