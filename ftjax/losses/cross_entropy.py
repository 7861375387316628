"""Cross-entropy of one chunk of tokens, with its gradient, from logits that may be split over the
vocabulary.

Pure functions on arrays. `axis` names the mapped axis over which the vocabulary is split (None: it
is not split), `offset` is the first vocabulary id of this part; models/head.py loops over chunks
and owns the weights. Where the vocabulary is padded, `without_padding` comes first: the padding has
probability 0 and no gradient in every function here."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Terms of the training loss.

  loss = nll + label_smoothing * (mean over the vocabulary of -log p - nll) + z_loss * logsumexp^2,
  per token, in nats. (Szegedy et al. 2016, section 7; Chowdhery et al. 2022, section 5.)
  dynamic: all of it times p(label), as a constant of the gradient (dynamic fine-tuning, Wu et al.
  2025, eq. 9)."""

  label_smoothing: float = 0.0
  z_loss: float = 0.0
  dynamic: bool = False


def _total(x: jax.Array, axis: str | None) -> jax.Array:
  return x if axis is None else jax.lax.psum(x, axis)


def _largest(x: jax.Array, axis: str | None) -> jax.Array:
  return x if axis is None else jax.lax.pmax(x, axis)


def _ids(logits: jax.Array, offset: jax.Array) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + offset


def without_padding(logits: jax.Array, offset: jax.Array, vocab: int | None) -> jax.Array:
  """Returns float32[n, V'] with -inf for ids from `vocab` on; None: every id is a token."""
  return logits if vocab is None else jnp.where(_ids(logits, offset) < vocab, logits, -jnp.inf)


def logsumexp(logits: jax.Array, axis: str | None) -> jax.Array:
  """Returns float32[n] of float32[n, V'], over the parts of all members of `axis`."""
  top = _largest(jax.lax.stop_gradient(logits.max(-1)), axis)
  return top + jnp.log(_total(jnp.exp(logits - top[:, None]).sum(-1), axis))


def label_logits(
  logits: jax.Array, labels: jax.Array, axis: str | None, offset: jax.Array
) -> jax.Array:
  """Returns float32[n]: the logit of each label int32[n], from the member that holds it."""
  ids = labels - offset
  mine = (ids >= 0) & (ids < logits.shape[-1])
  picked = jnp.take_along_axis(logits, jnp.where(mine, ids, 0)[:, None], axis=-1)[:, 0]
  return _total(jnp.where(mine, picked, 0.0), axis)


def likeliest(logits: jax.Array, axis: str | None, offset: jax.Array) -> jax.Array:
  """Returns int32[n]: the id with the largest logit of float32[n, V'], the smallest of equal ones,
  over the parts of all members of `axis`.
  """
  top, found = logits.max(-1), logits.argmax(-1).astype(jnp.int32) + offset
  if axis is None:
    return found
  nowhere = jnp.iinfo(jnp.int32).max
  return jax.lax.pmin(jnp.where(top == _largest(top, axis), found, nowhere), axis)


def entropy(logits: jax.Array, z: jax.Array, axis: str | None) -> jax.Array:
  """Returns float32[n], the entropy in nats of softmax(logits float32[n, V']) with logsumexp z
  float32[n]."""
  logp = logits - z[:, None]
  probs = jnp.exp(logp)
  return -_total(jnp.where(probs == 0, 0.0, probs * logp).sum(-1), axis)


def divergence(logits: jax.Array, others: jax.Array, axis: str | None) -> jax.Array:
  """Returns float32[n], the KL divergence in nats from softmax(logits) to softmax(others), both
  float32[n, V'].
  """
  logp = logits - logsumexp(logits, axis)[:, None]
  logq = others - logsumexp(others, axis)[:, None]
  probs = jnp.exp(logp)
  return _total(jnp.where(probs == 0, 0.0, probs * (logp - logq)).sum(-1), axis)


def logprob_gradient(
  logits: jax.Array,
  labels: jax.Array,
  d_logp: jax.Array,
  d_entropy: jax.Array | None,
  axis: str | None,
  offset: jax.Array,
) -> jax.Array:
  """Returns float32[n, V']: the gradient of log p(label) and of the entropy H by the logits.

  d log p(y) / d logit_v = [v = y] - p_v; dH / d logit_v = -p_v (log p_v + H).

  Args:
    logits: float32[n, V'].
    labels: int32[n], ids of the whole vocabulary.
    d_logp: float32[n], the cotangent of log p(label); 0 for tokens without weight.
    d_entropy: float32[n], that of H; None: nothing depends on it.
    axis: name of the axis the vocabulary is split over.
    offset: int32[], first id of this part.
  """
  z = logsumexp(logits, axis)
  logp = logits - z[:, None]
  probs = jnp.exp(logp)
  logp = jnp.where(probs == 0, 0.0, logp)  # of padding: 0 log 0 is 0
  hit = _ids(logits, offset) == labels[:, None]
  gradient = jnp.where(hit, d_logp[:, None], 0.0) - probs * d_logp[:, None]
  if d_entropy is not None:
    h = -_total((probs * logp).sum(-1), axis)
    gradient = gradient - probs * (logp + h[:, None]) * d_entropy[:, None]
  return gradient


def loss_and_gradient(
  logits: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  terms: LossConfig,
  axis: str | None,
  offset: jax.Array,
  vocab: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes weighted sums over a chunk, and the gradient of the loss by the logits.

  Args:
    logits: float32[n, V'].
    labels: int32[n], ids of the whole vocabulary.
    weights: float32[n].
    terms: the loss's terms.
    axis: name of the axis the vocabulary is split over.
    offset: int32[], first id of this part.
    vocab: ids from it on are padding, whose logits are -inf; None: there is none.

  Returns:
    (sum of weight * loss float32[], sum of weight * nll float32[], d(sum of loss)/d(logits)
    float32[n, V']).
  """
  # exp once: on a CPU it costs as much as a pass over the logits.
  top = _largest(logits.max(-1), axis)
  probs = jnp.exp(logits - top[:, None])
  total = _total(probs.sum(-1), axis)
  z = top + jnp.log(total)
  nll = z - label_logits(logits, labels, axis, offset)
  loss, scale = nll, jnp.ones_like(z)
  if terms.z_loss:
    loss = loss + terms.z_loss * z * z
    scale = scale + 2 * terms.z_loss * z
  smoothing = terms.label_smoothing
  hit = _ids(logits, offset) == labels[:, None]
  target = jnp.where(hit, 1.0 - smoothing, 0.0)
  if smoothing:
    size = vocab or logits.shape[-1] * (1 if axis is None else jax.lax.axis_size(axis))
    share = smoothing / size
    if vocab is not None:
      is_token = _ids(logits, offset) < vocab
      logits, share = jnp.where(is_token, logits, 0.0), jnp.where(is_token, share, 0.0)
    uniform = z - _total(logits.sum(-1), axis) / size
    loss = loss + smoothing * (uniform - nll)
    target = target + share
  factors = weights * jnp.exp(-nll) if terms.dynamic else weights
  gradient = probs * (scale * factors / total)[:, None] - target * factors[:, None]
  return (loss * factors).sum(), (nll * weights).sum(), gradient
