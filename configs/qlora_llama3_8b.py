"""QLoRA of Llama-3.1-8B on one chip with 16 GB: adapters of rank 16 on all linear maps, the frozen
base in nf4.

`python -m ftjax.plan --config=qlora_llama3_8b --topology=v5e:1x1` prints the memory it needs.
`--config.lora.base=int8` holds the base in 8 bits, for 24 GB and more. Set model.path and
data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/Llama-3.1-8B-Instruct'
  c.model.compute_dtype = 'bfloat16'
  c.lora.rank = 16
  c.lora.base = 'nf4'
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
