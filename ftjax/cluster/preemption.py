"""Listens for preemption and maintenance notices of Compute Engine's metadata server.

GKE and most schedulers send SIGTERM instead. A plain spot VM gets its notice here about 30 s before
the end, and one of planned maintenance earlier."""

import logging
import os
import pathlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

log = logging.getLogger(__name__)

# cloud.google.com/compute/docs/metadata/getting-live-migration-notice and
# .../instances/create-use-preemptible: values that announce an end.
_NOTICES = {
  'preempted': ('TRUE',),
  'maintenance-event': ('TERMINATE_ON_HOST_MAINTENANCE',),
}
_WAIT = 60  # seconds the server holds a request open
_PRODUCT = pathlib.Path('/sys/class/dmi/id/product_name')


def server() -> str | None:
  """Returns the address of the metadata server; None where there is none."""
  if host := os.environ.get('GCE_METADATA_HOST'):
    return host
  try:
    is_google = 'Google' in _PRODUCT.read_text()
  except OSError:
    return None
  return 'metadata.google.internal' if is_google else None


def is_preempted(host: str, timeout: float = 2.0) -> bool:
  """Returns whether the notice of preemption was given: this machine has half a minute left. False
  where the server does not answer within `timeout` seconds.

  Args:
    host: from `server`.
    timeout: seconds.
  """
  url = f'http://{host}/computeMetadata/v1/instance/preempted'
  request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=timeout) as answer:
      return answer.read().decode().strip() in _NOTICES['preempted']
  except (OSError, ValueError) as error:
    log.debug('%s: %s', url, error)
    return False


def listen(host: str, notice: Callable[[str], None]) -> None:
  """Calls `notice` with the reason, once, when the machine is about to be preempted.

  Listens in daemon threads. Maintenance that was announced before this start is only logged: it may
  be an hour away, and a run that ends at every start would make no progress.

  Args:
    host: from `server`.
    notice: called in another thread, with NAME=VALUE of the metadata.
  """
  is_reported = threading.Event()

  def poll(name: str, alarming: tuple[str, ...]) -> None:
    url = f'http://{host}/computeMetadata/v1/instance/{name}'
    etag, pause, is_first = '0', threading.Event(), True
    while not is_reported.is_set():
      # With an old etag the server answers when the value changes, or after the time given.
      request = urllib.request.Request(
        f'{url}?wait_for_change=true&timeout_sec={_WAIT}&last_etag={etag}',
        headers={'Metadata-Flavor': 'Google'},
      )
      try:
        with urllib.request.urlopen(request, timeout=_WAIT + 10) as answer:
          etag, value = answer.headers.get('ETag', '0'), answer.read().decode().strip()
      except (OSError, urllib.error.URLError) as error:
        log.debug('%s: %s', url, error)
        pause.wait(5)
        continue
      is_old = is_first and name == 'maintenance-event'
      is_first = False
      if value in alarming and is_old:
        log.warning('%s=%s was announced before this start: training until then', name, value)
      elif value in alarming and not is_reported.is_set():
        is_reported.set()
        notice(f'{name}={value}')

  for name, alarming in _NOTICES.items():
    threading.Thread(
      target=poll, args=(name, alarming), daemon=True, name=f'preemption {name}'
    ).start()
