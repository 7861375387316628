"""GGUF files of every family that llama.cpp names: written and read back, refused where llama.cpp
would compute another model. parity/test_llama_cpp.py compares their logits with llama.cpp's.
"""

import dataclasses

import family_models
import gguf
import gguf_cases as cases
import jax
import numpy as np
import pytest

from ftjax import convert
from ftjax.families import gguf as gguf_metadata
from ftjax.families import table
from ftjax.hf import export, layout, load
from ftjax.hf.gguf import GGUFSource
from ftjax.hf.safetensors import SafetensorsFolder, write_file
from ftjax.models.architecture import DeltaNetSpec
from ftjax.runtime import trees
from ftjax.runtime.errors import DataError, NonFiniteError


def opened(folder):
  """The tensors of a folder under the names of the family that its GGUF files are of, and that."""
  arch = table.in_gguf(table.architecture(load.read_config(folder)))
  return load.open_model_source(folder, arch), table.of(arch)


@pytest.mark.parametrize('name', cases.CASES)
def test_a_folder_comes_back_from_gguf(tmp_path, name):
  """Bit for bit; norm weights with a 1 in them as the norm computes with them, and rates of decay
  but for the rounding of an exponential.
  """
  source = cases.write_folder(tmp_path / 'hf', cases.CASES[name])
  convert.convert(source, str(tmp_path / 'x.gguf'), None)
  convert.convert(str(tmp_path / 'x.gguf'), str(tmp_path / 'back'), None)
  (before, family), after = opened(source), SafetensorsFolder(tmp_path / 'back')
  assert before.tensors == after.tensors and len(before.tensors) >= 20
  for tensor in before.tensors:
    a, b = before.read(tensor), after.read(tensor)
    if tensor.endswith(family.gguf.shifted):
      assert np.abs(a - b).max() <= 2.0**-24
      scale, kept = np.float32(1) + a, np.float32(1) + b
      assert np.abs(scale - kept).max() <= 2.0**-25
      np.testing.assert_array_equal(scale[scale >= 0.5], kept[scale >= 0.5])
    elif tensor.endswith('A_log'):
      assert np.abs(a - b).max() <= 2.0**-23
    else:
      assert a.tobytes() == b.tobytes(), tensor
  convert.convert(str(tmp_path / 'back'), str(tmp_path / 'y.gguf'), None)
  first, second = (gguf.GGUFReader(tmp_path / f'{n}.gguf') for n in 'xy')
  for x, y in zip(first.tensors, second.tensors, strict=True):
    if 'norm' in x.name and family.gguf.shifted:
      np.testing.assert_array_equal(x.data[x.data >= 0.5], y.data[x.data >= 0.5])
    elif x.name.endswith('ssm_a'):
      np.testing.assert_allclose(x.data, y.data, rtol=2.0**-22)
    else:
      assert x.data.tobytes() == y.data.tobytes(), x.name


@pytest.mark.parametrize('name', ['mixtral', 'gpt2', 'gemma3', 'phi3_longrope', 'qwen3_5_groups'])
def test_parts_of_a_tensor_are_those_of_the_whole(tmp_path, name):
  convert.convert(
    cases.write_folder(tmp_path / 'hf', cases.CASES[name]), str(tmp_path / 'x.gguf'), 'q8_0'
  )
  source, rng = GGUFSource(tmp_path / 'x.gguf'), np.random.default_rng(0)
  for tensor, info in source.tensors.items():
    whole = source.read(tensor)
    assert whole.shape == info.shape
    index = tuple(slice(*map(int, sorted(rng.integers(0, n + 1, 2)))) for n in whole.shape)
    np.testing.assert_array_equal(source.read(tensor, index), whole[index])


def test_routers_stay_float32(tmp_path):
  source = cases.write_folder(tmp_path / 'hf', cases.CASES['qwen3_moe'])
  convert.convert(source, str(tmp_path / 'x.gguf'), 'bfloat16')
  kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / 'x.gguf').tensors}
  assert kinds['blk.0.ffn_gate_inp.weight'] == 'F32'
  assert kinds['blk.0.ffn_gate_exps.weight'] == 'BF16'


def test_parameters_are_written_in_the_form_of_the_other_family(tmp_path):
  """As a checkpoint of Granite 4 is, whose GGUF files are of Granite 3."""
  source = cases.write_folder(tmp_path / 'hf', cases.CASES['granite4'])
  arch = table.architecture(load.read_config(source))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = trees.unflatten(dict.fromkeys(layout.leaf_shapes(arch), place))
  params = load.load_params(source, arch, places, np.float32)
  read = export.host_reader(params, table.in_gguf(arch), np.dtype(np.float32))
  files, family = opened(source)
  assert family is table.named('granite')
  for name in files.tensors:
    np.testing.assert_array_equal(read(name), files.read(name))


def test_convolutions_stay_float32(tmp_path):
  source = cases.write_folder(tmp_path / 'hf', cases.CASES['qwen3_5'])
  convert.convert(source, str(tmp_path / 'x.gguf'), 'q8_0')
  kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / 'x.gguf').tensors}
  assert kinds['blk.0.ssm_conv1d.weight'] == 'F32'
  assert kinds['blk.0.ssm_out.weight'] == 'Q8_0'


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path, monkeypatch):
  change = {'qwen35.block_count': 5, 'qwen35.nextn_predict_layers': 1}
  found = cases.write_changed(tmp_path, monkeypatch, 'qwen3_5', change, cases.FURTHER)
  source = GGUFSource(found)
  assert source.architecture() == table.architecture(cases.CASES['qwen3_5'])
  assert source.tensors.keys() == opened(tmp_path / 'hf')[0].tensors.keys()


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('qwen3_5', {'qwen35.ssm.inner_size': 48}, r'ssm\.inner_size=48; llama.cpp requires'),
    ('qwen3_5', {'qwen35.ssm.group_count': None}, r'ssm\.group_count is missing'),
    ('qwen3_5', {'qwen35.nextn_predict_layers': 4}, 'is 4 of 4 blocks; expected fewer'),
    ('qwen3_5', {'qwen35.nextn_predict_layers': 'a'}, "is 'a'; a whole number from 0 on"),
    ('qwen3_5', {'qwen35.attention.recurrent_layers': [True]}, 'expected a list of 4 flags'),
    ('granite4', {'granite.rope.scaling.finetuned': False}, 'attention without positions'),
  ],
)
def test_files_that_are_no_such_model_are_refused(tmp_path, monkeypatch, name, change, message):
  with pytest.raises(DataError, match=message):
    GGUFSource(cases.write_changed(tmp_path, monkeypatch, name, change)).architecture()


def test_a_rate_that_no_file_can_hold_is_refused(tmp_path):
  source = cases.write_folder(tmp_path / 'hf', cases.CASES['qwen3_5'])
  path = tmp_path / 'hf' / 'model.safetensors'
  stored = SafetensorsFolder(tmp_path / 'hf')
  tensors = {name: stored.read(name) for name in stored.tensors}
  tensors['model.layers.1.linear_attn.A_log'][0] = 90  # exp(90) is no float32
  write_file(path, stored.tensors, tensors.__getitem__)
  with pytest.raises(NonFiniteError, match=r'blk\.1\.ssm_a\[0\] is -inf'):
    convert.convert(source, str(tmp_path / 'x.gguf'), None)
  assert not (tmp_path / 'x.gguf').exists()


@pytest.mark.parametrize('reason', cases.REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, reason):
  name, change, message = cases.REFUSED[reason]
  source = cases.write_folder(tmp_path / 'hf', cases.CASES[name] | change)
  with pytest.raises(DataError, match=message):
    convert.convert(source, str(tmp_path / 'x.gguf'), None)
  assert not (tmp_path / 'x.gguf').exists()


def test_a_family_without_a_form_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(
    table.FAMILIES, 'qwen3_5', dataclasses.replace(table.named('qwen3_5'), gguf=None)
  )
  source = cases.write_folder(tmp_path / 'hf', cases.CASES['qwen3_5'])
  with pytest.raises(DataError, match='qwen3_5_text is not written as GGUF; supported: llama,'):
    convert.convert(source, str(tmp_path / 'x.gguf'), None)


def test_a_model_without_attention_is_refused():
  arch = family_models.architecture('qwen3_5')
  nets = tuple(b for b in arch.layers() if isinstance(b.mixer, DeltaNetSpec))[:1]
  with pytest.raises(DataError, match='without a layer of attention'):
    gguf_metadata.write_decoder(dataclasses.replace(arch, stacks=((nets, 2),)))
