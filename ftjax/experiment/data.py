"""The data of a run: tokenized rows by step, or prompts by number; for training and evaluation."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from ftjax.config import algorithms, choices
from ftjax.data import (
  class_balance,
  describe,
  prompts,
  source_text,
  sources,
  span_corruption,
  synthetic,
  token_cache,
)
from ftjax.data.annotated_rows import Annotation
from ftjax.data.batches import Batch, Stream, eval_batches
from ftjax.data.order import Mixture, SourceSchedule
from ftjax.data.sides import Sides
from ftjax.data.span_corruption import Corruption
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Data:
  """Training rows by step, and evaluation rows; see data/."""

  stream: Stream
  mixture: Mixture
  corpora: list[token_cache.Corpus]
  evaluation: list[token_cache.Corpus]
  sides: Sides | None = None

  def fingerprints(self) -> dict[str, str]:
    """Returns the sha256 of the order of training rows, and of each source."""
    groups = {'data': self.corpora, 'eval': self.evaluation}
    named = {f'{k} {i}': x.fingerprint for k, xs in groups.items() for i, x in enumerate(xs)}
    scored = {i: x.top_tokens.fingerprint for i, x in enumerate(self.corpora) if x.top_tokens}
    named |= {f"teacher's tokens {i}": text for i, text in scored.items()}
    return {'data order': self.mixture.fingerprint} | named

  def counts(self) -> dict[str, dict[str, Any]]:
    """Returns how many rows of each source were used and left out, and histograms of their lengths,
    as JSON for the manifest.
    """
    groups = {'data': self.corpora, 'eval': self.evaluation}
    return {
      f'{k} {i}': {'name': x.name, 'examples_used': len(x)}
      | dataclasses.asdict(x.counts)
      | {'lengths': describe.length_histogram(x.lengths)}
      for k, xs in groups.items()
      for i, x in enumerate(xs)
    }

  def log_summary(self) -> None:
    """Logs a line on each source, and warnings on rows that were left out or changed."""
    schedules = [*self.mixture.sources, *(None for _ in self.evaluation)]
    logged = set()
    # The summary of the run describes a single source.
    several = max(len(self.corpora), len(self.evaluation)) > 1
    for corpus, schedule in zip((*self.corpora, *self.evaluation), schedules, strict=True):
      if several:
        _log_source(corpus, schedule)
      if corpus.counts.unread_columns:
        log.info('%s: columns not read: %s', corpus.name, describe.unread_columns(corpus))
      # Both sides of a split have the notes of their whole source.
      for note in corpus.notes():
        if note not in logged:
          log.warning('%s', note)
        logged.add(note)


@dataclasses.dataclass
class PromptData:
  """Prompts by number, and held-out ones; see data/prompts.py."""

  mixture: Mixture
  sources: list[prompts.Prompts]
  evaluation: list[prompts.Prompts]

  def fingerprints(self) -> dict[str, str]:
    """Returns the sha256 of the order of prompts, and of each source."""
    groups = {'data': self.sources, 'eval': self.evaluation}
    named = {f'{k} {i}': x.fingerprint for k, xs in groups.items() for i, x in enumerate(xs)}
    return {'data order': self.mixture.fingerprint} | named

  def counts(self) -> dict[str, dict[str, Any]]:
    """Returns how many rows of each source were used and left out, and histograms of their lengths,
    as JSON for the manifest.
    """
    groups = {'data': self.sources, 'eval': self.evaluation}
    return {
      f'{k} {i}': {
        'name': x.name,
        'prompts': len(x.rows),
        'dropped': x.dropped,
        'bad': x.bad,
        'bad_reasons': list(x.bad_reasons),
        'unrendered': x.unrendered,
        'lengths': describe.length_histogram([len(p.ids) for p in x.rows]),
      }
      for k, xs in groups.items()
      for i, x in enumerate(xs)
    }

  def prompt(self, number: int) -> prompts.Prompt:
    """Returns prompt `number` since the start of training."""
    row = self.mixture.row(number)
    return self.sources[row.source].rows[row.examples[0]]

  def log_summary(self) -> None:
    """Logs a line on each source that the summary of the run does not describe."""
    several = len(self.sources) > 1
    for found in self.sources:
      if several or found.dropped:
        log.info(
          '%s: %d prompts, %d left out that are too long for seq_len',
          *(found.name, len(found.rows), found.dropped),
        )


def _log_source(corpus: token_cache.Corpus, schedule: SourceSchedule | None) -> None:
  """Logs one line on a source."""
  use = (
    'for evaluation'
    if schedule is None
    else f'{schedule.rows_per_epoch:,} packed sequences per epoch, '
    f'{schedule.fill:.1%} token utilization'
  )
  log.info(
    '%s: %s examples, %s tokens, %.1f %% supervised; %s',
    *(corpus.name, f'{len(corpus):,}', f'{corpus.tokens:,}'),
    *(100 * corpus.supervised / corpus.tokens, use),
  )


def _check_batch(c: ml_collections.ConfigDict, mixture: Mixture, unit: str) -> None:
  """Refuses a batch that holds what one epoch has more than once; warns of one nearly so large.

  Raises:
    ConfigError: naming both counts and the batch_size that fits.
  """
  have, taken = mixture.rows_per_epoch, f'batch_size={c.batch_size}'
  if c.batch_size > have:
    fits = have // c.grad_accum * c.grad_accum or have
    raise ConfigError(
      f'{taken}, but an epoch has only {have} {unit}: a batch would hold the same ones more than '
      f'once; set batch_size to at most {fits}, or give more data (data.train)'
    )
  most = algorithms.prompts_per_rollout(c)
  if most > c.batch_size:
    taken += f' with rollout.redraws={c.rollout.redraws} (up to {most} {unit} at once)'
  if 2 * most > have:
    log.warning(
      '%s is nearly as much as, or more than, the %d %s of an epoch: an epoch is only %.1f batches',
      *(taken, have, unit, have / most),
    )


def cache_folder(c: ml_collections.ConfigDict, workdir: str) -> str:
  """Returns the folder of tokenized data."""
  return c.data.cache or files.join(workdir, 'data_cache')


def open_data(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str
) -> Data | PromptData:
  """Returns the data of a config: rows, or prompts for an algorithm on rollouts."""
  is_sampled = algorithms.of(c).on_rollouts
  return (open_prompts if is_sampled else open_rows)(c, tokenizer, workdir)


def _sources(
  c: ml_collections.ConfigDict,
  tokenizer: Tokenizer,
  workdir: str,
  key: str,
  is_altered: bool = False,
) -> tuple[list[sources.Spec], list[token_cache.Source]]:
  """Returns the sources that data.train or data.eval names, as specs and opened; `is_altered`: with
  the copies of data.augment.
  """
  specs = sources.parse_specs(c.data[key]) if c.data[key] else []
  if key == 'eval' and (weighted := [s for s in specs if s.weight is not None]):
    raise ConfigError(
      f'data.eval: {weighted[0].path} has weight {weighted[0].weight}; all evaluation rows count '
      'alike: leave the @weight out'
    )
  specs = [synthetic.resolve(spec, cache_folder(c, workdir)) for spec in specs]
  return specs, [_source(c, tokenizer, workdir, spec, is_altered) for spec in specs]


def _source(
  c: ml_collections.ConfigDict,
  tokenizer: Tokenizer,
  workdir: str,
  spec: sources.Spec,
  is_altered: bool,
) -> token_cache.Source:
  shape = algorithms.of(c).example(c)
  return token_cache.Source(
    spec,
    tokenizer,
    cache_dir=cache_folder(c, workdir),
    seq_len=_longest_example(c, tokenizer, shape),
    source_len=algorithms.source_len(c) if shape == 'source_target' else 0,
    loss_on=c.data.loss_on,
    on_overlength=c.data.on_overlength,
    on_bad_row=c.data.on_bad_row,
    on_unrendered=c.data.on_unrendered,
    shape=shape,
    workers=c.data.workers,
    progress=True,
    augment=tuple(c.data.augment) if is_altered else (),
    augment_templates=tuple(c.data.augment_templates) if is_altered else (),
    augment_copies=c.data.augment_copies,
    augment_seed=c.seed,
    annotation=annotation(c),
  )


def annotation(c: ml_collections.ConfigDict) -> Annotation:
  """Returns what the labels of a config's rows are; nothing for rows of another shape."""
  shape, head = algorithms.of(c).example(c), algorithms.of(c).labels(c)
  if shape == 'class':
    names = () if choices.CLASS_OBJECTIVES[c.classification.objective].is_number else head.names
    return Annotation(c.classification.objective, names)
  if shape == 'tags':
    return Annotation('tags', head.names, c.token_classification.all_subwords)
  if shape == 'texts':
    section = c.embedding
    is_scored = section.objective == 'cosine'
    return Annotation(
      section.objective,
      negatives=0 if is_scored else section.negatives,
      needs_negative=not (is_scored or section.in_batch),
    )
  if shape == 'masked':
    return Annotation('masked')
  if shape == 'steps':
    return Annotation('steps', head.names, separator=c.prm.separator)
  return Annotation()


def _longest_example(c: ml_collections.ConfigDict, tokenizer: Tokenizer, shape: str) -> int:
  """Returns the most tokens of an example; of one for an encoder-decoder those of its target."""
  if shape == 'label':  # which also holds its prompt with another answer
    return c.seq_len // 2
  if shape == 'document':
    lengths = algorithms.source_len(c), c.seq_len
    return span_corruption.longest(sides_of(c, tokenizer).corruption, *lengths)
  return c.seq_len


def sides_of(c: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Sides | None:
  """Returns how examples become rows for an encoder-decoder; None for other algorithms."""
  shape, source_len = algorithms.of(c).example(c), algorithms.source_len(c)
  if not source_len:
    return None
  start, corruption = tokenizer.start_id, None
  if shape == 'document':
    own = c.span_corruption
    corruption = Corruption(
      *(own.density, own.mean_length, span_corruption.sentinels(tokenizer)),
      *(source_text.end(tokenizer), c.seed),
    )
  return Sides(source_len, c.seq_len, 0 if start is None else start, corruption)


def tokenize_share(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str, number: int, count: int
) -> None:
  """Tokenizes part `number` of `count` of each large source; all hosts call it with their own
  number, and then `open_data` finds the parts. Nothing for prompts, for what is no file (synthetic
  rows, hub names).
  """
  if algorithms.of(c).on_rollouts:
    return
  settings = [(c.data.train, True), (c.data.eval, False)]
  settings += [(c.data.train, False)] * bool(c.data.augment and c.data.eval_fraction)
  for value, is_altered in settings:
    for spec in sources.parse_specs(value) if value else []:
      if files.exists(spec.path):
        _source(c, tokenizer, workdir, spec, is_altered).tokenize_share(number, count)


def open_rows(c: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str) -> Data:
  """Tokenizes, or opens the cache, and schedules the rows."""
  specs, found = _sources(c, tokenizer, workdir, 'train', is_altered=True)
  training = [source.open() for source in found]
  evaluation = [source.open() for source in _sources(c, tokenizer, workdir, 'eval')[1]]
  if c.data.eval_fraction and not evaluation:
    plain = training
    if c.data.augment:  # the side of a row is that of its first example, which is not altered
      plain = [source.open() for source in _sources(c, tokenizer, workdir, 'train')[1]]
    split = functools.partial(token_cache.split, fraction=c.data.eval_fraction, seed=c.seed)
    training, evaluation = [split(x)[0] for x in training], [split(x)[1] for x in plain]
  if c.data.balance != 'none':
    for corpus in training:
      class_balance.weigh(corpus, c.data.balance)
  sides, documents = sides_of(c, tokenizer), algorithms.of(c).documents(c)
  mixture = _schedule(c, training, specs, sides)
  stream = Stream(mixture, training, c.seq_len, c.batch_size, documents, sides)
  _check_batch(c, mixture, 'packed sequences' if algorithms.is_packed(c) else 'examples')
  return Data(stream, mixture, training, evaluation, sides)


def _schedule(
  c: ml_collections.ConfigDict,
  training: list[token_cache.Corpus],
  specs: list[sources.Spec],
  sides: Sides | None,
) -> Mixture:
  settings = dict(seed=c.seed, packed=algorithms.is_packed(c), most=algorithms.documents_per_row(c))
  schedules = []
  for x in training:
    lengths = x.lengths if sides is None else sides.lengths(x)
    how = dict(fingerprint=x.fingerprint, ranks=_ranks(c, x), **settings)
    schedules.append(SourceSchedule(lengths, c.seq_len, **how))
  return Mixture(schedules, _shares(c, specs, schedules))


def _ranks(c: ml_collections.ConfigDict, corpus: token_cache.Corpus) -> np.ndarray | None:
  """Returns by what data.curriculum orders the examples, float[n]; None for a random order.

  Raises:
    DataError: rows without a difficulty.
  """
  if c.data.curriculum == 'length':
    return corpus.lengths
  if c.data.curriculum != 'difficulty':
    return None
  lacking = np.flatnonzero(np.isnan(corpus.difficulties))
  if len(lacking):
    raise DataError(
      f'{corpus.where(int(lacking[0]))}: no number in the column difficulty, which '
      f'data.curriculum=difficulty orders by ({len(lacking):,} such examples)'
    )
  return corpus.difficulties


def _shares(
  c: ml_collections.ConfigDict, specs: Sequence[sources.Spec], schedules: Sequence[SourceSchedule]
) -> list[float | None]:
  """Returns the weights of the sources; with a temperature their rows to the power 1 / temperature.

  Raises:
    ConfigError: both a temperature and weights.
  """
  given = [s.weight for s in specs]
  t = c.data.mix_temperature
  if t == 1:
    return given
  if any(w is not None for w in given):
    raise ConfigError(
      f'data.mix_temperature={t} with weights in data.train={c.data.train!r}: leave the @weight out'
    )
  return [float(s.rows_per_epoch) ** (1 / t) for s in schedules]


def first_rows(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str, rows: int
) -> list[tuple[token_cache.Corpus, Batch]]:
  """Returns the first `rows` rows of each training source, and a batch [B, T] with the first of
  them in order; no more of the sources is read. `workdir` is a local folder.
  """
  c = c.copy_and_resolve_references()
  with c.unlocked():
    c.data.cache = files.join(workdir, 'first_rows')
  opened = _sources(c, tokenizer, workdir, 'train', is_altered=True)[1]
  found = [token_cache.head(source, rows) for source in opened]
  shape = (c.batch_size, c.seq_len)
  settings = dict(packed=algorithms.is_packed(c), documents=algorithms.of(c).documents(c))
  settings |= {'sides': sides_of(c, tokenizer)}
  return [(corpus, next(eval_batches(corpus, *shape, **settings))) for corpus in found]


def open_prompts(
  c: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str, limit: int | None = None
) -> PromptData:
  """Reads prompts, of each source at most `limit` rows, and schedules them, one a row."""
  folder = cache_folder(c, workdir)
  room = algorithms.max_example(c) - c.rollout.max_tokens
  groups, weights = [], []
  settings = dict(on_bad_row=c.data.on_bad_row, on_unrendered=c.data.on_unrendered)
  for text in (c.data.train, c.data.eval):
    specs = [synthetic.resolve(s, folder) for s in (sources.parse_specs(text) if text else [])]
    weights.append([s.weight for s in specs])
    groups.append(
      [prompts.read(s, tokenizer, room, c.data.on_overlength, limit, **settings) for s in specs]
    )
  if any(w is not None for w in weights[1]):
    raise ConfigError(f'data.eval: {c.data.eval!r} has weights; leave the @weight out')
  training, evaluation = groups
  schedules = [
    SourceSchedule(
      *(x.lengths, c.seq_len),
      fingerprint=x.fingerprint,
      seed=c.seed,
      packed=False,
      ranks=x.lengths if c.data.curriculum == 'length' else None,
    )
    for x in training
  ]
  mixture = Mixture(schedules, _shares(c, sources.parse_specs(c.data.train), schedules))
  if limit is None:
    _check_batch(c, mixture, 'prompts')
  return PromptData(mixture, training, evaluation)
