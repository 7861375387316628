"""What TRL's own functions return on the inputs of trl_losses.py. Needs torch and TRL.

Trainers are made without their __init__ and given the attributes that the one method reads; models
are functions that return prepared numbers. Where TRL has a formula in the middle of a long method
(advantages, GAE, importance ratios), its very lines are cut out of the method's source and run.
"""

import collections
import inspect
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.utils import nanstd


def make(trainer: type, **attributes):
  """A trainer with nothing but the attributes that its loss reads."""
  out = trainer.__new__(trainer)
  plain = dict(
    model=SimpleNamespace(training=True),
    accelerator=SimpleNamespace(
      device=torch.device('cpu'),
      num_processes=1,
      sync_gradients=True,
      gather=lambda x: x,
      gather_for_metrics=lambda x: x,
      reduce=lambda x, reduction: x,
    ),
    aux_loss_enabled=False,
    is_encoder_decoder=False,
    pad_token_id=0,
    padding_value=0,
    current_gradient_accumulation_steps=1,
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    _total_train_tokens=0,
    _tp_size=1,
  )
  for name, value in (plain | attributes).items():
    object.__setattr__(out, name, value)
  return out


def lines_of(method, first: str, end: str, values: dict) -> dict:
  """Runs the lines of a method's source from the one that holds `first` up to `end`."""
  source = inspect.getsource(method) if callable(method) else method
  return run_lines(source, first, end, values)


def run_lines(source: str, first: str, end: str, values: dict) -> dict:
  lines = source.splitlines()
  a = next(i for i, line in enumerate(lines) if first in line)
  b = next(i for i, line in enumerate(lines) if i > a and end in line)
  scope = {'torch': torch, 'math': math, 'nanstd': nanstd, **values}
  exec(textwrap.dedent('\n'.join(lines[a:b])), scope)
  return scope


def masked_logps(x) -> torch.Tensor:
  logp = torch.log_softmax(x['pair_logits'], -1)[:, :-1]
  logp = logp.gather(-1, x['pair_ids'][:, 1:, None])[..., 0]
  return logp * x['pair_answer'][:, 1:]


SORTING = ('aot', 'aot_unpaired')


def dpo(x, **settings) -> torch.Tensor:
  """float[P]: the trainer's mean loss of each pair by itself."""
  trainer = make(
    DPOTrainer,
    ld_alpha=None,
    precompute_ref_logps=True,
    f_divergence_type=settings.get('divergence', 'reverse_kl'),
    f_alpha_divergence_coef=0.3,
    args=SimpleNamespace(discopop_tau=0.2),
    loss_weights=[1.0],
    use_weighting=False,
    beta=settings['beta'],
    label_smoothing=settings.get('label_smoothing', 0.0),
    loss_types=[settings['loss_type']],
  )
  logp, count = masked_logps(x), len(x['pair_ids']) // 2
  # Losses that sort the pairs of a batch get all of them, the others each by itself.
  batches = [range(count)] if settings['loss_type'] in SORTING else [[i] for i in range(count)]
  ref = (x['pair_ref'] * x['pair_answer'][:, 1:]).sum(-1)
  if 'divergence' in settings:  # of a reference nearby: some grow with exp of the log-ratio
    ref = 0.9 * logp.sum(-1)
  out = []
  for rows in batches:
    both = [*rows, *(count + i for i in rows)]

    def model(both=both, **kwargs):
      like = logp[both]
      zeros = torch.zeros_like(like)
      return SimpleNamespace(
        log_probs=like, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(like).bool()
      )

    inputs = {
      'input_ids': x['pair_ids'][both],
      'attention_mask': x['pair_real'][both],
      'completion_mask': x['pair_answer'][both].long(),
      'ref_chosen_logps': ref[both[: len(rows)]],
      'ref_rejected_logps': ref[both[len(rows) :]],
    }
    out.append(trainer._compute_loss(model, inputs, False))
  return torch.stack(out)


def odds_batch(x) -> dict:
  count = len(x['pair_ids']) // 2
  out = {}
  for side, rows in (('chosen', slice(0, count)), ('rejected', slice(count, None))):
    out[f'{side}_input_ids'] = x['pair_ids'][rows]
    out[f'{side}_attention_mask'] = x['pair_real'][rows].long()
    labels = torch.where(x['pair_answer'][rows] == 1, x['pair_ids'][rows], -100)
    out[f'{side}_labels'] = labels
  return out


def reference_free(x, trainer) -> torch.Tensor:
  """The trainer's loss of all pairs."""

  def model(ids, **kwargs):
    return SimpleNamespace(logits=x['pair_logits'])

  return trainer.get_batch_loss_metrics(model, odds_batch(x))[0]


def cpo(x, **settings) -> torch.Tensor:
  plain = dict(loss_type='sigmoid', beta=0.1, alpha=0.0, label_smoothing=0.0, cpo_alpha=0.0)
  return reference_free(x, make(CPOTrainer, **(plain | settings)))


def bco(x, folder: Path) -> torch.Tensor:
  """The mean loss of a completion in the first step of the BCO trainer of TRL 1.9."""
  source = (folder / 'trl' / 'experimental' / 'bco' / 'bco_trainer.py').read_text()
  method = source[source.index('def bco_loss') :]
  logp = masked_logps(x).sum(-1)
  chosen, rejected = logp.chunk(2)
  ref_chosen, ref_rejected = (x['pair_ref'] * x['pair_answer'][:, 1:]).sum(-1).chunk(2)
  running = SimpleNamespace(mean=0.0)
  running.update = lambda rewards: setattr(running, 'mean', rewards.mean().item())
  scope = run_lines(
    method,
    'chosen_logratios =',
    'return losses',
    {
      'self': SimpleNamespace(beta=0.1, running=running, match_underlying_distribution=False),
      'F': torch.nn.functional,
      'do_train': True,
      'chosen_rewards': None,
      'policy_chosen_logps': chosen,
      'policy_rejected_logps': rejected,
      'reference_chosen_logps': ref_chosen,
      'reference_rejected_logps': ref_rejected,
    },
  )
  return scope['losses'].mean()


# {name here: TRL's beta}
JSD_BETAS = {'forward_kl': 0.0, 'reverse_kl': 1.0, 'js': 0.3}


def jsd(x, beta: float) -> torch.Tensor:
  """Sum over the tokens of the first half of the rows, the second half being the teacher."""
  student, teacher = x['pair_logits'].chunk(2)
  return GKDTrainer.generalized_jsd_loss(student, teacher, None, beta, 1.7, 'sum')


# {name here: TRL's}
DIVERGENCES = {
  'forward_kl': 'forward_kl',
  'js': 'js_divergence',
  'alpha': 'alpha_divergence',
}


def kto(x) -> torch.Tensor:
  rows, steps = x['kto_logp'].shape
  trainer = make(
    KTOTrainer,
    calculate_KL=True,
    precompute_ref_logps=True,
    loss_type='kto',
    beta=0.1,
    desirable_weight=1.3,
    undesirable_weight=0.7,
  )

  def model(input_ids, **kwargs):
    logp = x['kto_logp'] if input_ids.sum() == 0 else x['kto_other']
    zeros = torch.zeros_like(logp)
    return SimpleNamespace(log_probs=logp, entropy=zeros, mean_logits=zeros)

  ids, mask = torch.zeros(rows, steps + 1).long(), torch.ones(rows, steps + 1).long()
  inputs = {
    'input_ids': ids,
    'attention_mask': mask,
    'completion_mask': mask,
    'KL_input_ids': ids + 1,
    'KL_attention_mask': mask,
    'KL_completion_mask': mask,
    'label': x['kto_good'],
    'ref_logps': x['kto_ref'],
    'ref_KL_logps': x['kto_ref_other'],
  }
  return trainer._compute_loss(model, inputs, False)


def reward_model(x, centring, margin) -> torch.Tensor:
  trainer = make(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centring))
  logits = torch.cat([x['chosen_reward'], x['rejected_reward']])[:, None]
  inputs = {'attention_mask': torch.ones(len(logits), 2)}
  if margin:
    inputs['margin'] = x['reward_margin']
  return trainer.compute_loss(lambda **kwargs: SimpleNamespace(logits=logits), inputs)


def grpo(x, loss_type, **changes) -> tuple[torch.Tensor, torch.Tensor]:
  """(loss, its gradient by the log-probs float[B, T])."""
  plain = dict(level='token', low=0.2, high=0.28, delta=None, beta=0.0, unbiased=True, entropy=0.0)
  c = SimpleNamespace(**(plain | changes))
  logp = x['logp'].clone().requires_grad_()
  trainer = make(
    GRPOTrainer,
    args=SimpleNamespace(delta=c.delta, use_bias_correction_kl=c.unbiased, steps_per_generation=1),
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    importance_sampling_level=c.level,
    beta=c.beta,
    loss_type=loss_type,
    epsilon_low=c.low,
    epsilon_high=c.high,
    use_vllm=False,
    max_completion_length=x['logp'].shape[1] + 3,
    _entropy_bonus_enabled=bool(c.entropy),
    use_adaptive_entropy=False,
    entropy_coef=c.entropy,
    _get_per_token_logps_and_entropies=lambda *a, **k: (logp, x['entropy'], None),
  )
  batch, steps = logp.shape
  inputs = {
    'prompt_ids': torch.zeros(batch, 1).long(),
    'prompt_mask': torch.ones(batch, 1).long(),
    'completion_ids': torch.zeros(batch, steps).long(),
    'completion_mask': x['weights'].long(),
    'advantages': x['advantages'],
    'old_per_token_logps': x['old_logp'],
    'ref_per_token_logps': x['ref_logp'],
    'num_items_in_batch': x['weights'].sum(),
  }
  loss = trainer._compute_loss(None, inputs)
  loss.backward()
  return loss.detach(), logp.grad


def rloo_loss(x) -> tuple[torch.Tensor, torch.Tensor]:
  logp = x['logp'].clone().requires_grad_()
  trainer = make(
    RLOOTrainer,
    epsilon_low=0.2,
    epsilon_high=0.28,
    _get_per_token_logps_and_entropies=lambda *a, **k: (logp, x['entropy'], None),
  )
  batch, steps = logp.shape
  inputs = {
    'prompt_ids': torch.zeros(batch, 1).long(),
    'prompt_mask': torch.ones(batch, 1).long(),
    'completion_ids': torch.zeros(batch, steps).long(),
    'completion_mask': x['weights'].long(),
    'advantages': x['advantages'],
    'old_logps': (x['old_logp'] * x['weights']).sum(-1),
  }
  loss = trainer._compute_loss(None, inputs)
  loss.backward()
  return loss.detach(), logp.grad


def advantages(x) -> dict:
  groups, size = x['group_rewards'].shape
  out = {}
  for name, scale in (('grpo', 'group'), ('dr_grpo', 'none')):
    trainer = SimpleNamespace(
      multi_objective_aggregation='sum_then_normalize',
      reward_weights=torch.ones(1),
      scale_rewards=scale,
    )
    scope = lines_of(
      GRPOTrainer._generate_and_score_completions,
      'unscorable_mask = torch.isnan',
      '# Slice to keep only the local part',
      dict(
        self=trainer,
        rewards_per_func=x['group_rewards'].reshape(-1, 1),
        device='cpu',
        num_generations=size,
      ),
    )
    out[f'advantages_{name}'] = scope['advantages'].reshape(groups, size)
  scope = lines_of(
    RLOOTrainer._generate_and_score_completions,
    'grouped_rewards = rewards.view',
    '# Slice to keep only the local part',
    dict(
      self=SimpleNamespace(normalize_advantages=False),
      rewards=x['group_rewards'].reshape(-1),
      num_generations=size,
    ),
  )
  return out | {'advantages_rloo': scope['advantages'].reshape(groups, size)}


def corrections(x) -> dict:
  out = {}
  for mode in ('token_truncate', 'token_mask', 'sequence_truncate', 'sequence_mask'):
    trainer = SimpleNamespace(
      use_vllm=True,
      vllm_importance_sampling_correction=True,
      vllm_importance_sampling_mode=mode,
      vllm_importance_sampling_clip_min=0.5,
      vllm_importance_sampling_clip_max=2.0,
    )
    scope = lines_of(
      GRPOTrainer._generate_and_score_completions,
      '# Compute the importance sampling ratio when using vLLM',
      '# Compute the per-token log probabilities for the reference',
      dict(
        self=trainer,
        completion_mask=x['weights'],
        tool_mask=None,
        old_per_token_logps=x['old_logp'],
        sampling_per_token_logps=x['sampler_logp'],
      ),
    )
    # The loss multiplies by the mask later.
    ratio = scope['vllm_importance_sampling_ratio'].expand_as(x['weights'])
    out[f'correction_{mode}'] = ratio * x['weights']
  return out


def ppo(x, folder: Path) -> dict:
  """TRL dropped its PPO trainer after 1.9.0; its source file is read, not imported."""
  source = (folder / 'trl/experimental/ppo/ppo_trainer.py').read_text()
  scope = run_lines(source, 'def masked_mean(', '# taken from https', {})
  mask = x['weights'].bool()
  values = x['values'] * mask
  args = SimpleNamespace(gamma=0.97, lam=0.9, cliprange_value=0.2, vf_coef=1.0, cliprange=0.2)
  gae = run_lines(
    source,
    'lastgaelam = 0',
    'advantages = masked_whiten(',
    dict(args=args, responses=x['weights'], values=values, rewards=x['token_rewards'] * mask),
  )
  new = x['values'].clone().requires_grad_()
  value = run_lines(
    source,
    'vpredclipped = torch.clamp(',
    'vf_clipfrac = masked_mean(',
    dict(
      args=args,
      vpred=new,
      mb_values=x['old_values'],
      mb_return=gae['returns'],
      masked_mean=scope['masked_mean'],
      padding_mask_p1=~mask,
      micro_batch_inds=slice(None),
    ),
  )
  value['vf_loss'].backward()
  # `~padding_mask_p1` there covers one more token than the policy's; here the same mask serves.
  return {
    'gae': gae['advantages'] * mask,
    'gae_returns': gae['returns'] * mask,
    'whiten': scope['masked_whiten'](x['values'], x['weights']) * mask,
    'whiten_keeps_mean': scope['masked_whiten'](x['values'], x['weights'], False) * mask,
    'value_loss': value['vf_loss'].detach(),
    'value_loss_grad': new.grad,
  }


GRPO_CASES = {
  'grpo': ('grpo', {}),
  'bnpo': ('bnpo', {}),
  'dr_grpo': ('dr_grpo', {}),
  'dapo': ('dapo', {}),
  'cispo': ('cispo', {'high': 1.2}),
  'two_sided': ('dapo', {'delta': 1.5}),
  'gspo': ('grpo', {'level': 'sequence', 'low': 0.05, 'high': 0.06}),
  'kl': ('dapo', {'beta': 0.3}),
  'kl_plain': ('dapo', {'beta': 0.3, 'unbiased': False}),
  'kl_gspo': ('grpo', {'beta': 0.3, 'level': 'sequence'}),
  'entropy': ('dapo', {'entropy': 0.1}),
}


def outputs(inputs: dict[str, np.ndarray], ppo_folder: Path) -> dict[str, np.ndarray]:
  """All of TRL's numbers, by the names that from_ftjax.py uses."""
  x = {name: torch.from_numpy(a) for name, a in inputs.items()}
  out = {
    'sigmoid': dpo(x, loss_type='sigmoid', beta=0.1),
    'sigmoid_norm': dpo(x, loss_type='sigmoid_norm', beta=2.0),
    'ipo': dpo(x, loss_type='ipo', beta=0.4),
    'hinge': dpo(x, loss_type='hinge', beta=0.3),
    'robust': dpo(x, loss_type='robust', beta=0.1, label_smoothing=0.2),
    'exo': dpo(x, loss_type='exo_pair', beta=0.1, label_smoothing=0.1),
    'discopop': dpo(x, loss_type='discopop', beta=0.1),
    'nca': dpo(x, loss_type='nca_pair', beta=0.1),
    'sppo': dpo(x, loss_type='sppo_hard', beta=0.4),
    'apo_zero': dpo(x, loss_type='apo_zero', beta=0.1),
    'apo_down': dpo(x, loss_type='apo_down', beta=0.1),
    'aot': dpo(x, loss_type='aot', beta=0.1, label_smoothing=0.1),
    'aot_unpaired': dpo(x, loss_type='aot_unpaired', beta=0.1, label_smoothing=0.1),
    'bco': bco(x, ppo_folder),
    **{
      f'{loss}_{name}': dpo(x, loss_type=loss, beta=0.1, divergence=divergence)
      for loss in ('sigmoid', 'sigmoid_norm', 'hinge', 'ipo', 'discopop')
      for name, divergence in DIVERGENCES.items()
    },
    **{f'jsd_{name}': jsd(x, beta) for name, beta in JSD_BETAS.items()},
    'cpo': cpo(x),
    'cpo_smoothed': cpo(x, label_smoothing=0.1),
    'cpo_nll': cpo(x, cpo_alpha=0.7),
    'simpo': cpo(x, loss_type='simpo', beta=2.0, simpo_gamma=0.5),
    'orpo': reference_free(x, make(ORPOTrainer, beta=0.2)),
    'kto': kto(x),
    'bradley_terry': reward_model(x, None, False),
    'bradley_terry_margin': reward_model(x, 0.01, True),
    'overlong': torch.tensor(
      get_soft_overlong_punishment(100, 20)([[0] * n for n in x['lengths']])
    ),
    **advantages(x),
    **corrections(x),
    **ppo(x, ppo_folder),
  }
  for name, (loss_type, changes) in GRPO_CASES.items():
    out[f'policy_{name}'], out[f'policy_{name}_grad'] = grpo(x, loss_type, **changes)
  out['policy_rloo'], out['policy_rloo_grad'] = rloo_loss(x)
  return {name: np.asarray(a.detach(), np.float32) for name, a in out.items()}
