"""The tables of docs/plans.md: shipped configs planned for slices that are not here, row by row.

  python3.11 -m venv /tmp/plan && /tmp/plan/bin/pip install '.[plan]'    # jax and libtpu
  /tmp/plan/bin/python benchmarks/plan_table.py --write

Rows are kept in benchmarks/plan_rows.jsonl by config, slice, settings, code and versions, so that a
run that was stopped goes on; a row takes one to six minutes on two cores. With --stale a row of
older code counts too, and --write puts what there is into docs/plans.md.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / 'benchmarks' / 'plan_rows.jsonl'
PAGE = ROOT / 'docs' / 'plans.md'
_SMALL = 'batch_size=64 eval.batch_size=64'

# (config, topology, overrides), the most telling first
ROWS = (
  ('sft_llama3_8b', 'v5e:16x16', ''),
  ('sft_llama3_8b', 'v5e:16x16', f'{_SMALL} mesh.context=4'),
  ('sft_llama3_70b', 'v6e:16x16', ''),
  ('sft_llama3_70b', 'v5p:4x4x8', 'batch_size=128 eval.batch_size=128'),
  ('sft_llama3_8b', 'v6e:16x16', ''),
  ('sft_llama32_1b', 'v5e:4x4', 'batch_size=16 eval.batch_size=16'),
  ('sft_smollm2_135m', 'v5e:2x4', ''),
  ('sft_llama32_3b', 'v5e:8x8', 'batch_size=64 eval.batch_size=64'),
  ('sft_llama3_8b', 'h200:8', 'batch_size=32 eval.batch_size=32 grad_accum=4'),
  ('sft_llama3_8b', '2xv5e:16x16', 'mesh.data=2 batch_size=512 eval.batch_size=512'),
  ('sft_llama3_8b', 'v5p:4x4x4', 'batch_size=64 eval.batch_size=64'),
  ('sft_llama3_70b', 'v5e:16x16', ''),
  ('sft_llama32_1b', 'v6e:2x4', 'batch_size=16 eval.batch_size=16'),
  ('sft_llama32_1b', 'v5p:2x2x1', 'batch_size=16 eval.batch_size=16'),
  ('sft_llama32_1b', 'h200:8', 'batch_size=16 eval.batch_size=16'),
  ('sft_llama32_3b', 'v6e:4x4', 'batch_size=32 eval.batch_size=32'),
  ('sft_llama32_3b', 'v5p:2x2x2', 'batch_size=32 eval.batch_size=32'),
  ('sft_llama32_3b', 'h200:8', 'batch_size=32 eval.batch_size=32'),
  ('sft_smollm2_135m', 'v6e:2x2', ''),
  ('sft_smollm2_135m', 'v5p:2x2x1', ''),
  ('sft_smollm2_135m', 'h200:1', ''),
  ('sft_llama3_8b', 'h200:8x4', 'batch_size=64 eval.batch_size=64 grad_accum=2'),
  ('sft_llama3_8b', 'v4:4x4x4', 'batch_size=64 eval.batch_size=64'),
  ('sft_llama3_8b', 'tpu7x:4x4x4', 'batch_size=128 eval.batch_size=128'),
  ('sft_llama3_70b', 'v5p:8x8x8', 'batch_size=512 eval.batch_size=512'),
  ('sft_llama3_70b', 'h200:8x4', 'batch_size=32 eval.batch_size=32'),
)

# Adapters: on the smallest slices of each kind that fit.
ADAPTERS = (
  ('qlora_llama3_8b', 'v5e:1x1', ''),
  ('lora_llama3_8b', 'v6e:1x1', ''),
  ('lora_llama3_8b', 'v5e:2x2', ''),
  ('qlora_llama3_8b', 'v6e:1x1', ''),
  ('qlora_llama3_8b', 'v5e:1x1', 'lora.base=int8 grad_accum=16 eval.batch_size=1'),
  ('lora_llama3_8b', 'v5p:1x1x1', ''),
  ('qlora_llama3_8b', 'v5p:1x1x1', ''),
  ('lora_llama3_8b', 'h100:1', ''),
  ('qlora_llama3_8b', 'h100:1', ''),
  ('lora_llama3_8b', 'h200:1', ''),
  ('qlora_llama3_8b', 'h200:1', ''),
)

# The shipped configs of further families, each on a slice of every kind.
FAMILIES = (
  ('sft_qwen3_0_6b', 'v5e:2x2', ''),
  ('sft_qwen3_0_6b', 'v6e:1x1', ''),
  ('sft_qwen3_0_6b', 'v5p:1x1x1', ''),
  ('sft_qwen3_0_6b', 'tpu7x:1x1x1', ''),
  ('sft_qwen3_0_6b', 'h100:1', ''),
  ('sft_qwen3_0_6b', 'h200:1', ''),
  ('sft_gemma3_1b', 'v5e:2x2', ''),
  ('sft_gemma3_1b', 'v6e:1x1', 'grad_accum=8 eval.batch_size=2'),
  ('sft_gemma3_1b', 'v5p:1x1x1', ''),
  ('sft_gemma3_1b', 'tpu7x:1x1x1', ''),
  ('sft_gemma3_1b', 'h100:1', ''),
  ('sft_gemma3_1b', 'h200:1', ''),
  ('lora_qwen3_8b', 'v5e:2x2', ''),
  ('lora_qwen3_8b', 'v6e:1x1', ''),
  ('lora_qwen3_8b', 'v5p:1x1x1', ''),
  ('lora_qwen3_8b', 'tpu7x:1x1x1', ''),
  ('lora_qwen3_8b', 'h100:1', ''),
  ('lora_qwen3_8b', 'h200:1', ''),
  ('lora_qwen3_5_4b', 'v5e:2x2', ''),
  ('lora_qwen3_5_4b', 'v6e:1x1', ''),
  ('lora_qwen3_5_4b', 'v5p:1x1x1', ''),
  ('lora_qwen3_5_4b', 'tpu7x:1x1x1', ''),
  ('lora_qwen3_5_4b', 'h100:1', ''),
  ('lora_qwen3_5_4b', 'h200:1', ''),
  ('lora_qwen3_30b_a3b', 'v5e:4x4', 'mesh.expert=16 grad_accum=1 eval.batch_size=16'),
  ('lora_qwen3_30b_a3b', 'v6e:2x4', 'mesh.expert=8 grad_accum=2 eval.batch_size=8'),
  ('lora_qwen3_30b_a3b', 'v5p:1x1x2', 'mesh.expert=2'),
  ('lora_qwen3_30b_a3b', 'tpu7x:1x1x1', 'mesh.expert=2'),
  ('lora_qwen3_30b_a3b', 'h100:2', 'mesh.expert=2'),
  ('lora_qwen3_30b_a3b', 'h200:1', ''),
)

_QWEN = 'model.path=models/Qwen2.5-1.5B-Instruct'

# The same of algorithms that train on what the model says.
ROLLOUTS = (
  ('grpo_gsm8k', 'v5e:2x4', ''),
  ('grpo_gsm8k', 'v6e:2x2', ''),
  ('grpo_gsm8k', 'h200:1', 'grad_accum=8'),
  ('grpo_gsm8k_lora', 'v5e:2x4', ''),
  ('grpo_gsm8k_lora', 'v6e:2x2', ''),
  ('grpo_gsm8k_lora', 'h200:1', 'grad_accum=16'),
  ('grpo_gsm8k', 'v5e:4x4', _QWEN),
  ('grpo_gsm8k', 'v6e:2x4', _QWEN),
  ('grpo_gsm8k', 'h200:4', f'{_QWEN} grad_accum=4'),
)

# (name, config, topology, overrides, published tokens/s a chip, published MFU): MaxText and
# tpu-recipes, guarantees 13.1 and 13.2. Rows of a chip are theirs where they publish them.
PUBLISHED = (
  (
    'Llama-3.1-8B, v6e-256, 8,192 (MaxText tiering.md)',
    *('sft_llama3_8b', 'v6e:16x16', 'batch_size=1024'),
    *(7207, 0.4546),
  ),
  (
    'Llama-3.1-8B, v6e-64, 8,192 (tpu-recipes)',
    *('sft_llama3_8b', 'v6e:8x8', 'batch_size=256 eval.batch_size=64'),
    *(7247, 419.7 / 918),
  ),
  (
    'Llama-3.1-8B, v6e-16, 8,192 (tpu-recipes)',
    *('sft_llama3_8b', 'v6e:4x4', 'batch_size=64 eval.batch_size=16'),
    *(7243, 419.5 / 918),
  ),
  (
    'Llama-3.1-70B, v6e-256, 8,192 (MaxText tiering.md)',
    *('sft_llama3_70b', 'v6e:16x16', ''),  # a quarter of their batch: four of them do not fit
    *(960, 0.5033),
  ),
)


def versions() -> str:
  """Code and compiler that a row comes from."""
  digest = hashlib.sha256()
  for file in sorted([*(ROOT / 'ftjax').rglob('*.py'), *(ROOT / 'configs').glob('*.py')]):
    digest.update(f'{file.relative_to(ROOT)}\0'.encode() + file.read_bytes())
  found = []
  for name in ('jax', 'libtpu', 'jax-cuda13-plugin'):
    try:
      found.append(f'{name} {metadata.version(name)}')
    except metadata.PackageNotFoundError:
      found.append(f'no {name}')
  return ', '.join([f'code {digest.hexdigest()[:12]}', *found])


def kept() -> dict[tuple, dict]:
  """{(config, topology, overrides): newest row}."""
  lines = KEPT.read_text().splitlines() if KEPT.exists() else []
  return {tuple(r['key']): r for r in map(json.loads, lines)}


def plan(key: tuple[str, str, str]) -> dict:
  """A row: the JSON of one plan, or {'error': what the command said}."""
  config, topology, overrides = key
  command = [sys.executable, '-m', 'ftjax.plan', f'--config={config}', f'--topology={topology}']
  command += ['--json', '--nosearch', *(f'--config.{o}' for o in overrides.split())]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  lines = [line for line in done.stdout.split('\n') if line.startswith('{')]
  row = {'key': key, 'versions': versions(), 'exit_code': done.returncode}
  return row | (json.loads(lines[-1]) if lines else {'error': done.stderr[-1500:]})


def _gib(size: float) -> str:
  return f'{size / 2**30:.1f}'


def _mesh(settings: dict) -> str:
  return ' '.join(f'{k[5:]} {v}' for k, v in settings.items() if k.startswith('mesh.') and v > 1)


def line(row: dict) -> str:
  """A row of the table."""
  config, topology, overrides = row['key']
  if 'lora.' in overrides:
    config += ' ' + ' '.join(o for o in overrides.split() if o.startswith('lora.'))
  if 'error' in row:
    return f'| {config} | {topology} | | | | failed: {row["error"].splitlines()[-1][:80]} | | | | |'
  settings, of = row['settings'], _gib(row['capacity'])
  shape = f'{row["rows"]} x {row["length"]:,} / {settings["grad_accum"]}, {settings["remat"]}'
  start = f'| {config} | {topology} | {_mesh(settings) or "one device"} | {shape} '
  start += f'| {row["attention"]} | {"yes" if row["fits"] else "**no**"} '
  end = f' | {row["compile_seconds"]:.0f} |'
  if row['memory'] is None:
    wanted = _gib(row['needed']) if row['needed'] else 'more'
    return f'{start}| {wanted} of {of} | | | {end}'
  held, cost = row['memory'], row['cost']
  split = ' + '.join(_gib(held[k]) for k in ('parameters', 'optimizer', 'gradients', 'activations'))
  rate = cost['tokens'] / cost['seconds'] / row['devices']
  time = f'{cost["seconds"]:.2f} s, {rate:,.0f}, {cost["mfu"]:.0%}, {cost["bound"]}'
  return f'{start}| {_gib(held["peak"])} of {of} | {split} | {time}{end}'


def table(rows: dict[tuple, dict], keys: tuple) -> str:
  """Markdown of `keys` that are there."""
  head = (
    '| config | slice | mesh | sequences x tokens / micro-batches, remat | attention | fits '
    '| peak GiB a device | parameters + optimizer + gradients + the rest '
    '| step, tokens/s a device, MFU, bound by | compile s |\n' + '|---' * 10 + '|'
  )
  return '\n'.join([head, *(line(rows[k]) for k in keys if k in rows)])


def rollouts(rows: dict[tuple, dict]) -> str:
  """Markdown of ROLLOUTS that are there."""
  out = [
    '| config | model | slice | mesh | sequences x tokens / micro-batches | fits '
    '| peak GiB of the step | during generation: other models + copy + cache, peak | a step, s '
    '| decoding a rollout, s at least |\n' + '|---' * 10 + '|'
  ]
  for key in ROLLOUTS:
    row = rows.get(key)
    if row is None or not row.get('rollout'):
      continue
    phase, settings, cost = row['rollout'], row['settings'], row['cost']
    held = ' + '.join(_gib(phase[k]) for k in ('auxiliary', 'weights', 'cache'))
    out.append(
      f'| {key[0]} | {row["parameters"] / 1e9:.2f} B | {key[1]} '
      f'| {_mesh(settings) or "one device"} '
      f'| {row["rows"]} x {row["length"]:,} / {settings["grad_accum"]} '
      f'| {"yes" if row["fits"] else "**no**"} '
      f'| {_gib(row["memory"]["peak"] + phase["auxiliary"])} of {_gib(row["capacity"])} '
      f'| {held}, {_gib(phase["peak"])} | {cost["seconds"]:.2f} | {phase["seconds"]:.1f} |'
    )
  return '\n'.join(out)


def ratios(rows: dict[tuple, dict]) -> str:
  """Markdown of PUBLISHED rows that are there: estimate / published."""
  out = [
    '| published | tokens/s a chip | MFU | our settings | our estimate, uncalibrated '
    '| estimate / published tokens/s | estimate / published MFU |\n' + '|---' * 7 + '|'
  ]
  for name, config, topology, overrides, tokens, mfu in PUBLISHED:
    row = rows.get((config, topology, overrides))
    if row is None or not row.get('cost'):
      continue
    cost, settings = row['cost'], row['settings']
    rate = cost['tokens'] / cost['seconds'] / row['devices']
    ours = f'{row["rows"]} rows / {settings["grad_accum"]}, {_mesh(settings)}, {settings["remat"]}'
    out.append(
      f'| {name} | {tokens:,} | {mfu:.1%} | {ours} | {rate:,.0f} tokens/s, {cost["mfu"]:.1%} '
      f'| {rate / tokens:.2f} | {cost["mfu"] / mfu:.2f} |'
    )
  return '\n'.join(out)


def write(rows: dict[tuple, dict]) -> None:
  """Puts the tables that have rows between their marks in docs/plans.md."""
  text, parts = PAGE.read_text(), {}
  for name, keys in (('table', ROWS), ('adapters', ADAPTERS), ('families', FAMILIES)):
    if sources := sorted({r['versions'] for k, r in rows.items() if k in keys}):
      parts[name] = table(rows, keys) + '\n\nFrom ' + '; '.join(sources) + '.'
  if any(k in rows for k in ROLLOUTS):
    parts['rollouts'] = rollouts(rows)
  if any(p[1:4] in rows for p in PUBLISHED):
    parts['ratios'] = ratios(rows)
  for name, part in parts.items():
    begin, end = f'<!-- {name} -->\n', f'\n<!-- end of {name} -->'
    before, rest = text.split(begin)
    text = before + begin + part + end + rest.split(end)[1]
  PAGE.write_text(text)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='', help='part of a config name, topology or setting')
  parser.add_argument('--stale', action='store_true', help='keep rows of older code')
  parser.add_argument('--write', action='store_true', help='write docs/plans.md')
  parser.add_argument('--most', type=int, default=math.inf, help='rows to compile, at most')
  flags = parser.parse_args()
  rows, now, made = kept(), versions(), 0
  for key in dict.fromkeys([*ROWS, *ADAPTERS, *FAMILIES, *ROLLOUTS, *(p[1:4] for p in PUBLISHED)]):
    old = rows.get(key)
    if old and 'error' not in old and (flags.stale or old['versions'] == now):
      continue
    if flags.only not in ' '.join(key) or made >= flags.most:
      continue
    rows[key] = plan(key)
    with KEPT.open('a') as file:
      file.write(json.dumps(rows[key]) + '\n')
    made += 1
    print(line(rows[key]), flush=True)
  if flags.write:
    write(rows)


if __name__ == '__main__':
  main()
