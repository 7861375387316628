"""The forward pass of a batch: a model with the dtype and the recomputation it is run with.

Every loss and every measurement begins with one of these methods. Axes: B rows, T tokens, D the
width of the model."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from ftjax.losses.cross_entropy import LossConfig
from ftjax.losses.distillation import Distillation
from ftjax.models import head, kinds, paired_head, score_head, top_k_head
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.models.cross_attention import Source
from ftjax.models.dropout import ModelDropout, Rates
from ftjax.models.layers import Dropout
from ftjax.models.logit_chunks import LowRank
from ftjax.models.routing import RouterLog

# Keeps the random numbers of dropout apart from others of the same row.
_DROPOUT = 0x5EED
_LABELS = 0x1ABE1
_INNER = 0x1AAE2
_SECOND = 0x2ED


@dataclasses.dataclass(frozen=True)
class Forward:
  """Computes what a model gives for batches of data/batches.py.

  Attributes:
    arch: architecture of the model.
    dtype: compute dtype of activations and matrix products.
    remat: what a backward pass recomputes; see kinds.apply.
    dropout_keys: key[B], of the rows, for the dropout of adapters; None: nothing is dropped.
    label_dropout: share of the numbers before the last map of a label head that a training step
      drops (transformers' classifier_dropout).
    label_keys: key[B], of the rows, for that; None: nothing is dropped.
    rates: of the dropout inside the model in a training step.
    inner: that dropout with the keys of the rows; None: nothing is dropped.
    router_log: where passes with a gradient note what their routers did; None: nowhere.

  The methods take `params`, a nested dict with the model's parameters. Entries of other models in
  it (experiment/auxiliary.py) are not read.
  """

  arch: Architecture
  dtype: jnp.dtype
  remat: str = 'none'
  dropout_keys: jax.Array | None = None
  label_dropout: float = 0.0
  label_keys: jax.Array | None = None
  rates: Rates = Rates()  # noqa: RUF009 - frozen
  inner: ModelDropout | None = None
  router_log: RouterLog | None = None

  def without_remat(self) -> Self:
    """Returns the same forward pass for use without a gradient."""
    return dataclasses.replace(self, remat='none', router_log=None)

  def with_score(self) -> Self:
    """Returns the forward pass of a reward or value model: this architecture with a score head."""
    return dataclasses.replace(self, arch=self.arch.with_score())

  def untrained(self) -> Self:
    """Returns the forward pass of the model that training starts from."""
    arch = self.arch.untrained()
    out = dataclasses.replace(self, arch=arch, dropout_keys=None, router_log=None)
    return dataclasses.replace(out, label_keys=None, inner=None)

  def find_params(self, params: dict, name: str) -> dict:
    """Returns the parameters of the auxiliary model `name` whose forward pass this is; see
    kinds.of_model.
    """
    return kinds.of_model(self.arch, params, name)

  def with_dropout(self, keys: jax.Array) -> Self:
    """Returns the forward pass of a training step: with the dropout of adapters, of the model and
    of the label head, if there is any.

    keys: key[B], of the rows.
    """
    out = self
    if self.arch.adapter is not None and self.arch.adapter.dropout:
      out = dataclasses.replace(out, dropout_keys=_folded(keys, _DROPOUT))
    if self.label_dropout and self.arch.num_labels:
      out = dataclasses.replace(out, label_keys=_folded(keys, _LABELS))
    if self.rates:
      out = dataclasses.replace(out, inner=ModelDropout(self.rates, _folded(keys, _INNER)))
    return out

  def hidden_states(self, params: dict, batch: dict, noise: jax.Array | None = None) -> jax.Array:
    """Returns the hidden states after the last norm, dtype[B, T, D].

    noise: added to the embeddings, [B, T, D], or None. A batch may hold `token_types` [B, T] of a
    model that has more than one; for an encoder-decoder it holds what the encoder reads,
    int32[B, S]: `source_tokens`, `source_segments` and `source_positions`.
    """
    where = Tokens(batch['segments'], batch['positions'])
    x, routing = kinds.routed(
      self.arch,
      params,
      batch['tokens'],
      where,
      dtype=self.dtype,
      remat=self.remat,
      noise=noise,
      dropout_keys=self.dropout_keys,
      **self._optional(batch),
    )
    if self.router_log is not None and routing is not None:
      self.router_log.add(routing)
    return x

  def _optional(self, batch: dict) -> dict[str, Any]:
    """Returns as named arguments the token types of a batch, where model and batch have them, what
    an encoder reads for a decoder, and the dropout of a training step.
    """
    found: dict[str, Any] = {'inner': self.inner}
    if self.arch.is_encoder_decoder:
      where = Tokens(batch['source_segments'], batch['source_positions'])
      found['source'] = Source(batch['source_tokens'], where)
    if self.arch.token_types > 1 and 'token_types' in batch:
      found['token_types'] = batch['token_types'].astype(jnp.int32)
    return {name: value for name, value in found.items() if value is not None}

  def _readout(
    self, params: dict, batch: dict, noise: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, LowRank | None]:
    """Returns what logits are made of: hidden states, head weights, what an adapter adds."""
    x = self.hidden_states(params, batch, noise)
    x = kinds.head_states(self.arch, params, x, self.dropout_keys)
    update = kinds.head_update(self.arch, params, x, self.dropout_keys)
    return x, kinds.head_weights(self.arch, params), update

  def router_choices(self, params: dict, batch: dict) -> jax.Array:
    """Returns the experts of each token in each layer that has experts, int32[B, T, L, k]."""
    where = Tokens(batch['segments'], batch['positions'])
    tokens = batch['tokens']
    _, found = kinds.routed(self.arch, params, tokens, where, dtype=self.dtype, remat=self.remat)
    return found.choices.transpose(1, 2, 0, 3)

  def cross_entropy(
    self, params: dict, batch: dict, config: LossConfig, noise: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (weighted sum of the loss, weighted sum of -log p(label)) over all tokens, float32[]
    in nats; see head.cross_entropy_sums. Only the first is differentiable.
    """
    x, table, update = self._readout(params, batch, noise)
    return head.cross_entropy_sums(
      x, table, batch['labels'], batch['weights'], config, self.arch.logit_spec, update
    )

  def paired_cross_entropy(
    self,
    params: dict,
    batch: dict,
    config: LossConfig,
    strength: float,
    keys: jax.Array,
    noise: Callable[[jax.Array], jax.Array | None],
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the weighted sums over all tokens of R-Drop's loss, of -log p(label) and of the
    divergence between two passes with other dropout masks, float32[] in nats; see
    paired_head.paired_sums. Only the first is differentiable.

    Args:
      params: of this model.
      batch: the rows.
      config: terms of the loss of tokens.
      strength: weight of the divergence.
      keys: key[B], of the rows; the first pass drops what a step without R-Drop would.
      noise: keys of a pass -> what is added to its embeddings, or None.
    """
    both = (keys, _folded(keys, _SECOND))
    passes = [self.with_dropout(k)._readout(params, batch, noise(k)) for k in both]
    labels, weights = batch['labels'], batch['weights']
    return paired_head.paired_sums(*passes, labels, weights, config, strength, self.arch.logit_spec)

  def token_logprobs(self, params: dict, batch: dict) -> jax.Array:
    """Returns log p(label) in nats, float32[B, T]; 0 where weights are 0."""
    x, table, update = self._readout(params, batch)
    return head.token_logprobs(
      x, table, batch['labels'], batch['weights'], logit_spec=self.arch.logit_spec, update=update
    )

  def logprobs_and_entropy(
    self, params: dict, batch: dict, temperature: float
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(label), entropy of p), each float32[B, T] in nats, of p = softmax(logits /
    temperature); 0 where weights are 0.
    """
    x, table, update = self._readout(params, batch)
    return head.logprobs_and_entropies(
      x, table, batch['labels'], batch['weights'], temperature, self.arch.logit_spec, update
    )

  def divergence_from(self, params: dict, other: Self, others: dict, batch: dict) -> jax.Array:
    """Returns the KL divergence in nats from this model's distribution of the next token to
    another's, summed over the tokens with a weight: float32[].

    Args:
      params: of this model.
      other: the forward pass of the other model.
      others: its parameters.
      batch: rows that both read.
    """
    ours, theirs = self._readout(params, batch), other._readout(others, batch)
    return head.divergence_sums(ours, theirs, batch['weights'], self.arch.logit_spec)

  def distillation(
    self, params: dict, batch: dict, teacher: Self, weights: dict, terms: Distillation
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the weighted sums of the loss of distillation, of -log p(label) and of the divergence
    over all tokens, float32[] in nats; see head.distillation_sums. Only the first is
    differentiable, by `params` alone.

    Args:
      params: of this model, the student.
      batch: rows that both read.
      teacher: the forward pass of the teacher.
      weights: its parameters.
      terms: of the loss.
    """
    theirs = jax.lax.stop_gradient(teacher.without_remat()._readout(weights, batch))
    return head.distillation_sums(
      self._readout(params, batch),
      theirs,
      batch['labels'],
      batch['weights'],
      terms,
      self.arch.logit_spec,
      teacher.arch.logit_spec,
    )

  def top_logprobs(
    self, params: dict, batch: dict, k: int, temperature: float
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the k likeliest tokens of each position with a weight, and their log-probs; see
    top_k_head.top_logprobs: (int32[B, T, k], float32[B, T, k + 1]).
    """
    model = self._readout(params, batch)
    return top_k_head.top_logprobs(model, batch['weights'], k, temperature, self.arch.logit_spec)

  def distillation_from_top(
    self, params: dict, batch: dict, terms: Distillation
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the sums of `distillation` from a teacher's likeliest tokens, which are the arrays
    `teacher_ids` and `teacher_logp` of the batch; see top_k_head.distillation_sums.
    """
    return top_k_head.distillation_sums(
      self._readout(params, batch),
      batch['teacher_ids'],
      batch['teacher_logp'],
      batch['labels'],
      batch['weights'],
      terms,
      self.arch.logit_spec,
    )

  def side_logprobs(
    self, params: dict, batch: dict, segments: Sequence[int]
  ) -> tuple[jax.Array, ...]:
    """Returns for each of `segments` the summed log p(label) of that segment of the rows:
    float32[B], in nats.
    """
    logp = self.token_logprobs(params, batch)
    return tuple(segment_sum(logp, batch, segment) for segment in segments)

  def label_logits(self, params: dict, batch: dict) -> jax.Array:
    """Returns the numbers of the labels of each token, float32[B, T, R]. The product with the head
    is float32, whatever the compute dtype is. For span answers R is 2: how likely an answer begins,
    and ends, at the token.
    """
    x = self.hidden_states(params, batch)
    return kinds.label_logits(self.arch, params, x, 'seq', self._label_dropout())

  def sequence_logits(self, params: dict, batch: dict, segments: int) -> list[jax.Array]:
    """Returns for each of the first `segments` segments of the rows the numbers of its labels,
    float32[B, R], of the state that the label head pools. A row without the segment has zeros.
    """
    pool = self.arch.score_head.pool
    states, there = self.sequence_states(params, batch, segments, pool)
    found = kinds.label_logits(self.arch, params, states, None, self._label_dropout())
    found = jnp.where(there[..., None], found, 0.0)
    return [found[:, i] for i in range(segments)]

  def sequence_states(
    self, params: dict, batch: dict, segments: int, pool: str
  ) -> tuple[jax.Array, jax.Array]:
    """Returns one hidden state for each of the first `segments` segments of the rows; see
    score_head.pooled: (dtype[B, S, D], bool[B, S], whether the row has the segment).

    pool: 'first' or 'last' token, or 'mean', as sentence embeddings are made.
    """
    x = self.hidden_states(params, batch)
    return score_head.pooled(x, batch['segments'], batch['positions'], segments, pool)

  def _label_dropout(self) -> Dropout | None:
    return None if self.label_keys is None else Dropout(self.label_dropout, self.label_keys)

  def token_scores(self, params: dict, batch: dict) -> jax.Array:
    """Returns the score of a reward or value model after each token, float32[B, T]."""
    return self.label_logits(params, batch)[..., 0]

  def sequence_rewards(self, params: dict, batch: dict, segments: int) -> list[jax.Array]:
    """Returns for each of the first `segments` segments of the rows its reward, float32[B]; see
    `sequence_logits`.
    """
    return [x[:, 0] for x in self.sequence_logits(params, batch, segments)]


def _folded(keys: jax.Array, number: int) -> jax.Array:
  """Returns key[B] for one use of the keys of the rows."""
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def segment_sum(x: jax.Array, batch: dict, segment: int) -> jax.Array:
  """Returns the sum of x float32[B, T] over one segment of each row, float32[B]."""
  return jnp.where(batch['segments'] == segment, x, 0.0).sum(-1)
