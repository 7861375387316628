"""Loads converted and exported folders with transformers and compares. In the parity environment
(make parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/check_with_transformers.py FTJAX_PYTHON \
    [CASE ...]

FTJAX_PYTHON has ftjax. CASE: of family_cases.py or t5_cases.py; all of them and SmolLM2 where none
is given. Prints a line a check and exits 1 if one fails. SmolLM2 needs .cache/ (demo/assets.py).
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
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
  AutoModelForCausalLM,
  AutoModelForMaskedLM,
  AutoModelForQuestionAnswering,
  AutoModelForSeq2SeqLM,
  AutoModelForSequenceClassification,
  AutoModelForTokenClassification,
  AutoTokenizer,
  GenerationConfig,
)

from parity import open_with_peft, t5_cases
from parity.family_cases import CASES, LABELED
from parity.mixed_strings import mixed_strings

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'parity' / 'golden'
CACHE, GGUF = ROOT / '.cache', 'SmolLM2-135M-Instruct.Q4_1.gguf'

EXPORT = """
import sys
import jax, numpy as np
from ftjax.hf import label_files, export, load, layout as names
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
from ftjax.runtime import sharding, trees
family, target = sys.argv[1:]
jax.config.update('jax_default_matmul_precision', 'highest')
jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1]))
sizes = dict(model_type=family, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, intermediate_size=48, rope_theta=1e6)
model = experiment.open_model('', sizes, 0, label_files.REWARD)
rng, arch = np.random.default_rng(0), model.arch
params = trees.unflatten({n: jnp.asarray(rng.normal(size=s) * 0.25, jnp.float32)
  for n, s in names.leaf_shapes(arch).items()})
ids = rng.integers(0, 200, (1, 40), np.int32)
arrays = dict(tokens=jnp.asarray(ids), segments=jnp.ones_like(ids),
  positions=jnp.arange(40, dtype=jnp.int32)[None])
out = Forward(arch, jnp.float32).token_scores(params, arrays)[:, -1:]
export.export(params, arch, target, source_config=model.config, tokenizer_files=model.files,
  dtype=np.float32, stop_ids=model.stop_ids)
np.savez(target + '.npz', ids=ids, out=out)
"""

CLASSES = {
  '': AutoModelForCausalLM,
  'masked': AutoModelForMaskedLM,
  'sequence': AutoModelForSequenceClassification,
  'token': AutoModelForTokenClassification,
  'span': AutoModelForQuestionAnswering,
}
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


def check_family(python: str, name: str, folder: Path) -> None:
  """A case of family_cases.py, imported, trained for five steps and exported in shards; and PEFT
  folders of adapters on it: transformers and PEFT compute what ftjax does.
  """
  script = [python, 'tests/parity/from_families.py', name, str(folder)]
  env = os.environ | {'PYTHONPATH': 'tests:.', 'JAX_PLATFORMS': 'cpu'}
  if subprocess.run(script, check=False, cwd=ROOT, env=env).returncode:
    report(f'{name}: trained and exported', False)
    return
  stored = np.load(folder / 'logits.npz')
  ids = torch.tensor(stored['ids'].astype(np.int64))
  head = (CASES | LABELED)[name].head
  loaded, left = model(folder / 'trained', CLASSES[head])
  # An untied BERT has a bias that nothing reads.
  left = {} if name == 'bert_untied' else left
  report(f'{name} trained: nothing missing or unexpected', not left, str(left))

  def logits(own) -> np.ndarray:
    with torch.no_grad():
      found = own(ids)
    if head == 'span':
      return torch.stack([found.start_logits, found.end_logits], -1).numpy()
    return found.logits.numpy()

  compare(f'{name} trained: logits', logits(loaded), stored['trained'], 1e-5)
  before = logits(model(folder / 'source', CLASSES[head])[0])
  apart = np.abs(before - stored['trained']).max() / np.abs(before).max()
  report(f'{name} trained: is another model', apart > 0.1, f'max |delta| / max {apart:.2f}')
  if name in LABELED:
    return
  for kind in ('lora', 'dora'):
    found = open_with_peft.compute(folder / kind, str(folder / 'source'), ids)
    texts = found['warnings'].tolist()
    report(f'{name} {kind}: PEFT loads it without a warning', not texts, str(texts))
    compare(f'{name} {kind}: logits', found['logits'], stored[kind], 1e-5)
    compare(f"{name} {kind}: logits after PEFT's merge", found['merged'], stored[kind], 1e-4)


def check_t5(python: str, name: str, folder: Path) -> None:
  """A case of t5_cases.py, imported, trained for five steps and exported in shards, and the PEFT
  folder of an adapter on it.
  """
  script = [python, 'tests/parity/from_t5.py', name, str(folder)]
  env = os.environ | {'PYTHONPATH': 'tests:.', 'JAX_PLATFORMS': 'cpu'}
  if subprocess.run(script, check=False, cwd=ROOT, env=env).returncode:
    report(f'{name}: trained and exported', False)
    return
  stored = dict(np.load(folder / 'logits.npz'))
  read, inside = (torch.tensor(stored[n].astype(np.int64)) for n in ('source', 'inside'))
  written = stored['segments'] > 0
  labels = torch.tensor(np.where(written, stored['labels'], -100).astype(np.int64))

  def logits(own) -> np.ndarray:
    with torch.no_grad():
      return own(input_ids=read, attention_mask=inside, labels=labels).logits.numpy()[written]

  loaded, left = model(folder / 'trained', AutoModelForSeq2SeqLM)
  report(f'{name} trained: nothing missing or unexpected', not left, str(left))
  compare(f'{name} trained: logits', logits(loaded), stored['trained'][written], 1e-5)
  base, _ = model(folder / 'source', AutoModelForSeq2SeqLM)
  apart = np.abs(logits(base) - stored['trained'][written]).max()
  report(f'{name} trained: is another model', apart > 0.1, f'max |delta| {apart:.2f}')
  adapted = PeftModel.from_pretrained(base, folder / 'lora').eval()
  compare(f'{name} lora: logits', logits(adapted), stored['lora'][written], 1e-5)


def compare(name: str, found: np.ndarray, expected: np.ndarray, limit: float) -> None:
  error = np.abs(found - expected).max() / np.abs(expected).max()
  report(f'{name} within {limit}', error <= limit, f'max |delta| / max {error:.1e}')


def check_scorer(python: str, family: str, folder: Path) -> None:
  """A random reward model without a HF folder behind it: transformers takes the exported folder for
  the right class and computes what ftjax does.
  """
  name = f'{family} reward model'
  target = folder / f'{family}_scorer'
  command = [python, '-c', MAKE, family, str(target)]
  subprocess.run(command, check=True, cwd=ROOT)
  loaded, left = model(target, AutoModelForSequenceClassification)
  stored = np.load(f'{target}.npz')
  with torch.no_grad():
    out = loaded(torch.tensor(stored['ids'].astype(np.int64))).logits.numpy().reshape(-1)
  report(f'{name}: {type(loaded).__name__}, nothing missing or unexpected', not left, str(left))
  compare(f'{name}: scores', out, stored['out'].reshape(-1), 1e-5)


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
    for case in sys.argv[2:] or CASES | LABELED | t5_cases.CASES:
      check = check_t5 if case in t5_cases.CASES else check_family
      check(sys.argv[1], case, Path(temp) / case)
    if not sys.argv[2:]:
      for family in ('llama', 'qwen2'):
        check_scorer(sys.argv[1], family, Path(temp))
      if (CACHE / 'smollm2').exists():
        check_smollm2(sys.argv[1], Path(temp))
        check_tokenizer(Path(temp))
  print(json.dumps({'failures': failures}))
  sys.exit(bool(failures))
