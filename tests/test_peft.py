"""Adapters leave as PEFT folders and come back the same; PEFT's folders are read as PEFT reads."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from parity import peft_cases

from ftjax import convert
from ftjax.config import keys
from ftjax.experiment import adapters
from ftjax.families import table
from ftjax.hf import load, peft, peft_export, peft_names
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.models import head, kinds
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError, NonFiniteError

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests' / 'parity' / 'golden'


def shardings(arch):
  return sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))


def open_base(name='llama_untied_gqa', labels=0, **lora):
  """The model of a base in golden/ with the adapter of a section lora."""
  arch = table.architecture(load.read_config(GOLDEN / name))
  c = keys.default()
  c.lora.update({'rank': 4, 'alpha': 8.0, 'base': 'float32'} | lora)
  return adapters.adapted(dataclasses.replace(arch, num_labels=labels), c)


def random_params(arch, name='llama_untied_gqa', seed=0):
  """Base weights of golden/, and an adapter in which nothing is zero but rows beyond a rank."""
  rng = np.random.default_rng(seed)
  held = dataclasses.replace(arch, num_labels=0)
  flat = trees.flatten(load.load_params(GOLDEN / name, held, shardings(held), np.float32))
  out = {}
  for n, p in kinds.declared(arch).items():
    out[n] = flat.get(n)
    if p.origin != 'adapter':
      continue
    x = rng.normal(size=p.shape).astype(np.float32) * 0.2
    map_name, _, leaf = n.rpartition('/')
    if leaf in ('lora_a', 'lora_b', 'lora_a0', 'lora_b0'):
      for layer, rank in enumerate(arch.adapter.find(map_name).ranks):
        x[layer, rank:] = 0
    elif n in flat:  # DoRA's lengths, norms, embedding
      x = np.asarray(flat[n]) * (1 + 0.3 * x)
    out[n] = tiny_model.place(x.astype(np.float32), *p.axes)
  return trees.unflatten(out)


def export(folder, arch, params, name='llama_untied_gqa', **more):
  path = str(GOLDEN / name)
  given = {
    'base': path,
    'sha256': load.fingerprint(path),
    'source_config': load.read_config(path),
    'tokenizer_files': load.tokenizer_files(path),
    'stop_ids': (),
  }
  peft_export.export(params, arch, folder, **(given | more))
  return folder


RANKS = (('layer1/attn/q', 7), ('.*/mlp/down', 3), ('layer0/attn/k', 0))
CASES = {
  'lora': {},
  'rslora': {'rslora': True, 'rank': 5},
  'dora': {'dora': True},
  'pissa': {'init': 'pissa'},
  'pissa_dora': {'init': 'pissa', 'dora': True},
  'patterns': {'rank_pattern': RANKS[:2], 'alpha_pattern': (('.*/attn/k', 20.0),), 'rank': 5},
  'some_layers': {'targets': 'layer[02]/attn/[qo]', 'dora': True},
  'trained': {'train': 'embed/w|head/w|.*norm/scale', 'targets': '.*/attn/v'},
  'nf4': {'base': 'nf4', 'block': 16},
}


@pytest.mark.parametrize('case', CASES)
def test_export_then_import_is_the_identity(tmp_path, case):
  arch = open_base(**CASES[case])
  params = random_params(arch)
  export(tmp_path / 'out', arch, params)
  folder = peft.read(tmp_path / 'out')
  found = folder.architecture(arch.plain())
  assert (found.base, found.block) == (arch.base, arch.block)
  assert found.adapter.trained == tuple(
    sorted(arch.adapter.trained, key=found.adapter.trained.index)
  )
  assert found.adapter.dora == arch.adapter.dora
  factor = 2 if arch.adapter.pissa else 1
  for m in arch.adapter.maps:
    other = found.adapter.find(m.name)
    assert other.ranks == tuple(factor * r for r in m.ranks)
    # alpha / rank; some quotients that rsLoRA makes are no quotient of a float64 by its rank
    assert other.scales == pytest.approx(m.scales, rel=1e-15)
    assert np.float32(other.scales).tolist() == np.float32(m.scales).tolist()
  assert len(found.adapter.maps) == len(arch.adapter.maps)
  read = peft.load_adapter(folder, arch, trees.flatten(shardings(arch)))
  wrote = trees.flatten(params)
  assert read.keys() == set(kinds.names(arch, 'adapter'))
  for n, x in read.items():
    kept = np.ones(x.shape, bool)
    if n.endswith('lora_m'):  # of a layer without an adapter it is nobody's
      kept[np.equal(arch.adapter.find(n.rpartition('/')[0]).ranks, 0)] = False
    assert np.array_equal(np.asarray(x)[kept], np.asarray(wrote[n])[kept]), n


def logits(arch, params, ids):
  return tiny_model.logits(arch, params, ids, tiny_model.tokens_at(np.ones_like(ids)))


# A case of each kind; all of them in make test-all: each takes seconds to compile.
EVERY_DAY = ('llama_dora', 'qwen2_modules')
PEFT_CASES = [
  pytest.param(n, marks=[pytest.mark.full] * (n not in EVERY_DAY)) for n in peft_cases.CASES
]


@pytest.mark.parametrize('case', PEFT_CASES)
def test_an_adapter_that_peft_saved_computes_the_same(case):
  wanted = np.load(peft_cases.FOLDER / case / 'found.npz')
  folder = peft.read(peft_cases.FOLDER / case)
  base = GOLDEN / peft_cases.CASES[case].base
  arch = folder.architecture(table.architecture(load.read_config(base)))
  params = peft.load_params(folder, base, arch, shardings, np.float32)
  assert np.abs(logits(arch, params, wanted['ids']) - wanted['logits']).max() < 1e-4


@pytest.mark.parametrize('case', peft_cases.CASES)
def test_settings_that_peft_saved_are_those_of_the_section_lora(case):
  """Ranks, scales and leaves, by patterns of either side."""
  found = peft_cases.CASES[case]
  folder = peft.read(peft_cases.FOLDER / case)
  arch = open_base(found.base, **found.lora)
  other = folder.architecture(arch.plain())
  assert other.adapter.maps == arch.adapter.maps
  assert set(other.adapter.trained) == set(arch.adapter.trained)
  assert other.adapter.dora == arch.adapter.dora


PROMPT = 'Hello'


def byte_base(folder):
  """A base with a tokenizer, tied; and its architecture."""
  path = tiny_model.write_folder(folder)
  return path, table.architecture(load.read_config(path))


def byte_adapter(tmp_path, base, plain, **lora):
  """A PEFT folder of a base with a tokenizer; (folder, architecture, parameters)."""
  c = keys.default()
  c.lora.update({'rank': 4, 'alpha': 64.0, 'base': 'float32'} | lora)
  arch = adapters.adapted(plain, c)
  flat = trees.flatten(load.load_params(base, arch, shardings(arch), np.float32))
  rng = np.random.default_rng(1)
  for n in kinds.names(arch, 'adapter'):
    x = rng.normal(size=flat[n].shape) * 0.3
    flat[n] = tiny_model.place(x.astype(np.float32), *kinds.declared(arch)[n].axes)
  params = trees.unflatten(flat)
  peft_export.export(
    params,
    arch,
    tmp_path / 'adapter',
    base=base,
    sha256=load.fingerprint(base),
    source_config=load.read_config(base),
    tokenizer_files=load.tokenizer_files(base),
    stop_ids=(7,),
  )
  return tmp_path / 'adapter', arch, params


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(base, PEFT folder, architecture, parameters)."""
  where = tmp_path_factory.mktemp('made')
  base, plain = byte_base(where / 'base')
  return base, *byte_adapter(where, base, plain)


def test_the_merged_model_computes_what_base_and_adapter_do(made, tmp_path):
  base, folder, arch, params = made
  convert.convert(str(folder), str(tmp_path / 'merged'), None)
  plain = arch.plain()
  merged = load.load_params(tmp_path / 'merged', plain, shardings(plain), np.float32)
  ids = tiny_model.ids(2, 12)
  whole = logits(arch, params, ids)
  assert np.abs(logits(plain, merged, ids) - whole).max() < 1e-4 * np.abs(whole).max()
  before = load.load_params(base, plain, shardings(plain), np.float32)
  assert np.abs(logits(plain, before, ids) - whole).max() > 0.1 * np.abs(whole).max()
  kept = json.loads((tmp_path / 'merged' / 'generation_config.json').read_text())
  assert kept['eos_token_id'] == [257, 7] or 7 in np.atleast_1d(kept['eos_token_id'])


def parity_python():
  """The interpreter with torch and peft; skips where there is none."""
  found = os.environ.get('FTJAX_PARITY_PYTHON', str(ROOT / '.venv-parity/bin/python'))
  if not Path(found).exists():
    pytest.skip(f'{found} is not there: `make parity` makes it, FTJAX_PARITY_PYTHON names another')
  return found


@functools.partial(jax.jit, static_argnums=0)
def gradient(arch, trained, frozen, ids, labels, weights, where):
  """By `trained`, of the mean next-token loss, or of the scores at the last tokens."""

  def loss(trained):
    params = trees.unflatten(frozen | trained)
    x = kinds.apply(arch, params, ids, where, dtype=jnp.float32)
    table = jax.sharding.reshard(kinds.head_weights(arch, params), sharding.spec(None, None))
    if arch.num_labels:
      return jnp.einsum('BD,RD->', x[:, -1], table)
    total = head.cross_entropy_sums(
      x, kinds.head_weights(arch, params), labels, weights, head.LossConfig()
    )[0]
    return total / weights.sum()

  return jax.grad(loss)(trained)


def our_gradient(arch, params, ids):
  """{name of the tensor: gradient}, as `export` would write it."""
  weights = np.ones(ids.shape, np.float32)
  weights[:, -1] = 0
  flat = trees.flatten(params)
  trained = {n: flat.pop(n) for n in kinds.names(arch, 'adapter') if not n.endswith('0')}
  rows = [tiny_model.place(a, 'batch', 'seq') for a in (ids, np.roll(ids, -1, 1), weights)]
  where = tiny_model.tokens_at(np.ones_like(ids))
  return gradient(arch, trained, flat, *rows, where)


# Base, labels, section lora.
WRITTEN = {
  'lora': ('llama_untied_gqa', 0, {}),
  'rslora': ('llama_untied_gqa', 0, {'rslora': True, 'rank': 5}),
  'dora_patterns': (
    'llama_untied_gqa',
    0,
    {'dora': True, 'rank_pattern': RANKS, 'alpha_pattern': (('.*/attn/k', 20.0),)},
  ),
  'pissa': ('qwen2_untied', 0, {'init': 'pissa'}),
  'pissa_dora': ('qwen2_untied', 0, {'init': 'pissa', 'dora': True}),
  'trained': ('llama_untied_gqa', 0, {'train': 'embed/w|head/w|.*norm/scale'}),
  'tied': ('qwen2_tied', 0, {'train': 'embed/w', 'targets': 'layer1/.*'}),
  'reward': ('qwen2_tied', 1, {}),
}


@pytest.fixture(scope='module')
def by_peft(tmp_path_factory):
  """A folder with what PEFT computes with each of WRITTEN, in a process of its own."""
  python, where = parity_python(), tmp_path_factory.mktemp('peft')
  for case, (name, labels, lora) in WRITTEN.items():
    arch = open_base(name, labels, **lora)
    export(where / case, arch, random_params(arch, name), name)
  np.save(where / 'ids.npy', tiny_model.ids(2, 12, vocab=128))
  jobs = {case: str(GOLDEN / name) for case, (name, _, _) in WRITTEN.items()}
  (where / 'jobs.json').write_text(json.dumps(jobs))
  done = subprocess.run(
    [python, ROOT / 'tests/parity/open_with_peft.py', where],
    capture_output=True,
    text=True,
    env=os.environ | {'OMP_NUM_THREADS': '1'},
  )
  assert not done.returncode, done.stderr
  return where


@pytest.mark.full
@pytest.mark.parametrize('case', WRITTEN)
def test_peft_computes_the_same_with_our_folder(by_peft, case):
  """Logits, gradient, merged logits, no warning."""
  name, labels, lora = WRITTEN[case]
  arch = open_base(name, labels, **lora)
  params, ids = random_params(arch, name), np.load(by_peft / 'ids.npy')
  stored = np.load(by_peft / f'{case}.npz')
  assert not stored['warnings'].tolist()
  ours = logits(arch, params, ids)
  ours = ours[:, -1] if labels else ours
  size = np.abs(ours).max()
  assert np.abs(stored['logits'] - ours).max() <= 1e-4 * max(1, size)
  assert np.abs(stored['merged'] - ours).max() <= 1e-3 * max(1, size)
  theirs = {k.removeprefix('gradient/'): stored[k] for k in stored if k.startswith('gradient/')}
  found = our_gradient(arch, params, ids)
  for place, m in peft_names.adapted(arch):
    rank, (inputs, outputs) = m.ranks[place.layer], place.sides
    a, b, magnitude = place.tensors

    def own(leaf, place=place):
      return np.asarray(found[f'{place.name}/{leaf}'])[place.binding.at]

    pairs = [
      (theirs.pop(a)[:rank], peft_names.to_hf(own('lora_a')[:rank], inputs)),
      (theirs.pop(b)[:, :rank], peft_names.to_hf(own('lora_b')[:rank], outputs).T),
    ]
    if arch.adapter.dora:
      pairs.append((theirs.pop(magnitude), peft_names.to_hf(own('lora_m')[None], outputs)[0]))
    for one, other in pairs:
      assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max(), place
  for hf, b in peft_names.trained(arch).items():
    other = b.to_hf(np.asarray(found[b.leaf])[b.at])
    assert np.abs(theirs.pop(f'base_model.model.{hf}') - other).max() <= 1e-4 * np.abs(other).max()
  assert not theirs
