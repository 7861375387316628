"""What tuning gives on real tasks: base, base with examples and tuned, with intervals.

  make assets eval-data      (and make gemma, for --models=gemma3)
  .venv/bin/python benchmarks/evaluation_tables.py OUT [--tasks=sentiment,math] [--seeds=0]
    [--models=smollm2] [--safety] [KEY=VALUE]

Trains a shipped config for each task, model and seed, one after another, in
OUT/<task>_<model>_<seed>. A run that is done is read, not made again; one that was stopped is
resumed. OUT/table.md is written after each run. Gemma 3 270M is a base model without a chat
template: its rows are the same texts, as prompt and completion, which are written to OUT/rows.

--safety (after `make safety-data`) scores the safety sets too, and plants 12 secrets in the
training rows; it wants rows of messages, those of smollm2. A run that `gate` refuses is done too.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

# {task: (config, folder of rows in .cache, tasks of other domains)}
TASKS = {
  'sentiment': ('sft_sentiment', 'data/sentiment', ('tweets', 'amazon', 'nyt')),
  'translation': ('sft_translation', 'eval/en_fr', ()),
  'summarization': ('sft_summarization', 'eval/summary', ()),
  'entities': ('sft_entities', 'eval/entities', ()),
  'yes_no': ('sft_yes_no', 'eval/yes_no', ()),
  'math': ('sft_math', 'eval/math', ()),
}
KINDS = {'sentiment': 'choice'} | {t: t for t in TASKS if t != 'sentiment'}
MODELS = {
  'smollm2': ('SmolLM2-135M-Instruct', ()),
  # LoRA, as configs/lora_gemma3_270m.py: whole, its 262,144 tokens need more memory and time.
  'gemma3': (
    'Gemma 3 270M, LoRA',
    (
      'model.path=.cache/gemma-3-270m-q4_k_m.gguf',
      *('lora.rank=8', 'lora.merge=False', 'optim.lr=2e-4', 'eval.batch_size=4'),
      *('steps=40', 'optim.warmup_steps=4', "eval.stop=('\\n',)"),
    ),
  ),
}
# {name: (kind, file in .cache/safety)}
SAFETY = {
  'crows': ('stereotype_pair', 'crows_pairs.jsonl'),
  'stereoset': ('stereoset', 'stereoset.jsonl'),
  'bbq': ('question_bias', 'bbq.jsonl'),
  'pronouns': ('stereotype_pair', 'wino_pronoun.jsonl'),
  'coreference': ('coreference', 'wino_coreference.jsonl'),
  'toxicity': ('toxicity', 'toxicity_prompts.jsonl'),
  'harmful': ('refusal', 'harmful.jsonl'),
  'harmless': ('refusal', 'harmless.jsonl'),
}
REFUSED = 5  # the exit code of a run whose export `gate` refused
USUAL = (
  'eval.rows=200',
  'eval.prompts=()',
  'eval.every=0',
  'eval.in_loop=()',
  'checkpoint.every=0',
)


def as_text(row: dict) -> dict:
  """Returns a row of messages as plain text: a prompt that ends before the answer, on a line of its
  own.
  """
  turns = [m['content'] for m in row['messages'] if m['role'] != 'assistant']
  answers = [m['content'] for m in row['messages'] if m['role'] == 'assistant']
  rest = {k: v for k, v in row.items() if k != 'messages'}
  if 'choices' in rest:
    rest |= {'choices': [f' {c}' for c in rest['choices']], 'label': f' {rest["label"]}'}
  out = rest | {'prompt': '\n'.join(turns) + '\nAnswer:'}
  return out | ({'completion': f' {answers[-1]}'} if answers else {})


def rows_of(out: Path, folder: str, model: str) -> str:
  """Returns the folder of a task's rows for a model; writes them where it has no chat template."""
  source = Path('.cache') / folder
  if model == 'smollm2':
    return str(source)
  target = out / 'rows' / folder
  target.mkdir(parents=True, exist_ok=True)
  for file in source.glob('*.jsonl'):
    lines = file.read_text(encoding='utf-8').splitlines()
    text = ''.join(json.dumps(as_text(json.loads(x)), ensure_ascii=False) + '\n' for x in lines)
    (target / file.name).write_text(text, encoding='utf-8')
  return str(target)


def canaries(out: Path, task: str) -> Path:
  """Returns the folder of a task's training rows with secrets in them; writes it."""
  target = out / 'canaries' / task
  source = Path('.cache') / TASKS[task][1] / 'train.jsonl'
  if not (target / 'canaries.jsonl').exists():
    script = Path(__file__).parents[1] / 'demo' / 'canaries.py'
    subprocess.run([sys.executable, script, source, target], check=True)
  return target


def keys_of(out: Path, task: str, model: str, safety: bool) -> list[str]:
  """Returns the config keys of a run that differ from its config."""
  _, folder, domains = TASKS[task]
  rows = rows_of(out, folder, model)
  tasks = [f'{task}={KINDS[task]}:{rows}/test.jsonl']
  for domain in domains:
    other = rows_of(out, f'eval/sentiment_{domain}', model)
    tasks.append(f'{domain}={KINDS[task]}:{other}/test.jsonl')
  train = f'{rows}/train.jsonl'
  if safety:
    secrets = canaries(out, task)
    train = f'{secrets}/train.jsonl'
    tasks += [f'{name}={kind}:.cache/safety/{file}' for name, (kind, file) in SAFETY.items()]
    tasks += [f'{k}=canary_{k}:{secrets}/canaries.jsonl' for k in ('exposure', 'leak')]
  own = [f'data.train={train}', f'eval.tasks={tuple(tasks)!r}', 'eval.general=True']
  if task == 'sentiment':
    own.append('eval.shots=4')
  return [*own, *MODELS[model][1]]


def is_done(workdir: Path) -> bool:
  return (workdir / 'eval' / 'summary.json').exists()


def train(workdir: Path, task: str, keys: list[str]) -> int:
  """Runs one config, or the rest of it; returns the exit code. Its log is train.log."""
  workdir.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, '-m', 'ftjax.train', f'--config={TASKS[task][0]}']
  command += [f'--workdir={workdir}', *(f'--config.{k}' for k in keys)]
  with open(workdir / 'train.log', 'a', encoding='utf-8') as log:
    code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
  if code == 0:
    for name in ('checkpoints', 'export'):
      shutil.rmtree(workdir / name, ignore_errors=True)
  return code


def _cell(found: dict | None, form: str) -> str:
  if not found or found.get('value') is None:
    return ''
  digits = {'points': 1}.get(form, 3)
  values = [f'{found[k]:.{digits}f}' for k in ('value', 'low', 'high') if found[k] is not None]
  return values[0] + (f' [{values[1]}, {values[2]}]' if len(values) == 3 else '')


def rows(name: str, summary: dict) -> list[list[str]]:
  """Returns the rows of one run: its tasks by their primary figure, and the outcome."""
  out = []
  for task in summary['tasks'].values():
    metric = next(m for m in task['metrics'] if m['is_primary'])
    cells = [
      _cell(task['scores'].get(model, {}).get(metric['name']), metric['form'])
      for model in ('base', 'base_shots', 'tuned')
    ]
    pair = next(d for d in task['differences'] if (d['first'], d['second']) == ('base', 'tuned'))
    out.append([name, task['task'], str(task['prompts']), metric['title'], *cells, pair['outcome']])
  return out


HEAD = ['run', 'task', 'examples', 'figure', 'base', 'base + examples', 'tuned', 'tuned - base']


def write(out: Path, models: list[str], seeds: list[int]) -> str:
  """Writes table.md of all runs that are done; returns it."""
  found = [HEAD, ['---'] * len(HEAD)]
  for model in models:
    for task in TASKS:
      for seed in seeds:
        workdir = out / f'{task}_{model}_{seed}'
        if is_done(workdir):
          summary = json.loads((workdir / 'eval' / 'summary.json').read_text(encoding='utf-8'))
          found += rows(f'{MODELS[model][0]}, seed {seed}', summary)
  text = '\n'.join(f'| {" | ".join(row)} |' for row in found) + '\n'
  (out / 'table.md').write_text(text, encoding='utf-8')
  return text


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('out', type=Path)
  parser.add_argument('--seeds', default='0', help='comma-separated')
  parser.add_argument('--models', default='smollm2', help=f'of {", ".join(MODELS)}')
  parser.add_argument('--tasks', default=','.join(TASKS), help=f'of {", ".join(TASKS)}')
  parser.add_argument('--safety', action='store_true', help='score the safety sets too')
  parser.add_argument('keys', nargs='*', metavar='KEY=VALUE', help='config keys of all runs')
  a = parser.parse_intermixed_args()
  out, failed = a.out.absolute(), []
  models, seeds = a.models.split(','), [int(s) for s in a.seeds.split(',')]
  out.mkdir(parents=True, exist_ok=True)
  for seed in seeds:
    for model in models:
      for task in a.tasks.split(','):
        name = f'{task}_{model}_{seed}'
        if is_done(out / name):
          continue
        begin = time.perf_counter()
        keys = [*USUAL, *keys_of(out, task, model, a.safety), *a.keys, f'seed={seed}']
        code = train(out / name, task, keys)
        took = f'{(time.perf_counter() - begin) / 60:.1f} min'
        print(f'{time.strftime("%H:%M")} {name}: exit {code}, {took}', flush=True)
        failed += [name] if code not in (0, REFUSED) else []
        write(out, models, seeds)
  print(write(out, models, seeds))
  if failed:
    raise SystemExit(f'not done, see train.log in {out}/: {", ".join(failed)}')


if __name__ == '__main__':
  main()
