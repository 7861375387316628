"""The cloud's notice that this machine will be taken away, from the metadata server of Compute
Engine.

GKE and most schedulers send SIGTERM, which needs none of this; a plain spot VM learns it here about
30 s before, and of planned maintenance earlier."""

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
_QUESTIONS = {
  'preempted': ('TRUE',),
  'maintenance-event': ('TERMINATE_ON_HOST_MAINTENANCE',),
}
_WAIT = 60  # seconds the server holds a question open
_PRODUCT = pathlib.Path('/sys/class/dmi/id/product_name')


def server() -> str | None:
  """Address of the metadata server; None where there is none."""
  if host := os.environ.get('GCE_METADATA_HOST'):
    return host
  try:
    is_google = 'Google' in _PRODUCT.read_text()
  except OSError:
    return None
  return 'metadata.google.internal' if is_google else None


def listen(host: str, notice: Callable[[str], None]) -> None:
  """Calls `notice` with the reason, once, when the machine is about to be taken; in threads that
  die with the process. Maintenance that was announced before is only logged: it may be an hour
  away, and a run that ended at once whenever it is started would get nowhere.

  Args:
    host: from `server`.
    notice: called in another thread.
  """
  told = threading.Event()

  def ask(question: str, alarming: tuple[str, ...]) -> None:
    url = f'http://{host}/computeMetadata/v1/instance/{question}'
    etag, pause, is_first = '0', threading.Event(), True
    while not told.is_set():
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
      is_old = is_first and question == 'maintenance-event'
      is_first = False
      if value in alarming and is_old:
        log.warning('%s=%s was announced before this start: going on until then', question, value)
      elif value in alarming and not told.is_set():
        told.set()
        notice(f'{question}={value}')

  for question, alarming in _QUESTIONS.items():
    threading.Thread(
      target=ask, args=(question, alarming), daemon=True, name=f'preemption {question}'
    ).start()
