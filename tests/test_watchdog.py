"""Limits of phases, by a clock of our own; and a process that really ends."""

import subprocess
import sys
import time

import pytest

from ftjax.cluster.watchdog import Watchdog


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  # The thread that looks would take a clock that jumps for a process that stood still.
  monkeypatch.setattr(Watchdog, '_watch', lambda self: None)
  return Clock()


def watch(clock, **limits):
  return Watchdog(limits, expire=lambda message: None, clock=clock)


def test_within_the_limit_and_over_it(clock):
  dog = watch(clock, step=10.0)
  assert dog.overdue() == ''
  with dog.phase('step'):
    clock.now = 10.0
    assert dog.overdue() == ''
    clock.now = 11.0
    assert "phase 'step' for 11 s, the limit is 10 (watchdog.step)" in dog.overdue()
    dog.beat()
    assert dog.overdue() == ''
  clock.now = 100.0
  assert dog.overdue() == ''


def test_the_outer_phase_stands_still(clock):
  dog = watch(clock, step=10.0, save=50.0)
  with dog.phase('step'):
    clock.now = 9.0
    with dog.phase('save'):
      clock.now = 40.0
      assert dog.overdue() == ''
    clock.now = 49.0
    assert dog.overdue() == ''
    clock.now = 51.0
    assert 'watchdog.step' in dog.overdue()


def test_slow_steps_have_ten_times_their_median(clock):
  dog = watch(clock, step=10.0)
  with dog.phase('step'):
    for _ in range(5):
      clock.now += 9.0
      dog.beat()
    clock.now += 90.0
    assert dog.overdue() == ''
    clock.now += 1.0
    assert 'the limit is 90' in dog.overdue()


def test_no_limit_and_no_such_phase(clock):
  dog = watch(clock, step=0.0)
  with dog.phase('step'):
    clock.now = 1e9
    dog.beat()
    clock.now = 2e9
    assert dog.overdue() == ''
  with pytest.raises(KeyError), dog.phase('compile'):
    pass


def test_a_process_that_hangs_ends_with_75_and_its_stacks():
  code = (
    'import time\nfrom ftjax.cluster.watchdog import Watchdog\n'
    "def stuck():\n  time.sleep(60)\nwith Watchdog({'step': 0.5}).phase('step'):\n  stuck()\n"
  )
  begin = time.monotonic()
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 75 and time.monotonic() - begin < 55
  assert 'watchdog.step' in done.stderr and 'in stuck' in done.stderr


def test_it_ends_when_stderr_is_not_read():
  """A log shipper that is stuck, Ctrl-S at a terminal: stderr is a full pipe."""
  code = (
    'import os, time\nfrom ftjax.cluster import processes as peers, watchdog\npeers.GRACE = 1.0\n'
    'os.set_blocking(2, False)\ntry:\n  while True:\n    os.write(2, bytes(4096))\n'
    'except BlockingIOError:\n  os.set_blocking(2, True)\n'
    "with watchdog.Watchdog({'step': 0.5}).phase('step'):\n  time.sleep(300)\n"
  )
  with subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE) as run:
    assert run.wait(60) == 75
