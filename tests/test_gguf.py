"""GGUF files are presented as HF would store the model; what is not understood is refused."""

import dataclasses
import json
import os
import shutil

import gguf
import numpy as np
import pytest
from parity.toy_gguf import Toy, toy_tensors, weight, write_toy
from tokenizers import Tokenizer

from ftjax.families import table as families
from ftjax.families.gguf_rope import llama3_factors, llama3_scaling
from ftjax.hf import file_marks, gguf_tokenizer, layout, load
from ftjax.hf import gguf as gguf_source
from ftjax.hf.gguf import GGUFSource, half_rotation
from ftjax.models.rope_spec import RopeScaling
from ftjax.runtime.errors import DataError

TYPES = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0')


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
  """A toy model whose matrices have all types that the `gguf` package can quantize to."""
  path = tmp_path_factory.mktemp('toy') / 'toy.gguf'
  write_toy(path, Toy(tied=False, types=TYPES), 'gpt2', tokenizer__chat_template='{{ messages }}')
  return path


def interleave(w, head_dim):
  """llama.cpp's permutation of Q and K, HF → GGUF, row by row."""
  out = np.empty_like(w)
  for head in range(0, w.shape[0], head_dim):
    for i in range(head_dim // 2):
      out[head + 2 * i] = w[head + i]
      out[head + 2 * i + 1] = w[head + head_dim // 2 + i]
  return out


def test_rows_of_q_and_k_go_back_to_half_rotation():
  w = np.arange(3 * 8 * 2).reshape(24, 2)
  np.testing.assert_array_equal(half_rotation(interleave(w, 8), 8), w)
  # Pairs (0, 1), (2, 3), ... of the file are the pairs (0, H/2), (1, H/2 + 1), ... of HF.
  np.testing.assert_array_equal(half_rotation(np.arange(4), 4), [0, 2, 1, 3])


def test_tensors_are_dequantized_under_hf_names(toy):
  source, model = GGUFSource(toy), Toy(tied=False, types=TYPES)
  shapes = toy_tensors(model, source.tensors['lm_head.weight'].shape[0])
  assert len(source.tensors) == len(shapes)
  kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(toy).tensors}
  assert {k.name for k in kinds.values()} == set(TYPES)
  pairs = {
    'token_embd.weight': 'model.embed_tokens.weight',
    'output.weight': 'lm_head.weight',
    'blk.1.ffn_down.weight': 'model.layers.1.mlp.down_proj.weight',
    'blk.0.attn_v.weight': 'model.layers.0.self_attn.v_proj.weight',
    'blk.0.ffn_norm.weight': 'model.layers.0.post_attention_layernorm.weight',
    'blk.1.attn_norm.weight': 'model.layers.1.input_layernorm.weight',
  }
  for stored, name in pairs.items():
    packed = gguf.quants.quantize(weight(stored, shapes[stored]), kinds[stored])
    expected = gguf.quants.dequantize(packed, kinds[stored])
    np.testing.assert_array_equal(source.read(name), expected)
    assert source.tensors[name] == (expected.shape, np.float32)


def test_q_is_unpermuted_and_parts_equal_the_whole(toy):
  source, rng = GGUFSource(toy), np.random.default_rng(0)
  name = 'model.layers.0.self_attn.k_proj.weight'
  stored = weight('blk.0.attn_k.weight', (32, 64))
  kind = {t.name: t.tensor_type for t in gguf.GGUFReader(toy).tensors}['blk.0.attn_k.weight']
  stored = gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind)
  np.testing.assert_array_equal(interleave(source.read(name), 16), stored)
  for other in [name, 'model.layers.1.self_attn.o_proj.weight', 'model.norm.weight']:
    whole = source.read(other)
    for _ in range(10):
      index = tuple(slice(*map(int, sorted(rng.integers(0, n + 1, 2)))) for n in whole.shape)
      np.testing.assert_array_equal(source.read(other, index), whole[index])


def write_blocks(path, kind, rows, width, seed=0):
  """A file whose embedding is random bytes of a type: any number in any field of its blocks."""
  raw = gguf.GGMLQuantizationType[kind]
  size, nbytes = gguf.GGML_QUANT_SIZES[raw]
  stored = np.random.default_rng(seed).integers(0, 256, (rows, width // size * nbytes), np.uint8)
  writer = gguf.GGUFWriter(str(path), 'llama')
  writer.add_tensor('token_embd.weight', stored, raw_dtype=raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return stored, raw


@pytest.mark.parametrize('kind', gguf_source.TYPES)
def test_every_type_is_dequantized_as_by_the_gguf_package(tmp_path, kind):
  """Bit for bit, whole and in part; of float types the stored numbers themselves."""
  stored, raw = write_blocks(tmp_path / 'x.gguf', kind, 5, 512)
  source = GGUFSource(tmp_path / 'x.gguf')
  with np.errstate(all='ignore'):
    expected = gguf.quants.dequantize(stored, raw)
  got = source.read('model.embed_tokens.weight')
  assert got.dtype == np.float32 and got.shape == (5, 512)
  np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
  part = source.read('model.embed_tokens.weight', (slice(2, 4), slice(100, 300)))
  np.testing.assert_array_equal(part, expected[2:4, 100:300])


@pytest.mark.parametrize('kind', ['IQ2_XXS', 'IQ3_S', 'IQ4_NL', 'IQ4_XS', 'NVFP4'])
def test_other_types_are_refused_by_name(tmp_path, kind):
  write_blocks(tmp_path / 'x.gguf', kind, 2, 256)
  with pytest.raises(DataError, match=f'token_embd.weight is {kind}; supported: F32, .*Requantize'):
    GGUFSource(tmp_path / 'x.gguf')


@pytest.mark.parametrize('kind', ['Q4_K', 'Q6_K'])
def test_k_quants_against_hand_arithmetic(tmp_path, kind):
  """One block of 256 numbers, unpacked here from the description of the format."""
  rng, size = np.random.default_rng(3), {'Q4_K': 144, 'Q6_K': 210}[kind]
  block = rng.integers(0, 256, size, dtype=np.uint8)
  scale = np.array([0.01, 0.02], np.float16).view(np.uint8)
  if kind == 'Q4_K':
    block[:4] = scale
    expected = q4_k(block)
  else:
    block[-2:] = scale[:2]
    expected = q6_k(block)
  path = tmp_path / 'k.gguf'
  writer = gguf.GGUFWriter(str(path), 'llama')
  raw = gguf.GGMLQuantizationType[kind]
  writer.add_tensor('token_embd.weight', np.tile(block, (2, 1)), raw_dtype=raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  got = GGUFSource(path).read('model.embed_tokens.weight', (slice(1, 2),))
  np.testing.assert_allclose(got[0], expected, rtol=1e-6, atol=1e-6)


def q4_k(block):
  d, dmin = block[:4].view(np.float16).astype(np.float64)
  packed, quants, out = block[4:16].astype(int), block[16:].astype(int), []
  for j in range(8):
    if j < 4:
      scale, low = packed[j] & 63, packed[j + 4] & 63
    else:
      scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4
      low = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4
    chunk = quants[32 * (j // 2) : 32 * (j // 2) + 32]
    out += [d * scale * ((q >> 4) if j % 2 else (q & 15)) - dmin * low for q in chunk]
  return np.array(out)


def q6_k(block):
  low, high = block[:128].astype(int), block[128:192].astype(int)
  scales, d = block[192:208].view(np.int8).astype(int), float(block[208:].view(np.float16)[0])
  out = np.zeros(256)
  for half in range(2):
    for i in range(32):
      lo, hi = low[64 * half :], high[32 * half + i]
      parts = [lo[i] & 15, lo[i + 32] & 15, lo[i] >> 4, lo[i + 32] >> 4]
      for k, part in enumerate(parts):
        q = (part | ((hi >> 2 * k) & 3) << 4) - 32
        out[128 * half + 32 * k + i] = d * scales[8 * half + 2 * k + i // 16] * q
  return out


def test_config_is_the_architecture(toy):
  config = load.read_config(toy)
  arch = families.architecture(config)
  assert config['rms_norm_eps'] == 1e-5  # the file holds 9.999999747378752e-06
  mixer, mlp = arch.layers()[0].mixer, arch.layers()[0].mlp
  assert (arch.model_dim, arch.num_layers, mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) == (
    64,
    2,
    4,
    2,
    16,
  )
  assert (mlp.ffn_dim, mixer.rope.theta, arch.tied, arch.max_len) == (96, 10000.0, False, 256)
  assert (config['bos_token_id'], config['eos_token_id'], config['pad_token_id']) == (1, 2, 2)
  load.check_tensors(load.open_source(toy), arch)
  assert {n: s.shape for n, s in GGUFSource(toy).tensors.items()} == {
    b.hf: b.hf_shape for b in layout.bindings(arch)
  }


def test_a_folder_with_one_gguf_is_a_model(toy, tmp_path):
  shutil.copy(toy, tmp_path / 'x.gguf')
  assert load.read_config(tmp_path) == load.read_config(toy)
  assert load.tokenizer_files(tmp_path) == load.tokenizer_files(toy)


# Models in parts


@pytest.fixture
def parts(tmp_path):
  """The first of three parts of the toy model."""
  whole = Toy(tied=False, types=('F32', 'Q8_0', 'F16'))
  write_toy(tmp_path / 'whole.gguf', whole, 'gpt2')
  (tmp_path / 'parts').mkdir()
  write_toy(tmp_path / 'parts' / 'toy.gguf', whole, 'gpt2', split=8)
  parts = sorted(p.name for p in (tmp_path / 'parts').iterdir())
  assert parts == [f'toy-0000{i}-of-00003.gguf' for i in (1, 2, 3)]
  return tmp_path / 'parts' / parts[0]


def test_a_model_in_parts_is_the_model_in_one_file(parts, tmp_path):
  """S11: by its first part, and by its folder."""
  whole = GGUFSource(tmp_path / 'whole.gguf')
  for path in (parts, parts.parent):
    source = load.open_source(path)
    assert source.tensors == whole.tensors
    for name in whole.tensors:
      np.testing.assert_array_equal(source.read(name), whole.read(name))
    assert load.read_config(path) == whole.config()
    assert load.tokenizer_files(path) == load.tokenizer_files(tmp_path / 'whole.gguf')
    load.check_tensors(source, families.architecture(load.read_config(path)))
    assert [name for name, _, _ in file_marks.outline(path)] == sorted(os.listdir(parts.parent))


def test_every_part_counts_for_the_fingerprint(parts):
  before = load.fingerprint(parts)
  last = parts.with_name('toy-00003-of-00003.gguf')
  content = bytearray(last.read_bytes())
  content[-1] ^= 1
  last.write_bytes(content)
  assert load.fingerprint(parts) != before


@pytest.mark.parametrize('number', [2, 3])
def test_any_part_names_the_model(parts, number):
  later = parts.with_name(f'toy-0000{number}-of-00003.gguf')
  assert load.read_config(later) == load.read_config(parts)
  assert load.tokenizer_files(later) == load.tokenizer_files(parts)
  assert load.fingerprint(later) == load.fingerprint(parts)
  assert file_marks.stamp(later) == file_marks.stamp(parts)
  later.unlink()
  for path in (parts, parts.parent):
    with pytest.raises(DataError, match=f'part {number} of 3, {later.name}, is missing'):
      load.open_source(path)


def test_without_the_first_part_it_is_named(parts):
  later = parts.with_name('toy-00002-of-00003.gguf')
  parts.unlink()
  for path in (parts.parent, later):
    with pytest.raises(DataError, match=r'part 1 of 3, toy-00001-of-00003\.gguf, is missing'):
      load.open_source(path)


def test_parts_of_two_models_are_refused(parts, tmp_path):
  second, third = (parts.with_name(f'toy-0000{i}-of-00003.gguf') for i in (2, 3))
  kept = second.read_bytes()
  shutil.copy(third, second)
  with pytest.raises(DataError, match=r'00002-of-00003.gguf: .*says part 3 of 3; expected part 2'):
    load.open_source(parts)
  shutil.copy(parts, second)  # a part twice
  with pytest.raises(DataError, match='says part 1 of 3; expected part 2 of 3'):
    load.open_source(parts)
  other = Toy(tied=False, num_layers=1)
  write_toy(tmp_path / 'b.gguf', other, 'gpt2', split=5)
  shutil.copy(tmp_path / 'b-00002-of-00003.gguf', second)
  with pytest.raises(DataError, match=r'00002-of-00003\.gguf: split\.tensors\.count=12, and 21'):
    load.open_source(parts)
  # The second of two parts of other sizes, whose tensors are the first one's.
  write_toy(tmp_path / 'c.gguf', Toy(tied=False, num_layers=2), 'gpt2', split=7)
  shutil.copy(tmp_path / 'c-00002-of-00003.gguf', second)
  with pytest.raises(DataError, match=r'is also in toy-00001|tensors, split\.tensors\.count=21'):
    load.open_source(parts)
  second.write_bytes(kept)
  load.open_source(parts)
  shutil.copy(tmp_path / 'whole.gguf', parts.with_name('other.gguf'))
  with pytest.raises(DataError, match='holds 4 GGUF files'):
    load.open_source(parts.parent)


def test_names_and_numbers_of_parts_that_contradict_each_other(parts, tmp_path):
  """A whole file under the name of a part; parts that say another count; a count of a million."""
  alone = shutil.copy(tmp_path / 'whole.gguf', tmp_path / 'toy-00001-of-00002.gguf')
  with pytest.raises(DataError, match=r'00001-of-00002\.gguf: its metadata says 1 parts.*name 2'):
    load.open_source(alone)
  two = parts.rename(parts.with_name('toy-00001-of-00002.gguf'))
  with pytest.raises(DataError, match='says 3 parts, its name 2'):
    load.open_source(two)
  many = parts.with_name('many.gguf')
  write_toy(many, Toy(), 'gpt2', split__count=1_000_000, split__no=0)
  with pytest.raises(DataError, match='part 2 of 1000000, many-00002-of-1000000'):
    load.open_source(many)
  write_toy(many, Toy(), 'gpt2', split__count='three')
  with pytest.raises(DataError, match=r"split\.count is 'three'; a whole number"):
    load.open_source(many)


def test_a_part_that_is_cut_is_named(parts):
  second = parts.with_name('toy-00002-of-00003.gguf')
  content = second.read_bytes()
  for size in (0, 20, len(content) // 2, len(content) - 1):
    second.write_bytes(content[:size])
    with pytest.raises(DataError, match=r'00002-of-00003\.gguf: not a readable GGUF file'):
      load.open_source(parts)


def test_a_renamed_part_asks_for_its_name(parts):
  other = parts.rename(parts.with_name('mine.gguf'))
  with pytest.raises(DataError, match=r'part 2 of 3, mine-00002-of-00003\.gguf, is missing'):
    load.open_source(other)


# Llama 3.1, 3.2, and one with four rotary frequencies on the ramp.
SCALINGS = [
  (RopeScaling(8.0, 1.0, 4.0, 8192), 500000.0, 128),
  (RopeScaling(32.0, 1.0, 4.0, 8192), 500000.0, 64),
  (RopeScaling(4.0, 1.0, 4.0, 32), 10000.0, 32),
]


@pytest.mark.parametrize(('scaling', 'theta', 'head_dim'), SCALINGS)
def test_llama3_scaling_is_recovered_from_the_divisors(scaling, theta, head_dim):
  factors = llama3_factors(scaling, theta, head_dim).astype(np.float32)
  assert (factors == 1).any() and (factors == scaling.factor).any()
  assert llama3_scaling(factors, theta, head_dim, None, 'x') == scaling
  assert llama3_scaling(factors, theta, head_dim, scaling.original_len, 'x') == scaling


def test_llama3_scaling_with_other_factors_computes_the_same():
  scaling = RopeScaling(8.0, 2.0, 8.0, 8192)
  factors = llama3_factors(scaling, 5e5, 128).astype(np.float32)
  assert llama3_scaling(factors, 5e5, 128, 8192, 'x') == scaling
  # Without original_len the scale is a convention, and the divisors are the same.
  free = llama3_scaling(factors, 5e5, 128, None, 'x')
  assert free == RopeScaling(8.0, 1.0, 4.0, 4096)
  np.testing.assert_allclose(llama3_factors(free, 5e5, 128), factors, rtol=1e-6)


def test_divisors_by_hand():
  # wavelengths 2 pi and 2 pi * 100: below 32/4 = 8 kept, above 32/1 = 32 divided by the factor
  np.testing.assert_allclose(llama3_factors(RopeScaling(4.0, 1.0, 4.0, 32), 10000.0, 4), [1.0, 4.0])
  # wavelength 2 pi * 10**0.5 = 19.87: smooth = (32/19.87 - 1)/3 = 0.2035, divisor 1/(0.7965/4 +
  # 0.2035) = 2.4836
  got = llama3_factors(RopeScaling(4.0, 1.0, 4.0, 32), 10.0, 4)[1]
  np.testing.assert_allclose(got, 2.4836, rtol=1e-4)


def test_other_divisors_are_refused():
  good = llama3_factors(RopeScaling(8.0, 1.0, 4.0, 8192), 5e5, 128)
  assert llama3_scaling(np.ones(64), 5e5, 128, None, 'x') is None
  bad = [
    np.full(64, 2.0),
    good[::-1],
    np.where(np.arange(64) == 30, good * 1.01, good),
    good[:10],
    good * np.nan,
  ]
  for factors in bad:
    with pytest.raises(DataError, match='rope_freqs'):
      llama3_scaling(factors, 5e5, 128, None, 'x')


def test_scaled_rope_reaches_the_config(tmp_path):
  scaling, theta, head_dim = SCALINGS[2]
  factors = tuple(llama3_factors(scaling, theta, head_dim))
  write_toy(tmp_path / 'x.gguf', Toy(rope_factors=factors, head_dim=head_dim), 'gpt2')
  config = load.read_config(tmp_path / 'x.gguf')
  assert families.architecture(config).layers()[0].mixer.rope.scaling == scaling
  load.check_tensors(load.open_source(tmp_path), families.architecture(config))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'llama__rope__scaling__type': 'longrope'}, "scaling.type='longrope'"),
    ({'llama__rope__scaling__type': 'yarn'}, 'rope.scaling.factor is missing'),
    ({'llama__attention__key_length': 32}, 'part of the head'),
  ],
)
def test_unknown_rotary_embeddings_are_refused(tmp_path, fields, message):
  write_toy(tmp_path / 'x.gguf', Toy(), 'gpt2', **fields)
  with pytest.raises(DataError, match=message):
    load.read_config(tmp_path)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('llama__attention__head_count_kv', 0),
    ('llama__block_count', 'two'),
    ('llama__rope__freq_base', 'fast'),
    ('llama__block_count', 10**12),
    # Settings of other architectures, which would be ignored.
    ('llama__logit_scale', 8.0),
    ('llama__attn_logit_softcapping', 50.0),
    ('llama__attention__causal', False),
  ],
)
def test_senseless_metadata_is_a_data_error(tmp_path, key, value):
  write_toy(tmp_path / 'x.gguf', Toy(), 'gpt2')
  source = GGUFSource(tmp_path / 'x.gguf')
  name = key.replace('__', '.')
  stated = dict(source.file.values) | {name: value}
  source.file = dataclasses.replace(source.file, values=stated)
  with pytest.raises(DataError, match=name):
    source.config()


def write_plain(path, arch='llama', tensors=('token_embd.weight',), kind='F32'):
  writer = gguf.GGUFWriter(str(path), arch)
  for name in tensors:
    raw = gguf.GGMLQuantizationType[kind]
    data = np.zeros((2, 32), np.float32)
    writer.add_tensor(name, gguf.quants.quantize(data, raw), raw_dtype=raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'arch': 'falcon'}, "architecture='falcon'.*from their HF folder"),
    (
      {'tensors': ('blk.0.attn_q_norm.weight',)},
      'no HF name is known for tensor blk.0.attn_q_norm.weight',
    ),
    ({'tensors': ('blk.0.attn_sinks.weight',)}, 'no HF name'),
  ],
)
def test_what_the_decoder_does_not_compute_is_refused(tmp_path, options, message):
  with pytest.raises(DataError, match=message):
    GGUFSource(write_plain(tmp_path / 'x.gguf', **options))


def test_broken_files_are_data_errors(tmp_path, toy):
  path, raw = tmp_path / 'x.gguf', write_plain(tmp_path / 'x.gguf').read_bytes()
  rng = np.random.default_rng(0)
  cuts = [raw[:n] for n in range(0, len(raw), 9)]
  for _ in range(100):
    flipped = bytearray(raw[:-256])
    flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
    cuts.append(bytes(flipped))
  refused = 0
  for content in [b'', b'GGUF', b'not a model at all', *cuts]:
    path.write_bytes(content)
    try:
      source = GGUFSource(path)
      for name in source.tensors:
        source.read(name)
    except DataError:
      refused += 1
  assert refused >= len(cuts) * 0.9
  with pytest.raises(DataError, match='No such file'):
    GGUFSource(tmp_path / 'none.gguf')


def test_tokenizer_files(toy, tmp_path):
  files = load.tokenizer_files(toy)
  config = json.loads(files['tokenizer_config.json'])
  assert (config['bos_token'], config['eos_token']) == ('<|im_start|>', '<|im_end|>')
  assert (config['unk_token'], config['pad_token']) == ('<|endoftext|>', '<|im_end|>')
  assert config['chat_template'] == '{{ messages }}'
  assert not config['add_bos_token']
  assert json.loads(files['generation_config.json']) == {
    'bos_token_id': 1,
    'eos_token_id': 2,
    'pad_token_id': 2,
  }
  assert json.loads(files['config.json']) == load.read_config(toy)
  tokenizer = Tokenizer.from_str(files['tokenizer.json'].decode())
  encoded = tokenizer.encode('<|im_start|>the <think> 12<|im_end|>')
  assert encoded.tokens[0] == '<|im_start|>'
  assert '<think>' in encoded.tokens
  assert tokenizer.decode(encoded.ids) == 'the <think> 12'


@pytest.mark.parametrize(
  ('vocabulary', 'pre', 'fields', 'begins', 'ends'),
  [
    ('gpt2', 'gpt-2', {}, False, False),
    ('gpt2', 'gpt-2', {'tokenizer__ggml__add_bos_token': True}, True, False),
    ('gpt2', 'llama-bpe', {}, True, False),
    ('gpt2', 'llama-bpe', {'tokenizer__ggml__add_bos_token': False}, False, False),
    ('llama', '', {}, True, False),
    ('llama', '', {'tokenizer__ggml__add_eos_token': True}, True, True),
  ],
)
def test_bos_and_eos_are_added_as_the_file_specifies(
  tmp_path, vocabulary, pre, fields, begins, ends
):
  write_toy(tmp_path / 'x.gguf', Toy(), vocabulary, pre, **fields)
  tokenizer = gguf_tokenizer.build(GGUFSource(tmp_path / 'x.gguf'))
  plain = tokenizer.encode('the x', add_special_tokens=False).ids
  assert tokenizer.encode('the x').ids == [1] * begins + plain + [2] * ends
  pair = tokenizer.encode('the x', 'the x').ids
  assert pair == ([1] * begins + plain + [2] * ends) * 2


def test_an_end_of_turn_token_is_a_stop_token(tmp_path):
  write_toy(tmp_path / 'x.gguf', Toy(), 'gpt2', tokenizer__ggml__eot_token_id=0)
  assert json.loads(load.tokenizer_files(tmp_path)['generation_config.json'])['eos_token_id'] == [
    2,
    0,
  ]


def test_other_pre_tokenizers_are_refused(tmp_path):
  write_toy(tmp_path / 'x.gguf', Toy(), 'gpt2', 'chatglm-bpe')
  with pytest.raises(DataError, match=r"pre='chatglm-bpe'.*smollm"):
    load.tokenizer_files(tmp_path)


def test_byte_fallback_and_spaces_of_sentencepiece(tmp_path):
  write_toy(tmp_path / 'x.gguf', Toy(), 'llama')
  tokenizer = gguf_tokenizer.build(GGUFSource(tmp_path / 'x.gguf'))
  for text in ['the x', 'one  two', 'ж\u4e2d😀 end ']:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
  assert '<0xF0>' in tokenizer.encode('🦖').tokens


def test_merges_implied_by_scores_by_hand():
  tokens, scores = ['a', 'b', 'ab', 'aba', 'c'], [0.0, 0.0, -1.0, -2.0, 0.0]
  assert gguf_tokenizer.implied_merges(tokens, scores) == [('a', 'b'), ('ab', 'a')]
  # Equal scores: the longer left half first, then the longer right half, then the order of tokens.
  tokens = ['a', 'b', 'ab', 'ba', 'aba']
  expected = [('ab', 'a'), ('a', 'ba'), ('a', 'b'), ('b', 'a')]
  assert gguf_tokenizer.implied_merges(tokens, [0.0] * 5) == expected


def test_smollm_splits_at_each_number_first(tmp_path):
  write_toy(tmp_path / 'x.gguf', Toy(), 'gpt2', 'smollm')
  tokenizer = gguf_tokenizer.build(GGUFSource(tmp_path / 'x.gguf'))
  pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("it's  12\n\n3")]
  assert pieces == ['it', "'s", 'ĠĠ', '1', '2', 'ĊĊ', '3']
