"""Adapters of matrices that HF fuses of several linear maps (qkv_proj, GPT-2's c_attn): PEFT's own
are computed as PEFT does, ours leave as one of the fused matrix and come back the same. That PEFT
computes ours is checked by check_with_transformers.py.
"""

import json
import shutil

import family_models
import jax
import numpy as np
import pytest
import tiny_adapters
import tiny_model
from safetensors.numpy import load_file

from ftjax.hf import load, peft, peft_config, peft_export, peft_weights
from ftjax.hf.safetensors import write_file
from ftjax.hf.tensor_source import TensorInfo
from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError
from parity import family_cases, peft_cases

FULL = pytest.mark.full


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """A folder with a folder of each base."""
  where = tmp_path_factory.mktemp('bases')
  for name in {case.base for case in peft_cases.FUSED.values()}:
    family_models.write_folder(name, where / name)
  return where


def shardings(arch):
  return sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))


def read(path, base):
  """(architecture, parameters) of a PEFT folder on a base."""
  folder = peft.read(path)
  arch = folder.architecture(family_models.architecture(base.name))
  return arch, peft_weights.load_params(folder, base, arch, shardings, np.float32)


def random(base, seed=0, **lora):
  """(architecture, parameters) of a case with a random adapter."""
  arch = tiny_adapters.adapted(family_models.architecture(base.name), **lora)
  begun = tiny_adapters.begin(arch, family_models.params(base.name, arch.plain()))
  return arch, tiny_adapters.move(arch, begun, seed)


def export(target, base, arch, params):
  peft_export.export(
    params,
    arch,
    target,
    base=str(base),
    sha256=load.fingerprint(base),
    source_config=load.read_config(base),
    tokenizer_files={},
    stop_ids=(),
  )


def logits(name, arch, params):
  ids = family_cases.ids(family_cases.CASES[name])
  return tiny_model.logits(arch, params, ids, tiny_model.tokens_at(np.ones_like(ids)))


def close(got, expected, limit=1e-5):
  return np.abs(got - expected).max() <= limit * np.abs(expected).max()


EVERY_DAY = ('gpt2_dora', 'phi3_lora')
CASES = [pytest.param(n, marks=[FULL] * (n not in EVERY_DAY)) for n in peft_cases.FUSED]


@pytest.mark.parametrize('case', CASES)
def test_an_adapter_that_peft_saved(bases, tmp_path, case):
  """Its logits; and those of the folder that we make of it, whose factors are the parts'."""
  base, source = bases / peft_cases.FUSED[case].base, peft_cases.FOLDER / case
  wanted = np.load(source / 'found.npz')['logits']
  arch, params = read(source, base)
  assert {m.name.rpartition('/')[2] for m in arch.adapter.maps} >= {'q', 'k', 'v'}
  assert close(logits(base.name, arch, params), wanted)
  export(tmp_path / 'again', base, arch, params)
  other, found = read(tmp_path / 'again', base)
  assert other == arch
  assert_same(arch, params, found)


def assert_same(arch, params, found, limit=0.0):
  """Whether two adapters are the same, but for DoRA's lengths of layers that have none."""
  params, found = trees.flatten(params), trees.flatten(found)
  for name in kinds.names(arch, 'adapter'):
    got, wanted = np.asarray(found[name]), np.asarray(params[name])
    if name.endswith('lora_m'):
      kept = np.asarray(arch.adapter.find(name.rpartition('/')[0]).ranks) > 0
      got, wanted = got[kept], wanted[kept]
    np.testing.assert_allclose(got, wanted, rtol=limit, atol=0, err_msg=name)


OWN = {
  'lora': ('phi3', {}),
  'dora': ('phi3', {'dora': True}),
  # Parts of several ranks and scales, and of layers without an adapter.
  'patterns': (
    'gpt2',
    {
      'rank_pattern': (('layer0/attn/k', 0), ('layer1/attn/[qkv]', 0), ('.*/attn/v', 2)),
      'alpha_pattern': (('.*/attn/v', 3.0),),
    },
  ),
  'rslora': ('gpt2', {'rslora': True, 'targets': '.*/attn/[qv]|.*/mlp/up'}),
  'whole': ('phi3', {'targets': '.*/mlp/.*', 'train': '.*/attn/[qkv]/w'}),
  'pissa': ('phi3', {'init': 'pissa'}),
}


@pytest.mark.parametrize('case', [pytest.param(n, marks=[FULL] * (n == 'pissa')) for n in OWN])
def test_export_then_import_is_the_identity(bases, tmp_path, case):
  """Of ranks, scales and numbers; those of B within a rounding where parts differ in their scale.
  Without our record of the parts all of them share one factor, and the model is the same.
  """
  name, lora = OWN[case]
  base, (arch, params) = bases / name, random(bases / name, **lora)
  export(tmp_path / 'out', base, arch, params)
  folder, places = peft.read(tmp_path / 'out'), trees.flatten(shardings(arch))
  found = trees.flatten(params) | peft_weights.load_adapter(folder, arch, places, {})
  assert_same(arch, params, trees.unflatten(found), 1e-6 if case == 'patterns' else 0)
  expected = logits(name, arch, params)
  if case in ('patterns', 'dora', 'whole'):
    record = tmp_path / 'out' / peft_config.BASE_FILE
    content = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in content.items() if k != 'parts'}))
    other, params = read(tmp_path / 'out', base)
    assert other != arch
    assert close(logits(name, other, params), expected)


def test_names_and_shapes_are_peft_s(bases, tmp_path):
  """Of a module whose parts have ranks 4, 0 and 2."""
  base, (arch, params) = bases / 'gpt2', random(bases / 'gpt2', **OWN['patterns'][1])
  export(tmp_path / 'out', base, arch, params)
  tensors = load_file(tmp_path / 'out' / peft_config.WEIGHTS_FILE)
  start = f'{peft_config.PREFIX}transformer.h.0.attn.c_attn.lora_'
  a, b = tensors[f'{start}A.weight'], tensors[f'{start}B.weight']
  assert (a.shape, b.shape) == ((6, 24), (72, 6))
  assert b[:24, :4].all() and b[48:, 4:].all()
  assert not b[:24, 4:].any() and not b[24:48].any() and not b[48:, :4].any()
  config = json.loads((tmp_path / 'out' / peft_config.CONFIG_FILE).read_text())
  assert config['fan_in_fan_out'] and 'transformer.h.0.attn.c_attn' in config['target_modules']


def test_dora_of_a_part_is_refused(bases):
  """PEFT would train the lengths of all outputs of the matrix."""
  arch, _ = random(bases / 'phi3', dora=True, targets='.*/attn/[qv]')
  with pytest.raises(ConfigError, match=r'layers\.0\.self_attn\.qkv_proj .*attn/k has no adapter'):
    peft_export.check(arch)


def parts_of(change):
  def edit(content, tensors):
    del tensors
    module = next(iter(content['parts']))
    content['parts'][module] = change(content['parts'][module])

  return edit


def unknown(content, tensors):
  del tensors
  content['parts']['model.layers.9.self_attn.qkv_proj'] = [[1, 1.0]]


def outside(content, tensors):
  del content
  name = next(n for n in tensors if n.endswith('qkv_proj.lora_B.weight'))
  tensors[name][0, -1] = 1.0


WRONG = {
  'fewer': (
    parts_of(lambda parts: parts[:2]),
    'parts has .* for model.layers.0.self_attn.qkv_proj',
  ),
  'sum': (parts_of(lambda parts: [[9, 2.0], *parts[1:]]), 'ranks with the sum 12'),
  'scale': (parts_of(lambda parts: [[r, 2 * s] for r, s in parts]), 'a first scale of 2'),
  'zero': (parts_of(lambda parts: [parts[0], [4, 0.0], parts[2]]), 'expected rank and scale'),
  'text': (parts_of(lambda parts: 'x'), 'expected lists of'),
  'unknown': (unknown, 'layers.9.self_attn.qkv_proj, which has no adapter'),
  'outside': (outside, 'numbers outside the blocks'),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_record_of_parts_that_does_not_fit_is_refused(bases, tmp_path, case):
  base, (arch, params) = bases / 'phi3', random(bases / 'phi3')
  export(tmp_path / 'out', base, arch, params)
  bad, (edit, message) = shutil.copytree(tmp_path / 'out', tmp_path / 'bad'), WRONG[case]
  content = json.loads((bad / peft_config.BASE_FILE).read_text())
  tensors = load_file(bad / peft_config.WEIGHTS_FILE)
  edit(content, tensors)
  (bad / peft_config.BASE_FILE).write_text(json.dumps(content))
  infos = {n: TensorInfo(x.shape, x.dtype) for n, x in tensors.items()}
  write_file(bad / peft_config.WEIGHTS_FILE, infos, tensors.__getitem__)
  with pytest.raises(DataError, match=message):
    read(bad, base)
