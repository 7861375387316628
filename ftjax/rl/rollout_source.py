"""The phase between updates in which the model speaks: prompts, completions, rewards, batches.

Rollout i holds prompts i x batch_size onwards, each with rollout.group completions, and serves U
updates, steps i U to i U + U - 1. It is a function of the seed, i, and the weights after i U steps;
so a run that goes on from there makes it again, bit for bit. Between two rollouts the weights it
came from are gone: then its arrays are read back from rollouts/<i>.npz.

Shared by the algorithms that train on completions of the model: each gives a `BatchBuilder`, which
turns a rollout with its rewards into rows to train on, and its loss. Rewards run in process 0;
everything else is computed alike in all processes."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.cluster import processes
from ftjax.config import algorithms, section
from ftjax.config.algorithms import (
  prompts_per_rollout,
  rows_per_rollout,
  rows_per_step,
  steps_per_batch,
)
from ftjax.data import stop_texts
from ftjax.data.batches import ARRAYS
from ftjax.data.prompts import Prompt
from ftjax.experiment.auxiliary import model_of
from ftjax.experiment.batch_source import Source, Tell
from ftjax.experiment.run import Run
from ftjax.experiment.trainer import Trainer
from ftjax.experiment.transcript import Transcripts
from ftjax.generation import weights
from ftjax.generation.completion import Rollout, stops
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.grading import rewards
from ftjax.grading.reward_alarms import RewardAlarms
from ftjax.grading.reward_batch import sample_rows
from ftjax.rl import rollout_batch
from ftjax.rl.reward_model_scorer import TrainedReward, check_tokens
from ftjax.rl.rollout_batch import RolloutBatch, with_groups, zero_variance_groups
from ftjax.rl.rollout_files import RolloutFiles
from ftjax.runtime.errors import CheckError, ConfigError
from ftjax.runtime.sharding import BATCH, spec, zigzag
from ftjax.training.prefetch import place
from ftjax.training.state import State

log = logging.getLogger(__name__)

# Nats of mean |trainer - sampler| from which on they are taken for different models.
_ALARM = 0.05
_CHECKED_LEAVES = 8


class TrainBatch(NamedTuple):
  """What a rollout teaches.

  arrays: algorithm_config.rows_per_rollout rows, with every field of a batch. metrics: by name.
  kept: JSON rows that land in rollouts/kept-<number>.jsonl.
  """

  arrays: dict[str, np.ndarray]
  metrics: dict[str, float]
  kept: Sequence[dict[str, Any]] = ()


class BatchBuilder:
  """What an algorithm makes of rollouts; what it remembers between them is saved with the run."""

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """Of one rollout; called once for each, in order."""
    raise NotImplementedError

  def saved(self) -> dict[str, Any]:
    """JSON of what it remembers."""
    return {}

  def restore(self, saved: Mapping[str, Any]) -> None:
    """Takes back what `saved` returned."""


# (all parameters, batch of arrays [B, T]) -> float32[B, T], laid out like the batch.
Measure = Callable[[dict, dict], jax.Array]
Measures = Mapping[str, Measure]  # by the name of the array


def _random(*names: int | str) -> bytes:
  return hashlib.sha256('/'.join(map(str, names)).encode()).digest()


def order(count: int, *names: int | str) -> np.ndarray:
  """int64[count]: a permutation named by `names`."""
  keys = [_random(*names, i) for i in range(count)]
  return np.array(sorted(range(count), key=keys.__getitem__), np.int64)


class RolloutSource(Source):
  """The source of a run's batches, for fit.fit; use it in a `with`.

  Args:
    run: from experiment.start.
    builder: of the algorithm.
    measures: what else it wants to know of every token, by name.

  Raises:
    ConfigError: rewards that cannot be had.
  """

  def __init__(
    self, run: Run, builder: BatchBuilder, measures: Mapping[str, Measure] | None = None
  ):
    c = run.config
    self.run, self._batch_builder = run, builder
    self._updates = steps_per_batch(c)
    self.files = RolloutFiles(run.workdir, self._updates)
    model, self._dtype = run.model, jnp.dtype(c.model.compute_dtype)
    texts = tuple(c.rollout.stop)
    stop_texts.check(texts, model.tokenizer, c.rollout.max_tokens, 'rollout.stop')
    for other in algorithms.of(c).auxiliary(c):
      if other.is_trained and (source := section.flat(c)[other.source_key]):
        check_tokens(other.source_key, source, run)
    stop_ids = (*model.stop_ids, *stop_texts.token_ids(texts, model.tokenizer))
    self._transcripts = Transcripts(model.tokenizer, stop_ids)
    self._engine = Engine(
      run.arch,
      self._dtype,
      tuple(dict.fromkeys(stop_ids)),
      model.tokenizer.pad_id,
      slots=c.rollout.slots,
      vocab_size=model.tokenizer.vocab_size,
    )
    self._sampling = Sampling(c.rollout.temperature, c.rollout.top_k, c.rollout.top_p)
    self._mesh = weights.rollout_mesh(run.mesh)
    self._ended = stops(texts, model.tokenizer)
    self._wants_ref = algorithms.place(c, 'reference') == 'rollout'
    self._wants_old = algorithms.of(c).needs_old_logp(c)
    self._measures = {
      name: jax.jit(
        lambda params, batch, f=f: jax.sharding.reshard(f(params, batch), spec(None, None))
      )
      for name, f in ({'logp': self._logp} | dict(measures or {})).items()
    }
    self._reference: dict | None = None
    self._held: tuple[int, dict[str, np.ndarray]] | None = None
    self._is_checked = self._is_warned = False
    self._rewards: rewards.Rewards | None = None
    self._parts = rewards.parse(c.rollout.rewards)
    self._alarms = RewardAlarms({p.name: p.weight for p in self._parts}, c.rollout.max_failed)
    if c.rollout.reward_model and not any(part.spec == 'model' for part in self._parts):
      raise ConfigError(
        f'rollout.reward_model={c.rollout.reward_model} does nothing: rollout.rewards='
        f"{c.rollout.rewards!r} has no part 'model'"
      )
    self._trained = TrainedReward(run) if c.rollout.reward_model else None
    self._judged = np.zeros(0, np.float32)
    self._rollout = 0  # the last one that was made
    processes.from_main(self._start_rewards)

  def _start_rewards(self) -> None:
    c, data = self.run.config, self.run.data
    sources = (*data.sources, *data.evaluation)
    self._rewards = rewards.Rewards(
      self._parts,
      {s.name: sorted(set().union(*(p.columns for p in s.rows))) for s in sources},
      # All processes must run the model, only this one has the rewards: it is asked before.
      model=(lambda *_: self._judged) if self._trained else None,
      completion_limit=c.rollout.reward_limit,
      call_limit=c.rollout.function_limit,
    )
    self._rewards.check_rows((p.place, p.columns) for s in sources for p in s.rows)

  def __enter__(self) -> 'RolloutSource':
    return self

  def __exit__(self, *error: Any) -> None:
    if self._rewards:
      self._rewards.close()

  def begin(self, trainer: Trainer, write: Tell, start: int, saved: dict[str, Any]) -> None:
    """See fit.Source."""
    self._trainer, self._write = trainer, write
    self._batch_builder.restore(saved)
    self.files.begin(start)
    if self._wants_ref:
      self._reference = trainer.first()  # not in the state: it never changes

  def saving(self, step: int) -> dict[str, Any]:
    """See fit.Source."""
    self.files.saving(step)
    return self._batch_builder.saved()

  def end(self) -> None:
    """See fit.Source."""
    self._reference = self._held = None

  def take(self, state: State, step: int) -> dict[str, jax.Array]:
    """The device batch [A, M, T] of a step."""
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
    c = self.run.config
    total = rows_per_step(c)
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
    c, params = self.run.config, self._trainer.everything(state)
    first = number * prompts_per_rollout(c)
    sampled, metrics = self._draw(params, range(first, first + c.batch_size), number)
    drawn = c.batch_size
    for again in range(1, c.rollout.redraws + 1):
      flat = zero_variance_groups(sampled)
      if not len(flat):
        break
      more, _ = self._draw(params, [first + again * c.batch_size + i for i in flat], None)
      sampled, drawn = with_groups(sampled, more, flat), drawn + len(flat)
    train_batch = self._batch_builder.build(sampled)
    if len(train_batch.arrays['tokens']) != rows_per_rollout(c):
      found = len(train_batch.arrays['tokens'])
      raise CheckError(f'rollout {number} has {found} rows, expected {rows_per_rollout(c)}')
    if c.rollout.redraws:
      left = len(zero_variance_groups(sampled))
      self._alarms.report_redraws(left, c.batch_size, c.rollout.redraws)
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
    """Completions of the prompts of these numbers, with their rewards."""
    c, prompts = self.run.config, [self.run.data.prompt(n) for n in numbers]
    found = self.sample(params, prompts, numbers, seed=c.seed, group=c.rollout.group)
    return self.score(params, prompts, found, rollout)

  def sample(
    self, params: dict, prompts: Sequence[Prompt], numbers: Sequence[int], *, seed: int, group: int
  ) -> Rollout:
    """Completions by the model of `params` (on the training mesh), whose copy is dropped again.

    numbers: what tells prompts apart in the sampling key, from all others of the run.
    """
    c, params = self.run.config, model_of(params)
    copy = weights.rollout_params(params, self.run.arch, self._mesh, self._dtype)
    # Else the engine's clock would also run for the update that is still under way.
    jax.block_until_ready(copy)
    if not self._is_checked:
      self._check(params, copy)
    return self._engine.generate(
      copy,
      [p.ids for p in prompts],
      group=group,
      max_tokens=c.rollout.max_tokens,
      sampling=self._sampling,
      seed=int.from_bytes(_random(seed, 'rollout')[:4], 'little'),
      prompt_ids=[n % 2**31 for n in numbers],
      ended=self._ended,
      beat=self.run.watchdog.beat,
    )

  def _check(self, params: dict, copy: dict) -> None:
    """The first rollout of a process: is it of the weights in training? (TRL issue 3247: after a
    resume it was not.)"""
    sums = [
      weights.checksums(p, self._dtype, count=_CHECKED_LEAVES, seed=self.run.config.seed)
      for p in (params, copy)
    ]
    if sums[0] != sums[1]:
      wrong = [n for n in sums[0] if sums[0][n] != sums[1][n]]
      raise CheckError(f'the weights of the rollout are not those of the trainer: {wrong}')

  def score(
    self, params: dict, prompts: Sequence[Prompt], found: Rollout, number: int | None
  ) -> tuple[RolloutBatch, dict[str, float]]:
    """Rewards, and log-probs of the trainer and the reference where they are wanted."""
    c = self.run.config
    arrays = rollout_batch.rows(prompts, found.completions, c.seq_len)
    totals, metrics = self._reward(prompts, found, number)
    metrics |= {f'engine/{k}': v for k, v in found.metrics.items()}
    if self._wants_old or not self._is_checked:
      old = self._measure('logp', params, arrays)
      gap = np.abs(old - arrays['sampler_logp'])[arrays['weights'] > 0]
      mean, largest = float(gap.mean()), float(gap.max())
      if not self._is_checked:
        log.info(
          'log-probs of sampler and trainer differ by %.2g nats, at most %.2g; the trainer from '
          'itself at another batch size by %.2g, at most %.2g',
          *(mean, largest, *self._noise(params, arrays, old)),
        )
        self._is_checked = True
      self._alarm(mean)
      if self._wants_old:
        arrays['old_logp'] = old
        metrics |= {'mismatch/mean': mean, 'mismatch/max': largest}
    if self._wants_ref:
      arrays['ref_logp'] = self._measure('logp', self._reference, arrays)
    for name in self._measures.keys() - {'logp'}:
      arrays[name] = self._measure(name, params, arrays)
    lengths = arrays['weights'].sum(-1).astype(np.int32)
    group = len(found.completions[0])
    return (
      RolloutBatch(
        arrays,
        totals,
        lengths,
        group,
        [p for p in prompts for _ in range(group)],
        [c for cs in found.completions for c in cs],
      ),
      metrics,
    )

  def _noise(
    self, params: dict, arrays: dict[str, np.ndarray], logp: np.ndarray
  ) -> tuple[float, float]:
    """(mean, largest) |difference| in nats of the trainer's log-probs of the first rows from `logp`
    when they are computed in other batches: what rounding alone makes.
    """
    size = rows_per_step(self.run.config) // self.run.config.grad_accum
    ways = math.prod(self.run.mesh.shape[a] for a in BATCH)
    few = {k: v[:size] for k, v in arrays.items()}
    again = self._measure('logp', params, few, ways if size > ways else 2 * size)
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
    """Is shown the metrics of every step."""
    self._alarm(values.get('mismatch/abs_diff', 0.0))

  def _logp(self, params: dict, batch: dict) -> jax.Array:
    forward = self.run.forward.without_remat()
    return forward.logprobs_and_entropy(params, batch, self.run.config.rollout.temperature)[0]

  def _measure(
    self, name: str, params: dict, arrays: dict[str, np.ndarray], size: int = 0
  ) -> np.ndarray:
    """float32[R, T], `size` rows at a time; 0: a micro-batch, as the update sees them."""
    c = self.run.config
    rows, size = len(arrays['tokens']), size or rows_per_step(c) // c.grad_accum
    filled = {k: np.pad(arrays[k], ((0, -rows % size), (0, 0))) for k in ARRAYS}
    shardings = {k: v for k, v in self.run.batch_shardings(micro=False).items() if k in ARRAYS}
    out = []
    for at in range(0, rows, size):
      part = place({k: v[at : at + size] for k, v in filled.items()}, shardings)
      out.append(np.asarray(self._measures[name](params, part)))
    laid, natural = np.concatenate(out)[:rows], np.empty_like(arrays['sampler_logp'])
    natural[:, zigzag(c.seq_len, self.run.mesh.shape['context'])] = laid
    return natural

  # Rewards.

  def _reward(
    self, prompts: Sequence[Prompt], found: Rollout, number: int | None
  ) -> tuple[np.ndarray, dict[str, float]]:
    """(float32[R], metrics); `number` of the rollout whose samples are kept, None for none.

    A completion that no reward scored gets the mean of its group, so that its advantage is 0.
    """
    pairs = [(p, c) for p, cs in zip(prompts, found.completions, strict=True) for c in cs]
    if self._trained:
      self._judged = self._trained(pairs)
    told = processes.from_main(lambda: self._reward_here(pairs, number))
    totals = rollout_batch.fill_unscored(
      np.array(told['totals'], np.float32), len(found.completions)
    )
    return totals, told['metrics'] | rollout_batch.rollout_statistics(totals, found)

  def _reward_here(self, pairs: Sequence[tuple], number: int | None) -> dict[str, Any]:
    batch = self._transcripts.batch(pairs, self._progress(number))
    scores = self._rewards.score(batch)
    what = 'redrawn prompts or an evaluation' if number is None else f'rollout {number}'
    self._alarms.report_failures(scores, what)
    if number is not None:
      # To be read: a model that cheats its rewards shows it here first.
      samples = sample_rows(batch, scores, self.run.config.rollout.samples)
      self.files.write_rows(str(number), samples)
      self._alarms.see(scores, self.run.config.rollout.group, number)
    return {'totals': scores.total.tolist(), 'metrics': scores.metrics()}

  def _progress(self, number: int | None) -> dict[str, float]:
    """Returns what TRL's trainer_state says of a run, for reward functions that ask for it."""
    if number is not None:
      self._rollout = number
    step, steps = self._rollout * self._updates, self.run.steps
    rows = self.run.data.mixture.rows_per_epoch
    return {'global_step': step, 'max_steps': steps, 'epoch': self.run.cursor(step) / rows}

  def evaluate(self, params: dict, is_cancelled: Callable[[], bool]) -> dict[str, float] | None:
    """Rewards of one greedy completion for every prompt of data.eval; empty without such prompts,
    None when cancelled.
    """
    prompts = [p for source in self.run.data.evaluation for p in source.rows]
    if not prompts:
      return {}
    c, done = self.run.config, []
    copy = weights.rollout_params(model_of(params), self.run.arch, self._mesh, self._dtype)
    size = max(c.eval.batch_size, c.rollout.slots)
    for at in range(0, len(prompts), size):
      if is_cancelled():
        return None
      some = [p.ids for p in prompts[at : at + size]]
      found = self._engine.generate(
        copy,
        some,
        group=1,
        max_tokens=c.rollout.max_tokens,
        sampling=Sampling(),
        seed=0,
        ended=self._ended,
        beat=self.run.watchdog.beat,
      )
      done += found.completions
    return self._reward(prompts, Rollout(done, {}), None)[1]
