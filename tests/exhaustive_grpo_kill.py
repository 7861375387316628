"""SIGKILL of a GRPO run after every step k < 8: are prompts, completions and losses the same?

Usage, from the repository root (about ten minutes on two cores; not collected by pytest):

  python tests/exhaustive_grpo_kill.py [--folder=DIR] [--passes=1,2,4] [--micro=1,2]

For each number of passes over a rollout (1, 2, 4) and of micro-batches (1, 2) an uninterrupted run
of eight steps is the reference. A trial is killed as soon as checkpoint k is there, then run to the
end. Prints a table; exit code 1 when a trial differs. Guarantee 1.1; tiny_rollouts.py does one such
trial with every run of the tests.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # ftjax is not installed

import tiny_rollouts
import tiny_run


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', default='')
  parser.add_argument('--passes', default='1,2,4')
  parser.add_argument('--micro', default='1,2')
  flags = parser.parse_args()
  folder = pathlib.Path(flags.folder or tempfile.mkdtemp(prefix='grpo_kill_'))
  folder.mkdir(parents=True, exist_ok=True)
  failed, log = 0, folder / 'log'
  print(f'{"passes":>6} {"micro":>6} {"k":>3} {"resumed":>8}  result', flush=True)
  for passes in map(int, flags.passes.split(',')):
    for micro in map(int, flags.micro.split(',')):
      settings = (f'rollout.updates={passes}', 'rollout.minibatches=1', f'grad_accum={micro}')
      reference = folder / f'reference-{passes}-{micro}'
      code, told = tiny_run.run('train', tiny_rollouts.arguments(reference, *settings))
      if code:
        print(told)
        return 1
      for k in range(1, 8):
        workdir = folder / 'trial'
        shutil.rmtree(workdir, ignore_errors=True)
        tiny_run.share_programs(reference, workdir)
        arguments = tiny_rollouts.arguments(workdir, *settings)
        process = tiny_run.launch('train', arguments, log)
        there = workdir / 'checkpoints' / str(k)
        in_time = tiny_run.kill_when(process, there.exists)
        steps = [int(p.name) for p in there.parent.iterdir() if p.name.isdigit()]
        code, told = tiny_run.run('train', arguments)
        wrong = [told[-300:]] if code else tiny_run.differences(workdir, reference)
        if not code and tiny_rollouts.rollouts(workdir) != tiny_rollouts.rollouts(reference):
          wrong.append('the rollouts differ')
        failed += bool(wrong) or not in_time
        result = wrong[0] if wrong else 'bitwise equal' if in_time else 'too late'
        print(f'{passes:6} {micro:6} {k:3} {max(steps):8}  {result}', flush=True)
  return int(failed > 0)


if __name__ == '__main__':
  sys.exit(main())
