"""One optimizer step: accumulate, clip, update; no update when something is not finite, or when
the batch has no signal.

The loss function returns sums, not means; sums over all micro-batches and devices are divided once,
here, by the summed weight. So a step does not depend on how its rows are cut into micro-batches.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from ftjax.runtime import compiler_options, trees
from ftjax.runtime.checksum import checksum
from ftjax.runtime.sharding import axis_size, zigzag
from ftjax.training import plateau, rounding, sharpness
from ftjax.training.layer_schedule import Unfreezing
from ftjax.training.state import State

# (params, micro-batch of M rows, key[M]) -> (total float32[], weight float32[],
#   {metric: (total, weight)}). All are sums, which are added over the micro-batches of a step.
# A loss that may be constant although its weight is not 0 gives the metric SIGNAL: its total is 0
# where the micro-batch has nothing to train on.
SIGNAL = 'signal'
# A loss with a term that no evaluation measures, such as the load-balance loss, gives this metric:
# what it is without the term.
LOSS_ALONE = 'loss/alone'
LossFn = Callable[[dict, dict, jax.Array], tuple[jax.Array, jax.Array, dict]]


class CoupledLoss(NamedTuple):
  """A loss with a term that couples all rows of a step.

  sums: (params, micro-batch, keys) -> a tree of sums over its rows, which are constants of the
  gradient. loss: a LossFn with one more argument, these sums over all micro-batches; None where the
  micro-batch is the whole step.
  """

  sums: Callable[[dict, dict, jax.Array], Any]
  loss: Callable[[dict, dict, jax.Array, Any], tuple[jax.Array, jax.Array, dict]]


class Extras(NamedTuple):
  """What only some runs ask of a step.

  sam_radius: of the ascent of SAM, see sharpness.py; 0: none. unfreezing: layers that are not
  trained yet, see layer_schedule.py; None: all are trained.
  """

  sam_radius: float = 0.0
  unfreezing: Unfreezing | None = None


def _row_keys(key: jax.Array, batch: dict) -> jax.Array:
  """Returns key[A, M], one for each row of a step, whichever micro-batch the row is in."""
  like = jax.tree.leaves(batch)[0]
  rows = jnp.arange(like.shape[0] * like.shape[1], dtype=jnp.int32).reshape(like.shape[:2])
  rows = jax.sharding.reshard(rows, P(*jax.typeof(like).sharding.spec[:2]))
  return jax.vmap(jax.vmap(lambda row: jax.random.fold_in(key, row)))(rows)


def _whole(loss_fn: CoupledLoss, params: dict, frozen: dict, batch: dict, keys: jax.Array) -> Any:
  """Returns the sums of a coupled loss over all micro-batches; None for one, which has them itself.

  What the sums do not need of the forward pass, the compiler leaves out.
  """
  if len(keys) == 1:
    return None

  def one(rows, keys):
    return loss_fn.sums(trees.merge(params, frozen), rows, keys)

  def body(carry, item):
    return jax.tree.map(jnp.add, carry, one(*item)), None

  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batch), keys[0])
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(body, zeros, (batch, keys))[0]


def _gradient(
  loss_fn: LossFn | CoupledLoss, params: dict, frozen: dict, batch: dict, key: jax.Array
):
  """Returns (gradient of the total, total, weight, metrics), summed over the micro-batches
  [A, M, ...] of `batch`.
  """

  keys = _row_keys(key, batch)
  if isinstance(loss_fn, CoupledLoss):
    whole = _whole(loss_fn, params, frozen, batch, keys)
    loss_fn = functools.partial(loss_fn.loss, whole=whole)

  def one(rows, keys):
    def total_loss(trained):
      total, weight, metrics = loss_fn(trees.merge(trained, frozen), rows, keys)
      return total, (weight, metrics)

    (total, (weight, metrics)), gradient = jax.value_and_grad(total_loss, has_aux=True)(params)
    return gradient, total, weight, metrics

  first = jax.tree.map(lambda x: x[0], batch), keys[0]
  if len(keys) == 1:  # a loop of one would hold a second copy of the gradient
    return one(*first)

  def body(carry, item):
    return jax.tree.map(jnp.add, carry, one(*item)), None

  rest = jax.eval_shape(lambda: one(*first)[1:])
  zeros = (
    # In float32 whatever the parameters are: in bfloat16 sums of many micro-batches stop growing.
    jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params),
    *jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), rest),
  )
  return jax.lax.scan(body, zeros, (batch, keys))[0]


def batch_stats(batch: dict) -> dict[str, jax.Array]:
  """Returns statistics of a batch [A, M, T], whatever its sharding: `tokens` int32[], all but
  padding; `supervised_tokens` float32[], the sum of their weights; `attended` float32[], the
  (query, key) pairs of causal attention within segments;
  `batch_checksum` uint32[], over every token and its position, those that an encoder reads too.
  """
  tokens, segments, positions = (batch[k] for k in ('tokens', 'segments', 'positions'))
  real, content = segments > 0, _checksum(tokens)
  if 'source_tokens' in batch:  # another factor: the sides do not make up for each other
    content = content + jnp.uint32(0x9E3779B1) * _checksum(batch['source_tokens'])
  return {
    'tokens': real.sum(dtype=jnp.int32),
    'supervised_tokens': batch['weights'].sum(dtype=jnp.float32),
    'attended': jnp.where(real, positions + 1, 0).sum(dtype=jnp.float32),
    'batch_checksum': content,
  }


def _checksum(tokens: jax.Array) -> jax.Array:
  """Returns the checksum of tokens int32[A, M, T] and their places, uint32[]."""
  a, m, t = tokens.shape
  order = zigzag(t, axis_size('context'))  # tokens lie in it; each counts with its place in the row
  place = jnp.arange(a * m * t, dtype=jnp.uint32).reshape(a, m, t)[..., order]
  place = jax.sharding.reshard(place, jax.typeof(tokens).sharding.spec)
  return checksum(tokens.astype(jnp.uint32), place)


def _ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
  return total / jnp.where(weight == 0, 1.0, weight)


def _make_update(
  optimizer: optax.GradientTransformation,
  shardings: State,
  ema_decay: float,
  is_stochastic: bool,
  unfreezing: Unfreezing | None,
) -> Callable:
  """Returns (gradient, bool[], key, state) -> (params, opt, ema): the new ones where that is True,
  else the old ones.
  """

  def update(gradient, is_made, key, state: State):
    updates, opt = optimizer.update(gradient, state.opt, state.params)
    if is_stochastic:
      params = rounding.apply_updates(state.params, updates, key)
    else:
      params = optax.apply_updates(state.params, updates)
    if unfreezing is not None:
      params = unfreezing.select(params, state.params, _updates(state))
    ema = (
      jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e), state.ema, params)
      if ema_decay
      else {}
    )
    old = (state.params, state.opt, state.ema)
    return jax.tree.map(lambda new, old: jnp.where(is_made, new, old), (params, opt, ema), old)

  # Optimizers come from libraries without explicit shardings: inside, the compiler chooses them.
  return jax.sharding.auto_axes(
    update, out_sharding=(shardings.params, shardings.opt, shardings.ema)
  )


def _updates(state: State) -> jax.Array:
  """Returns the number of updates that were made, which the optimizer counts, int32[]."""
  return state.step - state.skipped - state.no_signal


def _counted(gradient: dict, state: State, unfreezing: Unfreezing | None) -> dict:
  """Returns a gradient with zeros where layers are not trained yet: what the norm counts, and what
  SAM goes along.
  """
  return gradient if unfreezing is None else unfreezing.masked(gradient, _updates(state))


def _make_gradient(
  loss_fn: LossFn | CoupledLoss, mask: Callable[[dict], dict], extras: Extras
) -> Callable:
  """Returns (state, batch, key) -> (gradient of the mean loss that is applied, total, weight,
  metrics); arguments: of `make_step`.
  """

  def mean(params, state, batch, key):
    gradient, total, weight, metrics = _gradient(loss_fn, params, state.frozen, batch, key)
    return mask(jax.tree.map(lambda g: _ratio(g, weight), gradient)), total, weight, metrics

  def below(state, batch, key):
    return mean(state.params, state, batch, key)

  def above(state, batch, key):
    gradient, total, weight, metrics = mean(state.params, state, batch, key)
    gradient = _counted(gradient, state, extras.unfreezing)
    there = sharpness.ascend(state.params, gradient, extras.sam_radius)
    gradient, higher, _, _ = mean(there, state, batch, key)
    return gradient, total, weight, metrics | {'sharpness': (higher - total, weight)}

  return above if extras.sam_radius else below


def make_step(
  loss_fn: LossFn | CoupledLoss,
  optimizer: optax.GradientTransformation,
  shardings: State,
  *,
  mask: Callable[[dict], dict],
  schedule: Callable,
  clip_norm: float,
  ema_decay: float,
  is_stochastic: bool,
  seed: int,
  extras: Extras = Extras(),  # noqa: B008 - a constant
) -> Callable[[State, dict], tuple[State, dict[str, Any]]]:
  """Returns the step of an algorithm, to be compiled with `compile_step`.

  Args:
    loss_fn: sums of loss and weight over a micro-batch.
    optimizer: over the trained leaves.
    shardings: of the state.
    mask: gradient -> gradient, zero where a trained leaf holds frozen layers.
    schedule: update number -> learning rate, for the log; the plateau rule's factor multiplies it.
    clip_norm: largest global L2 norm of the gradient; 0 means no clipping.
    ema_decay: of the moving average of the parameters; 0 means none.
    is_stochastic: whether bfloat16 parameters are rounded stochastically, see rounding.py.
    seed: of the step's random keys, which are a function of (seed, step, row).
    extras: SAM and unfreezing. With SAM the loss is that before the ascent, `sharpness` its rise
      there, and grad_norm that of the applied gradient.

  Returns:
    step(state, batch) -> (state, metrics). Arrays of `batch` are [A, M, ...]: A micro-batches of M
    rows. Metrics hold loss (per unit of weight: a supervised token, or a pair), grad_norm (before
    clipping), lr, ok (finite), bad_streak, skipped, has_signal, no_signal, those of `batch_stats`,
    and loss_fn's own, divided.

  A step without signal (its weight or the total of SIGNAL is 0) leaves params, moments, moving
  average and the optimizer's count as they are, bit for bit: momentum and weight decay would move
  the weights, and the schedule would run ahead. `step` alone counts it, with `no_signal`.
  """

  update = _make_update(optimizer, shardings, ema_decay, is_stochastic, extras.unfreezing)
  measure = _make_gradient(loss_fn, mask, extras)

  def step(state: State, batch: dict):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradient, total, weight, metrics = measure(state, batch, key)
    norm = sharpness.norm(_counted(gradient, state, extras.unfreezing))
    if clip_norm:
      scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
      gradient = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)
    loss = _ratio(total, weight)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    signal = weight != 0
    if SIGNAL in metrics:
      signal = signal & (metrics[SIGNAL][0] != 0)
    # Rows are numbered from 0, so that none has this key.
    last = jax.random.fold_in(key, 2**32 - 1)
    params, opt, ema = update(gradient, ok & signal, last, state)
    bad, idle = (~ok).astype(jnp.int32), (ok & ~signal).astype(jnp.int32)
    new = State(
      step=state.step + 1,
      params=params,
      frozen=state.frozen,
      opt=opt,
      ema=ema,
      skipped=state.skipped + bad,
      bad_streak=(state.bad_streak + bad) * (bad | idle),  # an idle step does not end a streak
      no_signal=state.no_signal + idle,
    )
    out = {name: _ratio(*pair) for name, pair in metrics.items() if name != SIGNAL}
    out |= batch_stats(batch)
    rate = jnp.asarray(schedule(_updates(state)), jnp.float32)
    if (lr_scale := plateau.find_scale(state.opt)) is not None:
      rate = rate * lr_scale
    out |= dict(loss=loss, grad_norm=norm, lr=rate, ok=ok, has_signal=signal)
    out |= dict(skipped=new.skipped, bad_streak=new.bad_streak, no_signal=new.no_signal)
    return new, out

  return step


def compile_step(
  step: Callable,
  state: State,
  batch: dict,
  options: dict[str, compiler_options.Value] | None = None,
) -> jax.stages.Compiled:
  """Compiles ahead of time from ShapeDtypeStructs that carry shardings: one executable for fresh
  start, resume and plan.

  Args:
    step: from `make_step`.
    state: shapes, with shardings.
    batch: shapes, with shardings.
    options: of the compiler, see runtime/compiler_options.py; None: its own defaults.

  Raises:
    ConfigError: an option that the compiler does not know, or a value that it does not take.
  """
  shardings = jax.tree.map(lambda a: a.sharding, state)
  lowered = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch)
  try:
    return lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    refused = compiler_options.explain(error, options or {})
    if refused is None:
      raise
    raise refused from error


def program_text(compiled: jax.stages.Compiled) -> str:
  """Returns the optimized HLO; '' where jaxlib cannot print it (libtpu 0.0.52 makes asynchronous
  instructions that it cannot read).
  """
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    if 'RET_CHECK' not in str(error):
      raise
    return ''


# Where in the source each instruction comes from: tables of files and stacks, and a note on the
# instruction. They hold paths of this machine, and a step from the compile cache lacks them.
_TABLES = re.compile(r'\n*(FileNames|FunctionNames|FileLocations|StackFrames)\n')
_METADATA = re.compile(r', metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}')


def executable_fingerprint(compiled: jax.stages.Compiled) -> str:
  """Returns the sha256, in hex, of the optimized HLO without its positions in the source: the same
  wherever the code lies, compiled or read from the cache; '' where the HLO cannot be printed.
  """
  blocks = program_text(compiled).split('\n\n')
  text = '\n\n'.join(b for b in blocks if not _TABLES.match(b))
  return hashlib.sha256(_METADATA.sub('', text).encode()).hexdigest() if text else ''
