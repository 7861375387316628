"""LoRA of Qwen3-30B-A3B, a mixture of 128 experts: adapters of rank 16 on attention, the frozen
base in bfloat16. The experts and their router stay as they are; with
`--config.lora.targets=all-linear` each expert has an adapter of its own.

`python -m ftjax.plan --config=lora_qwen3_30b_a3b --topology=v5e:4x4 --config.mesh.expert=16` prints
the memory it needs. Set model.path and data.train to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/Qwen3-30B-A3B'
  c.model.compute_dtype = 'bfloat16'
  c.lora.rank = 16
  c.lora.targets = r'.*/attn/.*'
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
