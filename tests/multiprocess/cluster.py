"""Runs of several processes on loopback, each with devices of its own, started as a user starts
them.
"""

import pathlib
import socket
import time

import tiny_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEVICES = 4  # of all processes together
STEPS = 8


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def arguments(workdir, *overrides):
  """Of `ftjax.train`: 8 steps, a checkpoint every 2, an evaluation every 4."""
  settings = [
    f'steps={STEPS}',
    'batch_size=8',
    'grad_accum=2',
    'eval.batch_size=8',
    'data.train=sums:100',
    'checkpoint.every=2',
    'checkpoint.keep=20',
    'eval.every=4',
    'mesh.data=2',
    *overrides,
  ]
  return ['--config=tiny_sft', f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]


class Processes:
  """`count` processes of one run; what they say goes to <logs>/<number>.log. `own`: arguments of
  each; `folders`: from which each is started.
  """

  def __init__(self, count, arguments, logs, flags=(), own=None, folders=None):
    logs.mkdir(parents=True, exist_ok=True)
    self.logs = [logs / f'{i}.log' for i in range(count)]
    port, self.all = free_port(), []
    for i in range(count):
      several = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}', f'--process_id={i}']
      command = [*arguments, *flags, *(own[i] if own else ()), *(several if count > 1 else ())]
      folder = folders[i] if folders else ROOT
      # A shared compile cache is for runs of one process: see experiment.start.
      self.all.append(
        tiny_run.launch('train', command, self.logs[i], folder=folder, devices=DEVICES // count)
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.all:
      process.kill()
      process.wait()

  def wait(self, timeout=240):
    """Exit codes, in order."""
    end = time.monotonic() + timeout
    return [p.wait(timeout=max(end - time.monotonic(), 0.1)) for p in self.all]

  def said(self):
    return '\n'.join(
      f'--- process {i}\n{log.read_text(errors="replace")}' for i, log in enumerate(self.logs)
    )

  def until(self, is_time, timeout=240):
    """Waits for a moment; fails when a process ends before it."""
    end = time.monotonic() + timeout
    while not is_time():
      ended = [p.poll() for p in self.all]
      assert ended == [None] * len(ended), f'{ended}\n{self.said()}'
      assert time.monotonic() < end, f'the moment did not come\n{self.said()}'
      time.sleep(0.005)


def run(count, arguments, logs, **more):
  """Runs to the end; all must end well."""
  with Processes(count, arguments, logs, **more) as processes:
    codes = processes.wait()
    assert codes == [0] * count, f'{codes}\n{processes.said()}'
    return processes.said()
