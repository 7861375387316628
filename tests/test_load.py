"""Loading is strict in both directions, the same on every mesh, and frugal with memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from ftjax.families import table as families
from ftjax.hf import layout, load
from ftjax.hf.safetensors import SafetensorsFolder, write_folder
from ftjax.hf.tensor_source import TensorInfo
from ftjax.runtime import trees
from ftjax.runtime.errors import DataError

GOLDEN = Path(__file__).parent / 'parity' / 'golden'
MODELS = ('llama_tied', 'llama_untied_gqa', 'llama3_rope', 'qwen2_tied', 'qwen2_untied')


def one_device(arch):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return trees.unflatten(dict.fromkeys(layout.leaf_shapes(arch), place))


def load_all(path, dtype=np.float32):
  arch = families.architecture(load.read_config(path))
  return load.load_params(path, arch, one_device(arch), dtype)


def rewrite(target, source, change):
  """Copies a golden model with its {name: array} changed by `change`."""
  shutil.copytree(source, target)
  stored = SafetensorsFolder(source)
  tensors = change({name: stored.read(name) for name in stored.tensors})
  info = {name: TensorInfo(value.shape, value.dtype) for name, value in tensors.items()}
  write_folder(target, info, tensors.__getitem__)
  return target


@pytest.mark.parametrize('model', MODELS)
def test_every_leaf_holds_its_tensors(model):
  source, leaves = SafetensorsFolder(GOLDEN / model), trees.flatten(load_all(GOLDEN / model))
  arch = families.architecture(load.read_config(GOLDEN / model))
  assert {n: x.shape for n, x in leaves.items()} == layout.leaf_shapes(arch)
  for b in layout.bindings(arch):
    leaf = np.asarray(leaves[b.leaf])
    np.testing.assert_array_equal(b.to_hf(leaf[b.at]), source.read(b.hf))


def test_target_dtype_is_rounded_once(tmp_path):
  whole = trees.flatten(load_all(GOLDEN / 'llama_tied'))
  half = trees.flatten(load_all(GOLDEN / 'llama_tied', ml_dtypes.bfloat16))
  for name, value in whole.items():
    assert half[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
      np.asarray(half[name]), np.asarray(value).astype(ml_dtypes.bfloat16)
    )


def test_blocks_of_rows_make_the_same_leaves(monkeypatch):
  whole = trees.flatten(load_all(GOLDEN / 'llama_untied_gqa'))
  monkeypatch.setattr(load, '_BLOCK_BYTES', 300)
  for name, value in trees.flatten(load_all(GOLDEN / 'llama_untied_gqa')).items():
    np.testing.assert_array_equal(np.asarray(value), np.asarray(whole[name]))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda t: {k: v for k, v in t.items() if 'layers.1.mlp.up' not in k},
      'missing model.layers.1.mlp.up_proj.weight',
    ),
    (
      lambda t: t | {'model.layers.0.self_attn.q_proj.bias': np.ones(4, np.float32)},
      'no parameter takes .*q_proj.bias',
    ),
    (
      lambda t: t | {'model.norm.weight': np.ones(31, np.float32)},
      r'model.norm.weight is \[31\], expected \[32\]',
    ),
    (lambda t: t | {'model.norm.weight': np.ones(32, np.int8)}, 'model.norm.weight is int8'),
    (
      lambda t: t | {'lm_head.weight': t['model.embed_tokens.weight'] + 1},
      'lm_head.weight differs',
    ),
    (
      lambda t: t | {'lm_head.weight': t['model.embed_tokens.weight'][:5]},
      'lm_head.weight differs',
    ),
  ],
)
def test_strict_in_both_directions(tmp_path, change, message):
  path = rewrite(tmp_path / 'm', GOLDEN / 'llama_tied', change)
  with pytest.raises(DataError, match=message):
    load_all(path)


def test_a_missing_bias_is_named(tmp_path):
  name = 'model.layers.1.self_attn.v_proj.bias'
  drop = lambda t: {k: v for k, v in t.items() if k != name}  # noqa: E731
  path = rewrite(tmp_path / 'm', GOLDEN / 'qwen2_tied', drop)
  with pytest.raises(DataError, match=rf'missing {name} \(parameter stack0/block0/attn/v/b\)'):
    load_all(path)


def test_a_bias_that_the_family_does_not_have_is_named(tmp_path):
  more = {'model.layers.0.self_attn.o_proj.bias': np.ones(32, np.float32)}
  path = rewrite(tmp_path / 'm', GOLDEN / 'qwen2_tied', lambda t: t | more)
  with pytest.raises(DataError, match=r'no parameter takes .*o_proj\.bias'):
    load_all(path)


def test_untied_without_a_head_is_an_error(tmp_path):
  drop = lambda t: {k: v for k, v in t.items() if k != 'lm_head.weight'}  # noqa: E731
  path = rewrite(tmp_path / 'm', GOLDEN / 'llama_untied_gqa', drop)
  with pytest.raises(DataError, match=r'missing lm_head\.weight.*tie_word_embeddings'):
    load_all(path)


def test_harmless_extras_are_taken(tmp_path):
  def extras(tensors):
    rotary = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32)}
    return tensors | rotary | {'lm_head.weight': tensors['model.embed_tokens.weight']}

  path = rewrite(tmp_path / 'm', GOLDEN / 'llama_tied', extras)
  expected = trees.flatten(load_all(GOLDEN / 'llama_tied'))
  for name, value in trees.flatten(load_all(path)).items():
    np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[name]))


def test_shardings_must_name_every_parameter():
  arch = families.architecture(load.read_config(GOLDEN / 'llama_tied'))
  places = trees.flatten(one_device(arch))
  del places['embed/w']
  with pytest.raises(ValueError, match='embed/w'):
    load.load_params(GOLDEN / 'llama_tied', arch, trees.unflatten(places), np.float32)


def test_config_of_either_spelling_gives_the_same_architecture():
  new = load.read_config(GOLDEN / 'llama3_rope')
  old = {k: v for k, v in new.items() if k not in ('rope_parameters', 'dtype')}
  scaling = dict(new['rope_parameters'])
  old |= {
    'rope_theta': scaling.pop('rope_theta'),
    'rope_scaling': scaling,
    'torch_dtype': 'float32',
  }
  assert families.architecture(old) == families.architecture(new)
  assert families.architecture(new).layers()[0].mixer.rope.scaling.factor == 4.0


@pytest.mark.parametrize(
  ('text', 'message'), [('{', 'config.json:1'), ('[]', 'JSON object'), (None, 'missing')]
)
def test_bad_configs_name_the_file(tmp_path, text, message):
  if text is not None:
    (tmp_path / 'config.json').write_text(text)
  with pytest.raises(DataError, match=message):
    load.read_config(tmp_path)


def test_paths_that_are_no_model(tmp_path):
  (tmp_path / 'x.txt').write_text('')
  with pytest.raises(DataError, match='no such model'):
    load.open_source(tmp_path / 'none')
  with pytest.raises(DataError, match=r'HF folder or a \.gguf'):
    load.open_source(tmp_path / 'x.txt')
  for name in ('a.gguf', 'b.gguf'):
    (tmp_path / name).write_bytes(b'')
  with pytest.raises(DataError, match='2 GGUF files'):
    load.open_source(tmp_path)


def test_a_gguf_file_next_to_safetensors_is_refused(tmp_path):
  model = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'm')
  (model / 'x.Q4_0.gguf').write_bytes(b'')
  for call in (load.open_source, load.read_config, load.tokenizer_files, load.fingerprint):
    with pytest.raises(DataError, match=r'holds model\.safetensors and x\.Q4_0\.gguf, two models'):
      call(model)


@pytest.mark.parametrize(
  ('path', 'remedy'),
  [
    ('.cache/smollm2', '`make assets` makes it'),
    ('ROOT/.cache/smollm2', '`make assets` makes it'),
    ('.cache/SmolLM2-135M-Instruct.Q4_1.gguf', '`make assets` makes it'),
    ('models/llama-4', 'Did you mean models/llama-3'),  # no hub name: there is a folder `models`
    ('ROOT/models/lama-3', 'Did you mean ROOT/models/llama-3'),
    ('ROOT/modles/llama-3', 'Did you mean ROOT/models/llama-3'),
    ('ROOT/models/LLAMA-3', 'Did you mean ROOT/models/llama-3'),
    ('ROOT/models/toy-q8.guf', r'Did you mean ROOT/models/toy-q8\.gguf'),
    ('~/no such model', 'not expanded here: write /'),
  ],
)
def test_a_path_where_no_model_is_comes_with_the_remedy(tmp_path, path, remedy, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'models' / 'llama-3').mkdir(parents=True)
  (tmp_path / 'models' / 'toy-q8.gguf').write_bytes(b'')
  path, remedy = (t.replace('ROOT', str(tmp_path)) for t in (path, remedy))
  with pytest.raises(DataError, match=rf'no such model.*{remedy}'):
    load.read_config(path)


def test_a_path_like_nothing_there_has_no_suggestion(tmp_path):
  (tmp_path / 'abc').mkdir()
  with pytest.raises(DataError) as error:
    load.read_config(tmp_path / 'zzzzz')
  assert str(error.value).endswith('expected a HF folder or a .gguf file')


@pytest.mark.parametrize(
  ('files', 'remedy'),
  [
    ({}, 'the folder is empty'),
    ({'tokenizer.json': '{}', 'a.txt': ''}, r'It holds a\.txt, tokenizer\.json; expected config'),
    ({'inner/config.json': '{}'}, 'inner has one; give that folder'),
    ({'refs/main': '', 'snapshots/0a1b/config.json': '{}'}, 'snapshots/0a1b has one'),
    ({'adapter_config.json': '{}'}, 'LoRA adapter.*ftjax.convert'),
    ({'params.json': '{}', 'consolidated.00.pth': ''}, "authors' own format"),
    ({'model.safetensors': ''}, r'It holds model\.safetensors'),
  ],
)
def test_a_folder_without_a_config_names_what_it_is(tmp_path, files, remedy):
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  with pytest.raises(DataError, match=rf'config\.json is missing.*{remedy}'):
    load.read_config(tmp_path)


def test_a_workdir_is_no_model_folder(tmp_path):
  (tmp_path / 'config.json').write_text('{"algorithm": "sft", "model.path": "x"}')
  with pytest.raises(DataError, match=r'is a workdir.*/export.*ftjax\.convert --source='):
    load.read_config(tmp_path)


def test_dropout_in_a_config_is_reported_once(tmp_path, caplog):
  """S19."""
  model = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'm')
  config = json.loads((model / 'config.json').read_text())
  (model / 'config.json').write_text(json.dumps(config | {'attention_dropout': 0.5}))
  for _ in range(3):
    families.architecture(load.read_config(model))
  assert [r.getMessage() for r in caplog.records] == [
    f'{model}/config.json: attention_dropout=0.5 is not applied to a decoder: set '
    'model.dropout to train with dropout'
  ]


@pytest.mark.parametrize(
  ('files', 'warned'),
  [
    ({'chat_template.jinja': 'a', 'tokenizer_config.json': '{"chat_template": "b"}'}, True),
    ({'chat_template.jinja': 'a\n', 'tokenizer_config.json': '{"chat_template": "a"}'}, False),
    (
      {
        'chat_template.jinja': 'a',
        'tokenizer_config.json': '{"chat_template": [{"name": "default", "template": "b"}]}',
      },
      True,
    ),
    (
      {
        'tokenizer_config.json': '{"chat_template": "a"}',
        'chat_template.json': '{"chat_template": "b"}',
      },
      True,
    ),
    ({'chat_template.jinja': 'a', 'tokenizer_config.json': '{}'}, False),
  ],
)
def test_two_chat_templates_that_differ_are_reported_once(tmp_path, caplog, files, warned):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  for _ in range(2):
    assert load.tokenizer_files(tmp_path).keys() == files.keys()
  lines = [r.getMessage() for r in caplog.records]
  assert len(lines) == warned
  if warned:
    first, second = files
    assert f'{first} and the chat_template of {second} differ; {first} is used' in lines[0]


def test_tokenizer_files_are_the_bytes_and_links_stay_inside(tmp_path):
  (tmp_path / 'm').mkdir()
  (tmp_path / 'm' / 'tokenizer.json').write_bytes(b'{"a":\r\n 1}')
  (tmp_path / 'm' / 'README.md').write_bytes(b'not a tokenizer file')
  assert load.tokenizer_files(tmp_path / 'm') == {'tokenizer.json': b'{"a":\r\n 1}'}
  (tmp_path / 'secret').write_text('secret')
  (tmp_path / 'm' / 'tokenizer.model').symlink_to('../secret')
  with pytest.raises(DataError, match='leaves the model folder'):
    load.tokenizer_files(tmp_path / 'm')


def test_fingerprint_follows_content_alone(tmp_path):
  first = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'a')
  print_a = load.fingerprint(first)
  os.utime(first / 'model.safetensors', (0, 0))
  (first / 'config.json').write_text('{}')
  assert load.fingerprint(shutil.copytree(first, tmp_path / 'b')) == print_a
  assert re.fullmatch('[0-9a-f]{64}', print_a)
  raw = bytearray((first / 'model.safetensors').read_bytes())
  raw[-1] ^= 1
  (first / 'model.safetensors').write_bytes(raw)
  assert load.fingerprint(first) != print_a


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
from ftjax.hf import export, load, layout as names
from ftjax.families import table as families
from ftjax.models import counts
from ftjax.runtime import trees
path, target = sys.argv[1:]
config = load.read_config(path)
arch = families.architecture(config)
shapes = names.leaf_shapes(arch)
mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'))
block = 'stack0/block0/'
specs = dict.fromkeys(shapes, P()) | {
  'embed/w': P('tensor', 'fsdp'), 'head/w': P('tensor', 'fsdp'),
  block + 'attn/q/w': P(None, 'fsdp', 'tensor'),
  block + 'attn/k/w': P(None, None, None, 'tensor'),
  block + 'attn/o/w': P(None, 'tensor', None, 'fsdp'),
  block + 'mlp/up/w': P(None, 'fsdp', 'tensor'),
  block + 'mlp/down/w': P(None, ('fsdp', 'tensor'), 'data'),
}
single = dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))
one = load.load_params(path, arch, trees.unflatten(single), np.float32)
with jax.set_mesh(mesh):
  places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
  many = load.load_params(path, arch, trees.unflatten(places), np.float32)
  for name, leaf in trees.flatten(many).items():
    assert leaf.sharding == places[name], name
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trees.flatten(one)[name]))
  files = load.tokenizer_files(path)
  export.export(many, arch, target, source_config=config, tokenizer_files=files,
    dtype=np.float32, stop_ids=())
print('devices', len(jax.devices()))
"""


def run(code, *args, **env):
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code), *map(str, args)],
    capture_output=True,
    text=True,
    cwd=Path(__file__).parent.parent,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | env,
  )


def test_sharded_over_eight_devices_equals_one_and_exports_the_same(tmp_path):
  path = GOLDEN / 'llama_untied_gqa'
  done = run(
    EIGHT_DEVICES, path, tmp_path / 'out', XLA_FLAGS='--xla_force_host_platform_device_count=8'
  )
  assert done.stdout == 'devices 8\n', done.stderr
  a, b = SafetensorsFolder(path), SafetensorsFolder(tmp_path / 'out')
  assert a.tensors == b.tensors
  assert all(a.read(name).tobytes() == b.read(name).tobytes() for name in a.tensors)
