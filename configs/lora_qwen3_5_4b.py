"""LoRA of Qwen3.5-4B, three gated delta nets to one full attention: adapters of rank 16 on all
linear maps of both, the frozen base in bfloat16. Rows are packed: states and convolutions begin
anew at each document (docs/packing_delta_net.md).

`python -m ftjax.plan --config=lora_qwen3_5_4b --topology=v6e:1x1` prints the memory it needs.
Images and the multi-token head of the released folder are left out. Set model.path and data.train
to your files.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.model.path = 'models/Qwen3.5-4B'
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
