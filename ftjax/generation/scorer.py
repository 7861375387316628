"""Log-probabilities of several continuations of one prompt: the prompt is read once, each
continuation from its cache.

Prompts are padded on the left as in padding.py; a continuation of K tokens needs the prompt's last
hidden state and K - 1 more."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ftjax.generation.padding import left_pad
from ftjax.generation.weights import check_decodable
from ftjax.models import head, kinds
from ftjax.models import kv_cache as kv
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.models.cross_attention import Source
from ftjax.runtime import sharding
from ftjax.runtime.sharding import batch_axis_size, spec


class Scores(NamedTuple):
  """Of continuations, [B, C]: logp float64, summed log-probability in nats; is_greedy bool, whether
  each token is the likeliest after those before it.
  """

  logp: np.ndarray
  is_greedy: np.ndarray


class Scorer:
  """Scores continuations with one architecture; programs are compiled per (rows, prompt bucket,
  continuations, their length). start_id: token that the decoder of an encoder-decoder begins with;
  its encoder reads the prompts.
  """

  def __init__(self, arch: Architecture, dtype: jnp.dtype, mesh: Mesh, start_id: int | None = None):
    self.arch, self.dtype, self.mesh, self._start_id = arch, dtype, mesh, start_id
    self._run = jax.jit(self._score, static_argnames='with_greedy')

  def _score(self, params, tokens, where: Tokens, choices, weights, *, with_greedy: bool):
    """The log-probability of each token, float32[B, C, K]; and with_greedy another such array, 1
    where the token is the likeliest, else 0.

    Args: prompts int32[B, P], choices int32[C, B, K], weights float32[C, B, K].
    """
    batch, length = tokens.shape
    count, _, size = choices.shape
    zero, last = jnp.zeros((), jnp.int32), None
    if self.arch.is_encoder_decoder:
      source = Source(tokens, where)
      memory = kinds.begin(self.arch, params, source, size, dtype=self.dtype)
    else:
      memory = kv.empty(self.arch, batch, length + size - 1, self.dtype)
      x, memory = kinds.decode(self.arch, params, tokens, where, memory, zero, dtype=self.dtype)
      last = x[:, -1:]
    table = kinds.head_weights(self.arch, params)
    at, logps, matches = jnp.asarray(length, jnp.int32), [], []
    for c in range(count):
      # For one row, jax 0.12 forgets in indexing how the batch lies.
      labels, weight = (
        jax.sharding.reshard(a[c], spec('batch', 'seq')) for a in (choices, weights)
      )
      states = last
      if last is None:
        states = self._written(params, labels, memory)
      elif size > 1:
        inputs, is_read = (
          jax.sharding.reshard(a, spec('batch', 'seq')) for a in (labels[:, :-1], weight[:, 1:] > 0)
        )
        begin = where.positions[:, -1:] + 1
        positions = jax.sharding.reshard(
          begin + jnp.arange(size - 1, dtype=jnp.int32)[None], spec('batch', 'seq')
        )
        # What is behind a shorter choice is a document of its own: at positions further on it would
        # reach beyond a table of positions, and count for the length that scales a rope.
        places = Tokens(jnp.where(is_read, 1, 2), jnp.where(is_read, positions, 0))
        x, _ = kinds.decode(self.arch, params, inputs, places, memory, at, dtype=self.dtype)
        states = jnp.concatenate([last, x], axis=1)
      read = {
        'logit_spec': self.arch.logit_spec,
        'update': kinds.head_update(self.arch, params, states),
      }
      if with_greedy:
        logp, is_likeliest = head.logprobs_and_matches(states, table, labels, weight, **read)
        matches.append(is_likeliest)
      else:
        logp = head.token_logprobs(states, table, labels, weight, **read)
      logps.append(logp)
    found = (logps, matches) if with_greedy else (logps,)
    # The host reads it.
    return [jax.sharding.reshard(jnp.stack(each, axis=1), P()) for each in found]

  def _written(self, params, labels, memory) -> jax.Array:
    """Returns the states from which the decoder of an encoder-decoder writes labels int32[B, K]:
    it reads the start token and the labels before each. What is behind a shorter choice changes
    nothing before it.
    """
    start = jnp.full_like(labels[:, :1], self._start_id)
    inputs = jnp.concatenate([start, labels[:, :-1]], axis=1)
    one = jnp.ones_like(inputs)
    positions = jax.lax.broadcasted_iota(
      jnp.int32, inputs.shape, 1, out_sharding=spec('batch', 'seq')
    )
    where, zero = Tokens(one, positions), jnp.zeros((), jnp.int32)
    return kinds.decode(self.arch, params, inputs, where, memory, zero, dtype=self.dtype)[0]

  def score(
    self, params: dict, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
  ) -> np.ndarray:
    """Summed log-probability in nats of each choice after its prompt.

    Args:
      params: nested dict.
      prompts: token ids, B of them, none empty.
      choices: for each prompt the same number C of continuations, token ids, none empty.

    Returns:
      float64[B, C].
    """
    (logp,) = self._read(params, prompts, choices, with_greedy=False)
    return logp

  def score_greedy(
    self, params: dict, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
  ) -> Scores:
    """Returns the same and whether greedy decoding would give each choice; see `score`."""
    logp, matches = self._read(params, prompts, choices, with_greedy=True)
    return Scores(logp, matches == [[len(choice) for choice in row] for row in choices])

  def _read(self, params, prompts, choices, *, with_greedy: bool) -> list[np.ndarray]:
    check_decodable(self.mesh)
    rows = -(-len(prompts) // batch_axis_size()) * batch_axis_size()
    tokens, segments, positions = left_pad(prompts, rows, 0)
    count = len(choices[0])
    size = 1 << (max(len(ids) for row in choices for ids in row) - 1).bit_length()
    ids, weights = (
      np.zeros((count, rows, size), np.int32),
      np.zeros((count, rows, size), np.float32),
    )
    for b, row in enumerate(choices):
      for c, choice in enumerate(row):
        ids[c, b, : len(choice)], weights[c, b, : len(choice)] = choice, 1

    put = functools.partial(sharding.put, self.mesh)
    prompt, chosen = ('batch', 'seq'), (None, 'batch', 'seq')
    where = Tokens(put(segments, *prompt), put(positions, *prompt))
    out = self._run(
      *(params, put(tokens, *prompt), where, put(ids, *chosen), put(weights, *chosen)),
      with_greedy=with_greedy,
    )
    # Added on the host: float32 has a step of 6e-5 above 512 nats, and a text may have thousands.
    return [np.asarray(each)[: len(prompts)].sum(-1, dtype=np.float64) for each in out]
