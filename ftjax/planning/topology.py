"""Hardware topologies by name (`v5e:16x16`, `2xv5e:16x16`, `v5litepod-16`, `h200:8x4`, `cpu:8`):
figures of their chips, and devices for ahead-of-time compilation.

Parsing and the table need no jax. `environment` must be applied before jax is imported."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ftjax.planning import tpu_names
from ftjax.runtime.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of one jax device.

  memory: bytes. flops: bf16 FLOP/s. bandwidth: bytes/s of its memory. link: bytes/s that one device
  sends to the others of its slice, all links together, one direction. network: bytes/s between
  slices or hosts. dims: dimensions of a slice's name. per_chip: jax devices of a chip. layout: the
  compiler's name for chips whose two cores form one device, '' if that is its default.
  """

  platform: str
  memory: float
  flops: float
  bandwidth: float
  link: float
  network: float
  dims: int = 1
  per_chip: int = 1
  tpu_type: str = ''
  layout: str = ''


# TPUs: cloud.google.com/tpu/docs, system architecture (memory, peak, bandwidth); links: 45 to 90
# GB/s each and direction, two for each dimension of the torus (jax-ml.github.io/scaling-book,
# chapter 2). A TPU7x chip is two jax devices. GPUs: NVIDIA's data sheets; NVLink one direction;
# one 400 Gbit/s adapter for each GPU.
_GIB = 2**30
CHIPS = {
  'v4': Chip('tpu', 32 * _GIB, 275e12, 1.2e12, 6 * 45e9, 3.1e9, 3, 1, 'v4-8', 'megacore'),
  'v5e': Chip('tpu', 16 * _GIB, 197e12, 8.1e11, 4 * 45e9, 3.1e9, 2, 1, 'v5litepod-8'),
  'v5p': Chip('tpu', 95 * _GIB, 459e12, 2.8e12, 6 * 90e9, 6.2e9, 3, 1, 'v5p-8'),
  'v6e': Chip('tpu', 32 * _GIB, 918e12, 1.6e12, 4 * 90e9, 12.5e9, 2, 1, 'v6e-8'),
  'tpu7x': Chip('tpu', 96 * _GIB, 1153.5e12, 3.69e12, 3 * 90e9, 6.2e9, 3, 2, 'tpu7x-8'),
  'h100': Chip('gpu', 80e9, 989.4e12, 3.35e12, 450e9, 50e9),
  'h200': Chip('gpu', 141e9, 989.4e12, 4.8e12, 450e9, 50e9),
  'cpu': Chip('cpu', math.inf, math.nan, math.nan, math.nan, math.nan),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or several slices. shape: chips along each dimension for TPUs, (per host, hosts) for GPUs,
  (devices,) for CPUs.
  """

  name: str
  kind: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def num_devices(self) -> int:
    return math.prod(self.shape) * self.slices * self.chip.per_chip

  @property
  def local_devices(self) -> int:
    """Returns the number of devices that `link` connects: of a slice, or of a GPU host."""
    return self.shape[0] if self.chip.platform == 'gpu' else self.num_devices // self.slices


def parse(text: str) -> Topology:
  """Parses `[SLICESx]KIND:AxB[xC]`, or a name of Google Cloud (see tpu_names.py).

  Raises:
    ConfigError: an unknown kind, or a shape that the kind does not have.
  """
  name = tpu_names.topology(text) or text
  found = re.fullmatch(r'(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)', name)
  if not found or found[2] not in CHIPS:
    near = tpu_names.nearest(text)
    raise ConfigError(
      f'--topology={text}: {f"did you mean {near}? " if near else ""}expected [SLICESx]KIND:SHAPE '
      f'with KIND one of {", ".join(CHIPS)}, for example v5e:16x16, 2xv5e:16x16, v5p:4x4x8, '
      'h200:8, h200:8x4 (GPUs of a host x hosts), cpu:8; or the name of a TPU slice in Google '
      'Cloud, like v5litepod-16, v5p-8 or ct6e-standard-4t'
    )
  slices, kind = int(found[1] or 1), found[2]
  shape = tuple(int(n) for n in found[3].split('x'))
  chip = CHIPS[kind]
  dims = {'tpu': (chip.dims,), 'gpu': (1, 2), 'cpu': (1,)}[chip.platform]
  if len(shape) not in dims or 0 in shape or not slices or (slices > 1 and chip.platform != 'tpu'):
    example = {1: '8', 2: '4x4', 3: '4x4x4'}[dims[-1]]
    raise ConfigError(f'--topology={text}: {kind} slices are written like {kind}:{example}')
  return Topology(name, kind, shape, slices)


def environment(topology: Topology, dump: str = '') -> dict[str, str]:
  """Returns the environment variables that compiling for a topology needs, to be set before jax is
  imported.

  Args:
    topology: the target.
    dump: a folder in which the TPU compiler writes the compiled steps, for `written`.
  """
  out = {'JAX_PLATFORMS': 'cpu'}  # nothing is executed; an attached accelerator stays free
  flags = []
  if topology.chip.platform == 'tpu':
    out |= {
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_ACCELERATOR_TYPE': topology.chip.tpu_type,
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # another plan may be running
    }
    if dump:
      flags = [f'--xla_dump_to={dump}', '--xla_dump_hlo_as_text', '--xla_dump_hlo_module_re=step']
  if topology.chip.platform == 'cpu':
    flags = [f'--xla_force_host_platform_device_count={topology.num_devices}']
  if flags:
    out['XLA_FLAGS'] = ' '.join([*os.environ.get('XLA_FLAGS', '').split(), *flags])
  return out


def written(dump: str) -> str:
  """Returns the optimized program that the compiler wrote last into `dump`, and empties the folder;
  '' without one.
  """
  found = sorted(Path(dump).glob('*.after_optimizations.txt'), key=lambda p: p.stat().st_mtime_ns)
  text = found[-1].read_text(encoding='utf-8') if found else ''
  for file in filter(Path.is_file, Path(dump).iterdir()):
    file.unlink()
  return text


def devices(topology: Topology) -> Sequence:
  """Returns the devices to compile for; real ones only for `cpu`.

  Raises:
    ConfigError: the compiler is not installed, or the slice does not exist.
  """
  import jax
  from jax.experimental import topologies

  platform = topology.chip.platform
  if platform == 'cpu':
    return jax.devices()
  try:
    if platform == 'gpu':
      per_host, hosts = (*topology.shape, 1)[:2]
      found = topologies.get_topology_desc(
        platform='cuda',
        topology_name='',
        target_config=_gpu_target(topology.kind),
        topology=f'1x{hosts}x{per_host}',
      )
    else:
      shape = topology.shape
      extra = {'num_slices': topology.slices} if topology.slices > 1 else {}
      if topology.chip.layout:
        extra['chip_config_name'] = topology.chip.layout
      name = f'{topology.kind}:{"x".join(map(str, shape))}'
      found = topologies.get_topology_desc(platform='tpu', topology_name=name, **extra)
  except Exception as error:  # libtpu raises many types
    package = 'libtpu' if platform == 'tpu' else 'jax[cuda13]'
    raise ConfigError(
      f'--topology={topology.name}: the compiler gives no such devices '
      f'({str(error).splitlines()[0][:300]}); is {package} installed, and is this a shape that '
      'exists?'
    ) from error
  if len(found.devices) != topology.num_devices:
    raise ConfigError(
      f'--topology={topology.name}: expected {topology.num_devices} devices, the compiler made '
      f'{len(found.devices)}'
    )
  return found.devices


def link_domains(mesh, chip: Chip) -> list[int]:
  """Returns the slice of each device of a mesh in flat order, or the host of a GPU: devices of a
  domain communicate over `link`, domains over `network`.
  """
  devices = mesh.devices.flat
  if chip.platform == 'gpu':
    return [d.process_index for d in devices]
  return [getattr(d, 'slice_index', 0) or 0 for d in devices]


def _gpu_target(kind: str) -> str:
  """Returns XLA's GpuTargetConfig as text proto, with NVIDIA's figures for the SXM card."""
  chip = CHIPS[kind]
  return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {int(chip.memory)} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {kind.upper()}"
"""
