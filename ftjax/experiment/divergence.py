"""The KL divergence of a tuned model from its base on given texts, exact over the vocabulary."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from ftjax.data import batches
from ftjax.experiment.run import Run
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from ftjax.runtime.errors import DataError, NonFiniteError

_MULTIPLE = 128  # of the length in tokens, which the mesh axis `context` divides


def of_texts(run: Run, base: dict, tuned: dict, texts: Sequence[str]) -> list[tuple[float, int]]:
  """Returns for each text KL(base || tuned) of the next token's distribution in nats, summed over
  its tokens, and their number. What is beyond the model's length is left out.

  Both models are in memory at once; logits are computed in chunks of tokens.

  Args:
    run: of both models.
    base, tuned: their parameters, nested dicts on the run's mesh.
    texts: read after BOS, or EOS where there is none.

  Raises:
    DataError: a text without tokens.
    NonFiniteError: a divergence that is no number.
  """
  rows = [_encode(run, text) for text in texts]
  if not rows:
    return []
  longest = max(map(len, rows))
  shape = sharding.batch_axis_size(), -(-longest // _MULTIPLE) * _MULTIPLE
  forward = run.forward.without_remat()
  out = []
  for ids in rows:
    run.watchdog.beat()
    batch = batches.empty(*shape)
    batches.fill_row(batch, 0, [(np.asarray(ids, np.int32), np.ones(len(ids), bool))])
    placed = {k: sharding.put(run.mesh, v, 'batch', 'seq') for k, v in batch.items()}
    nats = float(_measure(forward, base, tuned, placed))
    if not math.isfinite(nats):
      raise NonFiniteError(f'general_texts: the KL divergence from the base is {nats}')
    # Rounding may leave a tiny negative sum.
    out.append((max(0.0, nats), len(ids) - 1))
  return out


@functools.partial(jax.jit, static_argnums=0)
def _measure(forward: Forward, base: dict, tuned: dict, batch: dict) -> jax.Array:
  return forward.divergence_from(base, forward, tuned, batch)


def _encode(run: Run, text: str) -> list[int]:
  tokenizer = run.model.tokenizer
  start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
  ids = tokenizer.encode(text)
  if start is not None and ids[:1] != [start]:
    ids = [start, *ids]
  if len(ids) < 2:
    raise DataError(f'the text {text!r} has no tokens to compare two models on')
  return ids[: run.arch.max_len]
