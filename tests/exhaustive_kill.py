"""SIGKILL at more than twenty moments, each followed by a run to the end: is the result the same?

Usage, from the repository root (about ten minutes on two cores; not collected by pytest):

  python tests/exhaustive_kill.py [--seed=N] [--only=PART_OF_A_NAME] [--folder=DIR]

An uninterrupted run is the reference. Every trial is killed once or more at its moment, then run
again to the end; losses, gradient norms, the checksums of the batches that were fed, exported files
and task scores must be those of the reference bit for bit. Prints a table; exit code 1 when a trial
differs. test_resume.py does one such trial with every run of the tests.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable

import tiny_run
from tiny_run import EPOCH_STEPS, SAVE_EVERY, STEPS


@dataclasses.dataclass(frozen=True)
class Trial:
  """moments: for each kill, (workdir, log) -> has it come; jitter: most seconds to wait after it.

  is_cold: without compiled programs, so that the kill falls into compiling.
  """

  name: str
  moments: tuple[Callable[[pathlib.Path, pathlib.Path], bool], ...]
  jitter: float = 0.01
  is_cold: bool = False


def at_step(step):
  """Step's row has been written; steps take 10 to 30 ms."""
  return lambda workdir, log: tiny_run.logged(workdir) >= step


def finalized(step):
  return lambda workdir, log: (workdir / 'checkpoints' / str(step)).exists()


def saving(step):
  """The files of a save are being written."""
  return lambda workdir, log: any((workdir / 'checkpoints').glob(f'{step}.*tmp*'))


def said(text):
  """A line of the log."""
  return lambda workdir, log: text in log.read_text(errors='replace')


def there(name):
  return lambda workdir, log: (workdir / name).exists()


def trials() -> list[Trial]:
  boundary = EPOCH_STEPS
  out = [Trial(f'in epoch 0, step {s}', (at_step(s),)) for s in (1, 2, 3, 6)]
  out += [Trial(f'in epoch {s // boundary}, step {s}', (at_step(s),)) for s in (11, 13, 18, 19, 21)]
  out += [Trial(f'after the last step, {STEPS}', (at_step(STEPS),), jitter=0.03)]
  out += [Trial(f'during the save of step {s}', (saving(s),), 0.02) for s in (4, 12, 20)]
  out += [Trial('saves of 8, 16 and 24 all torn', tuple(saving(s) for s in (8, 16, 24)), 0.005)]
  out += [Trial('twice in the save of step 4', (saving(4), saving(4)), 0.01)]
  out += [Trial(f'during the last save, {STEPS}', (saving(STEPS),), 0.02)]
  for s in (boundary, 2 * boundary, 3 * boundary):
    assert s % SAVE_EVERY == 0
    out += [Trial(f'on the epoch boundary, checkpoint {s} just there', (finalized(s),), 0.0)]
  out += [Trial(f'epoch boundary, row {boundary} just there', (at_step(boundary),), 0.0)]
  out += [Trial('while compiling the step', (said('supervised'),), 4.0, is_cold=True)]
  out += [Trial('while compiling, later', (said('sum base'),), 6.0, is_cold=True)]
  out += [Trial('while importing', (lambda workdir, log: True,), 3.0)]
  out += [Trial('while exporting', (there('.export.partial'),), 0.01)]
  out += [Trial('export just there, in the final evaluation', (there('export'),), 0.5)]
  out += [Trial('at three steps in a row', (at_step(5), at_step(10), at_step(20)))]
  return out


def write_task(path):
  """Eight questions with two answers each."""
  rows = [
    {'prompt': f'{a} + {b} =', 'choices': [str(a + b), str(a + b + 1)], 'label': str(a + b)}
    for a, b in ((1, 2), (3, 4), (10, 20), (7, 8), (5, 5), (30, 12), (2, 9), (40, 41))
  ]
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


def kills(trial, arguments, workdir, log, rng) -> list[str]:
  """Runs and kills at each moment of a trial; where each kill fell."""
  out = []
  for moment in trial.moments:
    log.write_bytes(b'')
    process = tiny_run.launch('train', arguments, log)
    delay = rng.uniform(0, trial.jitter)
    if not tiny_run.kill_when(process, lambda m=moment: m(workdir, log), delay):
      out.append('too late')
      continue
    folder = workdir / 'checkpoints'
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    finished = [int(n) for n in names if n.isdigit()]
    torn = ' torn' if any('tmp' in n for n in names) else ''
    out.append(f'row {tiny_run.logged(workdir)} ckpt {max(finished, default="-")}{torn}')
  return out


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='')
  parser.add_argument('--folder', default='')
  flags = parser.parse_args()
  rng = random.Random(flags.seed)
  folder = pathlib.Path(flags.folder or tempfile.mkdtemp(prefix='exhaustive_kill_'))
  folder.mkdir(parents=True, exist_ok=True)
  task, reference, log = folder / 'task.jsonl', folder / 'reference', folder / 'log'
  write_task(task)

  def arguments(workdir):
    return tiny_run.arguments(workdir, f"eval.tasks=('sum=choice:{task}',)")

  log.write_bytes(b'')
  code = tiny_run.launch('train', arguments(reference), log).wait()
  if code:
    print(log.read_text(errors='replace'))
    return 1
  print(f'reference: {len(tiny_run.metrics(reference))} rows, in {folder}\n')
  print(f'{"killed":50} {"where":44} {"seconds":>7}  result', flush=True)
  failed = missed = 0
  for i, trial in enumerate(trials()):
    if flags.only not in trial.name:
      continue
    workdir, begin = folder / f'trial{i}', time.monotonic()
    shutil.rmtree(workdir, ignore_errors=True)
    if not trial.is_cold:
      tiny_run.share_programs(reference, workdir)
    where = kills(trial, arguments(workdir), workdir, log, rng)
    log.write_bytes(b'')
    code = tiny_run.launch('train', arguments(workdir), log).wait()
    wrong = [f'exit code {code}'] if code else tiny_run.differences(workdir, reference)
    failed += bool(wrong)
    missed += 'too late' in where
    seconds = time.monotonic() - begin
    result = 'bitwise equal' if not wrong else f'{len(wrong)} differ: {wrong[0][:120]}'
    print(f'{trial.name:50} {"; ".join(where):44} {seconds:7.0f}  {result}', flush=True)
    if wrong:
      (folder / f'trial{i}.log').write_bytes(log.read_bytes())
    else:
      shutil.rmtree(workdir)
  print(f'\n{failed} trials differ, {missed} ended before they could be killed')
  return int(failed > 0)


if __name__ == '__main__':
  sys.exit(main())
