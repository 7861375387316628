"""Import → export is the identity, bit for bit; exports are whole or not there at all."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ftjax.families import table as families
from ftjax.hf import export, layout, load
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.runtime import trees
from ftjax.runtime.errors import DataError, NonFiniteError

GOLDEN = Path(__file__).parent / 'parity' / 'golden'


def load_all(path, dtype=np.float32):
  arch = families.architecture(load.read_config(path))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return load.load_params(
    path, arch, trees.unflatten(dict.fromkeys(layout.leaf_shapes(arch), place)), dtype
  ), arch


def export_as(target, path, params=None, dtype=np.float32, stop_ids=(), **options):
  loaded, arch = load_all(path)
  files = load.tokenizer_files(path)
  export.export(
    params or loaded,
    arch,
    target,
    source_config=load.read_config(path),
    tokenizer_files=files,
    dtype=dtype,
    stop_ids=stop_ids,
    **options,
  )
  return target


@pytest.mark.parametrize('max_shard_bytes', [10**9, 20_000])
def test_import_then_export_is_the_identity(tmp_path, max_shard_bytes):
  source = GOLDEN / 'llama_untied_gqa'
  out = export_as(tmp_path / 'out', source, max_shard_bytes=max_shard_bytes)
  a, b = SafetensorsFolder(source), SafetensorsFolder(out)
  assert a.tensors == b.tensors
  assert all(a.read(name).tobytes() == b.read(name).tobytes() for name in a.tensors)
  assert (len(list(out.glob('*.safetensors'))) > 1) == (max_shard_bytes == 20_000)
  assert (out / 'config.json').read_bytes() == (source / 'config.json').read_bytes()


def test_tokenizer_files_stay_byte_for_byte(tmp_path):
  source = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'in')
  files = {
    'tokenizer.json': b'{ "odd"  :\r\n1}',
    'tokenizer_config.json': b'{}\n\n',
    'chat_template.jinja': b'\xf0\x9f\x98\x80',
  }
  for name, content in files.items():
    (source / name).write_bytes(content)
  out = export_as(tmp_path / 'out', source, stop_ids=(2,))
  for name, content in files.items():
    assert (out / name).read_bytes() == content


SIDE_FILES = {
  'additional_chat_templates/rag.jinja': b'{{ messages }}\r\n',
  'additional_chat_templates/tool_use.jinja': b'\xff raw bytes',
  'vocab.txt': b'[PAD]\n',
  'merges.txt': b'#version: 0.2\n',
  'spiece.model': b'\x00\x01',
  'tokenizer.model.v3': b'\x02',
  'tekken.json': b'{"a" : 1}',
  'qwen.tiktoken': b'IQ== 0\n',
  'preprocessor_config.json': b'{}',
  'tool_template.jinja': b'{}',
}


def with_side_files(folder):
  shutil.copytree(GOLDEN / 'llama_tied', folder)
  for name, content in SIDE_FILES.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
  (folder / 'README.md').write_text('of the model it was')
  return folder


def test_further_templates_and_vocabularies_are_exported_byte_for_byte(tmp_path):
  """S14; twice, since the second export replaces a folder that has them."""
  source = with_side_files(tmp_path / 'in')
  for _ in range(2):
    out = export_as(tmp_path / 'out', source)
    found = {n: (out / n).read_bytes() for n in SIDE_FILES}
    assert found == SIDE_FILES
    assert not (out / 'README.md').exists()
  bare = export_as(tmp_path / 'out', GOLDEN / 'llama_tied')
  assert not (bare / 'additional_chat_templates').exists()


def test_further_templates_are_exported_to_a_bucket(bucket, tmp_path):
  source = with_side_files(tmp_path / 'in')
  for _ in range(2):
    export_as('gs://bucket/out', source)
    assert load.tokenizer_files('gs://bucket/out').items() >= SIDE_FILES.items()
  export_as('gs://bucket/out', GOLDEN / 'llama_tied')
  assert not [n for n in bucket.names() if 'additional' in n or n.endswith('.tiktoken')]


def test_further_templates_may_not_be_links_to_the_outside(tmp_path):
  source = with_side_files(tmp_path / 'in')
  (tmp_path / 'secret').write_text('secret')
  (source / 'additional_chat_templates' / 'x.jinja').symlink_to('../../secret')
  with pytest.raises(DataError, match='leaves the model folder'):
    load.tokenizer_files(source)


def test_a_templates_folder_with_folders_in_it_is_not_replaced(tmp_path):
  (tmp_path / 'out' / 'additional_chat_templates' / 'mine').mkdir(parents=True)
  with pytest.raises(DataError, match='additional_chat_templates'):
    export_as(tmp_path / 'out', GOLDEN / 'llama_tied')


@pytest.mark.parametrize(('key', 'value'), [('dtype', 'float32'), ('torch_dtype', 'float32')])
def test_only_the_dtype_key_of_the_config_changes(tmp_path, key, value):
  source = shutil.copytree(GOLDEN / 'llama3_rope', tmp_path / 'in')
  config = load.read_config(source)
  del config['dtype']
  config = {'zz_unknown': {'kept': [1, None]}, key: value} | config
  (source / 'config.json').write_text(json.dumps(config))
  same = export_as(tmp_path / 'same', source)
  assert (same / 'config.json').read_bytes() == (source / 'config.json').read_bytes()
  other = export_as(tmp_path / 'other', source, dtype=ml_dtypes.bfloat16)
  assert json.loads((other / 'config.json').read_text()) == config | {key: 'bfloat16'}
  assert list(json.loads((other / 'config.json').read_text())) == list(config)
  a, b = SafetensorsFolder(source), SafetensorsFolder(other)
  for name in a.tensors:
    assert b.read(name).tobytes() == a.read(name).astype(ml_dtypes.bfloat16).tobytes()


def test_a_config_without_dtype_stays_as_it_is(tmp_path):
  source = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'in')
  config = load.read_config(source)
  del config['dtype']
  (source / 'config.json').write_text(json.dumps(config))
  out = export_as(tmp_path / 'out', source)
  assert (out / 'config.json').read_bytes() == (source / 'config.json').read_bytes()
  out = export_as(tmp_path / 'half', source, dtype=ml_dtypes.bfloat16)
  assert json.loads((out / 'config.json').read_text())['torch_dtype'] == 'bfloat16'


@pytest.mark.parametrize(
  ('told', 'stop_ids', 'expected'),
  [
    ({'eos_token_id': 2, 'top_p': 0.9}, (2,), {'eos_token_id': 2, 'top_p': 0.9}),
    ({'eos_token_id': 0}, (2,), {'eos_token_id': [0, 2]}),
    ({'eos_token_id': [0, 2]}, (2, 5), {'eos_token_id': [0, 2, 5]}),
    ({'eos_token_id': [2, 0]}, (0,), {'eos_token_id': [2, 0]}),
    ({'top_k': 3}, (7,), {'top_k': 3, 'eos_token_id': [2, 7]}),
    ({'top_k': 3}, (), {'top_k': 3}),
    (None, (2,), {'bos_token_id': 1, 'eos_token_id': 2}),
    (None, (), None),
  ],
)
def test_generation_config_holds_the_trained_stop_tokens(told, stop_ids, expected):
  original = None if told is None else json.dumps(told).encode()
  got = export.generation_file(
    original, {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': None}, stop_ids
  )
  assert (None if got is None else json.loads(got)) == expected
  if told == expected:
    assert got is original


def test_the_exported_file_has_the_stop_tokens(tmp_path):
  out = export_as(tmp_path / 'out', GOLDEN / 'llama_tied', stop_ids=(9,))
  assert json.loads((out / 'generation_config.json').read_text())['eos_token_id'] == [2, 9]


def test_a_model_made_on_the_spot_gets_a_config(tmp_path):
  params, arch = load_all(GOLDEN / 'llama3_rope')
  export.export(
    params,
    arch,
    tmp_path / 'out',
    source_config=None,
    tokenizer_files={},
    dtype=np.float32,
    stop_ids=(3,),
  )
  config = load.read_config(tmp_path / 'out')
  assert families.architecture(config) == arch
  assert config.items() >= families.config(arch).items()
  for name, leaf in trees.flatten(load_all(tmp_path / 'out')[0]).items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trees.flatten(params)[name]))


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_a_non_finite_tensor_leaves_nothing_behind(tmp_path, bad):
  params, _ = load_all(GOLDEN / 'llama_tied')
  leaves = trees.flatten(params)
  leaves['stack0/block0/mlp/up/w'] = leaves['stack0/block0/mlp/up/w'].at[1, 4, 5].set(bad)
  target = tmp_path / 'deep' / 'out'
  with pytest.raises(NonFiniteError, match=r'model.layers.1.mlp.up_proj.weight\[5, 4\]'):
    export_as(target, GOLDEN / 'llama_tied', trees.unflatten(leaves))
  assert list(target.parent.iterdir()) == []
  # An older export stays as it was.
  export_as(target, GOLDEN / 'llama_tied')
  before = {p.name: p.read_bytes() for p in target.iterdir()}
  with pytest.raises(NonFiniteError):
    export_as(target, GOLDEN / 'llama_tied', trees.unflatten(leaves))
  assert {p.name: p.read_bytes() for p in target.iterdir()} == before
  assert [p.name for p in target.parent.iterdir()] == ['out']


def test_an_older_export_is_replaced_as_a_whole(tmp_path):
  export_as(tmp_path / 'out', GOLDEN / 'llama_untied_gqa', max_shard_bytes=20_000)
  (tmp_path / '.out.partial').mkdir()  # a killed process left it
  (tmp_path / '.out.partial' / 'junk').write_text('x')
  export_as(tmp_path / 'out', GOLDEN / 'llama_tied')
  names_now = sorted(os.listdir(tmp_path / 'out'))
  assert names_now == ['config.json', 'generation_config.json', 'model.safetensors']
  assert os.listdir(tmp_path) == ['out']


def test_an_export_killed_between_the_renames_is_put_back(tmp_path):
  export_as(tmp_path / 'out', GOLDEN / 'llama_tied')
  (tmp_path / 'out').rename(tmp_path / '.out.old')
  with pytest.raises(RuntimeError), export.whole_folder(tmp_path / 'out'):
    raise RuntimeError
  assert (tmp_path / 'out' / 'model.safetensors').exists()


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.tex').write_text('years of work')
  with pytest.raises(DataError, match=r'thesis\.tex'):
    export_as(tmp_path / 'out', GOLDEN / 'llama_tied')
  with pytest.raises(DataError, match='is a file'):
    export_as(tmp_path / 'out' / 'thesis.tex', GOLDEN / 'llama_tied')
  assert (tmp_path / 'out' / 'thesis.tex').read_text() == 'years of work'


def test_params_must_be_those_of_the_architecture(tmp_path):
  params, _ = load_all(GOLDEN / 'llama_tied')
  leaves = trees.flatten(params)
  del leaves['final_norm/scale']
  with pytest.raises(ValueError, match='final_norm/scale'):
    export_as(tmp_path / 'out', GOLDEN / 'llama_tied', trees.unflatten(leaves))
