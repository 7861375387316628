"""Adapters leave as PEFT folders and come back the same; PEFT's folders are read as PEFT reads."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_model
from parity import peft_cases

from ftjax.config import keys
from ftjax.experiment import adapters
from ftjax.families import table
from ftjax.hf import load, peft, peft_export
from ftjax.models import kinds
from ftjax.runtime import sharding, trees

GOLDEN = Path(__file__).parent / 'parity' / 'golden'


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


@pytest.mark.parametrize('case', peft_cases.CASES)
def test_an_adapter_that_peft_saved_computes_the_same(case):
  wanted = np.load(peft_cases.FOLDER / case / 'found.npz')
  folder = peft.read(peft_cases.FOLDER / case)
  base = GOLDEN / peft_cases.CASES[case].base
  arch = folder.architecture(table.architecture(load.read_config(base)))
  params = peft.load_params(folder, base, arch, shardings, np.float32)
  found = logits(arch, params, wanted['ids'])
  assert np.abs(found - wanted['logits']).max() < 1e-4
  plain = arch.plain()
  assert (
    np.abs(
      logits(plain, load.load_params(base, plain, shardings(plain), np.float32), wanted['ids'])
      - wanted['logits']
    ).max()
    > 1e-2
  )
