"""telemetry/throughput.py: windows of a clock that the test moves."""

import jax
import pytest

from ftjax.models import counts
from ftjax.telemetry import throughput
from ftjax.telemetry.throughput import Peak, Throughput


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _throughput(clock, peak=None):
  return Throughput(flops=counts.Flops(6e3, 240.0), peak=peak, clock=clock)


def _step(meter, clock, seconds=2.0, tokens=100):
  clock.now += seconds
  meter.step_done(tokens=tokens, supervised=tokens // 4, attended=tokens * 5)


def test_rates_by_hand_and_the_first_step_is_left_out():
  clock = Clock()
  meter = _throughput(clock, Peak(1e6, 'made up'))
  _step(meter, clock, seconds=60.0, tokens=7)  # compiles
  assert meter.read() == {}
  _step(meter, clock)
  _step(meter, clock)
  got = meter.read()
  assert got == pytest.approx(
    {
      'tokens_per_s': 50.0,
      'supervised_tokens_per_s': 12.5,
      'step_s': 2.0,
      'input_wait': 0.0,
      'mfu': (6 * 1000 * 200 + 12 * 2 * 10 * 1000) / (4 * 1e6),
      'mfu_6n': 6 * 1000 * 200 / (4 * 1e6),
    }
  )
  assert meter.read() == {}


def test_more_than_the_peak_is_no_share_of_it():
  """A newcomer's machine that was busy when its peak was measured: 135 % would be shown."""
  clock = Clock()
  meter = _throughput(clock, Peak(1e5, 'made up'))
  _step(meter, clock)
  _step(meter, clock)
  assert meter.read().keys() == {'tokens_per_s', 'supervised_tokens_per_s', 'step_s', 'input_wait'}


def test_after_a_restart_the_first_step_is_left_out_again():
  clock = Clock()
  meter = _throughput(clock)
  _step(meter, clock)
  meter.start()
  _step(meter, clock, seconds=60.0)
  _step(meter, clock)
  assert meter.read()['tokens_per_s'] == 50.0


def test_waiting_is_a_share_and_pauses_do_not_count():
  clock = Clock()
  meter = _throughput(clock)
  _step(meter, clock)
  with meter.waiting():
    clock.now += 1.0
  _step(meter, clock, seconds=3.0)
  with meter.paused():
    clock.now += 500.0
  got = meter.read()
  assert got['step_s'] == 4.0 and got['input_wait'] == 0.25
  assert 'mfu' not in got
  with meter.paused():
    clock.now += 500.0
  _step(meter, clock)
  assert meter.read()['step_s'] == 2.0


def test_peaks():
  def flops(kind, n=1):
    return throughput.table_peak(kind, n).flops_per_s

  assert flops('TPU v5 lite', 256) == 256 * 197e12
  assert flops('TPU v5') == flops('TPU v5p') == 459e12
  assert flops('TPU v6 lite') == 918e12
  assert flops('TPU v4') == 275e12
  assert flops('TPU7x', 2) == 2307e12  # two devices a chip
  assert flops('NVIDIA H100 80GB HBM3') == flops('NVIDIA H200') == 989.4e12
  assert flops('NVIDIA A100-SXM4-80GB') == 312e12
  assert throughput.table_peak('TPU v9', 1) is None
  assert '2 x TPU v4' in throughput.table_peak('TPU v4', 2).source


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='measures the CPU')
def test_the_cpu_peak_is_measured_once_and_plausible():
  peak = throughput.find_peak()
  assert 1e8 < peak.flops_per_s < 1e15
  assert 'measured' in peak.source and 'float32' in peak.source
  assert throughput.find_peak() is peak


def test_memory_of_this_process():
  got = throughput.memory()
  names = {n.split('_memory')[0] for n in got}
  assert len(got) == 2 and len(names) == 1 and names <= {'host', 'device'}
  now, peak = sorted(got, key=len)
  assert 0.01 < got[now] <= got[peak] * 1.001
