"""Drives a headless Chromium over its debugging pipe, for tests of report.html.

Messages are JSON, each ended by a zero byte, on the file descriptors 3 and 4 of the browser:
https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
FLAGS = (
  '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync',
  '--disable-dev-shm-usage', '--remote-debugging-pipe', '--hide-scrollbars',
)  # fmt: skip
LIMIT = 60  # seconds for an answer


def find():
  """The path of a browser, None where there is none."""
  return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
  """A browser with one page. Use it in a `with` block."""

  def __init__(self):
    self._profile = tempfile.TemporaryDirectory(prefix='chromium')
    reads, self._out = os.pipe()
    self._in, writes = os.pipe()
    # bash gives the browser the pipe's ends as 3 and 4.
    command = f'exec "$@" 3<&{reads} 4>&{writes}'
    profile = f'--user-data-dir={self._profile.name}'
    self._process = subprocess.Popen(
      ['bash', '-c', command, 'bash', find(), *FLAGS, profile, 'about:blank'],
      pass_fds=(reads, writes),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(reads)
    os.close(writes)
    self._number, self._buffer, self.events, self._session = 0, b'', [], None

  def __enter__(self):
    targets = self.call('Target.getTargets')['targetInfos']
    page = next(t['targetId'] for t in targets if t['type'] == 'page')
    attach = {'targetId': page, 'flatten': True}
    self._session = self.call('Target.attachToTarget', **attach)['sessionId']
    for domain in ('Page', 'Runtime', 'Network', 'Log'):
      self.call(f'{domain}.enable')
    return self

  def __exit__(self, *_):
    try:
      self._session = None
      self.call('Browser.close')
      self._process.wait(10)
    except (OSError, subprocess.TimeoutExpired, TimeoutError):
      self._process.kill()
      self._process.wait()
    os.close(self._out)
    os.close(self._in)
    self._profile.cleanup()

  def call(self, method, **parameters):
    """The result of a command."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': parameters}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._out, json.dumps(message).encode() + b'\0')
    while True:
      found = self._read()
      if found.get('id') == self._number:
        assert 'error' not in found, found
        return found['result']
      self.events.append(found)

  def _read(self):
    end = time.monotonic() + LIMIT
    while b'\0' not in self._buffer:
      if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
        raise TimeoutError('no answer from the browser')
      part = os.read(self._in, 1 << 20)
      if not part:
        raise OSError('the browser ended')
      self._buffer += part
    text, _, self._buffer = self._buffer.partition(b'\0')
    return json.loads(text)

  def open(self, path, width=1280, height=800, scheme='light', media='screen'):
    """Loads a file in a window of that size; returns when it is there."""
    self.events.clear()
    mobile = {'deviceScaleFactor': 1, 'mobile': width < 600}
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, **mobile)
    feature = {'name': 'prefers-color-scheme', 'value': scheme}
    self.call('Emulation.setEmulatedMedia', media=media, features=[feature])
    self.call('Page.navigate', url=f'file://{path}')
    while not any(e.get('method') == 'Page.loadEventFired' for e in self.events):
      self.events.append(self._read())

  def ask(self, script):
    """The value of a JavaScript expression."""
    found = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def press(self, key):
    """Presses and releases a key."""
    codes = {'Tab': 9, 'Enter': 13, 'ArrowRight': 39, 'ArrowLeft': 37, ' ': 32}
    text = {'Enter': '\r', ' ': ' '}.get(key)
    for kind in ('keyDown', 'keyUp'):
      shared = {'key': key, 'code': key, 'windowsVirtualKeyCode': codes[key]}
      if text and kind == 'keyDown':
        shared['text'] = text
      self.call('Input.dispatchKeyEvent', type=kind, **shared)

  def picture(self, path, **clip):
    """Writes a PNG of the window, or of x, y, width, height of the page."""
    found = self.call(
      'Page.captureScreenshot',
      format='png',
      captureBeyondViewport=bool(clip),
      **({'clip': {**clip, 'scale': 1}} if clip else {}),
    )
    with open(path, 'wb') as file:
      file.write(base64.b64decode(found['data']))

  def pdf(self):
    """The page as PDF."""
    return base64.b64decode(self.call('Page.printToPDF', printBackground=True)['data'])

  def problems(self):
    """Console messages, exceptions and log entries since `open`."""
    self.ask('0')  # events up to here have come
    kinds = ('Runtime.consoleAPICalled', 'Runtime.exceptionThrown', 'Log.entryAdded')
    return [e for e in self.events if e.get('method') in kinds]

  def requests(self):
    """URLs of the requests since `open`."""
    self.ask('0')
    kind = 'Network.requestWillBeSent'
    return [e['params']['request']['url'] for e in self.events if e.get('method') == kind]
