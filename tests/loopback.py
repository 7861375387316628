"""A server on this machine that stands in for one on the network."""

import threading


class Loopback:
  """Serves while it is entered. Subclasses make `_server`, a server of socketserver's."""

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
    return self

  def __exit__(self, *_):
    self._server.shutdown()
    self._server.server_close()

  @property
  def url(self):
    return f'http://127.0.0.1:{self._server.server_address[1]}'
