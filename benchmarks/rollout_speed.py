"""Rollout speed of ftjax against transformers' generate on this machine, side by side in one run.

  make assets
  python3 -m venv /tmp/hf && /tmp/hf/bin/pip install torch==2.13.0 transformers==5.24.0
  .venv/bin/python benchmarks/rollout_speed.py --ours .venv/bin/python \
    --hf-python /tmp/hf/bin/python

Random prompts of 20 to 90 tokens, tokens drawn at temperature 1 from the whole vocabulary, no stop
tokens, 16 sequences at once, in two cases:
  fixed: 16 completions of 128 tokens.
  ragged: 48 completions, each with a length of its own (log-normal with median 40, from 4 to 256).
    transformers takes 16 at a time, in order, and decodes until the longest of them is done; the
    engine refills slots. Speed counts the tokens that were asked for.

Every contestant is a process of rollout_speed_worker.py that stays alive and runs a round when
asked; they take turns, each round beginning with another one. Figures are medians over rounds,
ratios are medians of the quotients within a round, of the best dtype of each side. On a machine
that others use, cpu_seconds (of all threads) say more than seconds. One line of JSON per contestant
and case, then one of ratios.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from contest import Contestant, Worker, play

ROOT = Path(__file__).resolve().parent.parent
SLOTS = 16


def summary(worker: Worker, case: str) -> dict:
  """The line of a contestant; `tokens` are those that were asked for."""
  first = worker.rounds[0]
  return {'case': case, 'tokens': first['tokens'], 'steps': first['steps']} | worker.summary()


def make_job(case: str, model: str) -> dict:
  """Prompts and the length of each one's completion, the same for all."""
  vocab = json.loads((Path(model) / 'config.json').read_text())['vocab_size']
  chance = random.Random(0)
  lengths = [128] * SLOTS
  if case == 'ragged':
    lengths = [min(256, max(4, round(chance.lognormvariate(3.69, 0.9)))) for _ in range(3 * SLOTS)]
  prompts = [[chance.randrange(1, vocab) for _ in range(chance.randint(20, 90))] for _ in lengths]
  return {'model': model, 'slots': SLOTS, 'prompts': prompts, 'lengths': lengths}


def run_case(case: str, contestants: list[Contestant], args: argparse.Namespace) -> None:
  """Plays all rounds of a case and prints its lines."""
  workers: list[Worker] = []
  script = Path(__file__).with_name('rollout_speed_worker.py')
  environment = {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  with tempfile.TemporaryDirectory() as folder:
    try:
      for contestant in contestants:
        job = make_job(case, args.model)
        workers.append(Worker(contestant, script, job, Path(folder), environment))
      play(case, workers, args.warmup, args.rounds)
    finally:
      for worker in workers:
        worker.close()
  for worker in workers:
    print(json.dumps(summary(worker, case)), flush=True)

  def best(kind: str) -> Worker:
    return max(
      (w for w in workers if w.kind == kind), key=lambda w: statistics.median(w.speeds('seconds'))
    )

  if {w.kind for w in workers} == {'ftjax', 'hf'}:
    ours, theirs = best('ftjax'), best('hf')
    line = {'case': case, 'ours': ours.name, 'theirs': theirs.name}
    line |= {f'speed_over_by_{c}': ours.ratio(theirs, c) for c in ('seconds', 'cpu_seconds')}
    print(json.dumps(line), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--ours', default='', help='Python of an environment with ftjax')
  add('--hf-python', default='', help='Python of an environment with transformers')
  add('--contestants', nargs='*', help='only these, such as ftjax-float32 hf-float32')
  add('--cases', nargs='*', default=['fixed', 'ragged'], choices=('fixed', 'ragged'))
  add('--model', default=str(ROOT / '.cache/smollm2'), help='HF folder')
  add('--rounds', type=int, default=5)
  add('--warmup', type=int, default=1, help='rounds that do not count')
  args = parser.parse_args()
  contestants = [
    Contestant(f'{kind}-{dtype}', kind, command, dtype)
    for kind, command in (('ftjax', args.ours), ('hf', args.hf_python))
    for dtype in ('float32', 'bfloat16')
    if command
  ]
  for case in args.cases:
    picked = [c for c in contestants if not args.contestants or c.name in args.contestants]
    run_case(case, picked, args)


if __name__ == '__main__':
  main()
