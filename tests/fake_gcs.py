"""A Google Cloud Storage on loopback: objects and the JSON API are gcp-storage-emulator's, the
rest is here.

Added: conditions on generations (which make a lock a lock, and which tensorstore relies on), the
generation in the headers, denied permissions, a hanging server, a log of requests. `env` is what a
program needs to be sent here instead of to Google.
"""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import pathlib
import threading
import time
from http import HTTPStatus, server
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage
from loopback import Loopback

from ftjax.storage import gcs

logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)  # every 404 is an error to it
BUCKET = 'bucket'
PRINCIPAL = 'trainer@project.iam.gserviceaccount.com'


@dataclasses.dataclass(frozen=True)
class Request:
  """One request that was let through: the permission it needs, the object, its content's bytes."""

  permission: str
  key: str
  size: int
  is_content: bool


class FakeGcs(Loopback):
  """The server; a context manager. `deny` holds permissions, such as 'objects.create';
  `unavailable` how often a request is answered 503 whose path has the key in it.
  """

  def __init__(self):
    self.storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, self.storage)
    self.deny: set[str] = set()
    self.hangs = False
    self.unavailable: dict[str, int] = {}
    self.requests: list[Request] = []
    self.lock = threading.RLock()
    self._server = _Server(('127.0.0.1', 0), functools.partial(_Handler, self, self.storage))
    self.env = {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      'GOOGLE_CLOUD_PROJECT': 'project',
    }

  def reset(self) -> None:
    """An empty bucket that refuses nothing."""
    with self.lock:
      self.storage.wipe(keep_buckets=True)
      self.deny, self.hangs, self.unavailable = set(), False, {}
      self.requests.clear()

  def object(self, key: str) -> dict | None:
    """The resource of an object of the bucket, None where there is none."""
    try:
      return self.storage.get_file_obj(BUCKET, key)
    except NotFound:
      return None

  def names(self, prefix: str = '') -> list[str]:
    """Names of all objects below a prefix."""
    with self.lock:
      return sorted(k for k in self.storage.objects.get(BUCKET, {}) if k.startswith(prefix))

  def read(self, key: str) -> bytes:
    with self.lock:
      return bytes(self.storage.get_file(BUCKET, key))

  def upload(self, source, key: str) -> None:
    """Puts a file, or all files below a folder, into the bucket, by the client."""
    source = pathlib.Path(source)
    for path in [source] if source.is_file() else source.rglob('*'):
      if path.is_file():
        name = '' if path == source else f'/{path.relative_to(source).as_posix()}'
        gcs.GcsPath(f'gs://{BUCKET}/{key}{name}').write_bytes(path.read_bytes())

  def sent(self, prefix: str = '') -> int:
    """Bytes of objects below a prefix that were downloaded."""
    return sum(r.size for r in self.requests if r.is_content and r.key.startswith(prefix))

  def download(self, prefix: str, folder) -> None:
    """Writes all objects below a prefix into a folder, byte by byte as they are."""
    for key in self.names(prefix):
      path = os.path.join(folder, key[len(prefix) :].lstrip('/'))
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with open(path, 'wb') as f:
        f.write(self.read(key))


class _Server(server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, client_address):
    """Clients, and killed ones above all, drop connections."""


class _Handler(RequestHandler):
  protocol_version = 'HTTP/1.1'  # connections are kept: a client has thousands of small requests
  disable_nagle_algorithm = True

  def __init__(self, fake, storage, *args, **kwargs):
    self._fake, self._headers_to_add = fake, {}
    super().__init__(storage, *args, **kwargs)

  def log_message(self, *_):
    pass

  def end_headers(self):
    for name, value in self._headers_to_add.items():
      self.send_header(name, value)
    super().end_headers()

  def _serve(self, method):
    if self._fake.hangs:
      time.sleep(30)
      self.close_connection = True  # whoever asked has given up
      return
    connection, self._headers_to_add, self._body = (self.rfile, self.wfile), {}, b''
    if length := int(self.headers.get('Content-Length') or 0):
      # Not every handler reads the body, and what it leaves would be taken for the next request.
      self._body = self.rfile.read(length)
      self.rfile = io.BytesIO(self._body)
    self.wfile = answer = io.BytesIO()
    try:
      self._handle(method)
    finally:
      self.rfile, self.wfile = connection
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
      self.wfile.write(answer.getbuffer())  # without the lock: who does not read stops no other

  def _handle(self, method):
    with self._fake.lock:
      for part, left in self._fake.unavailable.items():
        if left and part in self.path:
          self._fake.unavailable[part] -= 1
          return self._answer(503, 'Backend Error')
      url = urlparse(self.path)
      query = {k: v[0] for k, v in parse_qs(url.query).items()}
      permissions, key = _classify(method, url.path, query)
      if '/upload/' in url.path and method == 'POST':
        key = query.get('name') or self._name_in_body()
      stored = self._fake.object(key) if key else None
      if 'objects.create' in permissions and stored:
        permissions = [*permissions, 'objects.delete']  # replacing is deleting
      if denied := [p for p in permissions if p in self._fake.deny]:
        return self._answer(
          403,
          f'{PRINCIPAL} does not have storage.{denied[0]} access to the Google Cloud Storage '
          f"object. Permission 'storage.{denied[0]}' denied on resource (or it may not exist).",
        )
      generation = int(stored['generation']) if stored else 0
      if 'ifGenerationMatch' in query and int(query['ifGenerationMatch']) != generation:
        return self._answer(412, 'At least one of the pre-conditions you specified did not hold.')
      if 'ifGenerationNotMatch' in query and int(query['ifGenerationNotMatch']) == generation:
        return self._answer(304, '')
      if stored and 'generation' in query and int(query['generation']) != generation:
        return self._answer(404, 'No such object of that generation')
      if stored:
        self._headers_to_add['x-goog-generation'] = str(generation)
      is_content = permissions[0] == 'objects.get' and (
        query.get('alt') == 'media' or '/download/' in url.path
      )
      self._fake.requests.append(Request(permissions[0], key, self._size(stored), is_content))
      Router(self).handle(method)

  def _name_in_body(self) -> str:
    """Of an upload whose name stands in its JSON, which is the body or the first part of it."""
    start = self._body.find(b'{')
    return json.JSONDecoder().raw_decode(self._body[start:].decode('latin-1'))[0]['name']

  def _size(self, stored) -> int:
    begin, _, end = self.headers.get('Range', '').removeprefix('bytes=').partition('-')
    size = int(stored['size']) if stored else 0
    return min(size, int(end) + 1) - int(begin) if begin and end else size

  def _answer(self, code: int, message: str):
    body = json.dumps({'error': {'code': code, 'message': message}}).encode() if message else b''
    self.send_response(code, HTTPStatus(code).phrase)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  do_GET = functools.partialmethod(_serve, 'GET')
  do_POST = functools.partialmethod(_serve, 'POST')
  do_PUT = functools.partialmethod(_serve, 'PUT')
  do_DELETE = functools.partialmethod(_serve, 'DELETE')
  do_PATCH = functools.partialmethod(_serve, 'PATCH')


def _classify(method: str, path: str, query: dict) -> tuple[list[str], str]:
  """The permissions that Google asks for a request, and the object it writes or reads."""
  _, _, rest = path.partition('/b/')
  _, has_objects, key = rest.partition('/o')
  key = key.lstrip('/')
  for verb in ('/rewriteTo/b/', '/copyTo/b/'):
    if verb in key:
      return ['objects.create'], unquote(key.partition(verb)[2].partition('/o/')[2])
  key = unquote(key)
  if not has_objects:
    return ['buckets.get'], ''
  if not key:
    return (
      (['objects.list'], '') if method == 'GET' else (['objects.create'], query.get('name', ''))
    )
  return [{'GET': 'objects.get', 'DELETE': 'objects.delete'}.get(method, 'objects.create')], key
