"""Tokenizing speed of ftjax on one core and on several, and of datasets.map, side by side.

  make assets
  python3 -m venv /tmp/hf && /tmp/hf/bin/pip install transformers==5.24.0 datasets==5.2.0 jinja2
  .venv/bin/python benchmarks/tokenize_speed.py --python /tmp/hf/bin/python

Short chats of one or two turns, made from a seed, as JSON lines. Every contestant is a process of
its own, timed around its own work and not around its start:
  one: ftjax from the file to the finished cache folder (tokens, masks, places), on one core.
  all: the same with --processes workers, their start included.
  map: datasets.map(num_proc=--processes) with apply_chat_template to ids; without --python it is
    left out. It makes no masks and checks nothing.
Contestants take turns; seconds are medians over rounds, ratios medians of the quotients within a
round. `cpu_seconds` (of all processes) says more on a machine that others use. One line of JSON per
contestant, then one of ratios.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_WORDS = (
  'the quick brown fox jumps over lazy dog what is capital of france it paris yes course can help '
  'you with that here are steps model training data learning rate function return value string'
)

_MAP = """
import json, sys, time, resource
import datasets, transformers
datasets.disable_progress_bars()
path, model, processes, cache = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
rows = datasets.Dataset.from_json(path, cache_dir=cache)
start = time.perf_counter()
found = rows.map(
  lambda row: {'ids': tokenizer.apply_chat_template(row['messages'], return_dict=False)},
  num_proc=int(processes), remove_columns=['messages'], load_from_cache_file=False,
)
seconds = time.perf_counter() - start
usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(u.ru_utime + u.ru_stime for u in usage)
tokens = sum(len(ids) for ids in found['ids'])
print(json.dumps({'seconds': seconds, 'cpu_seconds': cpu, 'tokens': tokens}))
"""


def write_rows(path: Path, count: int) -> None:
  """Writes `count` conversations as JSON lines."""
  chance, words = random.Random(0), _WORDS.split()

  def text(least: int, most: int) -> str:
    return ' '.join(chance.choice(words) for _ in range(chance.randint(least, most)))

  with path.open('w') as file:
    for i in range(count):
      messages = []
      for _ in range(2 if i % 3 == 0 else 1):
        messages.append({'role': 'user', 'content': text(8, 40)})
        messages.append({'role': 'assistant', 'content': text(4, 60)})
      file.write(json.dumps({'messages': messages}) + '\n')


def build(path: str, model: str, workers: int) -> dict[str, float]:
  """Tokenizes in this process, or with so many workers; seconds, CPU seconds and tokens."""
  from ftjax.data import sources, token_cache
  from ftjax.data.tokenizer import Tokenizer

  names = [p for p in Path(model).iterdir() if p.suffix in ('.json', '.jinja')]
  tokenizer = Tokenizer({p.name: p.read_bytes() for p in names}, model)
  with tempfile.TemporaryDirectory() as folder:
    source = token_cache.Source(
      sources.Spec(path),
      tokenizer,
      cache_dir=folder,
      seq_len=4096,
      loss_on='assistant',
      on_overlength='error',
      progress=False,
      workers=workers,
    )
    start = time.perf_counter()
    corpus = source.open()
    seconds = time.perf_counter() - start
  usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  cpu = sum(u.ru_utime + u.ru_stime for u in usage)
  return {'seconds': seconds, 'cpu_seconds': cpu, 'tokens': corpus.tokens}


def run(command: list[str], cores: int) -> dict[str, float]:
  """The last line of a process that may use so many cores, as JSON."""
  allowed = sorted(os.sched_getaffinity(0))[:cores]
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    command,
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    preexec_fn=lambda: os.sched_setaffinity(0, allowed),
  )
  return json.loads(done.stdout.splitlines()[-1])


def play(args: argparse.Namespace, rows: Path, folder: str) -> dict[str, list[dict[str, float]]]:
  """Results of each contestant, one for each round."""
  own = [sys.executable, __file__, '--build', str(rows), '--model', args.model, '--processes']
  contestants = {'one': ([*own, '1'], 1), 'all': ([*own, str(args.processes)], args.processes)}
  if args.python:
    words = [str(rows), args.model, str(args.processes), folder]
    contestants['map'] = ([args.python, '-c', _MAP, *words], args.processes)
  found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
  for _ in range(args.rounds):
    for name, (command, cores) in contestants.items():
      found[name].append(run(command, cores))
  return found


def main() -> None:
  """Prints the figures."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--model', default=str(ROOT / '.cache' / 'smollm2'), help='tokenizer folder')
  parser.add_argument('--python', help='an interpreter with transformers and datasets')
  parser.add_argument('--rows', type=int, default=30_000)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--build', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.build:
    print(json.dumps(build(args.build, args.model, args.processes)))
    return
  with tempfile.TemporaryDirectory() as folder:
    rows = Path(folder) / 'rows.jsonl'
    write_rows(rows, args.rows)
    found = play(args, rows, folder)
  for name, rounds in found.items():
    seconds = statistics.median(r['seconds'] for r in rounds)
    line = {'contestant': name, 'processes': 1 if name == 'one' else args.processes}
    line |= {'seconds': round(seconds, 2), 'examples_per_second': round(args.rows / seconds)}
    cpu = statistics.median(r['cpu_seconds'] for r in rounds)
    print(json.dumps(line | {'cpu_seconds': round(cpu, 2), 'tokens': rounds[0]['tokens']}))
  ratios = {}
  for name in ('one', 'map'):
    if name in found:
      pairs = zip(found[name], found['all'], strict=True)
      ratios[f'all / {name}'] = round(
        statistics.median(a['seconds'] / b['seconds'] for a, b in pairs), 2
      )
  print(json.dumps(ratios))


if __name__ == '__main__':
  main()
