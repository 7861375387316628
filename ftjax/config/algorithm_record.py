"""The record of a training algorithm: all that a config, an experiment and a plan ask of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from ftjax.runtime.errors import ConfigError

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Auxiliary:
  """A model that a run needs in addition to the one it trains.

  Attributes:
    name: of its parameters in the state, where it stands there.
    place: 'state': part of the training state, read by every step; 'rollout': in memory outside of
      the state, read when a rollout is made; 'cache': its log-probs are computed once and come with
      the batches.
    source_key: config key that names its folder; '' or an empty value: the model that training
      starts from.
    is_trained: with the policy, in the same optimizer step.
    has_score: whether it has a score for a head: a reward model or a value model.
    scores_steps: whether it is a process reward model, which gives two labels to tokens.
    has_own_architecture: whether a model in the state has the architecture of its folder, and not
      the policy's.
  """

  name: str
  place: str
  source_key: str = ''
  is_trained: bool = False
  has_score: bool = False
  has_own_architecture: bool = False
  scores_steps: bool = False


@dataclasses.dataclass(frozen=True)
class LabelHead:
  """The label head that an algorithm trains in place of a language model's.

  Attributes:
    task: what the labels are given to: 'sequence', 'token' or 'span'; 'embedding' for a model
      without a head, which gives vectors.
    names: of the labels, in the order of their numbers; () of a span, for begin and end.
    problem: transformers' `problem_type` of a sequence; '' for none.
    pool: of an embedding: what a vector is made of; see score_head.pooled. '' where the model's
      files decide it.
    max_tokens: of an embedding: longest text.
  """

  task: str
  names: tuple[str, ...] = ()
  problem: str = ''
  pool: str = ''
  max_tokens: int = 0

  @property
  def is_reward(self) -> bool:
    """Whether it is the score of a reward model."""
    return self == REWARD


REWARD = LabelHead('sequence', ('reward',), 'regression')


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """What a config, an experiment and a plan ask of an algorithm.

  Functions take the config. A direction is 'min' or 'max': whether smaller or larger is better.

  Attributes:
    module: dotted name of the module that implements it, with `make_loss(forward, c)`
      (a LossFn) and `build(run)` (experiment/fit.Parts).
    measured: what an evaluation measures, {name: direction}; checkpoint.best_metric may name them.
    headline: (metrics of a step, or of a rollout, in the progress bar; metrics with which the line
      of an evaluation begins, the most important one first).
    reads: sections and keys of the config that this algorithm reads and not every other does.
    example: shape of a training example: 'text', 'pair', 'label', 'score', 'class', 'tags',
      'masked', 'steps' or 'texts'; for encoder-decoders 'source_target' or 'document'.
    reads_source: whether it trains encoder-decoders, whose encoder has rows of its own.
    on_rollouts: it trains on completions that the model samples; data.train then holds prompts.
    rows_per_prompt: rows of the arrays that a rollout gives for each prompt.
    completions_per_row: completions that share one row of seq_len tokens.
    is_relative: whether completions are compared with others of their prompt, so that prompts with
      equal rewards may be replaced by others (rollout.redraws).
    fields: float arrays that a batch has in addition to those of data/batches.py: (of each token,
      of each row).
    wide: arrays of a batch with several numbers of each token: {name: (numbers, dtype)}.
    needs_old_logp: whether a rollout needs the trainer's own log-probs of its tokens before the
      first update on it.
    auxiliary: the other models of a run.
    labels: the label head of the trained model; None for a language model.
    predicts_masked: whether it trains an encoder to predict masked tokens.
    documents: float32 arrays that a batch has for each of the first S documents of its rows, by
      name with their shape after the rows: (S,) or (S, numbers of a document). Rows then hold at
      most S documents.
    fixed: keys that may not change when a run resumes, in addition to those of every algorithm.
    fixed_in_rollout: keys that may not change between two updates on one rollout.
    check: raises ConfigError for settings that do not go together.
    keys: hyperparameters of its own with their defaults. They are keys of the section `custom`.
  """

  module: str
  measured: Callable[[Config], Mapping[str, str]]
  headline: Callable[[Config], tuple[tuple[str, ...], tuple[str, ...]]]
  reads: tuple[str, ...] = ()
  example: Callable[[Config], str] = lambda c: 'text'
  reads_source: bool = False
  on_rollouts: bool = False
  rows_per_prompt: Callable[[Config], int] = lambda c: c.rollout.group
  completions_per_row: int = 1
  is_relative: Callable[[Config], bool] = lambda c: False
  fields: Callable[[Config], tuple[tuple[str, ...], tuple[str, ...]]] = lambda c: ((), ())
  wide: Callable[[Config], Mapping[str, tuple[int, str]]] = lambda c: {}
  needs_old_logp: Callable[[Config], bool] = lambda c: False
  auxiliary: Callable[[Config], tuple[Auxiliary, ...]] = lambda c: ()
  labels: Callable[[Config], LabelHead | None] = lambda c: None
  predicts_masked: bool = False
  documents: Callable[[Config], Mapping[str, tuple[int, ...]]] = lambda c: {}
  fixed: tuple[str, ...] = ()
  fixed_in_rollout: tuple[str, ...] = ()
  check: Callable[[Config], None] = lambda c: None
  keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name, usual in self.keys.items():
      if not name.isidentifier() or not isinstance(usual, bool | int | float | str | tuple):
        raise ConfigError(
          f'{self.module}: keys has {name!r}: {usual!r}; expected a name with True, False, a '
          'number, a text or a tuple as its default'
        )
