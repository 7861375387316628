"""A reward model that was trained here, as the reward `model` of rollouts: it scores every
completion after its prompt, on the training mesh."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data import batches
from ftjax.data.batches import ARRAYS
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import model_record
from ftjax.experiment.run import Run
from ftjax.families import table
from ftjax.hf import load
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.models.forward import Forward
from ftjax.rl.rollout_batch import side
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError
from ftjax.training.prefetch import place

KEY = 'rollout.reward_model'


def architecture(path: str, family: str) -> Architecture:
  """Returns the architecture of the reward model in a folder; `family`: value of model.family.

  Raises:
    ConfigError: a model without a score.
  """
  arch = table.architecture(load.read_config(path), family)
  if not arch.num_labels:
    raise ConfigError(
      f'{KEY}={path} is no reward model: it has no score. Name the export/ folder of a run with '
      'algorithm=reward_model'
    )
  return arch


def check_tokens(key: str, path: str, run: Run) -> None:
  """Raises ConfigError where the model in a folder, which reads the policy's token ids, has other
  tokens than the policy.

  Args:
    key: of the config, that names the folder: 'ppo.value_from'.
    path: the folder.
    run: of the policy.
  """
  found, own = Tokenizer(load.tokenizer_files(path), path), run.model.tokenizer
  if own.same_tokens(found):
    return
  different = f'{found.vocab_size} and {own.vocab_size} tokens'
  pairs = ((own.token(i), found.token(i)) for i in range(min(own.vocab_size, found.vocab_size)))
  if other := next((pair for pair in pairs if pair[0] != pair[1]), None):
    different += f', for example {other[1]!r} in place of {other[0]!r}'
  raise ConfigError(
    f'{key}={path} has another tokenizer than the policy {run.config.model.path or own.name}: '
    f'{different}. It would read other tokens than the policy wrote; train it from a model of the '
    'same family'
  )


class TrainedReward:
  """Scores of completions; the same on every process, which all must ask.

  Its weights stand on the mesh as long as it lives, in model.param_dtype.

  Args:
    run: of the policy; `rollout.reward_model` names the folder.

  Raises:
    ConfigError: no reward model, or one with other tokens than the policy's.
  """

  def __init__(self, run: Run):
    c, path = run.config, run.config.rollout.reward_model
    self._run, arch = run, architecture(path, c.model.family)
    check_tokens(KEY, path, run)
    if arch.max_len < c.seq_len:
      raise ConfigError(f'{KEY}={path} was made for {arch.max_len} positions, seq_len={c.seq_len}')
    with run.watchdog.phase('restore'):
      where = sharding.shardings(run.mesh, kinds.axes(arch))
      model_record.hash_while_loading(path, run.workdir)
      self._params = load.load_params(path, arch, where, jnp.dtype(c.model.param_dtype))
    forward = Forward(arch, jnp.dtype(c.model.compute_dtype))

    @jax.jit
    def score(params, batch):
      [out] = forward.sequence_rewards(params, batch, 1)
      return jax.sharding.reshard(out, sharding.spec(None))

    self._score = score

  def __call__(self, pairs: Sequence) -> np.ndarray:
    """float32[n] of (prompt, completion) pairs: the score at each completion's last token."""
    c, out = self._run.config, []
    shardings = self._run.batch_shardings(micro=False)
    for at in range(0, len(pairs), c.eval.batch_size):
      some = pairs[at : at + c.eval.batch_size]
      rows = batches.empty(c.eval.batch_size, c.seq_len)
      for i, pair in enumerate(some):
        batches.fill_row(rows, i, [side(*pair)])
      batch = place({k: rows[k] for k in ARRAYS}, {k: shardings[k] for k in ARRAYS})
      out.append(np.asarray(self._score(self._params, batch))[: len(some)])
    return np.concatenate(out)
