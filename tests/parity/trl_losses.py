"""Losses and advantages of ftjax against TRL's own functions, on the same random numbers.

TRL is no dependency of ftjax or of its tests; it is in the parity environment (make parity), and
beside it TRL 1.9, the last with PPO:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/trl_losses.py golden FOLDER \
    .venv-parity/trl-1.9
  PYTHONPATH=tests:. .venv/bin/python tests/parity/trl_losses.py compare

`golden` calls TRL (parity/from_trl.py) and writes trl_losses.npz, inputs and outputs, to FOLDER;
`compare` prints the largest differences. test_trl_losses.py reads the same file without torch.
"""

import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / 'golden' / 'trl_losses.npz'
TOLERANCE = 1e-6  # max |delta| / max(1, max |TRL's|)

# What TRL has no function for, or does otherwise by intent.
NOT_COMPARED = {
  'sigmoid with label_smoothing': "TRL's DPO trainer ignores label_smoothing there; the form is "
  'compared through its CPO trainer (cpo_smoothed)',
  'kto z': "TRL clamps a micro-batch's mean, ftjax the step's: the same for one micro-batch, which "
  'is what is compared',
  'sequence, constant over micro-batches': "TRL averages micro-batches' means; one is compared",
  'entropy with sequence or constant': "TRL takes the mean over tokens whatever the loss's "
  'aggregation; compared with token',
  'grpo of a constant group': 'TRL divides a rounding by 1e-4, ftjax returns 0; compared with '
  'rewards whose mean is exact',
  'reinforce, k2, dual_clip below 1 + clip_high': 'TRL has none',
  'mean squared error of rewards, calibration error': 'TRL has none',
  'REINFORCE++': "TRL has none (scale_rewards 'batch' is another formula)",
  'adaptive KL coefficient': 'TRL 1.16 has none',
}


def make_inputs() -> dict[str, np.ndarray]:
  """float32 and int arrays: P pairs of T tokens (3 of the prompt), N single answers, B completions
  in groups of C."""
  rng = np.random.default_rng(0)
  pairs, tokens, vocab, rows, steps, group = 6, 11, 5, 8, 9, 4
  lengths = rng.integers(1, tokens - 2, 2 * pairs)
  at = np.arange(tokens)
  x = {
    'pair_logits': rng.normal(size=(2 * pairs, tokens, vocab)) * 2,
    'pair_ids': rng.integers(0, vocab, (2 * pairs, tokens)),
    'pair_real': (at < 3 + lengths[:, None]).astype(np.float32),
    'pair_answer': ((at >= 3) & (at < 3 + lengths[:, None])).astype(np.float32),
    'pair_ref': -rng.exponential(size=(2 * pairs, tokens - 1)),
    'kto_logp': -rng.exponential(size=(rows, steps)),
    'kto_other': -rng.exponential(size=(rows, steps)) * 0.8,
    'kto_ref': -rng.exponential(size=rows) * steps,
    'kto_ref_other': -rng.exponential(size=rows) * steps - 2,
    'kto_good': rng.random(rows) < 0.5,
    'chosen_reward': rng.normal(size=pairs) * 2,
    'rejected_reward': rng.normal(size=pairs) * 2,
    'reward_margin': rng.random(pairs),
  }
  batch = 4 * group
  x |= {
    'logp': -rng.exponential(size=(batch, steps)),
    'entropy': rng.random((batch, steps)) * 2,
    'advantages': rng.normal(size=batch),
    'weights': (np.arange(steps) < rng.integers(1, steps + 1, batch)[:, None]).astype(np.float32),
    'group_rewards': rng.normal(size=(4, group)),
    'values': rng.normal(size=(batch, steps)),
    'token_rewards': rng.normal(size=(batch, steps)),
    'lengths': rng.integers(0, 130, batch),
  }
  x['old_logp'] = x['logp'] + rng.normal(size=x['logp'].shape) * 0.3
  x['ref_logp'] = x['logp'] + rng.normal(size=x['logp'].shape) * 0.5
  x['sampler_logp'] = x['old_logp'] + rng.normal(size=x['logp'].shape) * 0.4
  x['old_values'] = x['values'] + rng.normal(size=x['values'].shape) * 0.3
  x['group_rewards'][1] = 0.5  # a group without a built
  x['group_rewards'][2, 1] = np.nan  # a completion that no reward function could score
  return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in x.items()}


def difference(got: np.ndarray, expected: np.ndarray) -> float:
  """max |delta| / max(1, max |expected|); infinite for other shapes or anything not finite."""
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  if got.shape != expected.shape or not (np.isfinite(got) & np.isfinite(expected)).all():
    return np.inf
  return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))


def read() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """(inputs, TRL's outputs) of the golden file."""
  stored = np.load(GOLDEN)
  inputs = {k[3:]: stored[k] for k in stored.files if k.startswith('in/')}
  return inputs, {k[4:]: stored[k] for k in stored.files if k.startswith('trl/')}


def main() -> int:
  if sys.argv[1] == 'golden':
    from parity import from_trl

    inputs = make_inputs()
    target = Path(sys.argv[2]) / GOLDEN.name
    outputs = from_trl.outputs(inputs, Path(sys.argv[3]))
    stored = {f'in/{k}': v for k, v in inputs.items()} | {f'trl/{k}': v for k, v in outputs.items()}
    np.savez_compressed(target, **stored)
    print(f'{target}: {len(outputs)} outputs, {target.stat().st_size} bytes')
    return 0
  from parity import from_ftjax

  inputs, expected = read()
  got = from_ftjax.outputs(inputs)
  differences = {name: difference(got[name], e) for name, e in expected.items()}
  for name, value in differences.items():
    print(f'{name:34} {value:.1e}')
  for name, why in NOT_COMPARED.items():
    print(f'not compared: {name}: {why}')
  worst = max(differences.values())
  print(f'{len(differences)} outputs, largest difference {worst:.1e}, allowed {TOLERANCE:.0e}')
  return int(worst > TOLERANCE)


if __name__ == '__main__':
  sys.exit(main())
