"""SFT from nothing with all that keeps a model from fitting its rows too closely: dropout, R-Drop,
SAM, rates by depth and gradual unfreezing. A minute on a CPU; docs/regularization.md.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.steps = 300
  c.batch_size = 8
  c.seq_len = 64
  c.model.random = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    tie_word_embeddings=True,
    max_position_embeddings=256,
  )
  c.data.train = 'sums:400:20'
  c.data.eval_fraction = 0.1
  c.data.on_audit = 'error'
  c.model.dropout.attention = 0.05
  c.model.dropout.residual = 0.05
  c.model.dropout.embedding = 0.05
  c.loss.r_drop = 0.5
  c.optim.sam_radius = 0.02
  c.optim.layer_decay = 0.9
  c.optim.unfreeze_every = 20
  c.optim.lr = 3e-3
  c.optim.warmup_steps = 5
  c.eval.every = 100
  c.eval.batch_size = 8
  c.eval.prompts = ('7 + 5 =',)
  c.eval.max_tokens = 8
  c.checkpoint.every = 200
  return c
