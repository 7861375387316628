"""What a run trains on and is judged by: tokenized rows by step, or prompts by number."""

import dataclasses
import logging

import ml_collections

from ftjax import algorithm_config, algorithms
from ftjax.data import cache, made, prompts, sources
from ftjax.data.batches import Stream
from ftjax.data.schedule import Mixture, SourceSchedule
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime import files
from ftjax.runtime.errors import ConfigError

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Data:
  """Training rows by step, and evaluation rows; see data/."""

  stream: Stream
  mixture: Mixture
  corpora: list[cache.Corpus]
  evaluation: list[cache.Corpus]
  on_overlength: str

  def fingerprints(self) -> dict[str, str]:
    """sha256 of the order of training rows, and of each source."""
    groups = {'data': self.corpora, 'eval': self.evaluation}
    named = {f'{k} {i}': x.fingerprint for k, xs in groups.items() for i, x in enumerate(xs)}
    return {'data order': self.mixture.fingerprint} | named

  def tell(self) -> None:
    """Logs a line on each source."""
    for corpus in self.corpora:
      _tell(corpus, self.on_overlength)


@dataclasses.dataclass
class PromptData:
  """Prompts by number, and held-out ones; see data/prompts.py."""

  mixture: Mixture
  sources: list[prompts.Prompts]
  evaluation: list[prompts.Prompts]

  def fingerprints(self) -> dict[str, str]:
    """sha256 of the order of prompts, and of each source."""
    groups = {'data': self.sources, 'eval': self.evaluation}
    named = {f'{k} {i}': x.fingerprint for k, xs in groups.items() for i, x in enumerate(xs)}
    return {'data order': self.mixture.fingerprint} | named

  def prompt(self, number: int) -> prompts.Prompt:
    """Prompt `number` since the start of training."""
    row = self.mixture.row(number)
    return self.sources[row.source].rows[row.examples[0]]

  def tell(self) -> None:
    """Logs a line on each source."""
    for found in self.sources:
      log.info('%s: %d prompts, %d longer ones dropped', found.name, len(found.rows), found.dropped)


def _tell(corpus: cache.Corpus, on_overlength: str) -> None:
  """One line on a source, and one on what its policy for long rows did to it."""
  log.info(
    '%s: %d examples, %d tokens, %.1f %% supervised',
    corpus.name,
    len(corpus),
    corpus.tokens,
    100 * corpus.supervised / corpus.tokens,
  )
  counts = corpus.counts
  lost = counts.dropped + counts.unsupervised
  if lost + counts.truncated:
    of = counts.examples + lost
    log.warning(
      '%s: data.on_overlength=%s: %d of %d examples dropped (%.1f %%), %d shortened (%.1f %%)',
      corpus.name,
      on_overlength,
      lost,
      of,
      100 * lost / of,
      counts.truncated,
      100 * counts.truncated / of,
    )
  if counts.chosen_over or counts.rejected_over:
    log.warning(
      '%s: longer than half a row were %d chosen and %d rejected sides of pairs over seq_len',
      *(corpus.name, counts.chosen_over, counts.rejected_over),
    )


def cache_folder(c: ml_collections.ConfigDict, workdir: str) -> str:
  """Where what is made of the data is kept."""
  return c.data.cache or files.join(workdir, 'data_cache')


def open_data(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str
) -> Data | PromptData:
  """What the algorithm asks for."""
  is_sampled = c.algorithm in algorithm_config.ON_ROLLOUTS
  return (open_prompts if is_sampled else open_rows)(c, tokenizer, workdir)


def open_rows(c: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str) -> Data:
  """Tokenizes, or opens the cache, and schedules the rows."""
  folder, shape = cache_folder(c, workdir), algorithms.example_shape(c)

  def corpora(text, is_eval=False):
    specs = sources.parse_specs(text) if text else []
    if is_eval and (weighted := [s for s in specs if s.weight is not None]):
      raise ConfigError(
        f'data.eval: {weighted[0].path} has weight {weighted[0].weight}; all evaluation rows count '
        'alike: leave the @weight out'
      )
    specs = [made.resolve(spec, folder) for spec in specs]
    settings = dict(
      cache_dir=folder,
      # A labelled row also holds its prompt with another answer.
      seq_len=c.seq_len // 2 if shape == 'label' else c.seq_len,
      loss_on=c.data.loss_on,
      on_overlength=c.data.on_overlength,
      shape=shape,
    )
    return specs, [cache.build_or_open(s, tokenizer, progress=True, **settings) for s in specs]

  specs, training = corpora(c.data.train)
  _, evaluation = corpora(c.data.eval, is_eval=True)
  if c.data.eval_fraction and not evaluation:
    sides = [cache.split(corpus, c.data.eval_fraction, c.seed) for corpus in training]
    training, evaluation = ([side[i] for side in sides] for i in (0, 1))
  settings = dict(seed=c.seed, packed=algorithms.is_packed(c))
  schedules = [
    SourceSchedule(x.lengths, c.seq_len, fingerprint=x.fingerprint, **settings) for x in training
  ]
  mixture = Mixture(schedules, [s.weight for s in specs])
  stream = Stream(mixture, training, c.seq_len, c.batch_size)
  return Data(stream, mixture, training, evaluation, c.data.on_overlength)


def open_prompts(c: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str) -> PromptData:
  """Reads prompts and schedules them, one a row."""
  folder = cache_folder(c, workdir)
  room = algorithm_config.max_example(c) - c.rollout.max_tokens
  groups, weights = [], []
  for text in (c.data.train, c.data.eval):
    specs = sources.parse_specs(text) if text else []
    weights.append([s.weight for s in specs])
    groups.append(
      [prompts.read(made.resolve(s, folder), tokenizer, room, c.data.on_overlength) for s in specs]
    )
  if any(w is not None for w in weights[1]):
    raise ConfigError(f'data.eval: {c.data.eval!r} has weights; leave the @weight out')
  training, evaluation = groups
  schedules = [
    SourceSchedule(x.lengths, c.seq_len, fingerprint=x.fingerprint, seed=c.seed, packed=False)
    for x in training
  ]
  return PromptData(Mixture(schedules, weights[0]), training, evaluation)
