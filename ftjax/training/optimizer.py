"""Optimizers for parameters whose leaves are stacks of layers.

A stacked leaf must be treated as the layers it holds. Transforms that look at single numbers
(adamw, lion, sgd) need nothing; those that look at a whole matrix (muon, adafactor) are vmapped
over the axes of layers and experts and shown each matrix as [in, out]. Weight decay, freezing and
learning-rate multipliers come from regex tables over per-layer names, `layer3/attn/q/w`, and become
a number or a vector over the layer axis per leaf."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax.runtime import named_object, trees
from ftjax.runtime.errors import ConfigError
from ftjax.training import layer_schedule, moments, plateau

Table = Sequence[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What an optimizer must know of a parameter.

  Attributes:
    names: the per-layer names of a stacked leaf in layer order, or one name.
    stacked: whether axis 0 counts layers.
    split: how many dimensions, after the axes of layers and experts, are a matrix's input side; 0
      for scales and biases.
    table: whether it is a table of tokens or positions, which muon leaves to Adam.
    axes: logical axes of its dimensions.
    rate: factor of its learning rate, besides that of optim.multipliers.
  """

  names: tuple[str, ...]
  stacked: bool
  split: int
  table: bool
  axes: tuple[str | None, ...]
  rate: float = 1.0

  @property
  def lead(self) -> int:
    """How many axes count layers and experts, each of which has a matrix of its own."""
    return next(
      (i for i, a in enumerate(self.axes) if a not in ('layers', 'expert')), len(self.axes)
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """An optimizer in numbers. See ftjax/config/keys.py for the meaning of each.

  has_plateau: whether a factor of the learning rate is held in its state, see plateau.py.
  layer_decay: factor of the rate from one layer to the one below it, see layer_schedule.py.
  """

  name: str
  moments: str
  schedule: Callable
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  decay: Table
  multipliers: Table
  freeze: Table
  has_plateau: bool = False
  layer_decay: float = 1.0


def leaves(
  declared: Mapping[str, tuple],
  slots: Sequence[tuple[str, int]],
) -> dict[str, Leaf]:
  """{parameter name: Leaf} from declared {name: (shape, logical axes, fan_in, ...)} and the
  architecture's layer slots.
  """
  layers: dict[str, list[int]] = {}
  for layer, (block, _) in enumerate(slots):
    layers.setdefault(block, []).append(layer)
  out = {}
  for name, (shape, axes, fan_in, *_) in declared.items():
    stacked = axes[:1] == ('layers',)
    dims = tuple(n for n, a in zip(shape, axes, strict=True) if a not in ('layers', 'expert'))
    split = next((i for i in range(1, len(dims)) if math.prod(dims[:i]) == fan_in), 1)
    # A bias of heads has two dimensions and is no matrix.
    # Nor are the taps of a convolution: each channel has its own.
    split = split if fan_in and 'taps' not in axes else 0
    names = (name,)
    if stacked:
      block, rest = name.split('/', 2)[:2], name.split('/', 2)[2]
      names = tuple(f'layer{i}/{rest}' for i in layers['/'.join(block)])
    is_table = ('vocab' in axes or 'position' in axes) and 'rank' not in axes
    out[name] = Leaf(names, stacked, split, is_table, tuple(axes))
  return out


def _by_leaf(table: Table, info: Mapping[str, Leaf], key: str) -> dict[str, np.ndarray]:
  """{leaf: array of the table's values, one per layer} by matching per-layer names."""
  values = trees.match_table(table, [n for leaf in info.values() for n in leaf.names], key)
  return {
    name: np.asarray([values[n] for n in leaf.names], np.float32) for name, leaf in info.items()
  }


def frozen_names(table: Table, info: Mapping[str, Leaf]) -> set[str]:
  """Leaves that `optim.freeze` freezes whole: they get no gradient and no optimizer state."""
  frozen = {n for n, v in _by_leaf(table, info, 'optim.freeze').items() if v.all()}
  if len(frozen) == len(info):
    raise ConfigError('optim.freeze freezes every parameter; nothing is left to train')
  return frozen


def frozen_shares(table: Table, info: Mapping[str, Leaf]) -> dict[str, float]:
  """{leaf: share of its layers that `optim.freeze` freezes}."""
  return {n: float((v != 0).mean()) for n, v in _by_leaf(table, info, 'optim.freeze').items()}


def _layer_names(info: Mapping[str, Leaf]) -> dict[str, tuple[str, ...]]:
  return {n: leaf.names for n, leaf in info.items()}


def unfreezing(
  every: int, freeze: Table, info: Mapping[str, Leaf], trained: Mapping[str, Leaf]
) -> layer_schedule.Unfreezing:
  """Returns the schedule of gradual unfreezing of the leaves `trained` of all leaves `info`, but
  for the layers that `optim.freeze` freezes; every: updates between two groups.
  """
  frozen = _by_leaf(freeze, info, 'optim.freeze')
  is_on = {n: frozen[n] == 0 for n in trained}
  return layer_schedule.unfreezing(every, _layer_names(info), is_on)


def _scale_by(factors: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
  """Multiplies each leaf by its number, or its layers by theirs."""

  def update(updates, state, params=None):
    del params

    def one(name, u):
      f = factors[name]
      if (f == 1).all():
        return u
      return u * jnp.asarray(f if len(f) > 1 else f[0], u.dtype).reshape(
        (-1,) + (1,) * (u.ndim - 1) if len(f) > 1 else ()
      )

    return trees.map_named(one, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_mask(
  config: OptimizerConfig, info: Mapping[str, Leaf], trained: Mapping[str, Leaf]
) -> Callable[[dict], dict]:
  """gradient -> gradient with zeros for the frozen layers of leaves that are trained in part.

  Without it they would count in the norm that clipping looks at.
  """
  frozen = _by_leaf(config.freeze, info, 'optim.freeze')
  scale = _scale_by({n: 1 - frozen[n] for n in trained})
  return lambda gradient: scale.update(gradient, optax.EmptyState())[0]


def _add_decay(rate: float, factors: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
  """update + rate * factor * parameter: decoupled weight decay (Loshchilov and Hutter 2019)."""

  def update(updates, state, params):
    scaled, _ = _scale_by(factors).update(params, optax.EmptyState())
    decayed = {n for n, f in factors.items() if f.any()}
    return trees.map_named(
      lambda n, u, p: u + rate * p if n in decayed else u, updates, scaled
    ), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def per_matrix(
  transform: optax.GradientTransformation, info: Mapping[str, Leaf]
) -> optax.GradientTransformation:
  """`transform` applied to every layer of every leaf on its own, a layer's matrix shown as [in,
  out].

  Its state is a flat {leaf name: state}, with the leading axes of layers and experts throughout.
  """

  def view(name, x):
    leaf = info[name]
    lead = x.shape[: leaf.lead]
    dims = x.shape[len(lead) :]
    if not leaf.split:
      return x.reshape(*lead, math.prod(dims))
    return x.reshape(*lead, math.prod(dims[: leaf.split]), math.prod(dims[leaf.split :]))

  def each(name, function):
    for _ in range(info[name].lead):
      function = jax.vmap(function)
    return function

  def init(params):
    return {n: each(n, transform.init)(view(n, p)) for n, p in trees.flatten(params).items()}

  def update(updates, state, params):
    flat, new, out = trees.flatten(params), {}, {}
    for n, u in trees.flatten(updates).items():
      moved, new[n] = each(n, transform.update)(view(n, u), state[n], view(n, flat[n]))
      out[n] = moved.reshape(u.shape)
    return trees.unflatten(out), new

  return optax.GradientTransformation(init, update)


def _split(
  names: set[str], first: optax.GradientTransformation, other: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`first` for the named leaves, `other` for the rest."""

  def parts(tree):
    return trees.select(tree, lambda n: n in names)

  def init(params):
    a, b = parts(params)
    return (first.init(a), other.init(b))

  def update(updates, state, params):
    (ua, ub), (pa, pb) = parts(updates), parts(params)
    ua, sa = first.update(ua, state[0], pa)
    ub, sb = other.update(ub, state[1], pb)
    return trees.merge(ua, ub), (sa, sb)

  return optax.GradientTransformation(init, update)


def _adamw(config: OptimizerConfig, info: Mapping[str, Leaf]) -> optax.GradientTransformation:
  return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _lion(config: OptimizerConfig, info: Mapping[str, Leaf]) -> optax.GradientTransformation:
  return optax.scale_by_lion(config.b1, config.b2)


def _sgd(config: OptimizerConfig, info: Mapping[str, Leaf]) -> optax.GradientTransformation:
  return optax.trace(config.b1) if config.b1 else optax.identity()


def _adafactor(config: OptimizerConfig, info: Mapping[str, Leaf]) -> optax.GradientTransformation:
  """Shazeer and Stern 2018: factored second moments, update clipping at RMS 1, steps relative to
  the parameter's RMS.
  """
  parts = (
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  )
  return per_matrix(optax.chain(*parts), info)


def _muon(config: OptimizerConfig, info: Mapping[str, Leaf]) -> optax.GradientTransformation:
  """Jordan et al. 2024: matrices inside blocks by Newton-Schulz, the rest (norms, tables) by Adam.

  The factor makes an update's RMS that of Adam (Liu et al. 2025, eq. 4), so that one learning rate
  serves both.
  """
  muon = optax.chain(
    optax.contrib.scale_by_muon(
      beta=config.b1, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(0, 1)
    ),
    optax.stateless(lambda u, p: u * (0.2 * math.sqrt(max(u.shape)))),
  )
  matrices = {n for n, leaf in info.items() if leaf.split and not leaf.table}
  return _split(matrices, per_matrix(muon, info), _adamw(config, info))


# (config, {name: Leaf} of the trained parameters) -> from the clipped gradient to a step of rate 1,
# before weight decay. A user's optimizer is a function like these.
OPTIMIZERS = {
  'adamw': _adamw,
  'adafactor': _adafactor,
  'lion': _lion,
  'muon': _muon,
  'sgd': _sgd,
}
# Of the optimizers that can hold their moments in 8 bits: which these are.
IN_8BIT = {'adamw': moments.ADAM, 'lion': moments.LION, 'sgd': moments.SGD}


def _direction(config: OptimizerConfig, info: Mapping[str, Leaf]) -> optax.GradientTransformation:
  """Returns the transformation that config.name names, in OPTIMIZERS or as 'module:function'.

  Raises:
    ConfigError: there is none, or a user's function that returns something else.
  """
  if config.name in OPTIMIZERS:
    return OPTIMIZERS[config.name](config, info)
  if not named_object.is_named(config.name):
    raise ConfigError(
      f"optim.name={config.name!r}; expected one of {tuple(OPTIMIZERS)} or 'module:function'"
    )
  found = named_object.load('optim.name', config.name)(config, info)
  if not isinstance(found, optax.GradientTransformation):
    raise ConfigError(
      f'optim.name={config.name} returned a {type(found).__name__}; expected an '
      'optax.GradientTransformation'
    )
  return found


def make_optimizer(
  config: OptimizerConfig, info: Mapping[str, Leaf], trained: Mapping[str, Leaf]
) -> optax.GradientTransformation:
  """Direction, weight decay, multipliers and learning rate, over the leaves `trained` of all leaves
  `info`.

  Clipping is done by the step, which needs the norm anyway.

  Raises:
    ConfigError: an unknown name, or a table that does not cover.
  """
  frozen = _by_leaf(config.freeze, info, 'optim.freeze')
  rates = _by_leaf(config.multipliers, info, 'optim.multipliers')
  if config.layer_decay != 1:
    by_depth = layer_schedule.decayed(_layer_names(info), config.layer_decay)
    rates = {n: rate * by_depth[n] for n, rate in rates.items()}
  decay = _by_leaf(config.decay, info, 'optim.decay')
  direction = _direction(config, trained)
  if config.moments == '8bit':
    if config.name not in IN_8BIT:
      raise ConfigError(
        f'optim.moments=8bit with optim.name={config.name}: only {", ".join(IN_8BIT)} can hold '
        'their moments in 8 bits; set optim.moments=float32'
      )
    axes = {n: leaf.axes for n, leaf in trained.items()}
    direction = moments.in_8bit(direction, IN_8BIT[config.name], axes)
  parts = [direction]
  # Either way one part: a decay that is switched on or off leaves the state's shape as it was.
  parts.append(
    _add_decay(config.weight_decay, {n: decay[n] for n in trained})
    if config.weight_decay
    else optax.identity()
  )
  parts.append(
    _scale_by({n: leaf.rate * rates[n] * (1 - frozen[n]) for n, leaf in trained.items()})
  )
  parts.append(optax.scale_by_learning_rate(config.schedule))
  if config.has_plateau:
    parts.append(plateau.scale_updates())
  return _in_float32(optax.chain(*parts))


def _in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
  """Moments and arithmetic in float32 whatever the parameters are: a bfloat16 average that forgets
  a thousandth a step never forgets.
  """

  def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

  return optax.GradientTransformation(
    lambda params: transform.init(wide(params)),
    lambda updates, state, params: transform.update(wide(updates), state, wide(params)),
  )
