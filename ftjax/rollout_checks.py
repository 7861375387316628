"""What may not stand together in the sections `rollout` and `grpo` of a config; config.validate
calls it."""

import ml_collections

from ftjax.runtime.errors import ConfigError


def check(c: ml_collections.ConfigDict) -> None:
  """Raises ConfigError, naming the keys."""
  r, g = c.rollout, c.grpo
  if not r.rewards:
    raise ConfigError("rollout.rewards is empty: say what is paid, for example 'math@1'")
  if isinstance(r.stop, str) or not all(isinstance(s, str) and s for s in r.stop):
    raise ConfigError(f'rollout.stop={r.stop!r}; expected a tuple of texts')
  if r.temperature <= 0:
    raise ConfigError(
      f'rollout.temperature={r.temperature}; expected more than 0: equal completions teach nothing'
    )
  if not 0 < r.top_p <= 1:
    raise ConfigError(f'rollout.top_p={r.top_p}; expected more than 0 and at most 1')
  if r.max_tokens >= c.seq_len:
    raise ConfigError(
      f'rollout.max_tokens={r.max_tokens} leaves no room for a prompt in seq_len={c.seq_len}'
    )
  if c.data.eval_fraction:
    raise ConfigError('data.eval_fraction splits no prompts: name the held-out ones in data.eval')
  if c.data.on_overlength not in ('error', 'drop'):
    raise ConfigError(
      f'data.on_overlength={c.data.on_overlength!r}: prompts are not cut; expected error or drop'
    )
  if c.batch_size * r.group % g.minibatches:
    raise ConfigError(
      f'grpo.minibatches={g.minibatches} must divide the {c.batch_size * r.group} completions of a '
      'rollout (batch_size x rollout.group)'
    )
  if r.group < 2 and g.advantage != 'reinforce_pp':
    raise ConfigError(
      f'rollout.group={r.group}: grpo.advantage={g.advantage} compares the completions of a '
      'prompt; expected at least 2'
    )
  if g.correction != 'none' and (r.top_k or r.top_p < 1):
    raise ConfigError(
      f'grpo.correction={g.correction} with rollout.top_k={r.top_k}, top_p={r.top_p}: a ratio to a '
      'sampler that left tokens out is none; set top_k=0 and top_p=1, or correction=none'
    )
  if not 0 <= g.correction_low <= 1 <= g.correction_high:
    raise ConfigError(
      f'grpo.correction_low={g.correction_low}, correction_high={g.correction_high} must hold 1'
    )
  if g.dual_clip and g.dual_clip <= 1 + g.clip_high:
    raise ConfigError(
      f'grpo.dual_clip={g.dual_clip}; expected more than 1 + grpo.clip_high = {1 + g.clip_high}, '
      'or 0 for none'
    )
  if g.overlong > r.max_tokens:
    raise ConfigError(f'grpo.overlong={g.overlong} is more than rollout.max_tokens={r.max_tokens}')
  if g.surrogate == 'reinforce' and g.updates * g.minibatches > 1:
    raise ConfigError(
      'grpo.surrogate=reinforce holds for the first update alone: set grpo.updates=1 and '
      'grpo.minibatches=1, or take clip or cispo'
    )
