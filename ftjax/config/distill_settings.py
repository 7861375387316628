"""What a config of distillation asks for: the arrays of its batches, and settings that do not go
together."""

import ml_collections

from ftjax.runtime.errors import ConfigError


def wide(c: ml_collections.ConfigDict) -> dict[str, tuple[int, str]]:
  """Returns the arrays with several numbers of each token: {name: (numbers, dtype)}; see
  data/teacher_file.py.
  """
  k = c.distill.top_k
  return {'teacher_ids': (k, 'int32'), 'teacher_logp': (k + 1, 'float32')} if c.distill.file else {}


def check(c: ml_collections.ConfigDict) -> None:
  """Raises ConfigError for settings outside of their range."""
  d = c.distill
  if not 0 < d.share <= 1 or not 0 < d.beta < 1 or d.temperature <= 0:
    raise ConfigError(
      f'distill.share={d.share}, distill.beta={d.beta}, distill.temperature={d.temperature}; '
      'expected a share in (0, 1], a beta in (0, 1) and a positive temperature'
    )
