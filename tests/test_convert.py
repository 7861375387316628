"""The convert entry: HF folder, GGUF file or workdir to HF folder; exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from parity.toy_gguf import Toy, write_toy

from ftjax import convert
from ftjax.hf.gguf import GGUFSource
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.runtime.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / 'parity' / 'golden'


def run(*flags):
  command = [sys.executable, '-m', 'ftjax.convert', *flags]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def same_tensors(a, b):
  return a.tensors == b.tensors and all(
    a.read(n).tobytes() == b.read(n).tobytes() for n in a.tensors
  )


def test_a_hf_folder_is_copied_exactly(tmp_path):
  convert.convert(str(GOLDEN / 'llama3_rope'), str(tmp_path / 'out'), None)
  assert same_tensors(
    SafetensorsFolder(tmp_path / 'out'), SafetensorsFolder(GOLDEN / 'llama3_rope')
  )
  for name in ('config.json', 'generation_config.json'):
    assert (tmp_path / 'out' / name).read_bytes() == (GOLDEN / 'llama3_rope' / name).read_bytes()


def test_further_chat_templates_are_converted_byte_for_byte(tmp_path):
  source = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'in')
  names = 'additional_chat_templates/rag.jinja', 'vocab.txt', 'spiece.model'
  for name in names:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(b'\xff\r\n' + name.encode())
  for _ in range(2):
    convert.convert(str(source), str(tmp_path / 'out'), 'bfloat16')
    assert all((tmp_path / 'out' / n).read_bytes() == b'\xff\r\n' + n.encode() for n in names)


@pytest.mark.parametrize('family', ['llama', 'gemma2'])
def test_quantized_weights_are_not_converted(tmp_path, family):
  source = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'in')
  config = json.loads((source / 'config.json').read_text())
  config |= {'model_type': family, 'quantization_config': {'quant_method': 'awq', 'bits': 4}}
  (source / 'config.json').write_text(json.dumps(config))
  with pytest.raises(DataError, match=r"quantization_config \(quant_method='awq'\)"):
    convert.convert(str(source), str(tmp_path / 'out'), None)
  assert not (tmp_path / 'out').exists()


def test_a_gguf_file_becomes_a_hf_folder(tmp_path):
  write_toy(tmp_path / 'toy.gguf', Toy(types=('Q8_0', 'Q4_1', 'F16')), 'gpt2')
  convert.convert(str(tmp_path / 'toy.gguf'), str(tmp_path / 'out'), None)
  out, source = SafetensorsFolder(tmp_path / 'out'), GGUFSource(tmp_path / 'toy.gguf')
  assert same_tensors(out, source)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['torch_dtype'] == 'float32'
  convert.convert(str(tmp_path / 'toy.gguf'), str(tmp_path / 'half'), 'bfloat16')
  half = SafetensorsFolder(tmp_path / 'half')
  for name in source.tensors:
    assert half.read(name).tobytes() == source.read(name).astype(ml_dtypes.bfloat16).tobytes()
  config = json.loads((tmp_path / 'half' / 'config.json').read_text())
  assert config['torch_dtype'] == 'bfloat16'


def test_a_qwen2_folder_is_copied_and_one_without_a_bias_refused(tmp_path):
  source = GOLDEN / 'qwen2_tied'
  convert.convert(str(source), str(tmp_path / 'out'), None)
  assert same_tensors(SafetensorsFolder(tmp_path / 'out'), SafetensorsFolder(source))
  shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'other')
  shutil.copy(source / 'config.json', tmp_path / 'other' / 'config.json')
  with pytest.raises(DataError, match=r'missing model\.layers\.0\.self_attn\.q_proj\.bias'):
    convert.convert(str(tmp_path / 'other'), str(tmp_path / 'out'), None)


def test_weights_that_lack_a_layer_are_refused(tmp_path):
  """As the first part of a split model does."""
  shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'part')
  config = json.loads((tmp_path / 'part' / 'config.json').read_text())
  config['num_hidden_layers'] += 1
  (tmp_path / 'part' / 'config.json').write_text(json.dumps(config))
  with pytest.raises(DataError, match=r'missing model\.layers'):
    convert.convert(str(tmp_path / 'part'), str(tmp_path / 'out'), None)
  assert not (tmp_path / 'out').exists()


def test_a_folder_of_other_weights_is_not_replaced(tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'lora.safetensors').write_bytes(b'x')
  with pytest.raises(DataError, match=r'lora\.safetensors'):
    convert.convert(str(GOLDEN / 'llama_tied'), str(tmp_path / 'mine'), None)
  assert (tmp_path / 'mine' / 'lora.safetensors').exists()


def test_a_workdir_gives_its_export(tmp_path):
  shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'run' / 'export')
  (tmp_path / 'run' / 'config.json').write_text('{}')
  convert.convert(str(tmp_path / 'run'), str(tmp_path / 'out'), 'float32')
  assert same_tensors(SafetensorsFolder(tmp_path / 'out'), SafetensorsFolder(GOLDEN / 'llama_tied'))


def test_the_source_is_never_the_target(tmp_path):
  model = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'm')
  with pytest.raises(ConfigError, match='source itself'):
    convert.convert(str(model), str(tmp_path / 'x' / '..' / 'm'), None)
  assert (model / 'model.safetensors').exists()


@pytest.mark.parametrize('source', ['/no/such', './no', 'no.gguf', 'a/b/c', '~/x'])
def test_what_is_no_path_and_no_hub_name(source, tmp_path):
  with pytest.raises(DataError, match='no such file or folder'):
    convert.convert(source, str(tmp_path / 'out'), None)


@pytest.mark.parametrize(
  ('flags', 'code', 'message'),
  [
    (['--source=/no/such', '--target=OUT'], 3, 'error: --source=/no/such'),
    (['--help'], 0, ''),
    (['--source=MODEL'], 2, 'error: --source and --target are needed'),
    (['--source=gs:/bucket/run', '--target=OUT'], 2, 'error: --source=gs:/bucket/run: write gs://'),
    (['--source=MODEL', '--target=gs:/bucket'], 2, 'error: --target=gs:/bucket: write gs://bucket'),
    (['--source=MODEL', '--target=OUT', '--dtype=int3'], 2, 'int3'),
    (['--sorce=MODEL', '--target=OUT'], 2, 'sorce'),
    (['--source=MODEL', '--target=OUT', 'more'], 2, 'more'),
    (['--source=NAN', '--target=OUT'], 4, 'model.norm.weight[0]'),
    (['--source=MODEL', '--target=OUT'], 0, ''),
  ],
)
def test_exit_codes(tmp_path, flags, code, message):
  broken = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'nan')
  source = SafetensorsFolder(broken)
  raw = bytearray((broken / 'model.safetensors').read_bytes())
  entry = source._entries['model.norm.weight']
  raw[entry.offset : entry.offset + 4] = np.float32(np.nan).tobytes()
  (broken / 'model.safetensors').write_bytes(raw)
  places = {'MODEL': GOLDEN / 'llama_tied', 'OUT': tmp_path / 'out', 'NAN': broken}
  for word, place in places.items():
    flags = [flag.replace(word, str(place)) for flag in flags]
  done = run(*flags)
  assert done.returncode == code, done.stderr
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
  assert (tmp_path / 'out').exists() == (code == 0 and flags != ['--help'])


def test_converting_imports_neither_jax_nor_torch(tmp_path):
  write_toy(tmp_path / 'toy.gguf', Toy(), 'gpt2')
  code = f"""
import sys
from ftjax import convert
assert not {{'jax', 'torch', 'numpy'}} & sys.modules.keys()
convert.convert({str(tmp_path / 'toy.gguf')!r}, {str(tmp_path / 'out')!r}, None)
assert not {{'jax', 'torch', 'transformers'}} & sys.modules.keys()
"""
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, env=os.environ)
