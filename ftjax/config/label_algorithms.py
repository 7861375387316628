"""The algorithms of label heads and of encoders: labels of whole texts, of words and of the steps
of a solution, vectors of texts, and the prediction of masked tokens.
"""

from ftjax.config import choices
from ftjax.config.algorithm_record import Algorithm, Config, LabelHead
from ftjax.runtime.errors import ConfigError

# A packed row has arrays for so many documents: one for every 8 tokens, up to a limit.
_TOKENS_PER_DOCUMENT, _MOST_DOCUMENTS = 8, 128
# transformers' name of the one number of a regression.
_NUMBER = ('LABEL_0',)

_WRITES_NO_TEXT = (
  'eval.tasks, eval.prompts and eval.general ask for text, which a model of labels or vectors '
  'cannot write'
)


def _check_writes_no_text(c: Config) -> None:
  if c.eval.tasks or c.eval.prompts or c.eval.general:
    raise ConfigError(_WRITES_NO_TEXT)


# Classification of texts.


def label_names(c: Config) -> tuple[str, ...]:
  """Returns the names of the labels of texts, in the order of their numbers."""
  one = choices.CLASS_OBJECTIVES[c.classification.objective].is_number
  return _NUMBER if one else tuple(c.classification.labels)


def _classification_head(c: Config) -> LabelHead:
  return LabelHead(
    'sequence', label_names(c), choices.CLASS_OBJECTIVES[c.classification.objective].problem
  )


def _documents(c: Config) -> dict[str, tuple[int, ...]]:
  packed = max(1, min(_MOST_DOCUMENTS, c.seq_len // _TOKENS_PER_DOCUMENT))
  most = packed if c.data.packing else 1
  width = max(1, len(label_names(c))) if c.classification.objective == 'multi' else 1
  return {'targets': (most, width), 'document_weights': (most,)}


def _check_classification(c: Config) -> None:
  section = c.classification
  _check_writes_no_text(c)
  names = tuple(section.labels)
  _check_names('classification.labels', names)
  weights = tuple(section.class_weights)
  if weights and (not names or len(weights) != len(names)):
    raise ConfigError(
      f'classification.class_weights has {len(weights)} numbers for classification.labels={names}; '
      'expected one for each label, and the labels in their order'
    )
  if any(not w > 0 for w in weights):
    raise ConfigError(f'classification.class_weights={weights}; expected positive numbers')
  if section.focal_gamma < 0 or not 0 <= section.label_smoothing < 1:
    raise ConfigError(
      f'classification.focal_gamma={section.focal_gamma}, classification.label_smoothing='
      f'{section.label_smoothing}; expected at least 0, and a share in [0, 1)'
    )
  if not 0 < section.threshold < 1:
    raise ConfigError(
      f'classification.threshold={section.threshold}; expected a probability in (0, 1)'
    )


def _check_names(key: str, names: tuple[str, ...]) -> None:
  if not all(isinstance(n, str) and n for n in names) or len({*names}) != len(names):
    raise ConfigError(f'{key}={names}; expected different texts, such as ("negative", "positive")')
  if len(names) == 1:
    raise ConfigError(f'{key}={names}; expected at least two labels')


_MEASURED = {
  'single': {'loss': 'min', 'gap': 'min', 'accuracy': 'max', 'macro_f1': 'max'},
  'multi': {'loss': 'min', 'gap': 'min', 'micro_f1': 'max', 'macro_f1': 'max', 'accuracy': 'max'},
  'regression': {'loss': 'min', 'gap': 'min', 'pearson': 'max', 'spearman': 'max'},
  'binary': {'loss': 'min', 'gap': 'min', 'accuracy': 'max', 'roc_auc': 'max'},
}
_HEADLINES = {
  'single': (('loss', 'accuracy'), ('accuracy', 'macro_f1', 'loss')),
  'multi': (('loss', 'accuracy'), ('micro_f1', 'macro_f1', 'loss')),
  'regression': (('loss',), ('pearson', 'spearman', 'loss')),
  'binary': (('loss', 'accuracy'), ('accuracy', 'roc_auc', 'loss')),
}

_CLASSIFICATION = Algorithm(
  module='ftjax.algorithms.classification',
  measured=lambda c: _MEASURED[c.classification.objective],
  headline=lambda c: _HEADLINES[c.classification.objective],
  reads=('classification', 'data.packing', 'data.balance'),
  example=lambda c: 'class',
  fields=lambda c: (('token_types',), ()),
  documents=_documents,
  labels=_classification_head,
  fixed=(
    *('data.packing', 'data.balance'),
    *('classification.objective', 'classification.labels'),
  ),
  check=_check_classification,
)


# Classification of the words of a text.


def _check_token_classification(c: Config) -> None:
  _check_writes_no_text(c)
  _check_names('token_classification.labels', tuple(c.token_classification.labels))


_TOKEN_CLASSIFICATION = Algorithm(
  module='ftjax.algorithms.token_classification',
  measured=lambda c: {'loss': 'min', 'gap': 'min', 'accuracy': 'max', 'f1': 'max'},
  headline=lambda c: (('loss', 'accuracy'), ('f1', 'accuracy', 'loss')),
  reads=('token_classification', 'data.packing'),
  example=lambda c: 'tags',
  labels=lambda c: LabelHead('token', tuple(c.token_classification.labels)),
  fixed=(
    'data.packing',
    'token_classification.labels',
    'token_classification.all_subwords',
  ),
  check=_check_token_classification,
)


# Vectors of texts.

# A packed row has arrays for so many groups of texts: one for every 16 tokens, up to a limit.
_TOKENS_PER_GROUP, _MOST_GROUPS = 16, 64


def group_size(c: Config) -> int:
  """Returns the texts of a row: anchor, positive and the most negatives, or two with a score."""
  return 2 if c.embedding.objective == 'cosine' else 2 + c.embedding.negatives


def couples_rows(c: Config) -> bool:
  """Returns whether the loss of a row of embedding depends on the other rows of the step."""
  return c.embedding.objective != 'cosine' and c.embedding.in_batch


def _groups(c: Config) -> dict[str, tuple[int, ...]]:
  packed = max(1, min(_MOST_GROUPS, c.seq_len // _TOKENS_PER_GROUP))
  most = packed if c.data.packing else 1
  if c.embedding.objective == 'cosine':
    return {'targets': (most,), 'document_weights': (most,)}
  return {'text_ids': (most, 2 * group_size(c)), 'document_weights': (most,)}


def _check_embedding(c: Config) -> None:
  section = c.embedding
  _check_writes_no_text(c)
  if not section.temperature > 0 or not section.margin > 0:
    raise ConfigError(
      f'embedding.temperature={section.temperature}, embedding.margin={section.margin}; expected '
      'positive numbers'
    )
  if section.negatives < 0:
    raise ConfigError(f'embedding.negatives={section.negatives}; expected at least 0')
  if section.objective == 'cosine':
    return
  if section.symmetric and not section.in_batch:
    raise ConfigError(
      'embedding.symmetric=True compares a positive with the anchors of other rows, which '
      'embedding.in_batch=False excludes: leave one of them at its default'
    )
  if not section.in_batch and not section.negatives:
    raise ConfigError(
      'embedding.in_batch=False with embedding.negatives=0 leaves no negatives; set one of them'
    )
  if section.in_batch and not c.data.packing and c.batch_size < 2:
    raise ConfigError(
      f'batch_size={c.batch_size}: embedding.in_batch compares the rows of a step; expected at '
      'least 2'
    )


def _measured_embedding(c: Config) -> dict[str, str]:
  scored = {'spearman': 'max', 'pearson': 'max'}
  found = {'recall_at_1': 'max', 'recall_at_10': 'max', 'mrr': 'max'}
  own = scored if c.embedding.objective == 'cosine' else found
  return {'loss': 'min', 'gap': 'min'} | own


def _embedding_headline(c: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
  if c.embedding.objective == 'cosine':
    return ('loss',), ('spearman', 'pearson', 'loss')
  return ('loss', 'accuracy'), ('recall_at_1', 'mrr', 'loss')


_EMBEDDING = Algorithm(
  module='ftjax.algorithms.embedding',
  measured=_measured_embedding,
  headline=_embedding_headline,
  reads=('embedding', 'data.packing'),
  example=lambda c: 'texts',
  fields=lambda c: (('token_types',), ('row_numbers',)),
  documents=_groups,
  labels=lambda c: LabelHead('embedding', pool=c.embedding.pool, max_tokens=c.seq_len),
  fixed=(
    *('data.packing', 'embedding.objective', 'embedding.pool', 'embedding.in_batch'),
    'embedding.negatives',
  ),
  check=_check_embedding,
)


# Prediction of masked tokens.


def _check_masked_lm(c: Config) -> None:
  _check_writes_no_text(c)
  m = c.masked_lm
  if not 0 < m.share < 1 or m.masked < 0 or m.random < 0 or m.masked + m.random > 1:
    raise ConfigError(
      f'masked_lm.share={m.share}, masked_lm.masked={m.masked}, masked_lm.random={m.random}; '
      'expected a share in (0, 1), and shares of it that are at most 1 together'
    )


_MASKED_LM = Algorithm(
  module='ftjax.algorithms.masked_lm',
  measured=lambda c: {'loss': 'min', 'gap': 'min', 'perplexity': 'min'},
  headline=lambda c: (('loss',), ('loss', 'perplexity')),
  reads=('masked_lm', 'data.packing'),
  example=lambda c: 'masked',
  predicts_masked=True,
  fixed=('data.packing', 'masked_lm'),
  check=_check_masked_lm,
)


# Process reward models: labels of the steps of a solution.


def _check_prm(c: Config) -> None:
  _check_writes_no_text(c)
  if not c.prm.separator:
    raise ConfigError("prm.separator is ''; expected the text after each step, such as a newline")


_PRM = Algorithm(
  module='ftjax.algorithms.prm',
  measured=lambda c: {'loss': 'min', 'gap': 'min', 'accuracy': 'max', 'first_error': 'max'},
  headline=lambda c: (('loss', 'accuracy'), ('accuracy', 'first_error', 'loss')),
  reads=('prm', 'data.packing'),
  example=lambda c: 'steps',
  labels=lambda c: LabelHead('token', ('incorrect', 'correct')),
  fixed=('data.packing', 'prm.separator'),
  check=_check_prm,
)

ROWS = {
  'classification': _CLASSIFICATION,
  'token_classification': _TOKEN_CLASSIFICATION,
  'embedding': _EMBEDDING,
  'masked_lm': _MASKED_LM,
  'prm': _PRM,
}
