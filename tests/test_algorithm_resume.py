"""A run of every algorithm, killed for real after step k and run again: prompts, completions,
losses and exported bits are those of an uninterrupted run, though a reference is in no checkpoint,
nor the base under an adapter.
Those of SFT and GRPO are in test_resume.py and test_grpo.py.
"""

import functools
import re

import pytest
import tiny_rollouts
import tiny_run

SETTINGS = {
  'ppo': ('policy.kl_target=0.02',),
  'best_of_n': ('best_of_n.keep=2', 'rollout.redraws=1'),
  'online_dpo': ('rollout.group=4', 'rollout.minibatches=1'),
}


# Two epochs and a half, of which each has its own spans.
ENCODER_DECODERS = {
  'seq2seq': ('data.train=sums:100', 'seq2seq.source_len=128'),
  'span_corruption': ('data.train=texts:100', 'seq2seq.source_len=64', 'seq_len=32'),
}


PAIRS = ('steps=8', 'checkpoint.every=1', 'checkpoint.keep=8', 'eval.every=0', 'eval.prompts=()')
PAIRS += ('data.train=pairs:100', 'grad_accum=2')


# The same with an adapter: on every kind of base, with everything that an adapter may have.
ADAPTERS = {
  'sft': ('base=int8', 'dropout=0.2', 'train=embed/w', "rank_pattern=(('layer0/.*',2),)"),
  'dpo': ('base=nf4', 'block=16', 'init=pissa', 'train=embed/w'),
  'cached': ('base=int8', 'dora=True', 'train=embed/w'),
  'reward_model': ('dora=True', 'init=pissa', 'dropout=0.2'),
  'grpo': ('base=nf4', 'block=16', 'dora=True', 'train=embed/w'),
  'ppo': ('base=nf4', 'block=16', 'init=pissa', 'b_lr_ratio=4.0', 'train=.*norm/scale'),
  'best_of_n': ('base=float32', 'rslora=True'),
  'online_dpo': ('base=int8', 'train=embed/w'),
  'seq2seq': ('base=int8', 'dropout=0.2', 'train=embed/w'),
}


def arguments(algorithm, workdir):
  if algorithm.endswith('+lora'):
    algorithm = algorithm.removesuffix('+lora')
    settings = ('rank=4', 'alpha=8.0', 'merge_kl=1.0', *ADAPTERS[algorithm])
    return [*arguments(algorithm, workdir), *(f'--config.lora.{s}' for s in settings)]
  if algorithm == 'cached':
    return [*arguments('dpo', workdir), '--config.dpo.reference=cache']
  if algorithm == 'grpo':
    return tiny_rollouts.arguments(workdir)
  if algorithm == 'sft':
    settings = ('steps=8', 'checkpoint.every=1', 'checkpoint.keep=8', 'eval.every=3')
    return tiny_run.arguments(workdir, *settings)
  if algorithm in ENCODER_DECODERS:
    settings = ('steps=8', 'checkpoint.every=1', 'checkpoint.keep=8', 'eval.every=3')
    settings += ('grad_accum=2', 'eval.prompts=()', 'optim.warmup_steps=0')
    settings += ENCODER_DECODERS[algorithm]
    entry = [f'--config=tiny_{algorithm}', f'--workdir={workdir}']
    return [*entry, *(f'--config.{s}' for s in settings)]
  if algorithm in SETTINGS:
    return tiny_rollouts.arguments(workdir, *SETTINGS[algorithm], algorithm=algorithm)
  entry = [f'--config=tiny_{algorithm}', f'--workdir={workdir}']
  return [*entry, *(f'--config.{s}' for s in PAIRS)]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """Returns the workdir of an algorithm's run without a kill; each is run once."""

  @functools.cache
  def run(algorithm):
    workdir = tmp_path_factory.mktemp(algorithm)
    code, told = tiny_run.run('train', arguments(algorithm, workdir), share_cache=False)
    assert code == 0, told
    return workdir

  return run


# Both moments of a kill, pairs and rollouts; test_grpo.py and test_resume.py have others.
EVERY_DAY = {('cached', 1)}
CASES = [
  pytest.param(a, k, marks=[] if (a, k) in EVERY_DAY else [pytest.mark.full])
  for a in (
    *('dpo', 'cached', 'reward_model', *SETTINGS, *ENCODER_DECODERS),
    *(f'{a}+lora' for a in ADAPTERS),
  )
  for k in (1, 4)
]


@pytest.mark.parametrize(('algorithm', 'k'), CASES)
def test_killed_after_step_k_it_ends_bitwise_like_uninterrupted(
  algorithm, k, uninterrupted, tmp_path
):
  whole = uninterrupted(algorithm)
  tiny_run.share_programs(whole, tmp_path)
  process = tiny_run.launch('train', arguments(algorithm, tmp_path), tmp_path / 'log')
  assert tiny_run.kill_when(process, (tmp_path / 'checkpoints' / str(k)).exists)
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert max(steps) < 8
  code, told = tiny_run.run('train', arguments(algorithm, tmp_path))
  assert code == 0 and f'resuming after step {max(steps)} of 8' in told, told
  assert tiny_run.differences(tmp_path, whole) == []
  assert tiny_rollouts.rollouts(tmp_path) == tiny_rollouts.rollouts(whole)
  names = [p.read_text() for p in (tmp_path / 'checkpoints').rglob('_METADATA')]
  assert names and all('params' in n and 'reference' not in n for n in names)
  if algorithm.endswith('+lora'):  # and of the frozen base nothing
    frozen = {leaf for n in names for leaf in re.findall(r"\('frozen', [^)]+\)", n)}
    assert all('lora_' in leaf and 'lora_scale' not in leaf for leaf in frozen)
    merged = [(w / 'merged' / 'model.safetensors').read_bytes() for w in (tmp_path, whole)]
    assert merged[0] == merged[1]
