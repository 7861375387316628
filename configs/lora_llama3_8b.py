"""LoRA of Llama-3.1-8B: adapters of rank 16 on all linear maps, the frozen base in bfloat16.

`python -m ftjax.plan --config=lora_llama3_8b --topology=v6e:1x1` prints the memory it needs;
qlora_llama3_8b is for a chip with 16 GB. Set model.path and data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/Llama-3.1-8B-Instruct'
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
