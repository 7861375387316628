"""The label head that a run trains: its labels come from the config, or from the training rows."""

import logging
from collections.abc import Mapping
from typing import Any

import ml_collections

from ftjax.config import algorithms, custom_keys, keys, saved_config
from ftjax.data import annotated_rows, sources, synthetic
from ftjax.data.formats import Bad
from ftjax.experiment import data
from ftjax.experiment.model import Model, random_config
from ftjax.families import table
from ftjax.hf import load, sentence_files
from ftjax.hf.label_files import EMBEDDING, REWARD, Labels
from ftjax.models import score_head
from ftjax.runtime.errors import ConfigError, DataError

log = logging.getLogger(__name__)

# A set with more labels is taken for a mistake: identifiers, or texts to be written.
_MOST_FOUND = 1000
_WITHOUT_NAMES = ('span', EMBEDDING)
_OF_TOKENIZER = -1


def head(c: ml_collections.ConfigDict) -> Labels | None:
  """Returns the labels that the config's algorithm gives to a model; None for a language model.

  Raises:
    ConfigError: the labels are not known; see `resolve`.
  """
  found = algorithms.of(c).labels(c)
  if found is None:
    return None
  if found.task not in _WITHOUT_NAMES and not found.names:
    key = f'{c.algorithm}.labels'
    raise ConfigError(
      f'{key} is (), and without the training rows the labels are not known: set {key}, such as '
      "('negative', 'positive')"
    )
  return Labels(found.task, found.names, found.problem, found.pool, found.max_tokens)


def is_reward(config: Mapping[str, Any]) -> bool:
  """Returns whether a saved run makes a reward model; see `saved_head`."""
  return saved_head(config) == REWARD


def saved_head(config: Mapping[str, Any]) -> Labels | None:
  """Returns the labels that a saved run gives to its model; None for a language model.

  config: {dotted key: JSON value} of the run.
  """
  c = keys.default()
  c.algorithm = config['algorithm']
  custom_keys.complete(c)
  sections = {'custom', 'seq_len', *(name.partition('.')[0] for name in algorithms.of(c).reads)}
  for key, value in config.items():
    if key.partition('.')[0] in sections - {'data'}:
      saved_config.assign(c, key, value)
  return head(c)


def resolve_mask(c: ml_collections.ConfigDict, model: Model) -> None:
  """Writes the id of the mask into the config, where the algorithm predicts masked tokens.

  Raises:
    ConfigError: the model is a decoder, or its tokenizer has no mask.
  """
  if not algorithms.of(c).predicts_masked:
    return
  if not model.arch.is_encoder:
    raise ConfigError(
      f'algorithm={c.algorithm} needs an encoder, whose tokens attend to both sides; '
      f'{c.model.path or "model.random"} is a decoder: use algorithm=sft on texts'
    )
  if c.masked_lm.mask_id == _OF_TOKENIZER:
    text = model.tokenizer.special_texts.get('mask_token')
    found = None if text is None else model.tokenizer.find(text)
    if found is None:
      raise ConfigError(
        f'{model.tokenizer.name} has no mask_token in tokenizer_config.json: set masked_lm.mask_id'
      )
    c.masked_lm.mask_id = found
  if not 0 <= c.masked_lm.mask_id < model.arch.vocab_size:
    raise ConfigError(
      f'masked_lm.mask_id={c.masked_lm.mask_id}; expected an id below {model.arch.vocab_size}'
    )


def resolve(c: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes what the config leaves open into it: the names of the labels of the training rows; of a
  model of vectors the pool that its files name, or else the usual one.

  workdir: of synthetic rows, where there is no data.cache.

  Raises:
    DataError: rows that name no labels, one label, or more than are plausible.
    ConfigError: a model whose vectors are not computed here.
  """
  found = algorithms.of(c).labels(c)
  if found is not None and found.task == EMBEDDING and not found.pool:
    _resolve_pool(c)
  if found is None or found.names or found.task in _WITHOUT_NAMES:
    return
  key, shape = f'{c.algorithm}.labels', algorithms.of(c).example(c)
  specs = sources.parse_specs(c.data.train)
  rows = (
    row
    for spec in specs
    for _, _, row in sources.scan(synthetic.resolve(spec, data.cache_folder(c, workdir)))
    if not isinstance(row, Bad)
  )
  try:
    names = annotated_rows.names_of(rows, shape)
  except ValueError as error:
    raise DataError(f'data.train: {error}; name the labels in {key}') from error
  if len(names) < 2:
    raise DataError(
      f'data.train ({c.data.train}): its rows have the labels {list(names)}; expected at least two'
    )
  if len(names) > _MOST_FOUND:
    raise DataError(
      f'data.train: {len(names):,} different labels, such as {list(names[:3])}; if that is meant, '
      f'name them in {key}'
    )
  shown = ', '.join(names[:20]) + (f', ... ({len(names)})' if len(names) > 20 else '')
  log.info('labels of data.train: %s', shown)
  section, _, name = key.partition('.')
  c[section][name] = names


def _resolve_pool(c: ml_collections.ConfigDict) -> None:
  path, pool = c.model.path, ''
  if path:
    pool = sentence_files.find_pool(path)
  config = load.read_config(path) if path else random_config(c.model.random.to_dict())
  c.embedding.pool = pool or score_head.usual_pool(table.architecture(config, c.model.family))
  log.info('embedding.pool: %s', c.embedding.pool)
