"""Adapters leave as PEFT folders and come back the same; PEFT's folders are read as PEFT reads."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from parity import peft_cases

from ftjax import convert
from ftjax.config import keys
from ftjax.experiment import adapters, weights
from ftjax.families import table
from ftjax.hf import load, peft, peft_config, peft_export, peft_names, peft_weights
from ftjax.hf.safetensors import write_file
from ftjax.hf.tensor_source import TensorInfo
from ftjax.models import head, kinds
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError, NonFiniteError
from ftjax.serving import generator

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
      found = arch.adapter.find(map_name)
      for layer, rank in enumerate(found.ranks if found.is_stacked else ()):
        x[layer, rank:] = 0
    elif n in flat:  # DoRA's lengths, norms, embedding
      x = np.asarray(flat[n]) * (1 + 0.3 * x)
    if p.padding:
      x[(*[slice(None)] * p.axes.index('vocab'), slice(-p.padding, None))] = 0
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
  'head': {'targets': '.*/attn/q|head', 'rank_pattern': (('head', 6),), 'dora': True},
  'head_pissa': {'targets': 'head', 'init': 'pissa', 'base': 'nf4', 'block': 16},
  'nf4': {'base': 'nf4', 'block': 16},
}


# Their initial values take seconds to compile.
SLOW = ('pissa', 'nf4', 'head_pissa')


@pytest.mark.parametrize(
  'case', [pytest.param(n, marks=[pytest.mark.full] * (n in SLOW)) for n in CASES]
)
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
  read = peft_weights.load_adapter(folder, arch, trees.flatten(shardings(arch)), {})
  wrote = trees.flatten(params)
  assert read.keys() == set(kinds.names(arch, 'adapter'))
  for n, x in read.items():
    kept = np.ones(x.shape, bool)
    if n.endswith('lora_m') and n != 'head/lora_m':  # without an adapter it is nobody's
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
  params = peft_weights.load_params(folder, base, arch, shardings, np.float32)
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
  assert 7 in np.atleast_1d(kept['eos_token_id'])


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
    if arch.num_labels:
      table = jax.sharding.reshard(kinds.head_weights(arch, params), sharding.spec(None, None))
      where_to = sharding.spec('batch', 'seq', None)
      scores = jnp.einsum('BTD,RD->BTR', x, table, out_sharding=where_to)
      return (scores[..., 0] * (1 - weights)).sum()  # of the last tokens
    table, update = kinds.head_weights(arch, params), kinds.head_update(arch, params, x)
    terms = head.LossConfig()
    total = head.cross_entropy_sums(x, table, labels, weights, terms, update=update)[0]
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
  'head': ('llama_untied_gqa', 0, CASES['head'] | {'dora': False}),
  'head_dora': ('llama_untied_gqa', 0, CASES['head']),
  'head_pissa': ('llama_untied_gqa', 0, {'targets': 'head', 'init': 'pissa'}),
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
  np.save(where / 'ids.npy', 1 + tiny_model.ids(2, 12, vocab=127))  # 0 is padding
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
  for module in peft_names.adapted(arch):
    ((place, rank, _),) = module.parts
    (inputs, outputs), (a, b, magnitude) = place.sides, module.tensors

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
  for hf, (b,) in peft_names.trained(arch).items():
    other = b.to_hf(np.asarray(found[b.leaf])[b.at])
    assert np.abs(theirs.pop(f'base_model.model.{hf}') - other).max() <= 1e-4 * np.abs(other).max()
  assert not theirs


def copy(source, target, config=None, tensors=None, drop=()):
  """A PEFT folder with other settings and tensors; a tensor that is None is left out."""
  shutil.copytree(source, target)
  path = target / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
  if tensors:
    found = {n: peft.read(source).source.read(n) for n in peft.read(source).source.tensors}
    found = {n: x for n, x in (found | tensors).items() if x is not None}
    infos = {n: TensorInfo(x.shape, x.dtype) for n, x in found.items()}
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr('ftjax.hf.safetensors.check_finite', lambda name, value: None)
      write_file(target / 'adapter_model.safetensors', infos, found.__getitem__)
  for name in drop:
    (target / name).unlink()
  return target


def read_all(folder, plain):
  found = peft.read(folder)
  arch = found.architecture(plain)
  return peft_weights.load_adapter(found, arch, trees.flatten(shardings(arch)), {})


Q = 'base_model.model.model.layers.0.self_attn.q_proj.lora_'
FLOAT = np.float32
HOSTILE = {
  'ia3': ({'peft_type': 'IA3'}, {}, r"peft_type='IA3'"),
  'bias': ({'bias': 'all'}, {}, "bias='all'"),
  'fan_in': ({'fan_in_fan_out': True}, {}, 'fan_in_fan_out=True'),
  'parameters': ({'target_parameters': ['x']}, {}, 'target_parameters'),
  'lora_bias': ({'lora_bias': True}, {}, 'lora_bias=True'),
  'megatron': ({'megatron_config': {'a': 1}}, {}, 'megatron_config'),
  'alora': ({'alora_invocation_tokens': [1]}, {}, 'alora_invocation_tokens'),
  'replication': ({'layer_replication': [[0, 2]]}, {}, 'layer_replication'),
  'newer': ({'some_new_key': 3}, {}, 'some_new_key=3'),
  'pissa': ({'init_lora_weights': 'pissa'}, {}, 'path_initial_model_for_weight_conversion'),
  'pissa_niter': ({'init_lora_weights': 'pissa_niter_4'}, {}, 'pissa_niter_4'),
  'loftq': ({'init_lora_weights': 'loftq'}, {}, 'loftq'),
  'rank': ({'r': 5}, {}, r'is \[4, 32\], expected \[5, 32\]'),
  'rank_text': ({'r': '4'}, {}, "r='4'; expected a whole number"),
  'rank_zero': ({'r': 0}, {}, 'r=0'),
  'alpha': ({'lora_alpha': 0}, {}, 'lora_alpha=0; expected a positive'),
  'alpha_huge': ({'lora_alpha': float('inf')}, {}, 'adapter_config.json'),
  'pattern': ({'rank_pattern': {'(': 3}}, {}, 'rank_pattern.*no regular expression'),
  'alpha_long': ({'lora_alpha': 10**400}, {}, 'lora_alpha=1000.*expected a positive'),
  'rank_long': ({'r': 10**400}, {}, 'r=1000.*expected a whole number'),
  'pattern_kind': ({'alpha_pattern': [1]}, {}, 'alpha_pattern'),
  'targets': ({'target_modules': 3}, {}, 'target_modules=3'),
  'fewer_targets': ({'target_modules': ['k_proj']}, {}, 'nothing reads .*q_proj.lora_A'),
  'embedding': ({'target_modules': ['embed_tokens', 'q_proj']}, {}, 'embed_tokens, whose adapter'),
  'head': ({'target_modules': ['lm_head', 'q_proj']}, {}, 'lm_head, whose adapter'),
  'task': ({'task_type': 'FEATURE_EXTRACTION'}, {}, 'FEATURE_EXTRACTION'),
  'dora_without_lengths': ({'use_dora': True}, {}, 'missing .*lora_magnitude_vector'),
  'apart': (
    {'modules_to_save': ['model.layers.0.input_layernorm']},
    {'base_model.model.model.layers.0.input_layernorm.weight': np.ones(32, FLOAT)},
    'layers of a stack are trained together',
  ),
  'untied': (
    {'modules_to_save': ['embed_tokens']},
    {'base_model.model.model.embed_tokens.weight': np.ones((259, 32), FLOAT)},
    'missing base_model.model.lm_head.weight',
  ),
  'missing': ({}, {f'{Q}A.weight': None}, 'missing .*q_proj.lora_A.weight'),
  'shape': ({}, {f'{Q}B.weight': np.ones((32, 3), FLOAT)}, r'\[32, 3\], expected \[32, 4\]'),
  'extra': ({}, {'base_model.model.x.lora_A.weight': np.ones((2, 2), FLOAT)}, 'nothing reads'),
  'escape': ({}, {'../../x': np.ones(3, FLOAT)}, 'nothing reads ../../x'),
  'integers': ({}, {f'{Q}A.weight': np.ones((4, 32), np.int32)}, 'int32; expected float32'),
  'nan': ({}, {f'{Q}A.weight': np.full((4, 32), np.nan, FLOAT)}, 'lora_A.weight holds NaN'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_what_is_not_computed_in_the_same_way_is_refused(made, tmp_path, case):
  _, folder, arch, _ = made
  config, tensors, message = HOSTILE[case]
  bad = copy(folder, tmp_path / 'bad', config, tensors)
  with pytest.raises(DataError, match=message) as found:
    read_all(bad, arch.plain())
  assert str(bad) in str(found.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['bad']


def test_an_adapter_of_labels_needs_a_head_and_an_algorithm_that_trains_one(made, tmp_path):
  _, folder, arch, _ = made
  bad = copy(folder, tmp_path / 'bad', {'task_type': 'SEQ_CLS'}, {})
  with pytest.raises(ConfigError, match='bad is an adapter of a model with labels'):
    read_all(bad, arch.plain())
  with pytest.raises(DataError, match=r'score\.weight is missing'):
    peft.read(bad).count_labels(dataclasses.replace(arch.plain(), num_labels=2))


def test_patterns_that_take_forever_are_ended(made, tmp_path):
  _, folder, arch, _ = made
  slow = {'target_modules': r'(.*)*(.*)*(.*)*!'}, {'rank_pattern': {r'((\w|\.)+)+!': 4}}
  for i, config in enumerate(slow):
    begun = time.monotonic()
    with contextlib.suppress(DataError):
      peft.read(copy(folder, tmp_path / f'{i}', config)).architecture(arch.plain())
    assert time.monotonic() - begun < 20
  pattern = peft_config.Pattern(r'(.*)(.*)(.*)\3\2\1$', 'a key', peft_config.Clock(0.1))
  with pytest.raises(DataError, match='a key: its patterns take more than'):
    for _ in range(10_000):
      pattern.match('abc' * 9000)


def test_a_merge_has_the_dtype_of_most_of_the_base(made, tmp_path):
  base, folder, _, _ = made
  source, mixed = load.open_source(base), tmp_path / 'mixed'
  shutil.copytree(base, mixed)
  types = {n: FLOAT if n == 'model.norm.weight' else jnp.bfloat16 for n in source.tensors}
  infos = {n: TensorInfo(i.shape, np.dtype(types[n])) for n, i in source.tensors.items()}
  write_file(mixed / 'model.safetensors', infos, lambda n: source.read(n).astype(types[n]))
  own = copy(folder, tmp_path / 'own', drop=['ftjax_base.json'])
  convert.convert(str(own), str(tmp_path / 'out'), None, str(mixed))
  found = load.open_source(tmp_path / 'out').tensors.values()
  assert {i.dtype.name for i in found} == {'bfloat16'}


def test_an_edited_card_of_an_adapter_is_kept(made, tmp_path):
  _, _, arch, params = made
  base = made[0]

  def write(card):
    peft_export.export(
      params,
      arch,
      tmp_path / 'out',
      base=str(base),
      sha256='',
      source_config=load.read_config(base),
      tokenizer_files=load.tokenizer_files(base),
      stop_ids=(),
      card=card,
    )

  mark = b'<!-- ftjax: step 1, sha256 of the text above ' + b'0' * 64 + b' -->\n'
  write(mark)
  write(b'another card\n')
  assert (tmp_path / 'out' / 'README.md').read_bytes() == mark


def test_a_gguf_file_does_not_go_into_the_folder_of_the_base(made):
  base, folder, _, _ = made
  for place in (base, folder):
    with pytest.raises(ConfigError, match='is in the folder of the source'):
      convert.convert(str(folder), f'{place}/x.gguf', None)


def test_files_that_are_not_those_of_an_adapter(made, tmp_path):
  folder = made[1]
  bad = copy(folder, tmp_path / 'a', drop=['adapter_model.safetensors'])
  with pytest.raises(DataError, match=r'adapter_model\.safetensors is missing'):
    peft.read(bad)
  (bad / 'adapter_model.bin').write_bytes(b'x')
  with pytest.raises(DataError, match='pickled weights'):
    peft.read(bad)
  (bad / 'adapter_config.json').write_text(f'{{"r": {"1" * 5000}}}')
  with pytest.raises(DataError, match=r'adapter_config\.json: not JSON: Exceeds'):
    peft.read(bad)
  (bad / 'adapter_config.json').write_text('[1]')
  with pytest.raises(DataError, match=f'{bad}/adapter_config.json: expected a JSON object'):
    peft.read(bad)
  bad = copy(folder, tmp_path / 'b')
  (bad / 'adapter_model.safetensors').write_bytes(b'\xff' * 100)
  with pytest.raises(DataError, match=r'b/adapter_model\.safetensors: header of'):
    peft.read(bad)
  bad = copy(folder, tmp_path / 'c')
  for wrong in ({}, {'sha256': 'x', 'storage': 'int3', 'block': 64}, [1]):
    (bad / 'ftjax_base.json').write_text(json.dumps(wrong))
    with pytest.raises(DataError, match=r'ftjax_base\.json'):
      peft.read(bad)
  bad = copy(folder, tmp_path / 'd', drop=['adapter_model.safetensors'])
  (bad / 'adapter_model.safetensors').symlink_to(folder / 'adapter_model.safetensors')
  with pytest.raises(DataError, match='leaves the model folder'):
    peft.read(bad)


def test_another_base_is_refused(made, tmp_path):
  base, folder, arch, _ = made
  other = tiny_model.write_folder(tmp_path / 'other', dataclasses.replace(arch.plain()))
  place = Path(other) / 'model.safetensors'
  content = bytearray(place.read_bytes())
  content[-1] ^= 1
  place.write_bytes(bytes(content))
  with pytest.raises(DataError, match=f'{base} with weights of SHA-256 .* those of {other}'):
    convert.convert(str(folder), str(tmp_path / 'out'), None, other)
  assert not (tmp_path / 'out').exists()
  with pytest.raises(ConfigError, match='or the base of it'):
    convert.convert(str(folder), base, None)
  moved = copy(folder, tmp_path / 'moved', {'base_model_name_or_path': str(tmp_path / 'gone')})
  with pytest.raises(DataError, match=r'gone, is not there.*--base'):
    convert.convert(str(moved), str(tmp_path / 'out'), None)
  nameless = copy(folder, tmp_path / 'nameless', {'base_model_name_or_path': None})
  with pytest.raises(ConfigError, match='names no base; give its path with --base'):
    convert.convert(str(nameless), str(tmp_path / 'out'), None)
  with pytest.raises(ConfigError, match='no adapter and needs no base'):
    convert.convert(base, str(tmp_path / 'out'), None, base)
  convert.convert(str(moved), str(tmp_path / 'out'), 'bfloat16', base)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'


def test_an_adapter_that_diverged_is_not_written(made, tmp_path):
  base, _, arch, params = made
  flat = trees.flatten(params)
  flat['stack0/block0/attn/q/lora_a'] = flat['stack0/block0/attn/q/lora_a'] * np.nan
  old = tmp_path / 'out'
  shutil.copytree(made[1], old)
  before = {p.name: p.read_bytes() for p in old.iterdir()}
  with pytest.raises(NonFiniteError, match='lora_A'):
    peft_export.export(
      trees.unflatten(flat),
      arch,
      old,
      base=base,
      sha256='',
      source_config={},
      tokenizer_files={},
      stop_ids=(),
    )
  assert {p.name: p.read_bytes() for p in old.iterdir()} == before


def test_sharded_parameters_are_written_the_same(made, tmp_path, use_mesh):
  base, folder, arch, _ = made
  use_mesh(fsdp=2, tensor=2)
  read = peft_weights.load_adapter(peft.read(folder), arch, trees.flatten(shardings(arch)), {})
  assert any(not x.sharding.is_fully_replicated for x in read.values())
  files = load.tokenizer_files(base)
  settings = {'source_config': load.read_config(base), 'tokenizer_files': files, 'stop_ids': (7,)}
  sha256 = load.fingerprint(base)
  target = tmp_path / 'out'
  whole = trees.unflatten(read)
  peft_export.export(whole, arch, target, base=base, sha256=sha256, **settings)
  for path in folder.iterdir():
    assert (target / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_loads_its_export_for_evaluation(made, tmp_path):
  """The folder has the adapter alone: the base is the one that it names, or random by the seed."""
  _, folder, arch, params = made
  mesh = jax.sharding.get_mesh()
  found = trees.flatten(weights.load(str(folder), arch, mesh, 'float32', 0, ''))
  wanted = trees.flatten(kinds.with_derived(arch, params))
  assert found.keys() == wanted.keys()
  assert all(np.array_equal(found[n], wanted[n]) for n in found)
  with pytest.raises(ConfigError, match='set the keys of section lora'):
    weights.load(str(folder), arch.plain(), mesh, 'float32', 0, '')
  other = dataclasses.replace(arch, adapter=dataclasses.replace(arch.adapter, dora=True))
  with pytest.raises(ConfigError, match=r'DoRA False there, True by the config; set lora\.dora'):
    weights.load(str(folder), other, mesh, 'float32', 0, '')
  nameless = copy(folder, tmp_path / 'nameless', {'base_model_name_or_path': None})
  found = trees.flatten(weights.load(str(nameless), arch, mesh, 'float32', 5, ''))
  start = trees.flatten(kinds.init(arch, jax.random.key(5)))
  assert np.allclose(found['embed/w'], start['embed/w'], atol=1e-7)
  assert np.array_equal(found['stack0/block0/attn/q/lora_b'], wanted['stack0/block0/attn/q/lora_b'])


def test_trained_leaves_without_a_form_in_peft():
  """A bias alone of a module, or a weight whose map has an adapter."""
  arch = open_base('qwen2_tied', train='.*/attn/q/b', targets='.*/attn/v')
  with pytest.raises(ConfigError, match=r'attn/q/b alone has no form.*attn/q/w'):
    peft_export.check(arch)
  for own in ('head', '.*/attn/v'):
    with pytest.raises(ConfigError, match=rf'lora.train has {own}/w, and lora.targets gives it an'):
      peft_export.check(open_base(train=f'{own}/w', targets=own))
  peft_export.check(open_base('qwen2_tied', train='.*/attn/q/[wb]', targets='.*/attn/v'))


def test_a_rate_of_a_delta_net_has_no_form_in_peft_without_its_whole_module():
  """A_log belongs to the module that the projections are in, and PEFT saves whole modules."""
  c = keys.default()

  def adapted(**lora):
    c.lora.update({'rank': 4, 'alpha': 8.0, 'base': 'float32'} | lora)
    return adapters.adapted(family_models.architecture('qwen3_5'), c)

  for targets in ('all-linear', '.*/mlp/.*'):
    with pytest.raises(ConfigError, match=r'attn/a_log alone has no form.*linear_attn or an adap'):
      peft_export.check(adapted(train='.*/attn/a_log', targets=targets))
  peft_export.check(adapted(train='.*/attn/(conv|norm)', targets='all-linear'))
  whole = adapted(train='layer[012]/attn/.*', targets='.*/mlp/.*')
  names = [peft_names.module(n) for n in peft_names.trained(whole)]
  expected = [f'model.layers.{i}.linear_attn' for i in range(3)]
  assert sorted(set(peft_names.outermost(names))) == expected


def test_text_of_an_adapter_is_that_of_the_merged_model(made, tmp_path):
  base, folder, _, _ = made
  convert.convert(str(folder), str(tmp_path / 'merged'), None)
  settings = generator.Settings(max_tokens=8, raw=True)
  texts = []
  for path in (str(folder), str(tmp_path / 'merged'), base):
    found = generator.Generator(path, settings)
    texts.append(found.answer([found.encode_text('abc')], 0)[0])
  assert texts[0] == texts[1] != texts[2]


def test_a_run_is_told_how_to_train_from_an_adapter(made):
  with pytest.raises(DataError, match=r'model.path to its base .* init_from to the adapter'):
    load.read_config(made[1])


def test_a_copy_of_the_head_that_peft_saved_is_that_of_the_base(tmp_path):
  """PEFT reads the copy in place of the base's."""
  case = peft_cases.CASES['llama_head']
  name, base = 'base_model.model.lm_head.base_layer.weight', GOLDEN / case.base
  arch = table.architecture(load.read_config(base))
  other = peft.read(peft_cases.FOLDER / 'llama_head').source.read(name).copy()
  other[5, 7] += 1e-4
  folder = peft.read(copy(peft_cases.FOLDER / 'llama_head', tmp_path / 'other', {}, {name: other}))
  with pytest.raises(DataError, match=r'base_layer.weight is not the head of the base'):
    peft_weights.load_params(folder, base, folder.architecture(arch), shardings, np.float32)
  folder = peft.read(copy(peft_cases.FOLDER / 'llama_head', tmp_path / 'none', {}, {name: None}))
  peft_weights.load_params(folder, base, folder.architecture(arch), shardings, np.float32)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_a_copy_of_the_head_has_the_precision_that_peft_trained_with(tmp_path, dtype):
  """It is the base's head, rounded, whatever precision the base is held in here."""
  case = peft_cases.CASES['llama_head']
  name, base = 'base_model.model.lm_head.base_layer.weight', GOLDEN / case.base
  arch = table.architecture(load.read_config(base))
  head = peft.read(peft_cases.FOLDER / 'llama_head').source.read(name)
  head = head.astype(jnp.dtype(dtype))

  def read(x, held, path):
    folder = peft.read(copy(peft_cases.FOLDER / 'llama_head', tmp_path / path, {}, {name: x}))
    peft_weights.load_params(folder, base, folder.architecture(arch), shardings, jnp.dtype(held))

  for held in ('float32', 'bfloat16'):
    read(head, held, held)
  head[5, 7] *= 1.1
  with pytest.raises(DataError, match=r'base_layer.weight is not the head of the base'):
    read(head, 'float32', 'other')


@pytest.mark.parametrize('case', ['trained', 'head'])
def test_tables_of_a_padded_vocabulary_leave_without_the_padding(tmp_path, case):
  plain = open_base(**CASES[case])
  arch = dataclasses.replace(plain, vocab_multiple=48)
  params = random_params(arch)
  assert params['embed']['w'].shape[0] == 144 > plain.vocab_size
  found = peft.read(export(tmp_path / 'padded', arch, params))
  shapes = {n: p.file_shape for n, p in kinds.declared(arch).items()}
  cut = {n: x[tuple(map(slice, shapes[n]))] for n, x in trees.flatten(params).items()}
  export(tmp_path / 'plain', plain, trees.unflatten(cut))
  padded, without = (tmp_path / n / 'adapter_model.safetensors' for n in ('padded', 'plain'))
  assert padded.read_bytes() == without.read_bytes()
  for n, x in peft_weights.load_adapter(found, arch, trees.flatten(shardings(arch)), {}).items():
    np.testing.assert_array_equal(x, trees.flatten(params)[n])
