"""Import and export hold the parameters and little more on the host: one stacked leaf while they
are read, two tensors of the files while they are written.

The peak of the resident memory is measured in a process of its own, on models whose largest leaf is
several times what allocators and compiled programs take.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ftjax.families import table
from ftjax.hf import layout, load

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'parity' / 'golden'
pytestmark = pytest.mark.skipif(
  not Path('/proc/self/clear_refs').exists(), reason='reads and clears the peak in /proc'
)
SLACK = 16 << 20  # bytes, of allocators
PROGRAMS = 80 << 20  # bytes, of the programs that pack the leaves of a base, whatever its size

_SIZES = {
  'vocab_size': 4096,
  'hidden_size': 768,
  'intermediate_size': 2304,
  'num_hidden_layers': 4,
  'num_attention_heads': 12,
  'num_key_value_heads': 4,
  'head_dim': 64,
  'max_position_embeddings': 512,
  'rms_norm_eps': 1e-5,
  'tie_word_embeddings': False,
}
_WIDE = _SIZES | {'hidden_act': 'silu', 'rope_theta': 1e4}
_EXPERTS = {'num_local_experts': 16, 'num_experts_per_tok': 2}
_DELTA = {
  'linear_num_key_heads': 16,
  'linear_num_value_heads': 32,
  'linear_key_head_dim': 64,
  'linear_value_head_dim': 64,
  'linear_conv_kernel_dim': 4,
}
CONFIGS = {
  'llama': _WIDE | {'model_type': 'llama', 'vocab_size': 16384, 'tie_word_embeddings': True},
  'phi3': _WIDE | {'model_type': 'phi3', 'sliding_window': None, 'intermediate_size': 6144},
  'gpt2': {
    'model_type': 'gpt2',
    'vocab_size': 4096,
    'n_embd': 1536,
    'n_head': 24,
    'n_layer': 3,
    'n_positions': 512,
    'n_inner': 3072,
  },
  'gemma3': _SIZES | {'model_type': 'gemma3_text', 'num_hidden_layers': 6, 'sliding_window': 128},
  'qwen3_5': _SIZES
  | _DELTA
  | {'model_type': 'qwen3_5_text', 'num_hidden_layers': 8, 'hidden_act': 'silu'},
  'mixtral': _WIDE
  | _EXPERTS
  | {'model_type': 'mixtral', 'sliding_window': None, 'intermediate_size': 512},
  'qwen3_moe': _WIDE
  | _EXPERTS
  | {'model_type': 'qwen3_moe', 'moe_intermediate_size': 512, 'norm_topk_prob': True},
}

MEASURE = """
import ctypes, dataclasses, gc, sys
import jax, ml_dtypes, numpy as np
from ftjax.families import table
from ftjax.hf import export, load, layout, peft, peft_export, peft_weights
from ftjax.models import kinds
from ftjax.models.architecture import AdaptedMap, Adapter
from ftjax.runtime import sharding, trees

def held(key):
  line = next(l for l in open('/proc/self/status') if l.startswith(key))
  return int(line.split()[1]) * 1024

def added(work):
  # Bytes that were resident beyond those before, at most while it ran.
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)  # what was freed is not resident
  open('/proc/self/clear_refs', 'w').write('5')
  before = held('VmRSS')
  found = work()
  return found, held('VmHWM') - before

mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | dict(fsdp=-1))
jax.set_mesh(mesh)
jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(3)))

def places(arch):
  return sharding.shardings(mesh, kinds.axes(arch))

def size(params):
  return sum(x.nbytes for x in trees.flatten(params).values())
"""

LOAD = f"""{MEASURE}
path, target, dtype, base = sys.argv[1:]
config = load.read_config(path)
arch = table.architecture(config)
if base:
  maps = [(n, kinds.declared(arch)[n + '/w'].shape[0]) for n in kinds.linear_maps(arch)]
  maps = [AdaptedMap(n, (1,) * layers, (1.0,) * layers) for n, layers in maps if '/attn/' in n]
  arch = dataclasses.replace(arch, base=base, adapter=Adapter(tuple(maps)))
params, peak = added(lambda: load.load_params(path, arch, places(arch), np.dtype(dtype)))

def write():
  export.export(params, arch, target, source_config=config, tokenizer_files={{}},
    dtype=np.dtype(dtype), stop_ids=())

written = -1
if not base:
  write()  # compiles
  _, written = added(write)
print(jax.device_count(), size(params), peak, written)
"""

ADAPTER = f"""{MEASURE}
path, target = sys.argv[1:]
config = load.read_config(path)
arch = table.architecture(config)
maps = [(n, kinds.declared(arch)[n + '/w'].shape[0]) for n in kinds.linear_maps(arch)]
maps = [AdaptedMap(n, (96,) * layers, (1.0,) * layers) for n, layers in maps if '/mlp/' in n]
arch = dataclasses.replace(arch, adapter=Adapter(tuple(maps)))
where = trees.flatten(places(arch))
leaves = {{n: jax.device_put(np.full(p.shape, 0.5, np.float32), where[n])
  for n, p in kinds.declared(arch).items() if p.origin == 'adapter'}}

def write():
  peft_export.export(trees.unflatten(leaves), arch, target, base=path, sha256='0' * 64,
    source_config=config, tokenizer_files={{}}, stop_ids=())

write()
_, written = added(write)
largest, total = max(x.nbytes for x in leaves.values()), size(leaves)
leaves.clear()
_, peak = added(lambda: peft_weights.load_adapter(peft.find(target), arch, where, {{}}))
print(total, largest, peak, written)
"""


def run(code, *args, devices=1):
  """Returns the numbers that a process prints."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  done = subprocess.run(
    [sys.executable, '-c', code, *map(str, args)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    # glibc gives blocks of this size back at once, so that what is resident is what is held.
    env=os.environ
    | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'MALLOC_MMAP_THRESHOLD_': str(1 << 20)},
  )
  assert done.returncode == 0, done.stderr
  return [int(n) for n in done.stdout.split()]


def write_holes(folder, config, dtype, *, together=False, files=3):
  """Writes a HF folder of zeros that takes no room on the disk; together: with the experts of a
  layer in one tensor. Returns the architecture.
  """
  arch, dtype = table.architecture(config), np.dtype(dtype)
  family = table.of(arch)
  bindings = family.other_bindings(arch) if together else layout.bindings(arch)
  shapes = {b.hf: b.hf_shape for b in bindings}
  (folder / 'config.json').write_text(json.dumps(config))
  index, kind = {}, {'float32': 'F32', 'bfloat16': 'BF16'}[dtype.name]
  for i, names in enumerate(np.array_split(list(shapes), files), 1):
    file, header, at = f'model-{i:05d}-of-{files:05d}.safetensors', {}, 0
    for name in names:
      end = at + int(np.prod(shapes[name])) * dtype.itemsize
      header[name] = {'dtype': kind, 'shape': shapes[name], 'data_offsets': [at, end]}
      index[name], at = file, end
    text = json.dumps(header).encode()
    with open(folder / file, 'wb') as f:
      f.write(len(text).to_bytes(8, 'little') + text)
      f.truncate(8 + len(text) + at)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  return arch


def check_load(tmp_path, model, dtype, base=''):
  name, _, form = model.partition(' ')
  (folder := tmp_path / 'm').mkdir()
  arch = write_holes(folder, CONFIGS[name], 'float32', together=form == 'together')
  shapes = layout.leaf_shapes(arch)
  _, params, peak, written = run(LOAD, folder, tmp_path / 'out', dtype, base)
  # What is packed is packed from the numbers of the file.
  leaf = max(int(np.prod(s)) for s in shapes.values()) * (4 if base else np.dtype(dtype).itemsize)
  layer = max(int(np.prod(s[1:])) * 4 for s in shapes.values() if len(s) > 2)
  more = PROGRAMS + 3 * layer if base else 0  # matrices of one layer while they are packed
  assert peak <= params + leaf + SLACK + more, (peak, params, leaf)
  tensor = max(info.nbytes for info in layout.hf_tensors(arch, np.dtype(dtype)).values())
  print(f'{model} {dtype} {base}: {params} bytes, largest leaf {leaf}, peak {peak}')
  print(f'  written with {written}, largest tensor {tensor}')
  assert written <= 2 * tensor + SLACK / 2, (written, tensor)
  assert base or params > 80e6


@pytest.mark.parametrize(
  ('model', 'dtype'),
  [
    ('llama', 'bfloat16'),
    pytest.param('phi3', 'float32', marks=pytest.mark.full),
    pytest.param('qwen3_moe together', 'float32', marks=pytest.mark.full),
  ],
)
def test_a_model_is_read_with_one_leaf_more_and_written_with_two_tensors(tmp_path, model, dtype):
  """Matrices by themselves, parts of a fused one, experts in one tensor of a layer."""
  check_load(tmp_path, model, dtype)


@pytest.mark.full
@pytest.mark.parametrize(
  ('model', 'dtype'),
  [
    *((name, 'float32') for name in CONFIGS if name != 'phi3'),
    *((name, 'bfloat16') for name in ('phi3', 'gpt2', 'qwen3_moe', 'mixtral together')),
  ],
)
def test_every_family_is_read_with_one_leaf_more(tmp_path, model, dtype):
  check_load(tmp_path, model, dtype)


@pytest.mark.full
@pytest.mark.parametrize(
  ('model', 'base'),
  [
    ('phi3', 'nf4'),
    ('gpt2', 'int8'),
    ('mixtral', 'int8'),
    ('qwen3_moe together', 'nf4'),
    ('qwen3_5', 'int8'),
  ],
)
def test_a_packed_base_is_read_with_one_leaf_of_the_file_more(tmp_path, model, base):
  check_load(tmp_path, model, 'bfloat16', base)


@pytest.mark.full
@pytest.mark.parametrize('model', ['mixtral', 'qwen3_moe'])
def test_an_adapter_of_experts_is_read_with_one_leaf_more(tmp_path, model):
  (folder := tmp_path / 'm').mkdir()
  write_holes(folder, CONFIGS[model], 'float32')
  params, leaf, peak, written = run(ADAPTER, folder, tmp_path / 'out')
  assert params > 60e6 and peak <= params + leaf + SLACK / 2, (peak, params, leaf)
  assert written <= SLACK


def test_a_checkpoint_of_70b_shape_is_streamed(tmp_path):
  """Llama-3.1-70B with a sixteenth of its widths and all its 80 layers, in sparse files, onto eight
  devices: the parameters, one leaf, and some room.
  """
  config = load.read_config(GOLDEN / 'llama_untied_gqa') | {
    'vocab_size': 8016,
    'hidden_size': 512,
    'intermediate_size': 1792,
    'num_hidden_layers': 80,
    'num_attention_heads': 64,
    'num_key_value_heads': 8,
    'head_dim': 8,
  }
  write_holes(tmp_path, config, 'bfloat16', files=30)
  devices, params, peak = run(SHARE, tmp_path, devices=8)
  leaf = 2 * 80 * 512 * 1792
  assert devices == 8 and params > 500e6
  assert peak <= params + leaf + 64e6, (peak, params, leaf)


SHARE = f"""{MEASURE}
path = sys.argv[1]
arch = table.architecture(load.read_config(path))
params, peak = added(lambda: load.load_params(path, arch, places(arch), np.dtype('bfloat16')))
print(jax.device_count(), size(params), peak)
"""
