"""Batches of which a share holds completions of the model in training in place of the answers of
the rows (on-policy distillation, Agarwal et al. 2023, algorithm 1).

Which steps those are depends on the step and the share alone, their prompts are the rows that the
step would have read, and a completion depends on the seed, the row's number and the weights. So a
run that resumes makes the same batches again, and nothing of them is kept in checkpoints."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ftjax.data import batches
from ftjax.data.prompts import Prompt
from ftjax.data.token_cache import Corpus
from ftjax.experiment.batch_source import Source, WriteMetrics
from ftjax.experiment.run import Run
from ftjax.experiment.transcript import Transcripts
from ftjax.generation.completion import Completion, Rollout
from ftjax.rl.policy_sampler import PolicySampler
from ftjax.rl.rollout_files import RolloutFiles
from ftjax.runtime.errors import DataError
from ftjax.training.prefetch import host_batch, place
from ftjax.training.state import State


def is_on_policy(step: int, share: float) -> bool:
  """Returns whether the batch of a step holds completions of the model: of any n first steps
  floor(n * share) do, spread evenly.
  """
  return int((step + 1) * share) > int(step * share)


def prompt_length(supervised: np.ndarray) -> int:
  """Returns the tokens of an example before its last answer; supervised: bool[n]."""
  last = int(np.flatnonzero(supervised)[-1])
  before = np.flatnonzero(~supervised[:last])
  return int(before[-1]) + 1 if len(before) else 0


def prompt(corpus: Corpus, number: int) -> Prompt:
  """Returns what stands before the last answer of an example.

  Raises:
    DataError: nothing does.
  """
  tokens, supervised = corpus.example(number)
  length = prompt_length(supervised)
  if not length:
    raise DataError(
      f'{corpus.where(number)}: nothing stands before the answer, so the model has no prompt to '
      'complete; distill.on_policy needs rows with prompts'
    )
  return Prompt(tokens[:length].tolist(), {}, corpus.where(number))


def rows(
  examples: Sequence[tuple[Corpus, int]],
  prompts: Sequence[Prompt],
  completions: Sequence[Completion],
  seq_len: int,
) -> batches.Batch:
  """Returns a batch [B, T] of prompts with completions, which are cut where the row ends.

  Args:
    examples: corpus and number of each row, for its weight.
    prompts: B of them.
    completions: B of them.
    seq_len: T.
  """
  out = batches.empty(len(prompts), seq_len)
  for i, (given, completion) in enumerate(zip(prompts, completions, strict=True)):
    tokens = np.array([*given.ids, *completion.tokens][:seq_len], np.int32)
    batches.fill_row(out, i, [(tokens, np.arange(len(tokens)) >= len(given.ids))])
    corpus, number = examples[i]
    if corpus.weights is not None:
      out['weights'][i] *= corpus.weights[number]
  return out


class OnPolicyRows(Source):
  """The batches of a run, `share` of them with completions of the model in training.

  Args:
    run: a config on a mesh, with one example in each row.
    share: in (0, 1].

  Raises:
    ConfigError: a text of rollout.stop that cannot occur.
  """

  def __init__(self, run: Run, share: float):
    self._run, self._share = run, share
    self._sampler = PolicySampler(run)
    self._files = RolloutFiles(run.workdir, 1)
    self._transcripts = Transcripts(run.model.tokenizer, self._sampler.stop_ids)
    self._abstract = run.abstract_batch()
    self._shardings = run.batch_shardings(micro=True)

  def cut(self, step: int, drop_eval: bool) -> None:
    """See Source."""
    self._files.cut(step)

  def begin(self, write: WriteMetrics, start: int, saved: dict[str, Any]) -> None:
    """See Source."""
    self._write = write

  def take(self, state: State, step: int) -> dict[str, jax.Array]:
    """See Source."""
    if not is_on_policy(step, self._share):
      return place(host_batch(self._run.data.stream, step, self._abstract), self._shardings)
    with self._run.watchdog.phase('rollout'):
      batch = self._sampled(state, step)
    count, size = self._abstract['tokens'].shape[:2]
    shaped = {k: batch[k].reshape(count, size, *batch[k].shape[1:]) for k in self._shardings}
    return place(shaped, self._shardings)

  def _sampled(self, state: State, step: int) -> batches.Batch:
    """Returns the batch of a step with completions of the model."""
    run, c = self._run, self._run.config
    numbers = range(step * c.batch_size, (step + 1) * c.batch_size)
    examples = [self._example(number) for number in numbers]
    prompts = [prompt(corpus, number) for corpus, number in examples]
    params = state.parameters()
    found = self._sampler.sample(params, prompts, numbers, seed=c.seed, group=1)
    completions = [one for (one,) in found.completions]
    self._report(step, prompts, found)
    return rows(examples, prompts, completions, run.config.seq_len)

  def _example(self, number: int) -> tuple[Corpus, int]:
    row = self._run.data.mixture.row(number)
    return self._run.data.corpora[row.source], row.examples[0]

  def _report(self, step: int, prompts: Sequence[Prompt], found: Rollout) -> None:
    """Writes metrics of the completions, and samples to be read."""
    done = [one for (one,) in found.completions]
    metrics = {f'engine/{k}': v for k, v in found.metrics.items()}
    metrics['length'] = float(np.mean([len(one.tokens) for one in done]))
    metrics['truncated'] = float(np.mean([one.truncated for one in done]))
    self._write(step + 1, metrics)
    pairs = list(zip(prompts, done, strict=True))[: self._run.config.rollout.samples]
    samples = [
      {
        'prompt': self._transcripts.prompt(given),
        'completion': self._transcripts.completion(one.tokens),
        'place': given.place.rpartition('/')[2],
      }
      for given, one in pairs
    ]
    self._files.write_rows(str(step), samples)
