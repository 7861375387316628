"""The phase between updates in which the model speaks: prompts, completions, rewards, batches.

Rollout i holds prompts i x batch_size onwards, each with rollout.group completions, and serves U
updates, steps i U to i U + U - 1. It is a function of the seed, i, and the weights after i U steps;
so a run that goes on from there makes it again, bit for bit. Between two rollouts the weights it
came from are gone: then its arrays are read back from rollouts/<i>.npz.

Shared by the algorithms that train on what the model says: each gives a `Teach`, which turns
rewards into advantages, and its loss. Rewards run in process 0; everything else is done, and comes
out alike, in all processes."""

import dataclasses
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import config as config_lib
from ftjax.data import batches
from ftjax.data.prompts import Prompt
from ftjax.experiment import Run, batch_fields
from ftjax.fit import Trainer
from ftjax.models import head, transformer
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.rollout import rewards, weights
from ftjax.rollout.engine import Completion, Engine, Rollout
from ftjax.rollout.sampler import Sampling
from ftjax.runtime import files, peers
from ftjax.runtime.errors import CheckError, DataError
from ftjax.runtime.sharding import spec, zigzag
from ftjax.training.feed import place
from ftjax.training.state import State

log = logging.getLogger(__name__)

# Nats of mean |trainer - sampler| from which on they are taken for different models.
_ALARM = 0.05
_CHECKED_LEAVES = 8


@dataclasses.dataclass(frozen=True)
class Sampled:
  """A rollout on the host: R rows, one completion each, those of a prompt side by side.

  arrays: tokens, labels, segments, positions int32[R, T]; weights float32[R, T], 1 where the label
  is a completion's token; sampler_logp float32[R, T]; old_logp and ref_logp where they are wanted.
  rewards: float32[R]. lengths: int32[R], tokens of the completions. group: completions a prompt.
  """

  arrays: dict[str, np.ndarray]
  rewards: np.ndarray
  lengths: np.ndarray
  group: int


# What an algorithm makes of a rollout: advantages float32[R, T], the weights that remain
# float32[R, T], and metrics.
Teach = Callable[[Sampled], tuple[np.ndarray, np.ndarray, dict[str, float]]]


def readout(
  arch: Architecture, params: dict, batch: dict, *, temperature: float, dtype, remat: str
) -> tuple[jax.Array, jax.Array]:
  """(log-probs, entropies) float32[B, T] of a batch's labels, in nats, at the sampler's
  temperature; 0 where weights are 0.
  """
  where = Tokens(batch['segments'], batch['positions'])
  x = transformer.apply(arch, params, batch['tokens'], where, dtype=dtype, remat=remat)
  table = params['embed' if arch.tied else 'head']['w']
  return head.logprobs_and_entropies(x, table, batch['labels'], batch['weights'], temperature)


def rows(
  prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], seq_len: int
) -> dict[str, np.ndarray]:
  """Arrays [R, T] of completions[prompt][index], in this order; see `Sampled`."""
  pairs = [(p, c) for p, cs in zip(prompts, completions, strict=True) for c in cs]
  out = batches.empty(len(pairs), seq_len)
  out['sampler_logp'] = np.zeros((len(pairs), seq_len), np.float32)
  for i, (prompt, completion) in enumerate(pairs):
    whole = np.array([*prompt.ids, *completion.tokens], np.int32)
    start = len(prompt.ids)
    batches.fill_row(out, i, [(whole, np.arange(len(whole)) >= start)])
    out['sampler_logp'][i, start - 1 : len(whole) - 1] = completion.logprobs
  return out


def _random(*names: int | str) -> bytes:
  return hashlib.sha256('/'.join(map(str, names)).encode()).digest()


def order(count: int, *names: int | str) -> np.ndarray:
  """int64[count]: a permutation named by `names`."""
  keys = [_random(*names, i) for i in range(count)]
  return np.array(sorted(range(count), key=keys.__getitem__), np.int64)


class Episodes:
  """The source of a run's batches, for fit.fit; use it in a `with`.

  Args:
    run: from experiment.start.
    teach: of the algorithm.

  Raises:
    ConfigError: rewards that cannot be had.
  """

  def __init__(self, run: Run, teach: Teach):
    c = run.config
    self.run, self._teach = run, teach
    self._updates = config_lib.steps_per_batch(c)
    self._folder = files.join(run.workdir, 'rollouts')
    model, self._dtype = run.model, jnp.dtype(c.model.compute_dtype)
    self._engine = Engine(
      run.arch, self._dtype, model.stop_ids, model.tokenizer.pad_id, slots=c.rollout.slots
    )
    self._sampling = Sampling(c.rollout.temperature, c.rollout.top_k, c.rollout.top_p)
    self._mesh = weights.rollout_mesh(run.mesh)
    self._ended = stops(tuple(c.rollout.stop), model.tokenizer)
    self._wants_ref = bool(c.grpo.kl_coef)
    self._wants_old = self._updates > 1 or (self._wants_ref and c.grpo.kl == 'reward')
    self._readout = jax.jit(self._readout_fn)
    self._reference: dict | None = None
    self._held: tuple[int, dict[str, np.ndarray]] | None = None
    self._is_checked, self._last_saved = False, 0
    self._rewards: rewards.Rewards | None = None
    peers.from_main(self._start_rewards)

  def _start_rewards(self) -> None:
    c, data = self.run.config, self.run.data
    columns = [set(s.columns) for s in (*data.sources, *data.evaluation)]
    self._rewards = rewards.Rewards(
      rewards.parse(c.rollout.rewards),
      sorted(set.intersection(*columns)),
      completion_limit=c.rollout.reward_limit,
      call_limit=c.rollout.function_limit,
    )

  def __enter__(self) -> 'Episodes':
    return self

  def __exit__(self, *error: Any) -> None:
    if self._rewards:
      self._rewards.close()

  # What fit.fit asks for.

  def begin(
    self, trainer: Trainer, write: Callable[[int, dict[str, float]], None], start: int
  ) -> None:
    """See fit.Source."""
    self._trainer, self._write = trainer, write
    self._last_saved = start
    if peers.is_main():
      files.makedirs(self._folder)
    if self._wants_ref:
      # Not in the state: it never changes, and is where it came from.
      c, source = self.run.config, self.run.model.source
      if c.init_from:
        source = files.join(c.init_from, 'export')
      self._reference = self.run.load_params(source, c.model.param_dtype)

  def saving(self, step: int) -> None:
    """See fit.Source."""
    self._last_saved = step

  def take(self, state: State, step: int) -> dict[str, jax.Array]:
    """The device batch [A, M, T] of a step."""
    number, update = divmod(step, self._updates)
    if self._held is None or self._held[0] != number:
      with self.run.watchdog.phase('rollout'):
        if update:
          self._held = number, self._read(number)
        else:
          self._held = None  # two rollouts need not be held
          self._held = number, self._make(number, state, step)
    return self._batch(*self._held, update)

  def _batch(self, number: int, arrays: dict, update: int) -> dict[str, jax.Array]:
    c = self.run.config
    total = config_lib.rows_per_step(c)
    once, part = divmod(update, c.grpo.minibatches)
    which = np.arange(len(arrays['tokens']))
    if c.grpo.minibatches > 1:
      which = order(len(which), c.seed, number, once)
    which = which[part * total : (part + 1) * total]
    shape = (c.grad_accum, total // c.grad_accum, c.seq_len)
    shardings = self.run.batch_shardings(micro=True)
    return place({k: arrays[k][which].reshape(shape) for k in shardings}, shardings)

  # A rollout.

  def _make(self, number: int, state: State, step: int) -> dict[str, np.ndarray]:
    c, params = self.run.config, self._trainer.policy(state)
    numbers = range(number * c.batch_size, (number + 1) * c.batch_size)
    prompts = [self.run.data.prompt(n) for n in numbers]
    found = self.sample(params, prompts, numbers, seed=c.seed, group=c.rollout.group)
    sampled, metrics = self.score(params, prompts, found, number)
    advantages, kept, more = self._teach(sampled)
    arrays = sampled.arrays | {'advantages': advantages, 'weights': kept}
    self._write(step + 1, metrics | more)
    if self._updates > 1:
      self._save(number, arrays)
    return arrays

  def sample(
    self, params: dict, prompts: Sequence[Prompt], numbers: Sequence[int], *, seed: int, group: int
  ) -> Rollout:
    """Completions by the weights `params` (on the training mesh), whose copy is dropped again.

    numbers: what tells prompts apart in the sampling key, from all others of the run.
    """
    c = self.run.config
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
    self, params: dict, prompts: Sequence[Prompt], found: Rollout, number: int
  ) -> tuple[Sampled, dict[str, float]]:
    """Rewards, and log-probs of the trainer and the reference where they are wanted."""
    c = self.run.config
    arrays = rows(prompts, found.completions, c.seq_len)
    totals, metrics = self._reward(prompts, found, number)
    metrics |= {f'engine/{k}': v for k, v in found.metrics.items()}
    if self._wants_old or not self._is_checked:
      old = self._logprobs(params, arrays)
      gap = np.abs(old - arrays['sampler_logp'])[arrays['weights'] > 0]
      self._compare(gap)
      if self._wants_old:
        arrays['old_logp'] = old
        metrics |= {'mismatch/mean': float(gap.mean()), 'mismatch/max': float(gap.max())}
    if self._wants_ref:
      arrays['ref_logp'] = self._logprobs(self._reference, arrays)
    lengths = arrays['weights'].sum(-1).astype(np.int32)
    return Sampled(arrays, totals, lengths, len(found.completions[0])), metrics

  def _compare(self, gap: np.ndarray) -> None:
    """gap: float32[tokens], |trainer - sampler| in nats."""
    told = (
      f'log-probs of sampler and trainer differ by {gap.mean():.2g} nats, at most {gap.max():.2g}'
    )
    if gap.mean() > _ALARM:
      log.warning('%s: they are not the same model', told)
    elif not self._is_checked:
      log.info(told)
    self._is_checked = True

  def _readout_fn(self, params: dict, batch: dict) -> jax.Array:
    c = self.run.config
    logp, _ = readout(
      self.run.arch,
      params,
      batch,
      temperature=c.rollout.temperature,
      dtype=self._dtype,
      remat='none',
    )
    return jax.sharding.reshard(logp, spec(None, None))

  def _logprobs(self, params: dict, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """float32[R, T], a micro-batch at a time, as the update sees them."""
    c = self.run.config
    size = config_lib.rows_per_step(c) // c.grad_accum
    shardings = self.run.batch_shardings(micro=False)
    names = ('tokens', 'labels', 'weights', 'segments', 'positions')
    out = []
    for at in range(0, len(arrays['tokens']), size):
      part = {k: arrays[k][at : at + size] for k in names}
      out.append(np.asarray(self._readout(params, place(part, {k: shardings[k] for k in names}))))
    laid, natural = np.concatenate(out), np.empty_like(arrays['sampler_logp'])
    natural[:, zigzag(c.seq_len, self.run.mesh.shape['context'])] = laid
    return natural

  # Rewards.

  def _reward(
    self, prompts: Sequence[Prompt], found: Rollout, number: int | None
  ) -> tuple[np.ndarray, dict[str, float]]:
    """(float32[R], metrics); `number` of the rollout whose samples are kept, None for none."""
    told = peers.from_main(lambda: self._reward_here(prompts, found, number))
    totals = np.array(told['totals'], np.float32)
    return totals, told['metrics'] | _spread(totals, found)

  def _reward_here(self, prompts, found: Rollout, number: int | None) -> dict[str, Any]:
    tokenizer = self.run.model.tokenizer
    pairs = [(p, c) for p, cs in zip(prompts, found.completions, strict=True) for c in cs]
    texts = {p.place: tokenizer.decode(p.ids) for p in prompts}
    names = set.intersection(*(set(p.columns) for p in prompts))
    batch = rewards.Batch(
      prompts=[texts[p.place] for p, _ in pairs],
      completions=[tokenizer.decode(c.tokens) for _, c in pairs],
      prompt_ids=[p.ids for p, _ in pairs],
      token_ids=[c.tokens for _, c in pairs],
      is_truncated=[c.truncated for _, c in pairs],
      columns={n: [p.columns[n] for p, _ in pairs] for n in names},
    )
    scores = self._rewards.score(batch)
    for name, reason in scores.reasons.items():
      log.warning('reward %s failed %d times: %s', name, scores.failures[name], reason)
    if number is not None:
      self._keep_samples(batch, scores, number)
    return {'totals': scores.total.tolist(), 'metrics': scores.metrics()}

  def _keep_samples(self, batch: rewards.Batch, scores: rewards.Scores, number: int) -> None:
    """rollouts/<number>.jsonl: the first completions with what each part paid, to be read: a model
    that cheats its rewards shows it here first."""
    lines = []
    for i in range(min(self.run.config.rollout.samples, len(scores.total))):
      paid = {n: float(x) for n, x in zip(scores.names, scores.parts[i], strict=True)}
      row = {'prompt': batch.prompts[i], 'completion': batch.completions[i]}
      row |= {'reward': float(scores.total[i]), 'parts': paid}
      lines.append(json.dumps(row | {'truncated': batch.is_truncated[i]}, ensure_ascii=False))
    if lines:
      path = files.join(self._folder, f'{number}.jsonl')
      files.write_text(path, '\n'.join(lines) + '\n')

  def evaluate(self, params: dict, is_cancelled: Callable[[], bool]) -> dict[str, float] | None:
    """Rewards of one greedy completion for every prompt of data.eval; empty without such prompts,
    None when cancelled.
    """
    prompts = [p for source in self.run.data.evaluation for p in source.rows]
    if not prompts:
      return {}
    c, done = self.run.config, []
    copy = weights.rollout_params(params, self.run.arch, self._mesh, self._dtype)
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
      )
      done += found.completions
    return self._reward(prompts, Rollout(done, {}), None)[1]

  # Rollouts between two of their updates.

  def _path(self, number: int) -> str:
    return files.join(self._folder, f'{number}.npz')

  def _save(self, number: int, arrays: dict[str, np.ndarray]) -> None:
    if not peers.is_main():
      return
    names = ('tokens', 'labels', 'weights', 'segments', 'positions')
    wanted = (*names, *batch_fields(self.run.config))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{k: arrays[k] for k in wanted})
    files.write_bytes(self._path(number), buffer.getvalue())
    self._prune(number)

  def _prune(self, number: int) -> None:
    """Drops the arrays of rollouts before `number` that no checkpoint lies within; one that is
    still being written counts."""
    folder = files.join(self.run.workdir, 'checkpoints')
    there = files.listdir(folder) if files.exists(folder) else []
    steps = {self._last_saved, *(int(n) for n in there if n.isdigit())}
    needed = {s // self._updates for s in steps if s % self._updates}
    for name in files.listdir(self._folder):
      found = re.fullmatch(r'(\d+)\.npz', name)
      if found and int(found[1]) < number and int(found[1]) not in needed:
        files.remove(files.join(self._folder, name))

  def _read(self, number: int) -> dict[str, np.ndarray]:
    path = self._path(number)
    if not files.exists(path):
      raise DataError(
        f'{path} is missing: the checkpoint lies between two updates on that rollout; bring the '
        'file back, or remove this checkpoint to go on from an earlier one'
      )
    with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as found:
      return {k: found[k] for k in found.files}


def stops(texts: tuple[str, ...], tokenizer) -> Callable[[list[int]], bool] | None:
  """Whether one of `texts` ends a completion; None without any. A text may begin and end within
  tokens."""
  if not texts:
    return None
  # A token that is not special holds a byte at least, so this tail holds every text that the last
  # token completes.
  tail = 2 * max(len(t.encode()) for t in texts)

  def ended(tokens: list[int]) -> bool:
    said = tokenizer.decode(tokens[-tail:])
    return any(t in said for t in texts)

  return ended


def _spread(totals: np.ndarray, found: Rollout) -> dict[str, float]:
  """Metrics of rewards float32[R] and lengths; 'better' than the mean are the right answers, where
  rewards are 0 and 1.
  """
  lengths = np.array([len(c.tokens) for cs in found.completions for c in cs])
  truncated = [c.truncated for cs in found.completions for c in cs]
  groups = totals.reshape(len(found.completions), -1)
  out = {
    'reward_std': float(totals.std()),
    'flat_groups': float((groups.min(1) == groups.max(1)).mean()),
    'length': float(lengths.mean()),
    'truncated': float(np.mean(truncated)),
  }
  mean = totals.mean()
  for name, which in (('better', totals > mean), ('worse', totals < mean)):
    if which.any():
      out[f'length/{name}'] = float(lengths[which].mean())
  return out
