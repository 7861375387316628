"""python -m ftjax.plan --config=FILE --topology=v5e:16x16 [--suggest] [--json]

Ahead-of-time compiles the training step of a config for hardware that is not attached, and prints
its memory, communication and estimated time per device. If it does not fit, settings that do are
printed, and the exit code is 5."""

import dataclasses
import json
import math
import os
import tempfile

import ml_collections
from absl import flags

from ftjax import cli
from ftjax.config import validation
from ftjax.planning import topology
from ftjax.runtime import compiler_options
from ftjax.runtime.errors import CheckError

cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  '[SLICESx]KIND:SHAPE, for example v5e:16x16, 2xv5e:16x16, h200:8; or v5litepod-16, v5p-8.',
  required=True,
)
_SUGGEST = flags.DEFINE_bool(
  'suggest', False, 'Compile other meshes, micro-batches and remat policies, and print the best.'
)
_SEARCH = flags.DEFINE_bool('search', True, 'Look for what fits when the config does not.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object instead of text.')
_TRIES = flags.DEFINE_integer('tries', 6, 'Most compilations of --suggest.', lower_bound=1)


def _gib(size: float) -> str:
  return f'{size / 2**30:.2f}'


def _memory_lines(found) -> list[str]:
  held = found.memory
  rows = [
    ('parameters', held.parameters),
    ('optimizer state', held.optimizer),
    ('gradients', held.gradients),
    ('activations, other temporaries', held.activations),
    ('peak', held.peak),
  ]
  of = '' if math.isinf(found.capacity) else f' of {_gib(found.capacity)}'
  lines = [f'{name:<32}{_gib(size):>10}' for name, size in rows]
  return [f'{"GiB of a device":<32}', *lines[:-1], lines[-1] + of]


def _rollout_lines(found) -> list[str]:
  rollout = found.rollout
  if rollout is None:
    return []
  step = found.memory.peak + rollout.auxiliary
  lines = ['During rollouts, GiB of a device:']
  lines += [
    f'{name:<32}{_gib(size):>10}'
    for name, size in (
      ('auxiliary models', rollout.auxiliary),
      ('weights for sampling', rollout.weights),
      ('key-value cache', rollout.cache),
      ('peak of rollouts', rollout.peak),
      ('peak of the step', step),
    )
  ]
  if not math.isnan(rollout.seconds):
    lines.append(
      f'Decoding takes at least {rollout.seconds:.3g} s a rollout if all completions have the '
      'maximal length; prefill, rewards and log-probs take additional time'
    )
  return ['', *lines]


def _cost_lines(found) -> list[str]:
  cost = found.cost
  lines = [
    f'{found.rows} rows of {found.length} = {cost.tokens:,} tokens a step; '
    f'{cost.flops:.3e} model FLOPs, {cost.flops / cost.tokens:.3e} a token'
  ]
  if math.isnan(cost.seconds):
    return [*lines, 'No time is estimated for a CPU.']
  per_device = cost.tokens / cost.seconds / found.devices
  return [
    *lines,
    f'Estimate, uncalibrated, from peak rates (a real step is slower): {cost.seconds:.3g} s, '
    f'{per_device:,.0f} tokens/s a device, MFU {cost.mfu:.0%}, bound by {cost.bound}',
    f'  matrix products {cost.compute:.3g} s, memory {cost.traffic:.3g} s, '
    f'links {cost.links:.3g} s, between slices or hosts {cost.network:.3g} s',
  ]


def _collective_lines(found) -> list[str]:
  if found.collectives is None:
    return [
      'Collectives: unknown, and not in the estimate: the compiler did not print its program.'
    ]
  if not found.collectives:
    return ['No collectives.']
  head = f'{"collective":<20}{"axes":<16}{"size":>5}{"count":>8}{"GiB":>10}{"GiB sent":>10}'
  return [head] + [
    f'{c.kind:<20}{c.axes:<16}{c.group_size:>5}{c.count:>8}{_gib(c.bytes):>10}{_gib(c.sent):>10}'
    + ('  over the data-center network' if c.network else '')
    for c in found.collectives
  ]


def _gathering_lines(found) -> list[str]:
  at = found.gathering
  if at is None or not (at.layered or at.whole or at.unseen):
    return []
  lines = [f'Weights gathered one layer at a time, inside the loop: {len(at.layered)} stacks']
  if at.unseen:
    lines.append(f'  not found there: {", ".join(at.unseen)}')
  if at.whole:
    lines.append(
      f'  buffers as large as all layers gathered (or saved activations): {", ".join(at.whole)}'
    )
  return lines


def text(found, name: str) -> str:
  """Returns the report of a compile.Forecast as text."""
  settings = ' '.join(f'{k}={v}' for k, v in found.settings.items())
  adapted = f' ({found.trained:,} trained)' if found.trained < found.parameters else ''
  lines = [
    f'{name}: {found.parameters:,} parameters{adapted} on {found.slice}, {found.devices} devices',
    settings,
    f'compiled in {found.compile_seconds:.0f} s; attention: kernels/{found.attention}.py',
    f'compiler options: {compiler_options.format_flags(found.compiler_options) or "none"}',
    '',
  ]
  if found.memory is None:
    needed = f'{_gib(found.needed)} GiB' if found.needed else 'more'
    line = f'Does not fit: the {found.refused} needs {needed} of {_gib(found.capacity)} GiB.'
    return '\n'.join([*lines, line])
  held = [f'{n} ({_gib(b)} GiB)' for n, b in found.replicated.items()]
  return '\n'.join(
    [
      *lines,
      *_memory_lines(found),
      *_rollout_lines(found),
      '',
      *_cost_lines(found),
      '',
      *_collective_lines(found),
      '',
      f'Parameters replicated on every device: {", ".join(held) or "none"}',
      *_gathering_lines(found),
      'It fits.' if found.fits else 'It does not fit.',
    ]
  )


def _json(found) -> dict:
  out = dataclasses.asdict(found)
  if found.cost:
    out['cost'] |= {'seconds': found.cost.seconds, 'bound': found.cost.bound, 'calibrated': False}
  if found.memory:
    out['memory']['activations'] = found.memory.activations
  plain = json.dumps(out).replace('Infinity', 'null').replace('NaN', 'null')
  return json.loads(plain)


def main() -> None:
  """Plans one config, or searches for better settings."""
  with tempfile.TemporaryDirectory(prefix='ftjax-plan-') as dump:
    _plan(flags.FLAGS.config, topology.parse(_TOPOLOGY.value), dump)


def _plan(c: ml_collections.ConfigDict, where: topology.Topology, dump: str) -> None:
  validation.validate(c)
  os.environ.update(topology.environment(where, dump))
  import jax

  # Where a user's module has imported jax already, it has read JAX_PLATFORMS before.
  jax.config.update('jax_platforms', os.environ['JAX_PLATFORMS'])
  from ftjax.config import algorithms
  from ftjax.experiment import label_names
  from ftjax.experiment.model import check_writes, random_config
  from ftjax.families import table
  from ftjax.hf import label_files
  from ftjax.planning import compile, known_models

  random = c.model.random.to_dict()
  shape = known_models.read(c.model.path) if c.model.path else random_config(random)
  make_loss = cli.algorithm(c.algorithm).make_loss
  arch = table.architecture(shape, c.model.family)
  table.check_own(c.model.family, arch, f'model.path={c.model.path}')
  head = label_names.head(c)
  is_masked = algorithms.of(c).predicts_masked
  check_writes(arch, c.model.path or 'model.random', head, is_masked)
  if head is not None:
    shape = label_files.labeled(arch.family, shape, head)
    arch = table.architecture(shape, c.model.family)
  # A name may stand for a shape without a tokenizer: each new token is taken to need a row.
  size = arch.vocab_size + len((*c.model.add_tokens, *c.model.add_special_tokens))
  arch = dataclasses.replace(
    arch,
    vocab_size=size,
    vocab_multiple=c.model.vocab_multiple,
  )
  name = c.model.path or 'model.random'
  found = compile.make(c, where, arch, make_loss, dump)
  best = found if found.fits else None
  if _SUGGEST.value or (_SEARCH.value and not found.fits):
    other = compile.better(c, where, arch, make_loss, _TRIES.value, dump)
    if other and (best is None or other.cost.seconds < best.cost.seconds):
      best = other
  if _JSON.value:
    print(json.dumps(_json(found) | {'suggestion': best and best.settings}))
  else:
    print('\n' + text(found, name))
    if best is not None and best is not found:
      print('\nThe fastest candidate that fits:\n\n' + text(best, name))
  if not found.fits:
    raise CheckError(_verdict(found, best))


def _verdict(found, best) -> str:
  if best is None:
    return (
      f'does not fit on {found.slice}, and no other settings were found that do; use a larger slice'
    )
  settings = ' '.join(f'--config.{k}={v}' for k, v in best.settings.items())
  return f'does not fit on {found.slice}; this does: {settings}'


if __name__ == '__main__':
  cli.run(main)
