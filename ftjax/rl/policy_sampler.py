"""Completions of the policy as it is in training, by the generation engine."""

import hashlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ftjax.data import stop_texts
from ftjax.data.prompts import Prompt
from ftjax.experiment.run import Run
from ftjax.generation import weights
from ftjax.generation.completion import Completion, Rollout, stops
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.runtime.errors import CheckError

_CHECKED_LEAVES = 8


class PolicySampler:
  """Samples with a copy of the policy's weights in the compute dtype, under the mesh of rollouts.

  Args:
    run: the run.

  Raises:
    ConfigError: a text of rollout.stop that cannot occur.
  """

  def __init__(self, run: Run):
    c, model = run.config, run.model
    self._run, self._dtype = run, jnp.dtype(c.model.compute_dtype)
    texts = tuple(c.rollout.stop)
    stop_texts.check(texts, model.tokenizer, c.rollout.max_tokens, 'rollout.stop')
    found = (*model.stop_ids, *stop_texts.token_ids(texts, model.tokenizer))
    self.stop_ids = tuple(dict.fromkeys(found))
    self.ended = stops(texts, model.tokenizer)
    self._engine = Engine(
      run.arch,
      self._dtype,
      self.stop_ids,
      model.tokenizer.pad_id,
      slots=c.rollout.slots,
      vocab_size=model.tokenizer.vocab_size,
      routed=bool(run.arch.mixtures()),
    )
    self._mesh = weights.rollout_mesh(run.mesh)
    self._is_checked = False

  def _copy(self, params: dict) -> dict:
    """Returns the weights to sample with, on the mesh of rollouts."""
    return weights.rollout_params(params, self._run.arch, self._mesh, self._dtype)

  def sample(
    self, params: dict, prompts: Sequence[Prompt], numbers: Sequence[int], *, seed: int, group: int
  ) -> Rollout:
    """Returns sampled completions; the copy of the weights is dropped again.

    Args:
      params: all parameters, on the mesh of training.
      prompts: P of them.
      numbers: of the prompts since the start of training; the sampling key depends on them.
      seed: of the sampling key.
      group: completions of each prompt.
    """
    c, params = self._run.config, self._run.auxiliary.without(params)
    copy = self._copy(params)
    # Else the engine's clock would also run for the update that is still under way.
    jax.block_until_ready(copy)
    if not self._is_checked:
      self._check(params, copy)
      self._is_checked = True
    return self._engine.generate(
      copy,
      [p.ids for p in prompts],
      group=group,
      max_tokens=c.rollout.max_tokens,
      sampling=Sampling(c.rollout.temperature, c.rollout.top_k, c.rollout.top_p),
      seed=int.from_bytes(hashlib.sha256(f'{seed}/rollout'.encode()).digest()[:4], 'little'),
      prompt_ids=[n % 2**31 for n in numbers],
      ended=self.ended,
      beat=lambda ended: self._run.watchdog.beat(),
    )

  def _check(self, params: dict, copy: dict) -> None:
    """Checks at the first rollout of a process that the copy holds the weights in training. (TRL
    issue 3247: after a resume it did not.)
    """
    seed = self._run.config.seed
    sums = [
      weights.checksums(p, self._dtype, count=_CHECKED_LEAVES, seed=seed) for p in (params, copy)
    ]
    if sums[0] != sums[1]:
      wrong = [n for n in sums[0] if sums[0][n] != sums[1][n]]
      raise CheckError(f'the weights of the rollout are not those of the trainer: {wrong}')

  def greedy(
    self, params: dict, prompts: Sequence[Prompt], is_cancelled: Callable[[], bool]
  ) -> list[list[Completion]] | None:
    """Returns one greedy completion of each prompt, or None when cancelled."""
    c, done = self._run.config, []
    copy = self._copy(self._run.auxiliary.without(params))
    size = max(c.eval.batch_size, c.rollout.slots)
    for at in range(0, len(prompts), size):
      if is_cancelled():
        return None
      found = self._engine.generate(
        copy,
        [p.ids for p in prompts[at : at + size]],
        group=1,
        max_tokens=c.rollout.max_tokens,
        sampling=Sampling(),
        seed=0,
        ended=self.ended,
        beat=lambda ended: self._run.watchdog.beat(),
      )
      done += found.completions
    return done
