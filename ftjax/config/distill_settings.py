"""What a config of distillation asks for: the arrays of its batches, and settings that do not go
together."""

import ml_collections

from ftjax.runtime.errors import ConfigError

# Keys by which the student's completions are sampled.
SAMPLING = ('max_tokens', 'temperature', 'top_k', 'top_p', 'slots', 'stop', 'samples')
ROLLOUT_KEYS = tuple(f'rollout.{name}' for name in SAMPLING)


def wide(c: ml_collections.ConfigDict) -> dict[str, tuple[int, str]]:
  """Returns the arrays with several numbers of each token: {name: (numbers, dtype)}; see
  data/teacher_file.py.
  """
  k = c.distill.top_k
  return {'teacher_ids': (k, 'int32'), 'teacher_logp': (k + 1, 'float32')} if c.distill.file else {}


def check(c: ml_collections.ConfigDict) -> None:
  """Raises ConfigError for settings outside of their range, or that do not go together."""
  d = c.distill
  if not 0 < d.share <= 1 or not 0 < d.beta < 1 or d.temperature <= 0:
    raise ConfigError(
      f'distill.share={d.share}, distill.beta={d.beta}, distill.temperature={d.temperature}; '
      'expected a share in (0, 1], a beta in (0, 1) and a positive temperature'
    )
  if not 0 <= d.on_policy <= 1:
    raise ConfigError(f'distill.on_policy={d.on_policy}; expected a share of the steps in [0, 1]')
  if d.on_policy:
    _check_on_policy(c)


def _check_on_policy(c: ml_collections.ConfigDict) -> None:
  d, r = c.distill, c.rollout
  given = f'distill.on_policy={d.on_policy}'
  if d.file:
    raise ConfigError(
      f'{given} with distill.file={d.file}: the file knows nothing of tokens that the student '
      'samples; name the teacher in distill.teacher, and leave distill.file out'
    )
  if d.share != 1:
    raise ConfigError(
      f'{given} with distill.share={d.share}: the likelihood of tokens that the student sampled '
      'itself is no signal; set distill.share=1'
    )
  if c.data.packing:
    raise ConfigError(f'{given} completes the prompt of one example a row: set data.packing=False')
  if r.temperature <= 0 or not 0 < r.top_p <= 1:
    raise ConfigError(
      f'rollout.temperature={r.temperature}, rollout.top_p={r.top_p}; expected a positive '
      'temperature, and more than 0 and at most 1'
    )
  if r.max_tokens >= c.seq_len:
    raise ConfigError(
      f'rollout.max_tokens={r.max_tokens} leaves no room for a prompt in seq_len={c.seq_len}'
    )
  if isinstance(r.stop, str) or not all(isinstance(s, str) and s for s in r.stop):
    raise ConfigError(f'rollout.stop={r.stop!r}; expected a tuple of texts')
