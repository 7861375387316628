"""LoRA of Qwen3-8B: adapters of rank 16 on all linear maps, the frozen base in bfloat16.

`python -m ftjax.plan --config=lora_qwen3_8b --topology=v6e:1x1` prints the memory it needs;
`--config.lora.base=nf4` is for a chip with 16 GB. Set model.path and data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/Qwen3-8B'
  c.model.compute_dtype = 'bfloat16'
  c.lora.rank = 16
  c.data.train = 'data/train.jsonl'
  c.data.on_overlength = 'truncate_right'
  c.epochs = 2.0
  c.batch_size = 16
  c.grad_accum = 4
  c.seq_len = 2048
  c.remat = 'full'
  c.optim.lr = 2e-4
  c.optim.warmup_steps = 20
  c.eval.batch_size = 4
  c.checkpoint.every = 200
  return c
