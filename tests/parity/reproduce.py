"""Runs the writers of the golden numbers in the parity environment and compares what they write
with golden/; then loads what ftjax exports with transformers. From the repository's root:

  make parity

Prints a line a file that differs and exits 1 if there is one: then a reference library has changed,
or a writer without its golden numbers.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
GOLDEN = HERE / 'golden'
ASSET = Path('.cache') / 'SmolLM2-135M-Instruct.Q4_1.gguf'
GGUF_ASSETS = (ASSET, Path('.cache') / 'gemma-3-270m-q4_k_m.gguf', Path('.cache') / 'llama_cpp')
TASKS = ('folders', 'tokenizers', 'smollm2')
# Other processors add in another order: max |delta| / max |golden|, and after twenty steps.
TOLERANCE, AFTER_STEPS = 1e-5, 1e-3
STEPS = ('adamw_8bit.npz', 'peft/adamw.npz', 'peft/lora_plus.npz')
UNORDERED = ('target_modules', 'modules_to_save')  # PEFT writes sets


def writers(target: Path, tasks: tuple[str, ...]) -> list[list[str]]:
  """Returns the writers' command lines."""
  return [
    ['make_goldens.py', str(target), *tasks],
    ['make_family_goldens.py', str(target)],
    ['make_lm_eval_goldens.py', str(target)],
    *([['make_lm_eval_goldens.py', str(target), 'smollm2']] if 'smollm2' in tasks else []),
    ['make_multimodal_goldens.py', str(target)],
    ['make_packing_goldens.py', str(target)],
    ['make_peft_goldens.py', str(target)],
    ['make_prm_goldens.py', str(target)],
    ['make_rope_goldens.py', str(target)],
    ['make_router_goldens.py', str(target)],
    ['make_t5_goldens.py', str(target)],
    ['make_template_goldens.py', str(target)],
    ['adamw_8bit.py', str(target)],
    ['plateau.py', str(target)],
    ['trl_losses.py', 'golden', str(target), str(Path(sys.prefix) / 'trl-1.9')],
  ]


def run(command: list[str], python: str = sys.executable) -> int:
  """Runs a script beside this one, quietly unless it fails; returns its exit code."""
  start = time.monotonic()
  # On a busy machine torch's threads wait for each other many times longer than they compute.
  env = os.environ | {'HF_HUB_OFFLINE': '1', 'PYTHONHASHSEED': '0', 'OMP_NUM_THREADS': '1'}
  found = subprocess.run(
    [python, str(HERE / command[0]), *command[1:]],
    env=env,
    check=False,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  if found.returncode:
    print(found.stdout)
  print(f'{command[0]}: exit code {found.returncode}, {time.monotonic() - start:.0f} s', flush=True)
  return found.returncode


def files(folder: Path) -> set[str]:
  return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}


def arrays(path: Path) -> dict[str, np.ndarray]:
  if path.suffix == '.safetensors':
    return load_file(path)
  with np.load(path) as stored:
    return dict(stored)


def plain(path: Path):
  """What a JSON file says, sets in order."""
  found = json.loads(path.read_text())
  for key in UNORDERED:
    if isinstance(found.get(key), list):
      found[key] = sorted(found[key])
  return found


def difference(new: Path, golden: Path, tolerance: float) -> str:
  """Returns how a file differs from its golden one; '' if it does not."""
  if new.suffix == '.json':
    return '' if plain(new) == plain(golden) else 'says something else'
  got, expected = arrays(new), arrays(golden)
  if got.keys() != expected.keys():
    return f'has other arrays: {sorted(got.keys() ^ expected.keys())[:4]}'
  for name, e in expected.items():
    g = got[name]
    if g.shape != e.shape or g.dtype != e.dtype:
      return f'{name} is {g.dtype}{list(g.shape)}, golden {e.dtype}{list(e.shape)}'
    if e.dtype.kind != 'f':
      if not np.array_equal(g, e):
        return f'{name} differs in {int((g != e).sum())} of {e.size} places'
      continue
    where = np.isfinite(e)
    if not np.array_equal(g[~where], e[~where], equal_nan=True):
      return f'{name} differs where it is not finite'
    delta = float(np.abs(g[where] - e[where]).max(initial=0.0))
    if not delta <= tolerance * float(np.abs(e[where]).max(initial=0.0)):  # also where it is NaN
      return f'{name}: max |delta| {delta:.1e}, max |golden| {np.abs(e[where]).max():.1e}'
  return ''


def compare(new: Path, golden: Path, left_out: tuple[str, ...]) -> list[str]:
  """Returns a line for each file that differs, is missing or is new."""
  expected = {f for f in files(golden) if not f.startswith(left_out)} if left_out else files(golden)
  got, out = files(new), []
  out += [f'{name}: not written' for name in sorted(expected - got)]
  out += [f'{name}: not among the golden files' for name in sorted(got - expected)]
  for name in sorted(got & expected):
    tolerance = AFTER_STEPS if name in STEPS else TOLERANCE
    if what := difference(new / name, golden / name, tolerance):
      out.append(f'{name}: {what}')
  return out


def main(python: str) -> int:
  left_out = () if ASSET.exists() else ('smollm2_', 'lm_eval/smollm2')
  if left_out:
    print(f'smollm2: left out, {ASSET} is missing; `make assets` makes it')
  has_gguf = all(path.exists() for path in GGUF_ASSETS)
  if not has_gguf:
    left_out += ('gguf_',)
    print('gguf: left out; it needs `make assets`, `make gemma` and a run of test_llama_cpp.py')
  with tempfile.TemporaryDirectory() as temp:
    target = Path(temp)
    tasks = tuple(t for t in TASKS if not ('smollm2_' in left_out and t == 'smollm2'))
    failed = [c[0] for c in writers(target, tasks) if run(c)]
    # In numpy, with the packages of the tests.
    oracle = ['make_gguf_goldens.py', str(target)]
    failed += [oracle[0]] if has_gguf and run(oracle, python) else []
    wrong = compare(target, GOLDEN, left_out)
    count = len(files(target))
  for line in wrong:
    print('FAIL', line)
  print(f'{count} golden files written again, {len(wrong)} differ')
  if run(['check_with_transformers.py', python]):
    failed.append('check_with_transformers.py')
  # PEFT reads the adapters that ftjax writes.
  tests = ['-m', 'pytest', '-q', '--full', 'tests/test_peft.py', '-k', 'peft_computes']
  env = os.environ | {'FTJAX_PARITY_PYTHON': sys.executable}
  env.pop('PYTHONPATH', None)
  if subprocess.run([python, *tests], env=env).returncode:
    failed.append('tests/test_peft.py')
  print('make parity:', 'failed' if failed or wrong else 'all agree')
  return int(bool(failed or wrong))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1]))
