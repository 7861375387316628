"""Starts a run of several processes: finds the launch, checks that every process has connected and
names those that are missing, then initializes jax.distributed.

The launch comes from flags or from the environment: Cloud TPU metadata, SLURM, MPI. Communication
between the processes of a running job is in processes.py."""

import dataclasses
import ipaddress
import json
import logging
import os
import re
import socket
import time
from collections.abc import Mapping

import jax

from ftjax.cluster import processes
from ftjax.runtime.errors import ConfigError, StoppedEarly

log = logging.getLogger(__name__)

# (processes, this one's number, processes on this machine, its number among those) of launchers
# that start one program many times.
# MPI first: inside a SLURM job, mpirun also passes the SLURM variables of its own launcher.
_MPI_SIZE = 'OMPI_COMM_WORLD_SIZE'
_RANKS = (
  (
    *(_MPI_SIZE, 'OMPI_COMM_WORLD_RANK'),
    *('OMPI_COMM_WORLD_LOCAL_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
  ),
  ('PMI_SIZE', 'PMI_RANK', 'MPI_LOCALNRANKS', 'MPI_LOCALRANKID'),
  ('SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_STEP_TASKS_PER_NODE', 'SLURM_LOCALID'),
)
_MOST_BYTES = 4096  # of a message while connecting


@dataclasses.dataclass(frozen=True)
class Launch:
  """One process of several. coordinator: HOST:PORT of process 0. local_devices: indices of the GPUs
  that this process uses; None means all.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_devices: tuple[int, ...] | None = None


def find(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  environment: Mapping[str, str] = os.environ,
) -> Launch | None:
  """Returns the launch that flags or environment describe; None for a single process.

  Args:
    coordinator, num_processes, process_id: of the flags; with a coordinator, the other two may come
      from SLURM or MPI.
    environment: variables of the process.

  Raises:
    ConfigError: flags are incomplete or contradict each other, or a cluster does not answer.
  """
  if coordinator is None:
    if num_processes == 1 and not process_id:
      return None
    if num_processes is not None or process_id is not None:
      raise ConfigError(
        f'--num_processes={num_processes}, --process_id={process_id}: they need '
        '--coordinator=HOST:PORT, the address of process 0'
      )
    return _detect(environment)
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit():
    raise ConfigError(f'--coordinator={coordinator}: expected HOST:PORT of process 0')
  size, rank = _ranks(environment)
  size = num_processes if num_processes is not None else size
  rank = process_id if process_id is not None else rank
  if size is None or rank is None:
    raise ConfigError(
      f'--coordinator={coordinator}: --num_processes and --process_id are missing, and neither '
      'SLURM nor MPI sets them'
    )
  if not 0 <= rank < size:
    raise ConfigError(f'--process_id={rank}: expected 0 to {size - 1} (--num_processes={size})')
  return Launch(coordinator, size, rank, _own_devices(environment)) if size > 1 else None


def _ranks(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
  for size, rank, *_ in _RANKS:
    if size in environment and rank in environment:
      return int(environment[size]), int(environment[rank])
  return None, None


def _own_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
  """Returns the GPU of this process where several processes share a machine; None, which means all
  visible GPUs, for the only process of a machine or where a single GPU is visible.
  """
  if 'JAX_LOCAL_DEVICE_IDS' in environment:
    return tuple(int(i) for i in environment['JAX_LOCAL_DEVICE_IDS'].split(','))
  if environment.get('CUDA_VISIBLE_DEVICES', ',').count(',') == 0:
    return None
  for size, _, here, local in _RANKS:
    if size in environment and local in environment:
      # SLURM writes '2(x3),1': two on each of three machines, one on the next.
      counts = re.findall(r'(\d+)(?:\(x\d+\))?', environment.get(here, '1'))
      return (int(environment[local]),) if any(int(n) > 1 for n in counts) else None
  return None


def _detect(environment: Mapping[str, str]) -> Launch | None:
  """Returns the launch that jax's cluster detection finds (jax._src.clusters, which
  jax.distributed uses too)."""
  from jax._src.clusters import ClusterEnv

  known = [c for c in ClusterEnv._cluster_types if not c.opt_in_only_method]
  if environment.get('JAX_PLATFORMS', '').startswith('cpu'):
    known = [c for c in known if not c.name.endswith('tpu')]  # no TPU metadata is needed
  if environment.get('SLURM_STEP_NUM_TASKS') == '1':  # a shell inside an allocation
    known = [c for c in known if c.name != 'slurm']
  if 'JOB_COMPLETION_INDEX' not in environment:  # a pod that is no indexed job
    known = [c for c in known if c.name != 'k8s']
  found = None
  try:
    found = next((c for c in known if c.is_env_present()), None)
    if found is None or (size := found.get_process_count()) == 1:
      return _alone(environment)
    address = found.get_coordinator_address(
      timeout_secs=60, override_coordinator_port=environment.get('JAX_COORDINATOR_PORT')
    )
    launch = Launch(address, size, found.get_process_id(), _own_devices(environment))
  except (OSError, RuntimeError, ValueError, KeyError) as error:
    if found is not None:
      # If each process continued alone, each would train the whole run.
      raise ConfigError(
        f'this is a machine of a cluster ({found.name}), but its other processes could not be '
        f'found ({type(error).__name__}: {error}); try again, give --coordinator=HOST:PORT, or '
        '--num_processes=1 for a run of this process alone'
      ) from error
    log.warning('cluster detection failed (%s); continuing as a single process', error)
    return _alone(environment)
  nodes = int(environment.get('SLURM_JOB_NUM_NODES', '1'))
  if nodes > 1 and _is_loopback(address):
    raise ConfigError(
      f'coordinator {address} is a loopback address, which the other {nodes - 1} nodes cannot '
      'reach; give --coordinator=HOST:PORT'
    )
  return launch


def _alone(environment: Mapping[str, str]) -> None:
  """Returns None; raises ConfigError where MPI started several processes but gives no address."""
  if int(environment.get(_MPI_SIZE, '1')) > 1:
    raise ConfigError(
      f'{_MPI_SIZE}={environment[_MPI_SIZE]}, but the address of process 0 is unknown; give '
      '--coordinator=HOST:PORT'
    )


def _is_loopback(address: str) -> bool:
  host = address.rpartition(':')[0].strip('[]')
  try:
    return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
  except (OSError, ValueError):
    return False


def initialize(launch: Launch, timeout: float, heartbeat: int) -> None:
  """Connects to the other processes. Must run before jax initializes a device.

  Args:
    launch: from `find`.
    timeout: seconds to wait for the others.
    heartbeat: seconds without a heartbeat after which a process counts as lost.

  Raises:
    StoppedEarly: not all processes connected in time; names the missing ones.
    ConfigError: two processes have the same id, or different process counts.
  """
  begin = time.monotonic()
  meet(launch, timeout)
  # jax's SIGTERM handler would replace the one of this library, which all hosts agree through.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
    launch.coordinator,
    launch.num_processes,
    launch.process_id,
    local_device_ids=launch.local_devices,
    cluster_detection_method='deactivate',
    initialization_timeout=int(timeout),
    heartbeat_timeout_seconds=heartbeat,
  )
  processes.watch()
  log.info(
    'process %d of %d on %s, coordinator %s, connected in %.1f s; %d local devices of %d',
    launch.process_id,
    launch.num_processes,
    socket.gethostname(),
    launch.coordinator,
    time.monotonic() - begin,
    jax.local_device_count(),
    jax.device_count(),
  )
  _check_slices()


def _check_slices() -> None:
  """Raises ConfigError where MEGASCALE_NUM_SLICES counts slices that a preemption has removed."""
  expected = os.environ.get('MEGASCALE_NUM_SLICES')
  found = len({getattr(d, 'slice_index', 0) for d in jax.devices()})
  if expected and int(expected) != found:
    raise ConfigError(
      f'MEGASCALE_NUM_SLICES={expected}, but the devices form {found} slices; unset the variable '
      'of an earlier job, or wait for the missing slice'
    )


def meet(launch: Launch, timeout: float) -> None:
  """Waits until every process has connected to process 0, which counts them.

  jax's coordination service aborts the process when another one does not connect, and does not name
  it."""
  deadline = time.monotonic() + timeout
  if launch.process_id == 0:
    _host_meeting(launch, deadline, timeout)
  else:
    _join_meeting(launch, deadline, timeout)


def _host_meeting(launch: Launch, deadline: float, timeout: float) -> None:
  port = int(launch.coordinator.rpartition(':')[2])
  present: dict[int, tuple[socket.socket, str]] = {}
  wrong = ''
  with _server(port, launch.num_processes) as server:
    while not wrong:
      # A process that has disconnected is being restarted, or is dead: wait for it again.
      present = {n: entry for n, entry in present.items() if _is_open(entry[0])}
      if len(present) == launch.num_processes - 1 or time.monotonic() >= deadline:
        break
      server.settimeout(min(max(deadline - time.monotonic(), 0.001), 1.0))
      try:
        connection, _ = server.accept()
      except OSError:  # no connection within the timeout
        continue
      try:
        number, host, of = _hello(connection)
      except (OSError, ValueError):  # a connection that is not one of our processes
        connection.close()
        continue
      if of != launch.num_processes:
        wrong = f'process {number} on {host!r} expects {of} processes, process 0 expects '
        wrong += f'{launch.num_processes}'
      elif number in present and _is_open(present[number][0]):
        wrong = f'two processes have number {number}: on {present[number][1]!r} and on {host!r}'
      elif not 0 < number < launch.num_processes:
        wrong = f'a process on {host!r} has number {number} of {of}'
      else:
        present[number] = (connection, host)
        continue
      with connection:
        _send(connection, {'wrong': wrong, 'missing': []})
    missing = sorted(set(range(1, launch.num_processes)) - present.keys())
    verdict = {'wrong': wrong, 'missing': missing}
    for connection, _ in present.values():
      _send(connection, verdict)
    # The other side closes first, so that the port is free for jax's service at once.
    for connection, _ in present.values():
      _wait_for_end(connection)
  _check_verdict(launch, verdict, timeout)


def _server(port: int, backlog: int) -> socket.socket:
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ('', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
      )
    return socket.create_server(('', port), backlog=backlog)
  except OSError as error:
    raise ConfigError(
      f'port {port} of --coordinator cannot be opened on process 0: {error}; is another run using '
      'it?'
    ) from error


def _hello(connection: socket.socket) -> tuple[int, str, int]:
  """Returns (process id, host, number of processes that it expects) of a new connection.

  Raises:
    ValueError: the other side is not a process of this library.
  """
  message = _receive(connection, time.monotonic() + 5)
  if not isinstance(message, dict):
    raise ValueError('not an object')
  number, host, of = message.get('process'), message.get('host'), message.get('of')
  if not isinstance(number, int) or not isinstance(host, str) or not isinstance(of, int):
    raise ValueError('not as _join_meeting writes it')
  return number, host[:100], of


def _is_open(connection: socket.socket) -> bool:
  """Returns whether the other side has not closed the connection."""
  connection.settimeout(0)
  try:
    return connection.recv(1, socket.MSG_PEEK) != b''
  except BlockingIOError:
    return True
  except OSError:
    return False


def _join_meeting(launch: Launch, deadline: float, timeout: float) -> None:
  host, _, port = launch.coordinator.rpartition(':')
  me = {
    'process': launch.process_id,
    'host': socket.gethostname(),
    'of': launch.num_processes,
  }
  reason = 'no connection'
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host.strip('[]'), int(port)), timeout=min(left, 10)) as line:
        _send(line, me)
        verdict = _receive(line, deadline + 10)  # process 0 may have started later
    except (OSError, ValueError) as error:
      reason = str(error)
      time.sleep(0.2)
      continue
    return _check_verdict(launch, verdict, timeout)
  raise StoppedEarly(
    f'process {launch.process_id} of {launch.num_processes}: no process 0 at '
    f'{launch.coordinator} within {timeout:.0f} s ({reason}); is it running, and is the port open? '
    'Raise --init_timeout_s to wait longer'
  )


def _check_verdict(launch: Launch, verdict: dict, timeout: float) -> None:
  """Raises ConfigError for contradicting processes, StoppedEarly for missing ones."""
  if verdict['wrong']:
    raise ConfigError(f'{verdict["wrong"]}; check --process_id and --num_processes')
  if missing := verdict['missing']:
    hint = ''
    if slices := os.environ.get('MEGASCALE_NUM_SLICES'):
      hint = f' MEGASCALE_NUM_SLICES={slices}: is that still right?'
    if _is_loopback(launch.coordinator):
      hint += f' {launch.coordinator} is a loopback address: other machines cannot reach it.'
    raise StoppedEarly(
      f'process {launch.process_id} of {launch.num_processes}: waited {timeout:.0f} s at '
      f'{launch.coordinator}, missing: process {", ".join(map(str, missing))}.{hint} '
      'Raise --init_timeout_s to wait longer'
    )


def _send(connection: socket.socket, message: dict) -> None:
  connection.settimeout(5)
  try:
    connection.sendall(json.dumps(message).encode() + b'\n')
  except OSError as error:  # the check for missing processes reports it
    log.warning('a process closed its connection: %s', error)


def _receive(connection: socket.socket, deadline: float):
  """Returns the JSON value of one line.

  Raises:
    OSError: not within `deadline`.
    ValueError: the connection was closed, or the line is too long.
  """
  data = b''
  while not data.endswith(b'\n'):
    connection.settimeout(max(deadline - time.monotonic(), 0.001))
    more = connection.recv(_MOST_BYTES)
    if not more or len(data) > _MOST_BYTES:
      raise ValueError('the other side closed the connection, or its line is too long')
    data += more
  return json.loads(data)


def _wait_for_end(connection: socket.socket) -> None:
  with connection:
    try:
      connection.settimeout(5)
      connection.recv(1)
    except OSError:
      return
