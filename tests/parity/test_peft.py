"""Adapters against the numbers of PEFT, torch, TRL and bitsandbytes (golden/peft, made by
make_peft_goldens.py), in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from tiny_model import all_logits, place, tokens_at

from ftjax.config import keys
from ftjax.experiment import adapters
from ftjax.families import table as families
from ftjax.hf import layout, load
from ftjax.models import head, kinds, quantize
from ftjax.runtime import sharding, trees
from ftjax.runtime.sharding import spec
from ftjax.training import optimizer
from parity import peft_cases as cases

PREFIX = 'base_model.model.'
FACTORS = {'lora_a': 'lora_A.weight', 'lora_b': 'lora_B.weight', 'lora_m': 'lora_magnitude_vector'}


def adapted(case):
  """The architecture of a base with the adapter of a case."""
  c = keys.default()
  c.lora.update({'base': 'float32'} | case.lora)
  return adapters.adapted(families.architecture(load.read_config(cases.GOLDEN / case.base)), c)


def open_case(case):
  """(architecture, parameters) of a base with a new adapter."""
  folder, arch = cases.GOLDEN / case.base, adapted(case)
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  return arch, load.load_params(folder, arch, places, np.float32)


def _is_stacked(arch, leaf):
  found = arch.adapter.find(leaf.rpartition('/')[0])
  return found is None or found.is_stacked


def _module(bound, name, layer):
  """The HF module of a linear map's layer, with a dot; the head has no layers."""
  found = bound.get((f'{name}/w', (layer,))) or bound[f'{name}/w', ()]
  return found.hf.removesuffix('weight')


def tensors(arch, leaves):
  """{name in adapter_model.safetensors: array} of adapter leaves, or of a gradient by them. Rows
  beyond a layer's own rank must be 0.
  """
  out, bound = {}, {(b.leaf, b.at[:1]): b for b in layout.bindings(arch)}
  leaves = {n: x if _is_stacked(arch, n) else x[None] for n, x in leaves.items()}
  maps = {m.name: m for m in arch.adapter.maps}
  for name, leaf in leaves.items():
    place_of, _, field = name.rpartition('/')
    if field not in FACTORS:
      for b in (b for b in bound.values() if b.leaf == name):
        out[PREFIX + b.hf] = b.to_hf(leaf[b.at])
      continue
    for layer, rank in enumerate(maps[place_of].ranks):
      hf = _module(bound, place_of, layer) + FACTORS[field]
      x = leaf[layer].reshape(leaf.shape[1], -1) if field != 'lora_m' else leaf[layer].reshape(-1)
      if field != 'lora_m':
        assert not x[rank:].any(), name
        x = x[:rank].T if field == 'lora_b' else x[:rank]
      out[PREFIX + hf] = x
  return out


def with_tensors(arch, params, stored):
  """`params` with the adapter leaves of PEFT's tensors; every tensor is used."""
  declared, flat, left = kinds.declared(arch), trees.flatten(params), dict(stored)
  maps = {m.name: m for m in arch.adapter.maps}
  bound = {(b.leaf, b.at[:1]): b for b in layout.bindings(arch)}
  for name in kinds.names(arch, 'adapter'):
    place_of, _, field = name.rpartition('/')
    leaf = np.zeros(declared[name].shape, np.float32)
    whole, leaf = leaf, leaf if _is_stacked(arch, name) else leaf[None]
    if field not in FACTORS:
      for b in (b for b in bound.values() if b.leaf == name):
        leaf[b.at] = left.pop(PREFIX + b.hf).T if b.axes == 'DV' else left.pop(PREFIX + b.hf)
    else:
      for layer, rank in enumerate(maps[place_of].ranks):
        hf = _module(bound, place_of, layer) + FACTORS[field]
        x = left.pop(PREFIX + hf)
        assert field == 'lora_m' or x.shape[field == 'lora_b'] == rank, hf
        if field == 'lora_m':
          leaf[layer] = x.reshape(leaf.shape[1:])
        else:
          rows = x.T if field == 'lora_b' else x
          leaf[layer, :rank] = rows.reshape(rank, *leaf.shape[2:])
    flat[name] = place(whole, *declared[name].axes)
  left.pop(f'{PREFIX}lm_head.base_layer.weight', None)  # of the base
  if arch.tied:  # PEFT names the one table twice
    left.pop(f'{PREFIX}lm_head.weight', None)
  assert not left
  return trees.unflatten(flat)


def next_tokens(ids):
  """(labels, weights) of each next token; nothing follows the last one."""
  weights = np.ones(ids.shape, np.float32)
  weights[:, -1] = 0
  return np.roll(ids, -1, 1), weights


@functools.partial(jax.jit, static_argnums=0)
def run(arch, trained, frozen, tokens, labels, weights, where):
  """((loss, logits), gradient by `trained`)."""

  def loss(trained):
    params = trees.unflatten(frozen | trained)
    x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32)
    table, update = kinds.head_weights(arch, params), kinds.head_update(arch, params, x)
    sums = functools.partial(head.cross_entropy_sums, terms=head.LossConfig(), update=update)
    total = sums(x, table, labels, weights)[0]
    logits = all_logits(arch, params, x)
    return total / weights.sum(), logits

  return jax.value_and_grad(loss, has_aux=True)(trained)


def run_on(arch, params, ids):
  labels, weights = next_tokens(ids)
  flat, names = trees.flatten(params), kinds.names(arch, 'adapter')
  trained = {n: flat.pop(n) for n in names}
  arrays = (place(a, 'batch', 'seq') for a in (ids, labels, weights))
  return run(arch, trained, flat, *arrays, tokens_at(np.ones_like(ids)))


def close(got, expected, rtol):
  return np.abs(got - expected).max() <= rtol * np.abs(expected).max()


# Each takes seconds to compile; plain LoRA is in the twenty steps too.
EVERY_DAY = ('llama_rslora', 'llama_dora', 'qwen2_modules')
PARAMS = [pytest.param(n, marks=[pytest.mark.full] * (n not in EVERY_DAY)) for n in cases.CASES]


@pytest.mark.parametrize('name', PARAMS)
def test_loss_logits_and_gradient(name):
  """Of an adapter that PEFT saved, whose B is not 0."""
  arch, params = open_case(cases.CASES[name])
  stored = np.load(cases.FOLDER / name / 'found.npz')
  params = with_tensors(arch, params, load_file(cases.FOLDER / name / 'adapter_model.safetensors'))
  (loss, logits), gradient = run_on(arch, params, stored['ids'])
  assert float(loss) == pytest.approx(float(stored['loss']), rel=1e-6)
  assert close(np.asarray(logits), stored['logits'], 1e-5)
  got = tensors(arch, {n: np.asarray(g) for n, g in gradient.items()})
  expected = {k.removeprefix('gradient/'): stored[k] for k in stored if k.startswith('gradient/')}
  if arch.tied:
    expected.pop(f'{PREFIX}lm_head.weight', None)
  assert got.keys() == expected.keys()
  for key, e in expected.items():
    assert e.any() and close(got[key], e, 5e-5), key


def test_cases_cover_what_they_name():
  """Adapters of several ranks and scales, and each leaf that can be trained."""
  archs = {name: adapted(case) for name, case in cases.CASES.items()}
  assert {r for m in archs['llama_dora'].adapter.maps for r in m.ranks} == {3, 5, 7}
  assert len({s for m in archs['llama_rslora'].adapter.maps for s in m.scales}) >= 5
  assert len(archs['llama_modules'].adapter.trained) == 5
  for name, arch in archs.items():
    config = cases.read_config(name)
    assert config['use_dora'] == arch.adapter.dora and config['r'] == cases.CASES[name].lora['rank']


def test_pissa():
  """The initial adapter is the same part of the base, and base and adapter are the model. PEFT
  takes exact singular vectors, ours come from a range finder (models/lora.py): on these matrices,
  whose singular values lie within 2 % of each other, it holds as much of the base within 1e-3.
  """
  arch, params = open_case(cases.PISSA)
  stored, flat = np.load(cases.FOLDER / 'pissa.npz'), trees.flatten(params)
  (_, logits), _ = run_on(arch, params, stored['ids'])
  assert close(np.asarray(logits), stored['logits'], 1e-5)
  bound = {(b.leaf, b.at): b.hf for b in layout.bindings(arch)}
  names = set()
  for m in arch.adapter.maps:
    a, b = (np.asarray(flat[f'{m.name}/{f}']) for f in ('lora_a', 'lora_b'))
    for layer, (rank, scale) in enumerate(zip(m.ranks, m.scales, strict=True)):
      got = scale * b[layer].reshape(rank, -1).T @ a[layer].reshape(rank, -1)
      name = 'product/' + bound[f'{m.name}/w', (layer,)].removesuffix('.weight')
      names.add(name)
      assert close(got, stored[name], 3e-2), name
      assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(stored[name]), rel=1e-3), name
  assert names == {k for k in stored if k.startswith('product/')}


@pytest.mark.parametrize(('name', 'ratio'), [('adamw', 1.0), ('lora_plus', cases.PLUS_RATIO)])
def test_twenty_steps_of_adamw(name, ratio):
  """Losses and final adapters of torch's AdamW, and of LoRA+'s rates."""
  arch, params = open_case(cases.TRAINED)
  stored, c = np.load(cases.FOLDER / f'{name}.npz'), cases.ADAMW

  def part(prefix):
    return {k.removeprefix(prefix): stored[k] for k in stored if k.startswith(prefix)}

  params = with_tensors(arch, params, part('start/'))
  info = {
    n: dataclasses.replace(leaf, rate=ratio if n.endswith('/lora_b') else 1.0)
    for n, leaf in optimizer.leaves(kinds.declared(arch), arch.layer_slots()).items()
  }
  adapter = kinds.names(arch, 'adapter')
  fields = {f.name for f in dataclasses.fields(optimizer.OptimizerConfig)} - {'schedule'}
  chosen = c | {'name': 'adamw', 'clip_norm': 0.0, 'schedule': optax.constant_schedule(c['lr'])}
  usual = {n: v for n, v in keys.default().optim.items() if n in fields}
  del chosen['lr']
  settings = optimizer.OptimizerConfig(**(usual | chosen))
  made = optimizer.make_optimizer(settings, info, {n: info[n] for n in adapter})
  trained = {n: trees.flatten(params)[n] for n in adapter}
  state, losses = made.init(trees.unflatten(trained)), []

  @jax.jit
  def update(gradient, state, trained):
    trained, gradient = trees.unflatten(trained), trees.unflatten(gradient)
    updates, state = made.update(gradient, state, trained)
    return trees.flatten(optax.apply_updates(trained, updates)), state

  for ids in stored['ids']:
    whole = trees.unflatten(trees.flatten(params) | trained)
    (loss, _), gradient = run_on(arch, whole, ids)
    losses.append(float(loss))
    trained, state = update(gradient, state, trained)
  np.testing.assert_allclose(losses, stored['losses'], rtol=1e-4)
  got, start = tensors(arch, {n: np.asarray(x) for n, x in trained.items()}), part('start/')
  expected, rates = part('end/'), part('rate/')
  assert got.keys() == expected.keys() == rates.keys()
  for key, e in expected.items():
    assert close(got[key] - start[key], e - start[key], 1e-3), key
    assert rates[key] == pytest.approx(c['lr'] * (ratio if 'lora_B' in key else 1.0))


def test_codes_of_nf4():
  """Every code and every absmax of bitsandbytes; blocks lie along the inputs here too. Ours are
  [in, out], and two codes of half a block share a byte.
  """
  stored = np.load(cases.FOLDER / 'nf4.npz')
  np.testing.assert_array_equal(np.asarray(quantize.NF4, np.float32), stored['table'])
  np.testing.assert_array_equal(stored['weights'], cases.nf4_weights())
  for name in ('weights', 'ties'):
    w, codes = stored[name], stored[f'{name}_codes']
    outputs, inputs = w.shape
    packed = jax.jit(quantize.pack_nf4, static_argnums=1)(jnp.asarray(w.T), 64)
    found = np.asarray(packed.codes).reshape(inputs // 64, 32, outputs)
    found = np.concatenate([found >> 4, found & 15], 1).reshape(inputs, outputs).T
    is_zero = np.repeat(stored[f'{name}_absmax'] == 0, 64, 1)
    np.testing.assert_array_equal(found[~is_zero], codes[~is_zero])
    whole = np.asarray(quantize.unpack_nf4(packed, jnp.float32)).T
    assert not whole[is_zero].any()
    # Ours rounds each absmax to 8 bits (double quantization), here one scale for all outputs.
    largest = np.repeat(stored[f'{name}_absmax'].max(0, keepdims=True), 64, 1)
    wrong = np.abs(whole - stored[f'{name}_dequantized'])
    assert (wrong <= 1.00001 * largest / 255).all()


def test_dpo_with_the_base_as_reference():
  """TRL's loss, rewards and gradient of an adapter; its reference is the model without it."""
  stored = np.load(cases.FOLDER / 'dpo.npz')
  arch, params = open_case(cases.CASES['llama_lora'])
  adapter = load_file(cases.FOLDER / 'llama_lora' / 'adapter_model.safetensors')
  params = with_tensors(arch, params, adapter)
  ids, answer = stored['ids'], stored['answer'].astype(np.float32)
  labels, weights = np.roll(ids, -1, 1), np.roll(answer, -1, 1)
  weights[:, -1] = 0
  tokens, labels, weights = (place(a, 'batch', 'seq') for a in (ids, labels, weights))
  where, plain = tokens_at(np.ones_like(ids)), arch.untrained()
  flat = trees.flatten(params)
  trained = {n: flat[n] for n in kinds.names(arch, 'adapter')}

  def sums(arch, flat):
    params = trees.unflatten({n: flat[n] for n in kinds.declared(arch)})
    x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32)
    logp = head.token_logprobs(x, kinds.head_weights(arch, params), labels, weights)
    return (logp * weights).sum(1)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def step(trained):
    ratio = sums(arch, flat | trained) - jax.lax.stop_gradient(sums(plain, flat))
    rewards = cases.DPO_BETA * jax.sharding.reshard(ratio, spec(None)).reshape(2, -1)
    return -jax.nn.log_sigmoid(rewards[0] - rewards[1]).mean(), rewards

  (loss, rewards), gradient = step(trained)
  assert float(loss) == pytest.approx(float(stored['loss']), rel=1e-5)
  means = np.asarray(rewards).mean(1)
  assert means == pytest.approx(
    [float(stored[f'rewards/{side}']) for side in ('chosen', 'rejected')], rel=1e-4
  )
  for key, g in tensors(arch, {n: np.asarray(x) for n, x in gradient.items()}).items():
    assert close(g, stored[f'gradient/{key}'], 1e-4), key
