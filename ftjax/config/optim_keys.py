"""The config keys of the optimizer and of the loss of tokens; see keys.py."""

from ftjax.config.section import Section


def add_optim(c: Section) -> None:
  """Adds the section optim."""
  # decay, multipliers and freeze are tables of (regex, value) over per-layer names: embed/w,
  # final_norm/scale, head/w, layer0/attn/q/w, ... The first row that matches a whole name counts;
  # every name must be matched, and every row must match a name that no earlier row does.
  c.optim = Section()
  c.optim.name = 'adamw'  # the optimizer
  # How moments are held between steps: as float32, or as 8bit, a byte each and a float32 for each
  # block of up to 256 (adamw, lion, sgd).
  c.optim.moments = 'float32'
  # How a new parameter becomes bfloat16: the nearest number, or one of its two neighbours at random
  # (stochastic), so that steps below half their distance add up; with model.param_dtype=bfloat16.
  c.optim.rounding = 'nearest'
  c.optim.lr = 2e-5  # peak learning rate
  c.optim.schedule = 'cosine'  # course of the learning rate after the warmup
  c.optim.warmup_steps = 0  # updates in which the learning rate rises linearly from 0
  c.optim.end_fraction = 0.0  # last learning rate of linear, cosine and wsd, as a share of lr
  c.optim.decay_steps = 0  # updates of the final decay of wsd
  # With a factor below 1 the schedule's rate is multiplied by it when checkpoint.best_metric has
  # not improved for plateau_patience evaluations, and again after as many; 1: never.
  c.optim.plateau_factor = 1.0
  c.optim.plateau_patience = 2  # evaluations without a better best_metric before the rate falls
  c.optim.plateau_min = 0.0  # smallest product of these factors
  c.optim.weight_decay = 0.0  # decoupled; multiplied by the learning rate
  c.optim.b1 = 0.9  # decay of the first moment; momentum of sgd and muon
  c.optim.b2 = 0.999  # decay of the second moment
  c.optim.eps = 1e-8  # added to the root of the second moment
  c.optim.clip_norm = 1.0  # largest global L2 norm of the gradient; 0: no clipping
  # Radius of sharpness-aware minimization (SAM): the gradient is taken where the loss rises most
  # within it, at twice the cost of a step; 0: none, 0.05 is usual.
  c.optim.sam_radius = 0.0
  # Decay of a moving average of the parameters, which is evaluated and exported in place of them;
  # 0: none.
  c.optim.ema_decay = 0.0
  # Factors of weight_decay; norm scales, biases and the rates of delta nets have none.
  c.optim.decay = (('.*(norm/scale|/b|attn/(norm|a_log|dt_bias))', 0.0), ('.*', 1.0))
  c.optim.multipliers = (('.*', 1.0),)  # factors of the learning rate
  c.optim.freeze = (('.*', False),)  # True: not trained
  # Factor of the learning rate from each layer to the one below it, from the head down to the
  # embeddings (discriminative rates); 1: none, 0.9 is usual, ULMFiT has 1 / 2.6.
  c.optim.layer_decay = 1.0
  # Updates between two groups of gradual unfreezing: the head is trained first, then layer after
  # layer from the last one, then the embeddings; 0: all from the first update.
  c.optim.unfreeze_every = 0


def add_loss(c: Section) -> None:
  """Adds the section loss."""
  c.loss = Section()
  c.loss.label_smoothing = 0.0  # share of the target that is spread over the vocabulary
  c.loss.z_loss = 0.0  # weight of logsumexp squared
  c.loss.dynamic = False  # a token's loss is multiplied with its probability (DFT)
  # Weight of the divergence between two passes with other dropout masks (R-Drop), at twice the cost
  # of a step; 0: one pass, 1 to 5 is usual.
  c.loss.r_drop = 0.0
  # Alpha of uniform noise on embeddings, alpha / sqrt(tokens * dim); 0: none, 5 is usual.
  c.loss.neftune = 0.0
