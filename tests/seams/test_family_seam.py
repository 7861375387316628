"""A model family outside the package is loaded, trained, resumed, planned, generated from and
exported like a shipped one (toy_family.py)."""

import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file
from tiny_model import logits, tokens_at

from ftjax.data import synthetic
from ftjax.families import table
from ftjax.hf import export, load
from ftjax.models import kinds
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError, DataError

SEAMS = pathlib.Path(__file__).parent
OWN = 'toy_family:FAMILY'
V, D, N, K, H, F, L = synthetic.VOCAB_SIZE, 16, 2, 1, 8, 24, 2
CONFIG = {
  'architectures': ['ToyForCausalLM'],
  'model_type': 'toy_llama',
  'vocab_size': V,
  'hidden_size': D,
  'num_hidden_layers': L,
  'num_attention_heads': N,
  'num_key_value_heads': K,
  'intermediate_size': F,
  'rms_norm_eps': 1e-5,
  'layer_norm_eps': 1e-3,
  'rope_theta': 10000.0,
  'hidden_act': 'silu',
  'tie_word_embeddings': True,
  'max_position_embeddings': 128,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A HF folder of the family with random weights."""
  path = tmp_path_factory.mktemp('toy')
  rng = np.random.default_rng(0)
  shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  for i in range(L):
    shapes |= {
      f'model.layers.{i}.{name}.weight': shape
      for name, shape in {
        'attention_norm': (D,),
        'mlp_norm': (D,),
        'self_attn.q_proj': (N * H, D),
        'self_attn.k_proj': (K * H, D),
        'self_attn.v_proj': (K * H, D),
        'self_attn.o_proj': (D, N * H),
        'mlp.gate_up_proj': (2 * F, D),
        'mlp.down_proj': (D, F),
      }.items()
    }
  weights = {n: rng.normal(size=s).astype(np.float32) / 4 for n, s in shapes.items()}
  save_file(weights, path / 'model.safetensors')
  for name, content in synthetic.byte_tokenizer().items():
    (path / name).write_bytes(content)
  (path / 'config.json').write_text(json.dumps(CONFIG))
  return path


def entry(name, *flags):
  """Runs an entry in the family's folder; what it printed."""
  with tempfile.NamedTemporaryFile() as log:
    process = tiny_run.launch(name, [*map(str, flags)], log.name, folder=SEAMS, share_cache=True)
    code, text = process.wait(timeout=300), pathlib.Path(log.name).read_text()
  assert code == 0, text
  return text


def settings(folder, steps):
  pairs = {
    'model.random': '{}',
    'model.path': folder,
    'model.family': OWN,
    'steps': steps,
    'optim.warmup_steps': 0,
    'seq_len': 64,
    'batch_size': 4,
    'data.train': 'sums:40',
    'eval.every': 2,
    'eval.batch_size': 4,
    'eval.prompts': '()',
    'checkpoint.every': 2,
    'checkpoint.keep': 2,
  }
  return ['--config=tiny_sft', *(f'--config.{k}={v}' for k, v in pairs.items())]


def test_the_shipped_families_do_not_read_it(folder):
  with pytest.raises(DataError, match=r"model_type='toy_llama'.*model.family"):
    table.architecture(load.read_config(folder))
  with pytest.raises(DataError, match='wide_kernel=3'):
    table.architecture(CONFIG | {'wide_kernel': 3}, OWN)
  with pytest.raises(ConfigError, match=r'model.family.*remove model.family'):
    arch = table.architecture(CONFIG | {'model_type': 'llama', 'layer_norm_eps': None}, OWN)
    table.check_own(OWN, arch, 'model.path=x')
  with pytest.raises(ConfigError, match='toy_family:ROWS'):
    table.architecture(CONFIG, 'toy_family:ROWS')


def test_the_family_computes_what_it_describes(folder):
  """Logits by hand, in numpy."""
  arch = table.architecture(load.read_config(folder), OWN)
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  params = load.load_params(folder, arch, places, np.float32)
  ids = np.array([[5, 9, 200, 7]], np.int32)
  got = logits(arch, params, ids, tokens_at(np.ones_like(ids)))
  np.testing.assert_allclose(got, by_hand(load_file(folder / 'model.safetensors'), ids), atol=2e-4)


def by_hand(w, ids):
  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * w[f'{name}.weight']

  def rotate(x):  # [T, heads, H]
    angle = np.arange(len(x))[:, None] * 1e4 ** (-np.arange(0, H, 2) / H)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  x = w['model.embed_tokens.weight'][ids[0]].astype(np.float64)
  for i in range(L):
    p = f'model.layers.{i}.'
    q, k, v = (
      (x @ w[f'{p}self_attn.{n}_proj.weight'].T).reshape(len(x), -1, H) for n in ('q', 'k', 'v')
    )
    q, k = rotate(q), rotate(k)
    scores = np.einsum('tnh,sh->nts', q, k[:, 0]) / np.sqrt(H)
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    y = np.einsum('nts,sh->tnh', share, v[:, 0]).reshape(len(x), -1)
    x = x + norm(y @ w[f'{p}self_attn.o_proj.weight'].T, f'{p}attention_norm')
    gate, up = np.split(x @ w[f'{p}mlp.gate_up_proj.weight'].T, 2, axis=-1)
    gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    x = x + norm((gate * up) @ w[f'{p}mlp.down_proj.weight'].T, f'{p}mlp_norm')
  return (norm(x, 'model.norm') @ w['model.embed_tokens.weight'].T)[None]


def test_an_export_of_what_was_loaded_has_the_same_tensors(folder, tmp_path):
  arch = table.architecture(load.read_config(folder), OWN)
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  params = load.load_params(folder, arch, places, np.float32)
  small = dict(tokenizer_files={}, dtype=np.dtype(np.float32), stop_ids=())
  export.export(params, arch, tmp_path / 'out', source_config=None, **small)
  first, found = (load_file(f / 'model.safetensors') for f in (folder, tmp_path / 'out'))
  assert found.keys() == first.keys()
  for name, value in first.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert table.architecture(load.read_config(tmp_path / 'out'), OWN) == arch


def test_the_family_trains_resumes_generates_and_exports(folder, tmp_path):
  workdir, first = tmp_path / 'run', load_file(folder / 'model.safetensors')
  entry('train', *settings(folder, 2), f'--workdir={workdir}')
  printed = entry('train', *settings(folder, 4), f'--workdir={workdir}')
  assert 'resuming after step 2 of 4' in printed
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  losses = [row['loss'] for row in rows if row['split'] == 'train']
  assert len(losses) == 4 and losses[-1] < losses[0]
  trained = load_file(workdir / 'export' / 'model.safetensors')
  assert trained.keys() == first.keys()
  assert all((trained[n] != first[n]).any() for n in first)
  entry('generate', f'--model={workdir}', '--prompt=1 + 1 =', '--max_tokens=4')
  entry('generate', f'--model={workdir}@2', '--prompt=1 + 1 =', '--max_tokens=4')
  entry(
    *('generate', f'--model={workdir}/export', f'--family={OWN}'),
    *('--prompt=1 + 1 =', '--max_tokens=4'),
  )


def test_the_family_is_planned(folder):
  flags = ['--topology=cpu:8', '--config.batch_size=8', '--config.eval.batch_size=8', '--json']
  text = entry('plan', *settings(folder, 4), *flags)
  found = json.loads(text[text.index('{"slice"') :].splitlines()[0])
  assert found['parameters'] == V * D + D + L * (2 * D + D * H * (2 * N + 2 * K) + 3 * D * F)
