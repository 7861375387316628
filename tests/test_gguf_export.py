"""GGUF files that are written: read by the `gguf` package, read back bit for bit, refused where
llama.cpp would compute something else. parity/test_llama_cpp.py asks llama.cpp itself.
"""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from parity.mixed_strings import mixed_strings
from parity.test_logits import open_model
from test_gguf import interleave
from tiny_model import QWEN2, TINY, UNTIED, init, with_mixer
from tiny_tokenizer import SPECIAL, tiny_files

from ftjax import convert
from ftjax.data.tokenizer import Tokenizer
from ftjax.families import table as families
from ftjax.hf import export, gguf_export, gguf_tokenizer, gguf_writer, load
from ftjax.hf.gguf import GGUFSource
from ftjax.hf.gguf_writer import Tensor
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.models.rope_spec import DynamicScaling, QueryScaling, Rope, RopeScaling, YarnScaling
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError, DataError, NonFiniteError

TEMPLATES = Path(__file__).parent / 'templates'
VOCAB = 400  # rows of the embeddings; the tokenizer has 384 tokens


def with_rope(arch, scaling, head_dim=32):
  def change(block):
    rope = dataclasses.replace(block.mixer.rope, scaling=scaling)
    mixer = dataclasses.replace(block.mixer, rope=rope, head_dim=head_dim)
    return dataclasses.replace(block, mixer=mixer)

  return arch.with_blocks(change)


ROPE = with_rope(TINY, RopeScaling(4.0, 1.0, 4.0, 32))
ARCHS = {'llama': TINY, 'untied': UNTIED, 'llama3_rope': ROPE, 'qwen2': QWEN2}


def write_model(folder, arch=TINY, files=None):
  export.export(
    init(arch),
    arch,
    folder,
    source_config=None,
    tokenizer_files=files or tiny_files(),
    dtype=np.float32,
    stop_ids=(0,),
  )
  return str(folder)


def of_tokenizer(arch):
  return dataclasses.replace(arch, vocab_size=VOCAB)


def split_by(pre):
  """Files of the tiny tokenizer with the pre-tokenizer of a name."""
  files = tiny_files()
  content, known = json.loads(files['tokenizer.json']), gguf_tokenizer.splittings()[pre]
  content['pre_tokenizer'] = json.loads(known.pre_tokenizer.__getstate__())
  content['model']['ignore_merges'] = known.ignore_merges
  if known.normalizer is not None:
    content['normalizer'] = json.loads(known.normalizer.__getstate__())
  return files | {'tokenizer.json': json.dumps(content).encode()}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """A HF folder of each architecture."""
  root = tmp_path_factory.mktemp('hf')
  pre = {'llama': 'smollm', 'untied': 'gpt-2', 'llama3_rope': 'llama-bpe', 'qwen2': 'qwen2'}
  return {
    name: write_model(root / name, of_tokenizer(arch), split_by(pre[name]))
    for name, arch in ARCHS.items()
  }


@pytest.mark.parametrize('name', ARCHS)
def test_a_folder_comes_back_from_gguf_bit_for_bit(folders, tmp_path, name):
  source = folders[name]
  convert.convert(source, str(tmp_path / 'x.gguf'), None)
  convert.convert(str(tmp_path / 'x.gguf'), str(tmp_path / 'hf'), None)
  before, after = SafetensorsFolder(source), SafetensorsFolder(tmp_path / 'hf')
  assert before.tensors == after.tensors and len(before.tensors) > 20
  for tensor in before.tensors:
    assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
  config = load.read_config(source)
  assert load.read_config(tmp_path / 'hf').items() >= config.items()
  assert families.architecture(config) == of_tokenizer(ARCHS[name])
  loaded = trees.flatten(open_model(tmp_path / 'x.gguf')[1])  # as train and generate read it
  for leaf, value in trees.flatten(init(of_tokenizer(ARCHS[name]))).items():
    np.testing.assert_array_equal(value, loaded[leaf])
  old, new = (Tokenizer(load.tokenizer_files(f)) for f in (source, tmp_path / 'hf'))
  assert [old.encode(t) for t in mixed_strings(200)] == [new.encode(t) for t in mixed_strings(200)]
  for value in ('template', 'bos_id', 'eos_id', 'pad_id', 'stop_ids', 'special_ids', 'prefix_ids'):
    assert getattr(old, value) == getattr(new, value), value


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [('llama', 'float16'), ('qwen2', 'q8_0'), ('llama', 'bfloat16'), ('untied', 'float32')],
)
def test_the_gguf_package_reads_every_tensor(folders, tmp_path, name, dtype):
  """Against its own conversion; vectors are float32, Q and K of llama alone are interleaved."""
  convert.convert(folders[name], str(tmp_path / 'x.gguf'), dtype)
  reader, source = gguf.GGUFReader(tmp_path / 'x.gguf'), SafetensorsFolder(folders[name])
  assert len(reader.tensors) == len(source.tensors)
  short = {'embed_tokens': 'token_embd', 'lm_head': 'output', 'self_attn.q_proj': 'attn_q'}
  found = {t.name: t for t in reader.tensors}
  assert set(short.values()) & {n.rsplit('.', 1)[0].split('.', 2)[-1] for n in found}
  for tensor in found.values():
    hf = gguf_export.gguf.hf_name(
      families.named(families.find(load.read_config(folders[name]))).rows, tensor.name
    )
    value = source.read(hf)
    if name != 'qwen2' and hf.endswith(('q_proj.weight', 'k_proj.weight')):
      value = interleave(value, 8)
    kind = {'q8_0': 'Q8_0', 'float16': 'F16', 'bfloat16': 'BF16', 'float32': 'F32'}[dtype]
    kind = gguf.GGMLQuantizationType[kind if value.ndim > 1 else 'F32']
    assert tensor.tensor_type == kind, tensor.name
    assert list(tensor.shape) == list(reversed(value.shape))
    assert tensor.data.tobytes() == gguf.quants.quantize(value, kind).tobytes(), tensor.name


def fields(path):
  return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}


def test_metadata(folders, tmp_path):
  convert.convert(folders['llama3_rope'], str(tmp_path / 'mine.gguf'), 'q8_0')
  found = fields(tmp_path / 'mine.gguf')
  assert {k: found[k] for k in found if k.startswith('llama.')} == {
    'llama.vocab_size': 400,
    'llama.context_length': 128,
    'llama.embedding_length': 32,
    'llama.block_count': 3,
    'llama.feed_forward_length': 64,
    'llama.attention.head_count': 4,
    'llama.attention.head_count_kv': 2,
    'llama.attention.key_length': 32,
    'llama.attention.value_length': 32,
    'llama.attention.layer_norm_rms_epsilon': pytest.approx(1e-5),
    'llama.rope.dimension_count': 32,
    'llama.rope.freq_base': 10000.0,
    'llama.rope.scaling.original_context_length': 32,
  }
  assert (found['general.name'], found['general.file_type']) == ('mine', 7)
  ids = {k: v for k, v in found.items() if k.endswith('_id') or '.add_' in k}
  assert ids == {
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.eot_token_id': 0,
    'tokenizer.ggml.padding_token_id': 2,
    'tokenizer.ggml.add_bos_token': False,
    'tokenizer.ggml.add_eos_token': False,
  }
  assert found['tokenizer.ggml.pre'] == 'llama-bpe'
  tokens, types = found['tokenizer.ggml.tokens'], found['tokenizer.ggml.token_type']
  assert (tokens[:3], types[:4], tokens[-1], types[-1]) == ([*SPECIAL], [3, 3, 3, 1], '[PAD399]', 5)


def test_a_qwen2_file_as_others_write_it(folders, tmp_path):
  """The head's width is not stated: it follows from the number of heads."""
  convert.convert(folders['qwen2'], str(tmp_path / 'x.gguf'), None)
  reader = gguf.GGUFReader(tmp_path / 'x.gguf')
  writer = gguf.GGUFWriter(str(tmp_path / 'y.gguf'), 'qwen2')
  optional = ('key_length', 'value_length', 'dimension_count', 'vocab_size', 'architecture')
  for key, field in reader.fields.items():
    if not key.startswith('GGUF.') and not key.endswith(optional):
      kind = field.types[0]
      writer.add_key_value(key, field.contents(), kind, field.types[-1])
  for tensor in reader.tensors:
    writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  one, other = GGUFSource(tmp_path / 'x.gguf'), GGUFSource(tmp_path / 'y.gguf')
  assert one.architecture() == other.architecture() == of_tokenizer(QWEN2)
  load.check_tensors(other, other.architecture())
  for name in one.tensors:
    np.testing.assert_array_equal(one.read(name), other.read(name))


def test_q8_0_of_blocks_that_round_badly():
  """Zeros, denormal numbers, one large number, values between two steps; bit for bit gguf's."""
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(40, 96)).astype(np.float32)
  rows[0], rows[1], rows[2, 5] = 0, 1e-41, 1e6
  rows[3] = np.linspace(-127, 127, 96) / 127 + 0.5 / 127
  [block] = gguf_writer.encoded(Tensor('x', rows.shape, 'Q8_0'), rows)
  with np.errstate(all='ignore'):
    assert block.tobytes() == gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_rows_that_fill_no_blocks_are_float32(tmp_path):
  arch = of_tokenizer(
    TINY.with_blocks(lambda b: dataclasses.replace(b, mlp=dataclasses.replace(b.mlp, ffn_dim=40)))
  )
  source = write_model(tmp_path / 'hf', arch)
  convert.convert(source, str(tmp_path / 'x.gguf'), 'q8_0')
  kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / 'x.gguf').tensors}
  assert kinds['blk.0.ffn_down.weight'] == 'F32' and kinds['blk.0.ffn_up.weight'] == 'Q8_0'


@pytest.mark.parametrize(('kind', 'value'), [('F16', 7e4), ('BF16', 3.4e38), ('Q8_0', 1e10)])
def test_what_a_type_cannot_hold_is_refused(kind, value):
  rows = np.zeros((2, 32), np.float32)
  rows[1, 3] = value
  with pytest.raises(DataError, match=f'x holds .*, which {kind} cannot hold'):
    list(gguf_writer.encoded(Tensor('x', rows.shape, kind), rows))


def test_one_tensor_is_in_memory_at_a_time():
  tensors = [Tensor(str(i), (1024, 1024), 'Q8_0') for i in range(20)]  # 4 MB each, read

  class Sink:
    size = 0

    def write(self, content):
      self.size += len(content)

  sink = Sink()
  tracemalloc.start()
  gguf_writer.write(sink, {}, tensors, lambda name: [np.full((1024, 1024), int(name), np.float32)])
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert sink.size > sum(t.nbytes for t in tensors) == 20 * 1024 * 1024 // 32 * 34
  assert peak < 3 * 4 * 2**20


# Targets


@pytest.fixture
def model(folders, tmp_path):
  """A copy of a HF folder, and the path of a GGUF file to write."""
  return Path(shutil.copytree(folders['llama'], tmp_path / 'hf')), tmp_path / 'out' / 'x.gguf'


def test_weights_that_are_not_finite_leave_nothing_and_keep_the_older_file(model):
  source, target = model
  convert.convert(str(source), str(target), 'q8_0')
  before = {p.name: p.read_bytes() for p in target.parent.iterdir()}
  entry = SafetensorsFolder(source)._entries['model.norm.weight']
  raw = bytearray((source / 'model.safetensors').read_bytes())
  raw[entry.offset + 4 : entry.offset + 8] = np.float32(np.inf).tobytes()
  (source / 'model.safetensors').write_bytes(raw)
  with pytest.raises(NonFiniteError, match=r'model\.norm\.weight\[1\] is inf'):
    convert.convert(str(source), str(target), 'float32')
  assert before == {p.name: p.read_bytes() for p in target.parent.iterdir()}
  assert set(before) == {'x.gguf', 'Modelfile'}


def test_an_interrupted_write_leaves_nothing(model):
  source, target = model
  config, files = load.read_config(source), load.tokenizer_files(source)
  weights, seen = load.open_source(source), []

  def read(name):
    seen.append(name)
    if len(seen) == 5:
      assert [p.name for p in target.parent.iterdir()] == ['.x.gguf.partial']
      raise KeyboardInterrupt
    return weights.read(name)

  arch = families.architecture(config)
  dtypes = dict.fromkeys(weights.tensors, 'float32')
  with pytest.raises(KeyboardInterrupt):
    gguf_export.export(target, arch, config, files, read, dtypes)
  assert not list(target.parent.iterdir())


def test_other_files_are_not_replaced(model):
  source, target = model
  target.parent.mkdir()
  target.write_bytes(b'mine')
  with pytest.raises(DataError, match='no GGUF file; it is not replaced'):
    convert.convert(str(source), str(target), None)
  target.unlink()
  beside = target.with_name('Modelfile')
  beside.write_text('FROM llama3\n')
  with pytest.raises(DataError, match=r'Modelfile is there.*another folder'):
    convert.convert(str(source), str(target), None)
  assert not target.exists() and beside.read_text() == 'FROM llama3\n'
  beside.unlink()
  target.mkdir()
  with pytest.raises(DataError, match='is a folder; give the name of a file'):
    convert.convert(str(source), str(target), None)


def test_targets_and_dtypes_that_contradict_each_other(model):
  source, target = model
  with pytest.raises(ConfigError, match='--dtype=q8_0 is of GGUF files; expected float32 or'):
    convert.convert(str(source), str(target.parent), 'q8_0')
  with pytest.raises(ConfigError, match='in the folder of the source'):
    convert.convert(str(source), str(source / 'x.gguf'), None)
  convert.convert(str(source), str(target), None)
  with pytest.raises(ConfigError, match='is the source itself'):
    convert.convert(str(target), str(target), 'q8_0')


def test_a_bucket_gets_the_same_file(model, bucket):
  source, target = model
  convert.convert(str(source), str(target), 'q8_0')
  convert.convert(str(source), 'gs://bucket/out/x.gguf', 'q8_0')
  path = export.files_lib.as_path('gs://bucket/out/x.gguf')
  assert path.read_bytes() == target.read_bytes()
  assert path.with_name('Modelfile').read_bytes() == target.with_name('Modelfile').read_bytes()


# Models that are refused


def test_llama3_rope_of_qwen2_is_refused(tmp_path):
  """llama.cpp computes plain rotary embedding there, whatever the file says."""
  source = write_model(
    tmp_path / 'hf', with_rope(of_tokenizer(QWEN2), RopeScaling(4.0, 1.0, 4.0, 32))
  )
  with pytest.raises(DataError, match=r"rope_scaling is not applied.*'qwen2'"):
    convert.convert(source, str(tmp_path / 'x.gguf'), None)


@pytest.mark.parametrize(
  ('rope', 'named'),
  [
    (Rope(scaling=YarnScaling(4.0, 32, 1.2)), r'scaling\.attention_factor=1\.2 would be 1\.138'),
    (Rope(scaling=DynamicScaling(4.0, 32)), 'DynamicScaling.*has no form in GGUF'),
    (Rope(fraction=0.5), 'part of the head'),
    (Rope(scaling=RopeScaling(4.0, 1.0, 4.0, 32), fraction=0.5), 'part of the head'),
    (Rope(query=QueryScaling(0.1, 32)), 'QueryScaling'),
    (None, "layer 0.mixer.rope=None would be 'Rope'"),
  ],
)
def test_a_rope_that_the_files_cannot_hold_is_refused(tmp_path, rope, named):
  arch = of_tokenizer(with_mixer(TINY, rope=rope))
  with pytest.raises(DataError, match=named):
    gguf_export.export(tmp_path / 'x.gguf', arch, {}, tiny_files(), None, {})


def test_a_reward_model_is_refused(tmp_path):
  arch = dataclasses.replace(of_tokenizer(TINY), num_labels=1)
  with pytest.raises(DataError, match='a reward model has no form'):
    gguf_export.export(tmp_path / 'x.gguf', arch, {}, tiny_files(), None, {})
