"""The table of docs/plan.md: shipped configs planned for slices that are not here, a row at a time.

  python3.12 -m venv /tmp/plan && /tmp/plan/bin/pip install '.[plan]'    # jax and libtpu
  /tmp/plan/bin/python benchmarks/plan_table.py [--only=8b] > table.md

One compilation takes one to three minutes on two cores. Rows that do not fit are said not to.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# (config, topology, overrides)
ROWS = (
  ('sft_smollm2_135m', 'v5e:2x4', ''),
  ('sft_smollm2_135m', 'v6e:2x2', ''),
  ('sft_llama32_1b', 'v5e:4x4', ''),
  ('sft_llama32_1b', 'v6e:2x4', ''),
  ('sft_llama32_1b', 'v5p:2x2x1', ''),
  ('sft_llama32_3b', 'v5e:8x8', ''),
  ('sft_llama32_3b', 'v6e:4x4', ''),
  ('sft_llama32_3b', 'v5p:2x2x2', ''),
  ('sft_llama3_8b', 'v5e:16x16', ''),
  ('sft_llama3_8b', 'v5e:16x16', 'batch_size=64 eval.batch_size=64 mesh.context=4'),
  ('sft_llama3_8b', 'v5e:8x8', ''),
  ('sft_llama3_8b', 'v6e:8x8', ''),
  ('sft_llama3_8b', 'v5p:4x4x4', ''),
  ('sft_llama3_8b', '2xv5e:16x16', 'mesh.data=2 batch_size=512 eval.batch_size=512'),
  ('sft_llama3_70b', 'v6e:16x16', ''),
  ('sft_llama3_70b', 'v5p:4x8x8', ''),
  ('sft_llama3_70b', 'v5e:16x16', ''),
  ('sft_llama32_1b', 'h200:8', ''),
  ('sft_llama3_8b', 'h200:8', 'batch_size=32 eval.batch_size=32 grad_accum=4'),
)


def plan(config: str, topology: str, overrides: str) -> dict:
  """The JSON of one plan."""
  command = [sys.executable, '-m', 'ftjax.plan', f'--config={config}', f'--topology={topology}']
  command += ['--json', '--nosearch', *(f'--config.{o}' for o in overrides.split())]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  lines = [line for line in done.stdout.split('\n') if line.startswith('{')]
  if not lines:
    raise SystemExit(f'{" ".join(command)}\n{done.stderr[-3000:]}')
  return json.loads(lines[-1])


def row(config: str, topology: str, overrides: str) -> str:
  """A line of the table."""
  found = plan(config, topology, overrides)
  settings = found['settings']
  mesh = ' '.join(
    f'{k.removeprefix("mesh.")} {v}' for k, v in settings.items() if 'mesh' in k and v > 1
  )
  start = f'| {config} | {topology} | {mesh} | {found["rows"]} x {found["length"]}'
  start += f' / {settings["grad_accum"]} | {settings["remat"]} |'
  if found['memory'] is None:
    wanted = f'{found["needed"] / 2**30:.1f}' if found['needed'] else 'more'
    return f'{start} does not fit: {wanted} of {found["capacity"] / 2**30:.0f} | | | |'
  memory, cost = found['memory'], found['cost']
  state = (memory['parameters'] + memory['optimizer']) / 2**30
  peak = f'{memory["peak"] / 2**30:.1f} of {found["capacity"] / 2**30:.0f}'
  sent = sum(c['sent'] for c in found['collectives']) / 2**30
  fits = '' if found['fits'] else 'does not fit: '
  return (
    f'{start} {fits}{peak} | {state:.2f} | {sent:.1f} | {cost["mfu"]:.0%} ({cost["bound"]}) '
    f'| {found["compile_seconds"]:.0f} |'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='', help='part of a config name or topology')
  only = parser.parse_args().only
  print('| config | slice | mesh | rows x tokens / micro-batches | remat | peak GiB a device '
        '| state GiB | GiB sent a step | MFU bound, uncalibrated | compile s |')  # fmt: skip
  print('|---|---|---|---|---|---|---|---|---|---|')
  for config, topology, overrides in ROWS:
    if only in config or only in topology:
      print(row(config, topology, overrides), flush=True)


if __name__ == '__main__':
  main()
