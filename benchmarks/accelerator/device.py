"""The device: kind, driver and runtime, and its measured memory bandwidth and matrix-product rate.

A copy reads and writes each byte, so its traffic is twice the array. Both figures are context for
all others: no card reaches the rate of its data sheet.
"""

import functools

import jax
import jax.numpy as jnp

from accelerator import measuring, training
from accelerator.record import Record
from ftjax.planning import topology
from ftjax.telemetry import throughput

COLUMNS = (
  ('value', 'measured', '.4g'),
  ('unit', 'unit', ''),
  ('sheet', 'data sheet', '.4g'),
  ('text', 'text', ''),
)


def run(record: Record, tiny: bool) -> None:
  """Measures the attached device."""
  measuring.one_device()
  device = jax.devices()[0]
  with record.row('device') as row:
    row['text'] = f'{device.device_kind}, {len(jax.devices())} attached, {device.platform}'
    row |= {'kind': device.device_kind, 'platform': device.platform, 'count': len(jax.devices())}
  with record.row('runtime') as row:
    row['text'] = ' '.join(str(device.client.platform_version).split())
  with record.row('memory of the allocator') as row:
    row |= {'value': measuring.gib(measuring.memory()['limit']), 'unit': 'GiB'}
  with record.row('memory bandwidth, copy') as row:
    row |= {'value': _bandwidth(2**20 if tiny else 2**32) / 1e9, 'unit': 'GB/s'}
    name = training.chip_name(device.device_kind)
    row['sheet'] = topology.CHIPS[name].bandwidth / 1e9 if name else None
  with record.row('bfloat16 matrix product') as row:
    sheet = throughput.table_peak(device.device_kind, 1)
    row |= {'value': _products(128 if tiny else 8192) / 1e12, 'unit': 'TFLOP/s'}
    row['sheet'] = sheet.flops_per_s / 1e12 if sheet else None


def _bandwidth(size: int) -> float:
  """Returns bytes/s read and written by x + 1 of an array of `size` bytes."""
  x = jnp.zeros((size // 4,), jnp.float32)
  add = jax.jit(lambda a: a + 1)
  return 2 * size / measuring.median_seconds(functools.partial(add, x), times=9)


def _products(n: int) -> float:
  """Returns FLOP/s of products of random bfloat16 [n, n] matrices."""
  keys = jax.random.split(jax.random.key(0), 2)
  a, b = (jax.random.normal(k, (n, n), jnp.bfloat16) for k in keys)
  multiply = jax.jit(jnp.matmul)
  return 2 * n**3 / measuring.median_seconds(functools.partial(multiply, a, b), times=9)
