"""Loads converted and exported folders with transformers and compares. In the parity environment
(make parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/check_with_transformers.py FTJAX_PYTHON

FTJAX_PYTHON has ftjax. Prints a line a check and exits 1 if one
fails. Needs .cache/ (demo/assets.py) for the checks of SmolLM2.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
  AutoModelForCausalLM,
  AutoModelForSequenceClassification,
  AutoTokenizer,
  GenerationConfig,
)

from parity.mixed_strings import mixed_strings

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'parity' / 'golden'
CACHE, GGUF = ROOT / '.cache', 'SmolLM2-135M-Instruct.Q4_1.gguf'

EXPORT = """
import sys
import jax, numpy as np
from ftjax.hf import export, load, layout as names
from ftjax.families import table as families
from ftjax.runtime import trees
path, target, shard = sys.argv[1:]
config, files = load.read_config(path), load.tokenizer_files(path)
arch = families.architecture(config)
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
places = trees.unflatten(dict.fromkeys(names.leaf_shapes(arch), place))
params = load.load_params(path, arch, places, np.float32)
export.export(params, arch, target, source_config=config, tokenizer_files=files, dtype=np.float32,
  stop_ids=(2,), max_shard_bytes=int(shard))
"""

MAKE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from ftjax.experiment import run as experiment
from ftjax.models.forward import Forward
from ftjax.hf import export, layout as names
from ftjax.models import head, kinds
from ftjax.models.attention import Tokens
from ftjax.runtime import sharding, trees
family, labels, target = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update('jax_default_matmul_precision', 'highest')
jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1]))
sizes = dict(model_type=family, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, intermediate_size=48, rope_theta=1e6)
model = experiment.open_model('', sizes, 0, labels=labels)
rng, arch = np.random.default_rng(0), model.arch
params = trees.unflatten({n: jnp.asarray(rng.normal(size=s) * 0.25, jnp.float32)
  for n, s in names.leaf_shapes(arch).items()})
ids = rng.integers(0, 200, (1, 40), np.int32)
arrays = dict(tokens=jnp.asarray(ids), segments=jnp.ones_like(ids),
  positions=jnp.arange(40, dtype=jnp.int32)[None])
if labels:
  out = Forward(arch, jnp.float32).token_scores(params, arrays)[:, -1:]
else:
  x = kinds.apply(arch, params, arrays['tokens'], Tokens(arrays['segments'],
    arrays['positions']), dtype=jnp.float32)
  out = head.logits(x[0], kinds.head_weights(arch, params))
config = model.config if labels else None  # then architecture.to_hf makes it
export.export(params, arch, target, source_config=config, tokenizer_files=model.files,
  dtype=np.float32, stop_ids=model.stop_ids)
np.savez(target + '.npz', ids=ids, out=out)
"""

failures = []


def report(name: str, good: bool, detail: str = '') -> None:
  print('ok  ' if good else 'FAIL', name, detail, flush=True)
  if not good:
    failures.append(name)


def model(folder: Path, kind=AutoModelForCausalLM, **options):
  loaded, info = kind.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True, **options
  )
  left = {key: value for key, value in info.items() if value}
  return loaded.eval(), left


def export(python: str, source: Path, target: Path, shard: int) -> None:
  subprocess.run([python, '-c', EXPORT, str(source), str(target), str(shard)], check=True, cwd=ROOT)


def check_tiny(python: str, name: str, folder: Path) -> None:
  """A golden model, imported and exported in shards: transformers computes what it does with the
  golden one, which is the stored logits but for rounding, as other processors add in another order.
  """
  export(python, GOLDEN / name, folder / name, 20_000)
  (loaded, left), (original, _) = model(folder / name), model(GOLDEN / name)
  stored = np.load(GOLDEN / name / 'logits.npz')
  with torch.no_grad():
    ids = torch.tensor(stored['ids'].astype(np.int64))
    logits, expected = (m(ids).logits.numpy() for m in (loaded, original))
  report(f'{name}: nothing missing or unexpected', not left, str(left))
  report(
    f'{name}: logits bitwise equal',
    np.array_equal(logits, expected),
    f'max |delta| {np.abs(logits - expected).max()}',
  )
  error = np.abs(logits - stored['logits']).max() / np.abs(stored['logits']).max()
  report(f'{name}: the stored logits within 1e-5', error <= 1e-5, f'max |delta| / max {error}')


def check_made(python: str, family: str, labels: int, folder: Path) -> None:
  """A random model without a HF folder behind it, a language or a reward model: transformers takes
  the exported folder for the right class and computes what ftjax does.
  """
  name = f'{family}_made_{labels}'
  command = [python, '-c', MAKE, family, str(labels), str(folder / name)]
  subprocess.run(command, check=True, cwd=ROOT)
  kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
  loaded, left = model(folder / name, kind)
  stored = np.load(folder / f'{name}.npz')
  with torch.no_grad():
    out = loaded(torch.tensor(stored['ids'].astype(np.int64))).logits.numpy().reshape(-1)
  error = np.abs(out - stored['out'].reshape(-1)).max() / np.abs(out).max()
  report(f'{name}: {type(loaded).__name__}, nothing missing or unexpected', not left, str(left))
  report(f'{name}: equal within 1e-5', error <= 1e-5, f'max |delta| / max {error}')


def check_smollm2(python: str, folder: Path) -> None:
  """The converted SmolLM2 against transformers' own loading of the GGUF file."""
  converted, left = model(CACHE / 'smollm2')
  report('smollm2: nothing missing or unexpected', not left, str(left))
  reference, _ = model(CACHE, gguf_file=GGUF)
  ours, theirs = converted.state_dict(), reference.state_dict()
  same = [name for name in theirs if torch.equal(ours[name], theirs[name])]
  report(
    'smollm2: weights bitwise those of from_pretrained(gguf_file=)',
    len(same) == len(theirs) == len(ours),
    f'{len(same)} of {len(theirs)}',
  )
  keys = (
    'hidden_size',
    'num_hidden_layers',
    'num_attention_heads',
    'num_key_value_heads',
    'head_dim',
    'vocab_size',
    'intermediate_size',
    'max_position_embeddings',
    'tie_word_embeddings',
    'rope_parameters',
    'bos_token_id',
    'eos_token_id',
  )
  wrong = [k for k in keys if getattr(converted.config, k) != getattr(reference.config, k)]
  eps = [np.float32(m.config.rms_norm_eps) for m in (converted, reference)]
  report(
    'smollm2: config equal',
    not wrong and eps[0] == eps[1],
    str({k: (getattr(converted.config, k), getattr(reference.config, k)) for k in wrong}),
  )
  ids = torch.tensor(np.load(GOLDEN / 'smollm2_logits.npz')['ids'][None, :128].astype(np.int64))
  with torch.no_grad():
    a, b = converted(ids).logits, reference(ids).logits
  report(
    'smollm2: logits bitwise equal', torch.equal(a, b), f'max |delta| {(a - b).abs().max().item()}'
  )
  del reference, converted
  export(python, CACHE / 'smollm2', folder / 'smollm2', 5 * 10**9)
  exported, left = model(folder / 'smollm2')
  with torch.no_grad():
    report(
      'smollm2 exported: logits bitwise equal',
      torch.equal(exported(ids).logits, a) and not left,
      str(left),
    )
  weights = [load_file(f / 'model.safetensors') for f in (CACHE / 'smollm2', folder / 'smollm2')]
  report(
    'smollm2 exported: tensors bitwise',
    all(torch.equal(weights[1][k], v) for k, v in weights[0].items()),
    f'{len(weights[0])} tensors',
  )
  same = all(
    (folder / 'smollm2' / n).read_bytes() == (CACHE / 'smollm2' / n).read_bytes()
    for n in ('tokenizer.json', 'tokenizer_config.json', 'config.json')
  )
  report('smollm2 exported: tokenizer files and config.json byte for byte', same)
  stops = GenerationConfig.from_pretrained(folder / 'smollm2').eos_token_id
  report(
    'smollm2 exported: generation_config stops at the trained token',
    2 in np.atleast_1d(stops),
    str(stops),
  )


def check_tokenizer(folder: Path) -> None:
  """AutoTokenizer of the exported folder against those of the converted one and the GGUF."""
  ours, again = (
    AutoTokenizer.from_pretrained(CACHE / 'smollm2'),
    AutoTokenizer.from_pretrained(folder / 'smollm2'),
  )
  theirs = AutoTokenizer.from_pretrained(CACHE, gguf_file=GGUF)
  texts = mixed_strings()
  rows = [t(texts, add_special_tokens=True)['input_ids'] for t in (ours, again, theirs)]
  raw = [len(a) and a == b for a, b in zip(rows[0], rows[1], strict=True)]
  report(
    'tokenizer: AutoTokenizer of the export equals that of the source',
    all(raw),
    f'{sum(raw)} of {len(raw)}',
  )
  stored = np.load(GOLDEN / 'smollm2_tokenizer.npz')
  report(
    'tokenizer: AutoTokenizer gives the ids of tokenizer.json alone',
    [i for row in rows[0] for i in row] == stored['digits_ids'].tolist(),
  )
  report(
    'tokenizer: special tokens equal',
    ours.special_tokens_map == theirs.special_tokens_map,
    str(ours.special_tokens_map),
  )
  chat = [{'role': 'user', 'content': 'Hi  12'}, {'role': 'assistant', 'content': 'x'}]
  report(
    'tokenizer: chat template equal',
    ours.apply_chat_template(chat, tokenize=False)
    == theirs.apply_chat_template(chat, tokenize=False),
  )
  back = [t.decode(r) for t, r in zip([ours] * len(texts), rows[0], strict=True)]
  report(
    'tokenizer: decoding gives the text',
    back == texts,
    f'{sum(a == b for a, b in zip(back, texts, strict=True))} of {len(texts)}',
  )
  same = sum(a == b for a, b in zip(rows[0], rows[2], strict=True))
  print(
    'note',
    f'ids equal to from_pretrained(gguf_file=), which ignores tokenizer.ggml.pre=smollm: {same} of '
    f'{len(texts)}',
  )


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as temp:
    for tiny in ('llama_tied', 'llama_untied_gqa', 'llama3_rope', 'qwen2_tied', 'qwen2_untied'):
      check_tiny(sys.argv[1], tiny, Path(temp))
    for family in ('llama', 'qwen2'):
      for labels in (0, 1):
        check_made(sys.argv[1], family, labels, Path(temp))
    if (CACHE / 'smollm2').exists():
      check_smollm2(sys.argv[1], Path(temp))
      check_tokenizer(Path(temp))
  print(json.dumps({'failures': failures}))
  sys.exit(bool(failures))
