"""Threads of XLA's CPU backend, where a program runs on several CPU devices.

A collective blocks its thread until every device has arrived, and independent collectives of one
program begin in any order. With a thread for each device (jaxlib 0.10 and 0.12) two devices can
wait in one collective and the others in another, with no thread left: the program hangs until XLA
ends the process. More threads than waiting collectives prevent that. The backend reads NPROC when
it is made, in place of the number of cores."""

import os
import re
from collections.abc import MutableMapping

_DEVICES = re.compile(r'--xla_force_host_platform_device_count=(\d+)')
_EACH = 16  # collectives of a program that wait at once on a device; seen: 2


def reserve(processes: int = 1, environment: MutableMapping[str, str] = os.environ) -> None:
  """Sets NPROC where CPU devices run collectives; to be called before jax makes its backends. A
  value that is set already is kept.

  Args:
    processes: of the run.
    environment: XLA_FLAGS and JAX_PLATFORMS are read, NPROC is set.
  """
  found = _DEVICES.findall(environment.get('XLA_FLAGS', ''))
  devices = int(found[-1]) if found else 1
  is_cpu = environment.get('JAX_PLATFORMS', '') == 'cpu'
  if devices > 1 or (processes > 1 and is_cpu):
    environment.setdefault('NPROC', str(max(_EACH * devices, os.cpu_count() or 1)))
