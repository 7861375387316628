"""models/counts.py: numbers of parameters and FLOPs of adapters and packed bases, by hand."""

import dataclasses

import pytest
from tiny_model import TINY, UNTIED, with_mixer

from ftjax.config import keys
from ftjax.experiment import adapters, auxiliary
from ftjax.models import counts, kinds
from ftjax.models.architecture import MaskedHead, Norm
from ftjax.planning import cost

# Of a layer of TINY: q and o 32*32, k and v 32*16, gate, up and down 32*64.
BLOCKS = 3 * (2 * 1024 + 2 * 512 + 3 * 2048)
NORMS = (2 * 3 + 1) * 32
TABLE = 256 * 32
# Of adapters of rank 4: 4 (inputs + outputs) of q, o, k, v, gate, up, down.
LORA = 3 * 4 * (64 + 64 + 48 + 48 + 96 + 96 + 96)


def adapted(arch, **lora):
  c = keys.default()
  c.lora.rank = 4
  c.lora.update(lora)
  return adapters.adapted(arch, c)


def test_train_flops_equal_the_products_counted_one_by_one():
  # Every product [m, k] x [k, n] costs 2 m k n, and the backward pass twice the forward.
  t, d, heads, h = 7, 32, 4, 8
  forward = 2 * t * (BLOCKS + TABLE)
  for query in range(t):
    forward += 3 * 2 * 2 * heads * h * (query + 1)  # q.k and p.v with each key that is seen
  assert heads * h == d
  assert counts.forward_flops(TINY)(t, t * (t + 1) / 2) == forward
  assert counts.train_flops(TINY)(t, t * (t + 1) / 2) == 3 * forward


@pytest.mark.parametrize('base', ['bfloat16', 'int8', 'nf4'])
def test_a_frozen_matrix_costs_4_a_token_and_a_trained_one_6(base):
  arch = adapted(TINY, base=base)
  assert counts.num_params(arch) == BLOCKS + NORMS + TABLE + LORA
  assert counts.num_trained(arch) == LORA
  assert counts.matmul_params(arch) == BLOCKS + TABLE + LORA
  found = counts.train_flops(arch)
  assert found.token == 4 * (BLOCKS + TABLE) + 6 * LORA
  assert found.pair == counts.train_flops(TINY).pair == 12 * 3 * 32  # no matrix is multiplied
  assert counts.forward_flops(arch).token == 2 * (BLOCKS + TABLE + LORA)


def test_what_dora_and_pissa_add_is_no_model_flop():
  for more in ({'dora': True}, {'init': 'pissa'}):
    assert counts.train_flops(adapted(TINY, **more)) == counts.train_flops(adapted(TINY))


def test_a_head_that_is_trained_whole_counts_as_trained():
  arch = adapted(UNTIED, train='head/w|final_norm/scale')
  assert counts.num_trained(arch) == LORA + TABLE + 32
  assert counts.train_flops(arch).token == 4 * BLOCKS + 6 * (LORA + TABLE)


def test_auxiliary_models_on_the_base_under_an_adapter():
  """The reference of DPO computes the base forward; PPO's value model has an adapter of its own."""
  c = keys.default()
  arch = adapted(TINY, base='nf4')
  policy = 4 * (BLOCKS + TABLE) + 6 * LORA

  def token(algorithm):
    c.algorithm, c.policy.kl_coef = algorithm, 0.1
    models = auxiliary.find(c, arch)
    assert all(m.shares_base for m in models)
    passes = models.passes(arch)
    attention = sum({3: 12, 1: 4, 0: 0}[times] for _, times in passes) * 3 * 32
    return cost.model_flops(passes, 1, 1) - attention

  assert token('sft') == token('grpo') == policy
  assert token('dpo') == policy + 2 * (BLOCKS + TABLE)
  # The score maps 32 numbers to one, and is trained.
  assert token('ppo') == policy + 4 * BLOCKS + 6 * (LORA + 32)


def test_recomputation_repeats_the_adapters_too():
  arch = adapted(TINY)
  attention = 4 * 3 * 32 * (2 * 8 * 9 / 2)
  assert cost.recomputed(arch, 2, 8, 'full') == attention + 2 * (BLOCKS + LORA) * 16
  assert cost.recomputed(arch, 2, 8, 'dots') == attention
  assert dataclasses.replace(arch, adapter=None, base='') == TINY


def test_an_encoder_attends_on_both_sides():
  """A document of n tokens: n n pairs, where a decoder has n (n + 1) / 2."""
  arch = with_mixer(dataclasses.replace(TINY, kind='encoder', final_norm=None), causal=False)
  arch = dataclasses.replace(arch, masked_head=MaskedHead(Norm()))
  n, width = 10, 3 * 4 * 8
  seen = n * (n + 1) // 2
  forward, trained = counts.forward_flops(arch), counts.train_flops(arch)
  assert forward(n, seen) == 2 * counts.matmul_params(arch) * n + 4 * width * n * n
  assert trained(n, seen) == 6 * counts.matmul_params(arch) * n + 12 * width * n * n
  assert 'masked/dense/w' in kinds.declared(arch)
