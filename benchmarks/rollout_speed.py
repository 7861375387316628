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
import dataclasses
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLOTS = 16


@dataclasses.dataclass(frozen=True)
class Contestant:
  """Who runs: kind of rollout_speed_worker.py, dtype, command of its Python."""

  kind: str
  dtype: str
  command: str

  @property
  def name(self) -> str:
    return f'{self.kind}-{self.dtype}'


class Worker:
  """A live contestant."""

  def __init__(self, contestant: Contestant, job: dict, folder: Path):
    self.contestant = contestant
    path = folder / f'{contestant.name}.json'
    path.write_text(json.dumps(job | {'dtype': contestant.dtype}))
    script = str(Path(__file__).with_name('rollout_speed_worker.py'))
    self._log = open(folder / f'{contestant.name}.log', 'w+')  # noqa: SIM115
    self._process = subprocess.Popen(
      [*shlex.split(contestant.command), script, contestant.kind, str(path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
      env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    )
    self.rounds: list[dict] = []
    self.versions = self._read()['versions']

  def _read(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      raise SystemExit(f'{self.contestant.name} has ended:\n{self._log.read()[-4000:]}')
    return json.loads(line)

  def round(self) -> dict:
    self._process.stdin.write('round\n')
    self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    self._process.stdin.close()
    try:
      self._process.wait(timeout=60)
    except subprocess.TimeoutExpired:
      self._process.kill()
    self._log.close()

  def speeds(self, clock: str) -> list[float]:
    """Tokens asked for per second of each round by `clock`: seconds or cpu_seconds."""
    return [r['tokens'] / r[clock] for r in self.rounds]

  def summary(self, case: str) -> dict:
    return {
      'case': case,
      'contestant': self.contestant.name,
      'tokens_per_s': round(statistics.median(self.speeds('seconds')), 1),
      'tokens': self.rounds[0]['tokens'],
      'steps': self.rounds[0]['steps'],
      'seconds': [round(r['seconds'], 2) for r in self.rounds],
      'cpu_seconds': [round(r['cpu_seconds'], 2) for r in self.rounds],
      'peak_rss_gb': self.rounds[-1]['peak_rss_gb'],
      'versions': self.versions,
    }


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
  with tempfile.TemporaryDirectory() as folder:
    try:
      for contestant in contestants:
        workers.append(Worker(contestant, make_job(case, args.model), Path(folder)))
      for number in range(args.warmup + args.rounds):
        turn = number % len(workers)
        for worker in workers[turn:] + workers[:turn]:
          result = worker.round()
          print(case, number, worker.contestant.name, json.dumps(result), file=sys.stderr)
          if number >= args.warmup:
            worker.rounds.append(result)
    finally:
      for worker in workers:
        worker.close()
  for worker in workers:
    print(json.dumps(worker.summary(case)), flush=True)

  def best(kind: str) -> Worker:
    return max(
      (w for w in workers if w.contestant.kind == kind),
      key=lambda w: statistics.median(w.speeds('seconds')),
    )

  if {w.contestant.kind for w in workers} == {'ftjax', 'hf'}:
    ours, theirs = best('ftjax'), best('hf')
    line = {'case': case, 'ours': ours.contestant.name, 'theirs': theirs.contestant.name}
    for clock in ('seconds', 'cpu_seconds'):
      pairs = zip(ours.speeds(clock), theirs.speeds(clock), strict=True)
      line[f'speed_over_by_{clock}'] = round(statistics.median(a / b for a, b in pairs), 3)
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
    Contestant(kind, dtype, command)
    for kind, command in (('ftjax', args.ours), ('hf', args.hf_python))
    for dtype in ('float32', 'bfloat16')
    if command
  ]
  for case in args.cases:
    picked = [c for c in contestants if not args.contestants or c.name in args.contestants]
    run_case(case, picked, args)


if __name__ == '__main__':
  main()
