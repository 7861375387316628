"""GGUF files of every family that llama.cpp names: written and read back, refused where llama.cpp
would compute another model. parity/test_llama_cpp.py compares their logits with llama.cpp's.
"""

import gguf
import gguf_cases as cases
import numpy as np
import pytest

from ftjax import convert
from ftjax.families import table
from ftjax.hf import load
from ftjax.hf.gguf import GGUFSource
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.runtime.errors import DataError


@pytest.mark.parametrize('name', cases.CASES)
def test_a_folder_comes_back_from_gguf(tmp_path, name):
  """Bit for bit; norm weights with a 1 in them as the norm computes with them."""
  source = cases.write_folder(tmp_path / 'hf', cases.CASES[name])
  convert.convert(source, str(tmp_path / 'x.gguf'), None)
  convert.convert(str(tmp_path / 'x.gguf'), str(tmp_path / 'back'), None)
  before, after = SafetensorsFolder(source), SafetensorsFolder(tmp_path / 'back')
  assert before.tensors == after.tensors and len(before.tensors) >= 20
  shifted = table.named(table.find(load.read_config(source))).gguf.shifted
  for tensor in before.tensors:
    a, b = before.read(tensor), after.read(tensor)
    if shifted and tensor.endswith('norm.weight'):
      assert np.abs(a - b).max() <= 2.0**-24
      scale, kept = np.float32(1) + a, np.float32(1) + b
      assert np.abs(scale - kept).max() <= 2.0**-25
      np.testing.assert_array_equal(scale[scale >= 0.5], kept[scale >= 0.5])
    else:
      assert a.tobytes() == b.tobytes(), tensor
  convert.convert(str(tmp_path / 'back'), str(tmp_path / 'y.gguf'), None)
  first, second = (gguf.GGUFReader(tmp_path / f'{n}.gguf') for n in 'xy')
  for x, y in zip(first.tensors, second.tensors, strict=True):
    if shifted and 'norm' in x.name:
      np.testing.assert_array_equal(x.data[x.data >= 0.5], y.data[x.data >= 0.5])
    else:
      assert x.data.tobytes() == y.data.tobytes(), x.name


@pytest.mark.parametrize('name', ['mixtral', 'gpt2', 'gemma3', 'phi3_longrope'])
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


@pytest.mark.parametrize('reason', cases.REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, reason):
  name, change, message = cases.REFUSED[reason]
  source = cases.write_folder(tmp_path / 'hf', cases.CASES[name] | change)
  with pytest.raises(DataError, match=message):
    convert.convert(source, str(tmp_path / 'x.gguf'), None)
  assert not (tmp_path / 'x.gguf').exists()


def test_a_family_without_a_form_is_refused(tmp_path):
  config = cases.CASES['granite'] | {
    'model_type': 'granitemoehybrid',
    'layer_types': ['attention'] * 3,
    'num_local_experts': 0,
    'shared_intermediate_size': 36,
  }
  del config['mlp_bias']
  with pytest.raises(DataError, match='granitemoehybrid is not written as GGUF; supported: llama,'):
    convert.convert(cases.write_folder(tmp_path / 'hf', config), str(tmp_path / 'x.gguf'), None)
