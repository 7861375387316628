"""GRPO of Qwen2.5-1.5B-Instruct on GSM8K with LoRA: adapters of rank 32 on all linear maps. Only
they are trained; the frozen base is also the reference, without a second copy. The reward is 1 for
a right "#### NUMBER" and 0 otherwise.

`python demo/gsm8k.py data/gsm8k train.jsonl test.jsonl` makes the data; grpo_gsm8k is the same with
full fine-tuning. The same for 0.5B: `--config.model.path=models/Qwen2.5-0.5B-Instruct`.
"""

from ftjax import config


def get_config():
  c = config.default()
  c.algorithm = 'grpo'
  c.model.path = 'models/Qwen2.5-1.5B-Instruct'
  c.model.compute_dtype = 'bfloat16'
  c.lora.rank = 32
  c.data.train = 'data/gsm8k/train.jsonl'
  c.data.eval = 'data/gsm8k/dev.jsonl'
  c.seq_len = 1024  # prompt and completion; GSM8K's prompts are shorter than 400
  c.batch_size = 256  # prompts per rollout
  c.steps = 600  # four on each rollout: 150 rollouts, five passes over the questions
  c.grad_accum = 4
  c.remat = 'full'
  c.rollout.group = 8
  c.rollout.max_tokens = 512
  c.rollout.slots = 512
  c.rollout.minibatches = 4
  c.rollout.rewards = 'math:strict,symbolic=off'
  c.policy.kl_coef = 0.001
  c.optim.lr = 2e-5
  c.optim.schedule = 'constant'
  c.optim.warmup_steps = 8
  c.checkpoint.every = 40
  c.checkpoint.best_metric = 'eval/reward'
  c.checkpoint.best_mode = 'max'
  c.eval.every = 40
  c.eval.batch_size = 64
  c.eval.max_tokens = 512
  c.eval.tasks = (
    'flexible=math:data/gsm8k/test.jsonl',
    'strict=math_strict:data/gsm8k/test.jsonl',
  )
  return c
