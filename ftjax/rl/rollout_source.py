"""Batches of completions by the model in training: prompts, completions, rewards, rows.

Rollout i holds prompts i x batch_size onwards, each with rollout.group completions, and serves U
updates, steps i U to i U + U - 1. It is a function of the seed, i, and the weights after i U steps;
so a run that resumes from there makes it again, bit for bit. Between two updates on a rollout the
weights it came from are gone: then its arrays are read back from rollouts/<i>.npz.

Shared by the algorithms that train on rollouts: each gives a `BatchBuilder` and its loss."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import algorithms
from ftjax.data.prompts import Prompt
from ftjax.experiment.batch_source import Source, WriteMetrics
from ftjax.experiment.run import Run
from ftjax.experiment.transcript import Transcripts
from ftjax.generation.completion import Rollout
from ftjax.models.forward import Forward
from ftjax.rl import rollout_batch, step_rewards
from ftjax.rl.batch_builder import BatchBuilder
from ftjax.rl.measurements import Measure, Measurements
from ftjax.rl.policy_sampler import PolicySampler
from ftjax.rl.rollout_batch import RolloutBatch, with_groups, zero_variance_groups
from ftjax.rl.rollout_files import RolloutFiles
from ftjax.rl.rollout_rewards import RolloutRewards
from ftjax.runtime.errors import CheckError
from ftjax.runtime.sharding import BATCH
from ftjax.training.prefetch import place
from ftjax.training.state import State

log = logging.getLogger(__name__)

# Mean |trainer - sampler| in nats above which the two are taken for different models.
_ALARM = 0.05
# Auxiliary models of config/algorithms.py that are read here.
_REFERENCE, _REWARD_MODEL = 'reference', 'reward model'


def order(count: int, *names: int | str) -> np.ndarray:
  """Returns a permutation int64[count] that depends on `names` alone."""

  def key(i: int) -> bytes:
    return hashlib.sha256('/'.join(map(str, (*names, i))).encode()).digest()

  return np.array(sorted(range(count), key=key), np.int64)


class RolloutSource(Source):
  """The source of batches of an algorithm that trains on rollouts.

  Args:
    run: a config on a mesh.
    builder: of the algorithm.
    measures: what else the algorithm measures of every token with the parameters in training, by
      the name of the array.

  Raises:
    ConfigError: rewards or stop texts that cannot be used.
  """

  def __init__(
    self, run: Run, builder: BatchBuilder, measures: Mapping[str, Measure] | None = None
  ):
    c = run.config
    self.run, self._batch_builder = run, builder
    self._updates = algorithms.steps_per_batch(c)
    self.files = RolloutFiles(run.workdir, self._updates)
    self.sampler = PolicySampler(run)
    transcripts = Transcripts(run.model.tokenizer, self.sampler.stop_ids)
    self._needs_old_logp = algorithms.of(c).needs_old_logp(c)
    self._own_measures = tuple(measures or {})
    self.measure = Measurements(run, _measures(run) | dict(measures or {}))
    self._models: dict[str, dict] = {}  # weights of the auxiliary models of rollouts
    self._held: tuple[int, dict[str, np.ndarray]] | None = None
    self._is_checked = self._is_warned = False
    self._rewards = RolloutRewards(run, transcripts, self.files)
    self._step_rewards = step_rewards.StepRewards(run, transcripts)

  def cut(self, step: int, drop_eval: bool) -> None:
    """See Source."""
    self.files.cut(step)

  def begin(self, write: WriteMetrics, start: int, saved: dict[str, Any]) -> None:
    """See Source."""
    self._write = write
    self._batch_builder.restore(saved)
    # Not in the state, which is saved and donated: they never change.
    self._models = {m.name: self.run.load_auxiliary(m) for m in self.run.auxiliary.of_rollouts}

  def saving(self, step: int) -> dict[str, Any]:
    """See Source."""
    self.files.saving(step)
    return self._batch_builder.saved()

  def close(self) -> None:
    """See Source."""
    self._models, self._held = {}, None
    self._rewards.close()

  def take(self, state: State, step: int) -> dict[str, jax.Array]:
    """See Source."""
    number, update = divmod(step, self._updates)
    if self._held is None or self._held[0] != number:
      with self.run.watchdog.phase('rollout'):
        if update:
          names = self.run.batch_shardings(micro=True)
          self._held = number, self.files.read_arrays(number, names)
        else:
          self._held = None  # two rollouts need not be held
          self._held = number, self._make(number, state, step)
    return self._batch(*self._held, update)

  def _batch(self, number: int, arrays: dict, update: int) -> dict[str, jax.Array]:
    """Returns the rows of one update on a rollout, on the devices."""
    c = self.run.config
    total = algorithms.rows_per_step(c)
    once, part = divmod(update, c.rollout.minibatches)
    which = np.arange(len(arrays['tokens']))
    if c.rollout.minibatches > 1:
      which = order(len(which), c.seed, number, once)
    which = which[part * total : (part + 1) * total]
    shape = (c.grad_accum, total // c.grad_accum)
    shardings = self.run.batch_shardings(micro=True)
    rows = {k: arrays[k][which] for k in shardings}
    return place({k: v.reshape(*shape, *v.shape[1:]) for k, v in rows.items()}, shardings)

  def _make(self, number: int, state: State, step: int) -> dict[str, np.ndarray]:
    """Returns the rows of a rollout with the weights of `state`."""
    c, params = self.run.config, state.parameters()
    first = number * algorithms.prompts_per_rollout(c)
    sampled, metrics = self._draw(params, range(first, first + c.batch_size), number)
    drawn = c.batch_size
    for again in range(1, c.rollout.redraws + 1):
      equal = zero_variance_groups(sampled)
      if not len(equal):
        break
      more, _ = self._draw(params, [first + again * c.batch_size + i for i in equal], None)
      sampled, drawn = with_groups(sampled, more, equal), drawn + len(equal)
    train_batch = self._batch_builder.build(sampled)
    expected = algorithms.rows_per_rollout(c)
    if (found := len(train_batch.arrays['tokens'])) != expected:
      raise CheckError(f'rollout {number} has {found} rows, expected {expected}')
    if c.rollout.redraws:
      left = len(zero_variance_groups(sampled))
      self._rewards.report_redraws(left)
      metrics |= {'redrawn': drawn / c.batch_size - 1, 'zero_variance_left': left}
    self._write(step + 1, metrics | train_batch.metrics)
    self.files.write_rows(f'kept-{number}', train_batch.kept)
    if self._updates > 1:
      wanted = self.run.batch_shardings(micro=True)
      self.files.write_arrays(number, {k: train_batch.arrays[k] for k in wanted})
    return train_batch.arrays

  def _draw(
    self, params: dict, numbers: Sequence[int], rollout: int | None
  ) -> tuple[RolloutBatch, dict[str, float]]:
    """Returns completions of the prompts of these numbers, with their rewards, and metrics."""
    c, prompts = self.run.config, [self.run.data.prompt(n) for n in numbers]
    found = self.sampler.sample(params, prompts, numbers, seed=c.seed, group=c.rollout.group)
    return self.score(params, prompts, found, rollout)

  def _score_by_model(self) -> dict[str, tuple[str, dict]]:
    """Returns the entry of the reward model for `measure`, if there is one; one of steps reads rows
    of its own.
    """
    params = self._models.get(_REWARD_MODEL)
    is_left_out = params is None or self.run.config.rollout.step_reward
    return {} if is_left_out else {_REWARD_MODEL: (_REWARD_MODEL, params)}

  def _score_steps(self, prompts: Sequence[Prompt], found: Rollout, size: int) -> np.ndarray | None:
    """Returns the scores of a process reward model, float32[R]; None without one.

    size: rows at a time, as of `measure`.
    """
    params = self._models.get(_REWARD_MODEL)
    if params is None or not self.run.config.rollout.step_reward:
      return None
    wanted = {_REWARD_MODEL: (_REWARD_MODEL, params)}
    return self._step_rewards(
      *(prompts, found.completions),
      lambda arrays: self.measure(arrays, wanted, size)[_REWARD_MODEL],
    )

  def _of_reference(self, params: dict) -> tuple[str, dict]:
    """Returns the entry of the reference for `measure`; params: all parameters in training."""
    own = self._models[_REFERENCE]
    if self.run.auxiliary.find(_REFERENCE).shares_base:
      return 'ref_logp', params | {_REFERENCE: own}
    return 'logp', own

  def score(
    self, params: dict, prompts: Sequence[Prompt], found: Rollout, number: int | None
  ) -> tuple[RolloutBatch, dict[str, float]]:
    """Returns the completions with rewards and everything that is measured of them, and metrics.

    Args:
      params: all parameters in training.
      prompts: P of them.
      found: their completions.
      number: of the rollout whose samples are kept; None for none.
    """
    arrays = rollout_batch.rows(prompts, found.completions, self.run.config.seq_len)
    wanted = {name: (name, params) for name in self._own_measures} | self._score_by_model()
    if self._needs_old_logp or not self._is_checked:
      wanted['old_logp'] = ('logp', params)
    if _REFERENCE in self._models:
      wanted['ref_logp'] = self._of_reference(params)
    measured = self.measure(arrays, wanted) if wanted else {}
    scores = measured.pop(_REWARD_MODEL, None)
    scores = self._score_steps(prompts, found, 0) if scores is None else scores
    totals, metrics = self._rewards.score(prompts, found, scores, number)
    metrics |= {f'engine/{k}': v for k, v in found.metrics.items()}
    if 'old_logp' in measured:
      metrics |= self._compare(params, arrays, measured['old_logp'])
      if not self._needs_old_logp:
        del measured['old_logp']
    if number is not None and self.run.arch.mixtures():
      metrics |= self._compare_experts(params, arrays, prompts, found)
    group = len(found.completions[0])
    sampled = RolloutBatch(
      arrays | measured,
      totals,
      arrays['weights'].sum(-1).astype(np.int32),
      group,
      [p for p in prompts for _ in range(group)],
      [c for cs in found.completions for c in cs],
    )
    return sampled, metrics

  def _compare(
    self, params: dict, arrays: dict[str, np.ndarray], logp: np.ndarray
  ) -> dict[str, float]:
    """Compares the trainer's log-probs with the sampler's, and returns metrics of the difference
    where every rollout has it.
    """
    gap = np.abs(logp - arrays['sampler_logp'])[arrays['weights'] > 0]
    mean, largest = float(gap.mean()), float(gap.max())
    if not self._is_checked:
      log.info(
        'log-probs of sampler and trainer differ by %.2g nats, at most %.2g; the trainer from '
        'itself at another batch size by %.2g, at most %.2g',
        *(mean, largest, *self._rounding(params, arrays, logp)),
      )
      self._is_checked = True
    self._alarm(mean)
    return {'mismatch/mean': mean, 'mismatch/max': largest} if self._needs_old_logp else {}

  def _compare_experts(
    self,
    params: dict,
    arrays: dict[str, np.ndarray],
    prompts: Sequence[Prompt],
    found: Rollout,
  ) -> dict[str, float]:
    """Returns the share of the experts that the sampler's routers chose for the tokens of the first
    micro-batch of completions, which the trainer's choose too: a mean over tokens and layers.
    """
    c = self.run.config
    size = algorithms.rows_per_step(c) // c.grad_accum
    few = {k: v[:size] for k, v in arrays.items()}
    ours = self.measure(few, {'choices': ('choices', params)})['choices']
    theirs = rollout_batch.sampler_choices(prompts, found.completions, few['tokens'].shape)
    share = (theirs[..., :, None] == ours[..., None, :]).any(-1).mean((-2, -1))
    return {'mismatch/same_experts': float(share[few['weights'] > 0].mean())}

  def _rounding(
    self, params: dict, arrays: dict[str, np.ndarray], logp: np.ndarray
  ) -> tuple[float, float]:
    """Returns (mean, largest) |difference| in nats of the trainer's log-probs of the first rows
    from `logp` when they are computed in batches of another size: the effect of rounding.
    """
    c = self.run.config
    size = algorithms.rows_per_step(c) // c.grad_accum
    devices = math.prod(self.run.mesh.shape[a] for a in BATCH)
    few = {k: v[:size] for k, v in arrays.items()}
    other = devices if size > devices else 2 * size
    again = self.measure(few, {'logp': ('logp', params)}, other)['logp']
    gap = np.abs(again - logp[:size])[few['weights'] > 0]
    return (float(gap.mean()), float(gap.max())) if gap.size else (0.0, 0.0)

  def _alarm(self, gap: float) -> None:
    """gap: mean |trainer - sampler| of a token's log-prob, in nats."""
    if not gap <= _ALARM and not self._is_warned:
      self._is_warned = True
      log.warning(
        'log-probs of sampler and trainer differ by %.2g nats: they are not the same model', gap
      )

  def watch(self, done: int, values: dict[str, float]) -> None:
    """Reads the metrics of every step."""
    self._alarm(values.get('mismatch/abs_diff', 0.0))

  def evaluate(self, params: dict, is_cancelled: Callable[[], bool]) -> dict[str, float] | None:
    """Returns rewards of one greedy completion for every prompt of data.eval; empty without such
    prompts, None when cancelled.
    """
    prompts = [p for source in self.run.data.evaluation for p in source.rows]
    if not prompts:
      return {}
    done = self.sampler.greedy(params, prompts, is_cancelled)
    if done is None:
      return None
    scores, c = None, self.run.config
    if wanted := self._score_by_model():
      rows = rollout_batch.rows(prompts, done, c.seq_len)
      scores = self.measure(rows, wanted, c.eval.batch_size)[_REWARD_MODEL]
    found = Rollout(done, {})
    scores = self._score_steps(prompts, found, c.eval.batch_size) if scores is None else scores
    return self._rewards.score(prompts, found, scores, None)[1]


def _measures(run: Run) -> dict[str, Measure]:
  """Returns what is measured of the rows of every algorithm: log-probs, and a reward model's
  scores.
  """
  c, forward = run.config, run.forward.without_remat()
  reference = forward.untrained()

  def ref_logp(params, batch):
    own = reference.find_params(params, _REFERENCE)
    return reference.logprobs_and_entropy(own, batch, c.rollout.temperature)[0]

  found = {
    'logp': lambda p, batch: forward.logprobs_and_entropy(p, batch, c.rollout.temperature)[0],
    'ref_logp': ref_logp,
  }
  if run.arch.mixtures():
    found['choices'] = forward.router_choices
  if model := run.auxiliary.find(_REWARD_MODEL):
    kind = (model.architecture(), jnp.dtype(c.model.compute_dtype))
    score = Forward(*kind)
    found[_REWARD_MODEL] = lambda p, batch: score.sequence_rewards(p, batch, 1)[0]
    if c.rollout.step_reward:
      found[_REWARD_MODEL] = step_rewards.measure(*kind)
  return found
