"""JSON over HTTP to one server: limits on time and size, retries, and errors without secrets.

A request is sent again after 408, 409, 425, 429, 5xx, a lost connection, a timeout and a body that
is no JSON. Waiting times double, and follow the server's Retry-After where it has one. A redirect
is an error: the key is never sent anywhere but to the URL that the user wrote.
"""

import dataclasses
import datetime
import email.utils
import http.client
import json
import logging
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from ftjax.runtime.errors import ConfigError, DataError
from ftjax.runtime.redaction import REDACTED, redact_text

log = logging.getLogger(__name__)

_MOST_BYTES = 64 << 20  # of one reply
_CONNECT = 30.0  # seconds for a connection, its encryption included
_SHOWN = 300  # characters of a server's message
_RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)} - {501, 505})
_KEY = re.compile(r'[\x21-\x7e]+')
_LOOPBACK = re.compile(r'localhost|127\.\d+\.\d+\.\d+|::1')


@dataclasses.dataclass(frozen=True)
class Limits:
  """How a server is asked.

  Attributes:
    concurrency: most requests at once.
    timeout: seconds for one request, from connecting to the last byte.
    attempts: most times that one request is sent. A timeout or a body that is no JSON counts twice,
      429 (too many requests) half.
    pause: seconds before the second attempt; they double with each further one.
    longest_wait: seconds; a server that asks for more by Retry-After is given up.
  """

  concurrency: int = 8
  timeout: float = 600.0
  attempts: int = 6
  pause: float = 1.0
  longest_wait: float = 120.0


class RefusedError(Exception):
  """The server has refused one request for good: `status` (4xx, 501) and its message, cleaned."""

  def __init__(self, status: int, message: str):
    super().__init__(f'{status}: {message}')
    self.status, self.message = status, message


class ClosedError(Exception):
  """The client was closed while a request waited for its next attempt."""


class _RetryError(Exception):
  """A failure that may pass. `cost` in attempts; `wait` is the server's Retry-After in seconds."""

  def __init__(self, problem: str, cost: float = 1, wait: float | None = None):
    super().__init__(problem)
    self.problem, self.cost, self.wait = problem, cost, wait


class _Connection(http.client.HTTPConnection):
  def connect(self):
    timeout, self.timeout = self.timeout, min(self.timeout, _CONNECT)
    super().connect()
    self.timeout = timeout
    self.sock.settimeout(timeout)


class _EncryptedConnection(http.client.HTTPSConnection):
  def connect(self):
    timeout, self.timeout = self.timeout, min(self.timeout, _CONNECT)
    super().connect()
    self.timeout = timeout
    self.sock.settimeout(timeout)


class _Plain(urllib.request.HTTPHandler):
  def http_open(self, req):
    return self.do_open(_Connection, req)


class _Encrypted(urllib.request.HTTPSHandler):
  def https_open(self, req):
    return self.do_open(_EncryptedConnection, req, context=ssl.create_default_context())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, req, fp, code, msg, headers, newurl):
    return None  # urllib then raises HTTPError with the status 3xx


def is_loopback(url: str) -> bool:
  """Returns whether the host of a URL is this machine."""
  return _LOOPBACK.fullmatch(urllib.parse.urlsplit(url).hostname or '') is not None


def retry_after(headers: Mapping[str, str], now: datetime.datetime) -> float | None:
  """Returns the seconds that a server asks to wait, by Retry-After (seconds or a date, RFC 9110
  10.2.3) or OpenAI's retry-after-ms; None where it asks for nothing, or for nonsense.
  """
  for name, scale in (('retry-after-ms', 1e-3), ('retry-after', 1.0)):
    text = (headers.get(name) or '').strip()
    if re.fullmatch(r'\d{1,9}(\.\d{1,9})?', text):
      return float(text) * scale
  try:
    date = email.utils.parsedate_to_datetime(headers.get('retry-after') or '')
  except (ValueError, TypeError, IndexError, OverflowError):
    return None
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  return max((date - now).total_seconds(), 0.0)


def error_text(body: Any) -> str:
  """Returns the message of an error's body, JSON value or text, in the forms that servers use."""
  if isinstance(body, Mapping):
    for key in ('error', 'message', 'detail', 'msg'):
      if body.get(key):
        return error_text(body[key])
  if isinstance(body, list) and body:
    return '; '.join(error_text(x) for x in body[:3])
  return body if isinstance(body, str) else json.dumps(body)


class Client:
  """Sends JSON to one server; several threads may call `post` at once.

  Args:
    url: http or https, of the folder that all paths are below; without user, query and fragment.
    key: sent as a bearer token; '' for none. It is in no message and no log.
    limits: see there.

  Raises:
    ConfigError: a key that no header can have.
  """

  def __init__(self, url: str, key: str, limits: Limits):
    self.url, self.limits = url, limits
    self._headers = {'Content-Type': 'application/json', 'Accept': 'application/json'}
    self._headers['User-Agent'] = 'ftjax'
    self._clean = redact_text
    if key:
      if not _KEY.fullmatch(key):
        raise ConfigError(
          f'the API key for {url} has white space or characters that are not ASCII; expected one '
          'word: check the environment variable'
        )
      self._headers['Authorization'] = f'Bearer {key}'
      if len(key) > 5:  # 'EMPTY' is what servers without keys are given
        self._clean = lambda text: redact_text(text.replace(key, REDACTED))
      if url.startswith('http:') and not is_loopback(url):
        log.warning('%s: the API key is sent unencrypted; use https where the server has it', url)
    # A proxy from the environment has no way to this machine.
    proxies = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    self._opener = urllib.request.build_opener(_NoRedirect(), _Plain(), _Encrypted(), *proxies)
    self._is_closed, self._lock = threading.Event(), threading.Lock()
    self._resume = 0.0  # time.monotonic() until which the server wants no request
    self._logged: set[str] = set()

  def close(self) -> None:
    """Ends the waiting of all requests; those that the server answers now are not ended."""
    self._is_closed.set()

  def open(self) -> None:
    """Allows requests again after `close`."""
    self._is_closed.clear()

  def get(self, path: str) -> dict[str, Any]:
    """Returns the JSON object at `url`/path, asked once.

    Raises:
      RefusedError: there is none.
    """
    try:
      return self._send(path, None)
    except _RetryError as error:
      raise RefusedError(0, error.problem) from error

  def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON object that the server answers with.

    Raises:
      RefusedError: the server refuses this request.
      ConfigError: it refuses the key, redirects, or its certificate is not trusted.
      DataError: no usable answer after all attempts.
      ClosedError: `close` was called.
    """
    data = json.dumps(body).encode()  # escaped, so that half a surrogate pair is no error here
    used, pause = 0.0, self.limits.pause
    while True:
      self._wait_for_turn()
      try:
        return self._send(path, data)
      except _RetryError as error:
        used += error.cost
        if (error.wait or 0) > self.limits.longest_wait:
          raise DataError(
            f'{self.url}/{path}: {error.problem}; the server asks to wait {error.wait:.0f} s, more '
            f'than {self.limits.longest_wait:.0f}: evaluate again later'
          ) from error
        if used >= self.limits.attempts:
          raise DataError(
            f'{self.url}/{path} gave no usable answer, the last time: {error.problem}'
          ) from error
        wait = max(pause * random.uniform(0.5, 1.0), error.wait or 0)  # not all threads at once
        if error.wait:
          with self._lock:
            self._resume = max(self._resume, time.monotonic() + error.wait)
        pause = min(2 * pause, self.limits.longest_wait)
        self._log_once(f'{self.url}/{path}: {error.problem}; it is asked again')
        if self._is_closed.wait(wait):
          raise ClosedError from error

  def _log_once(self, text: str) -> None:
    with self._lock:
      is_new = text not in self._logged
      self._logged.add(text)
    if is_new:
      log.warning('%s', text)

  def _wait_for_turn(self) -> None:
    while (left := self._resume - time.monotonic()) > 0:
      if self._is_closed.wait(left):
        break
    if self._is_closed.is_set():
      raise ClosedError

  def _send(self, path: str, data: bytes | None) -> dict[str, Any]:
    """Returns the reply to one request; `data` None: a GET."""
    limits, end = self.limits, time.monotonic() + self.limits.timeout
    request = urllib.request.Request(f'{self.url}/{path}', data, self._headers)
    try:
      try:
        response = self._opener.open(request, timeout=limits.timeout)
      except urllib.error.HTTPError as error:
        response = error
      with response:
        raw = self._read(response, end)
        return self._checked(response.status, response.headers, raw)
    except urllib.error.URLError as error:
      raise self._lost(error.reason) from error
    except (OSError, http.client.HTTPException) as error:
      raise self._lost(error) from error

  def _read(self, response, end: float) -> bytes:
    """Returns the body. A server that sends it byte by byte ends at the timeout too."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
      parts.append(part)
      size += len(part)
      if time.monotonic() > end:
        raise TimeoutError
      if size > _MOST_BYTES:
        raise DataError(f'{self.url}: a reply of more than {_MOST_BYTES >> 20} MiB')
    expected = response.headers.get('content-length', '')
    if expected.isdigit() and size < int(expected):
      raise http.client.IncompleteRead(b'', int(expected) - size)
    return b''.join(parts)

  def _lost(self, reason: Any) -> Exception:
    """Returns the error for a request that got no answer."""
    if isinstance(reason, ssl.SSLCertVerificationError):
      return ConfigError(f'{self.url}: its certificate is not trusted: {reason.verify_message}')
    if isinstance(reason, TimeoutError):
      return _RetryError(f'no answer in time (timeout {self.limits.timeout:g} s)', cost=2)
    kind = type(reason).__name__
    return _RetryError(self._shown(f'{kind}: {reason}' if str(reason) else kind))

  def _shown(self, body: Any) -> str:
    text = ' '.join(self._clean(error_text(body)).split())
    return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text)[:_SHOWN]

  def _checked(self, status: int, headers: Mapping[str, str], raw: bytes) -> dict[str, Any]:
    try:
      body = json.loads(raw)
    except (ValueError, RecursionError):
      body = None
    if 200 <= status < 300:
      if not isinstance(body, dict):
        shown = self._shown(raw[: 4 * _SHOWN].decode(errors='replace')) or 'nothing'
        raise _RetryError(f'status {status}, expected a JSON object, got {shown}', cost=2)
      if not body.get('error'):
        return body
      code = body['error'].get('code') if isinstance(body['error'], dict) else None
      status = code if isinstance(code, int) and 400 <= code < 600 else 500
    message = self._shown(raw.decode(errors='replace') if body is None else body) or 'no reason'
    if 300 <= status < 400:
      place = self._shown(headers.get('location') or 'nowhere')
      raise ConfigError(f'{self.url} redirects to {place}; name the URL that answers')
    if status in (401, 403):
      given = 'the API key was refused' if 'Authorization' in self._headers else 'it wants a key'
      raise ConfigError(f'{self.url}: {given}: {status}: {message}')
    if status == 429 and 'insufficient_quota' in error_code(body):
      raise ConfigError(f'{self.url}: the quota of this key is used up: {message}')
    if status in _RETRIED:
      now = datetime.datetime.now(datetime.UTC)
      cost = 0.5 if status == 429 else 1
      raise _RetryError(f'{status}: {message}', cost, retry_after(headers, now))
    raise RefusedError(status, message)


def error_code(body: Any) -> str:
  """Returns the code and type of an error's body in OpenAI's form; '' in another."""
  error = body.get('error') if isinstance(body, Mapping) else None
  return f'{error.get("code")} {error.get("type")}' if isinstance(error, Mapping) else ''
