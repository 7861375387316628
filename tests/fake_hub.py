"""A Hugging Face hub on loopback: what huggingface_hub and datasets ask of it, and a log of that.

Repositories hold commits of files. `env` is what a program needs to be sent here instead of to the
real hub, with a cache of its own; `HF_HUB_OFFLINE` in it is off (conftest.py sets it for all else).
It also takes uploads: creating a repository, large files by LFS, commits.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import time
from http import HTTPStatus, server
from urllib.parse import parse_qs, unquote, urlparse

import yaml
from loopback import Loopback

from ftjax.data import hub_dataset
from ftjax.hf import model_folder
from ftjax.storage import hub


@dataclasses.dataclass
class Repo:
  """refs: branch or tag -> commit. needs: '' or the token that may read; gated: who asks without
  it is told of terms to accept. private: what is told of who may read it."""

  commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
  refs: dict[str, str] = dataclasses.field(default_factory=dict)
  needs: str = ''
  gated: bool = False
  private: bool = False

  def push(self, files, branch='main'):
    """Adds a commit with these files and returns its hash."""
    made = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
    self.commits[made] = dict(files)
    self.refs[branch] = made
    return made


class FakeHub(Loopback):
  """The server; a context manager. `repos` is by 'models/org/name' or 'datasets/org/name'.

  requests: (method, path, bytes sent) of what was answered. slow_files: seconds of sleep in the
  middle of a file. status: answers everything with this HTTP status, if it is not 0. writers:
  {token: organization it may write to}. blobs: large files by their SHA-256. broken: (part of a
  path, status) of requests that are answered with an error.
  """

  def __init__(self, home):
    self.repos: dict[str, Repo] = {}
    self.requests: list[tuple[str, str, int]] = []
    self.slow_files: dict[str, float] = {}
    self.status = 0
    self.writers: dict[str, str] = {}
    self.blobs: dict[str, bytes] = {}
    self.broken: tuple[str, int] | None = None
    self._begun: list[str] = []
    self._server = server.ThreadingHTTPServer(('127.0.0.1', 0), self._handler())
    self._server.daemon_threads = True
    self.env = {
      'HF_ENDPOINT': self.url,
      'HF_HOME': str(home),
      'HF_HUB_OFFLINE': '0',
      'HF_HUB_DISABLE_TELEMETRY': '1',
      'HF_HUB_DISABLE_XET': '1',
      'NO_PROXY': '127.0.0.1',
    }

  def repo(self, name, kind='models'):
    return self.repos.setdefault(f'{kind}/{name}', Repo())

  def fetched(self):
    """Names of the files whose content was sent, in order."""
    return [p.rpartition('/')[2] for m, p, n in self.requests if m == 'GET' and '/resolve/' in p]

  def begun(self, name):
    """Whether some bytes of a file were sent."""
    return name in self._begun

  def _handler(self):
    own = self

    class Handler(_Handler):
      fake = own

    return Handler


@contextlib.contextmanager
def asked(tmp_path, monkeypatch):
  """A hub that this process asks, with an empty cache; the working directory is empty too."""
  import datasets
  from huggingface_hub import constants

  with FakeHub(tmp_path / 'hf') as fake:
    monkeypatch.setattr(constants, 'ENDPOINT', fake.url)
    template = fake.url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hf' / 'hub'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'hf' / 'token'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(datasets.config, 'HF_ENDPOINT', fake.url)
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.delenv('HF_TOKEN', raising=False)
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    forget()
    yield fake
    forget()


def forget():
  """What a new process does not know."""
  hub.pin.cache_clear()
  model_folder._snapshot.cache_clear()
  hub_dataset.list_files.cache_clear()


_API = re.compile(
  r'/api/(models|datasets)/([^/]+/[^/]+)'
  r'(?:/(revision|tree|paths-info|preupload|commit)/([^/]+)(?:/(.*))?)?'
)
_RESOLVE = re.compile(r'/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)')


class _Handler(server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  fake: FakeHub

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self._answer()

  def do_GET(self):
    self._answer()

  def do_POST(self):
    self._answer()

  def do_PUT(self):
    self._answer()

  def _body(self):
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(parts)

  def _answer(self):
    body = self._body()
    url = urlparse(self.path)
    if self.fake.status:
      return self._error(self.fake.status, '', 'out of order')
    if self.fake.broken and self.fake.broken[0] in self.path:
      return self._error(self.fake.broken[1], '', 'broken')
    if url.path == '/api/repos/create':
      return self._create(json.loads(body))
    if url.path == '/api/validate-yaml':
      return self._validate(json.loads(body)['content'])
    if url.path.endswith('.git/info/lfs/objects/batch'):
      return self._batch(json.loads(body)['objects'])
    if url.path.startswith('/lfs/'):
      return self._blob(url.path.removeprefix('/lfs/'), body)
    if found := _API.fullmatch(url.path):
      kind, name, what, revision, inside = found.groups()
    elif found := _RESOLVE.fullmatch(url.path):
      kind, what = 'datasets' if found[1] else 'models', 'resolve'
      name, revision, inside = found[2], found[3], found[4]
    else:
      return self._error(404, '', f'no such route {url.path}')
    repo = self.fake.repos.get(f'{kind}/{name}')
    if refused := self._refused(repo, what):
      return self._error(*refused)
    if what in ('preupload', 'commit'):
      if not self._may_write(name.partition('/')[0]):
        return None
      lines = [json.loads(line) for line in body.splitlines()]
      return (self._preupload if what == 'preupload' else self._commit)(name, lines)
    revision = unquote(revision or 'main')
    commit = repo.refs.get(revision, revision)
    if commit not in repo.commits:
      return self._error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
    files = repo.commits[commit]
    if what == 'resolve':
      return self._file(files, unquote(inside), commit)
    if what == 'tree':
      return self._json(_tree(files, unquote(inside or ''), parse_qs(url.query)))
    if what == 'paths-info':
      asked = (
        json.loads(body)['paths'] if body.startswith(b'{') else parse_qs(body.decode())['paths']
      )
      return self._json(
        [_file_info(p, files[p]) for p in asked if p in files]
        + [_folder_info(p) for p in asked if any(f.startswith(f'{p}/') for f in files)]
      )
    return self._json(
      {
        'id': name,
        'sha': commit,
        'private': repo.private or bool(repo.needs),
        'gated': 'auto' if repo.gated else False,
        'tags': [],
        'downloads': 0,
        'likes': 0,
        'siblings': [{'rfilename': p} for p in files],
        'lastModified': '2026-01-01T00:00:00.000Z',
      }
    )

  def _refused(self, repo, what):
    """(status, code, message), or None, as the hub answers."""
    token = self.headers.get('Authorization', '').removeprefix('Bearer ')
    if repo is None:
      return (404 if token else 401), 'RepoNotFound', 'Repository not found'
    if not repo.needs or token == repo.needs:
      return None
    if repo.gated:  # everybody sees its page, and its files when the terms are accepted
      return ((403 if token else 401), 'GatedRepo', 'gated') if what == 'resolve' else None
    return (404 if token else 401), 'RepoNotFound', 'Repository not found'

  def _may_write(self, organization):
    token = self.headers.get('Authorization', '').removeprefix('Bearer ')
    if token not in self.fake.writers:
      self._error(401, '', 'Invalid username or password.')
    elif self.fake.writers[token] != organization:
      self._error(403, '', f"You don't have the rights to create a model under {organization}")
    return self.fake.writers.get(token) == organization

  def _create(self, asked):
    name = f'{asked["organization"]}/{asked["name"]}'
    if not self._may_write(asked['organization']):
      return
    if f'models/{name}' in self.fake.repos:
      return self._json({'error': 'exists', 'url': f'{self.fake.url}/{name}'}, 409)
    repo = self.fake.repo(name)
    repo.private = asked.get('visibility') == 'private' or asked.get('private', False)
    repo.push({'.gitattributes': b'*.safetensors filter=lfs\n'})
    self._json({'url': f'{self.fake.url}/{name}', 'name': name})

  def _validate(self, card):
    try:
      meta = yaml.safe_load(card.split('---\n')[1]) if card.startswith('---\n') else {}
      wrong = [] if isinstance(meta, dict) else ['metadata is no mapping']
    except yaml.YAMLError as error:
      wrong = [str(error)]
    errors = [{'message': message} for message in wrong]
    self._json({'errors': errors, 'warnings': []}, 400 if wrong else 200)

  def _preupload(self, name, lines):
    self._json({
      'files': [
        {
          'path': f['path'],
          'uploadMode': 'lfs' if f['path'].endswith('.safetensors') else 'regular',
          'shouldIgnore': False,
        }
        for f in lines[0]['files']
      ]
    })  # fmt: skip

  def _batch(self, objects):
    found = []
    for o in objects:
      actions = {'upload': {'href': f'{self.fake.url}/lfs/{o["oid"]}'}}
      found.append(o if o['oid'] in self.fake.blobs else o | {'actions': actions})
    self._json({'transfer': 'basic', 'objects': found})

  def _blob(self, oid, body):
    if hashlib.sha256(body).hexdigest() != oid:
      return self._error(400, '', 'other bytes than their hash')
    self.fake.blobs[oid] = body
    self._json({})

  def _commit(self, name, lines):
    repo = self.fake.repos[f'models/{name}']
    files = dict(repo.commits[repo.refs['main']])
    for line in lines[1:]:
      value = line['value']
      if line['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif line['key'] == 'lfsFile':
        files[value['path']] = self.fake.blobs[value['oid']]
      elif line['key'] == 'deletedFile':
        del files[value['path']]
    made = repo.push(files)
    self._json({'commitOid': made, 'commitUrl': f'{self.fake.url}/{name}/commit/{made}'})

  def _error(self, status, code, message):
    self.send_response(status)
    if code:
      self.send_header('X-Error-Code', code)
    self.send_header('X-Error-Message', message)
    self._finish(json.dumps({'error': message}).encode())

  def _json(self, value, status=HTTPStatus.OK):
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self._finish(json.dumps(value).encode())

  def _finish(self, content):
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)
    self.fake.requests.append((self.command, self.path, len(content)))

  def _file(self, files, path, commit):
    if path not in files:
      return self._error(404, 'EntryNotFound', 'Entry not found')
    content = files[path]
    begin, end = 0, len(content)
    if found := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
      begin, end = int(found[1]), min(end, int(found[2] or end) + 1)
      self.send_response(HTTPStatus.PARTIAL_CONTENT)
      self.send_header('Content-Range', f'bytes {begin}-{end - 1}/{len(content)}')
    else:
      self.send_response(HTTPStatus.OK)
    etag = hashlib.sha256(content).hexdigest()
    for name, value in (
      ('Content-Length', end - begin),
      ('ETag', f'"{etag}"'),
      ('X-Repo-Commit', commit),
      ('X-Linked-Size', len(content)),
      ('X-Linked-ETag', f'"{etag}"'),
      ('Accept-Ranges', 'bytes'),
    ):
      self.send_header(name, str(value))
    self.end_headers()
    sent = 0
    if self.command != 'HEAD':
      with contextlib.suppress(ConnectionError):  # a client that was killed
        middle = (begin + end) // 2
        self.wfile.write(content[begin:middle])
        self.wfile.flush()
        self.fake._begun.append(path)
        time.sleep(self.fake.slow_files.get(path, 0))
        self.wfile.write(content[middle:end])
        sent = end - begin
    self.fake.requests.append((self.command, self.path, sent))


def _file_info(path, content):
  digest = hashlib.sha256(content).hexdigest()
  info = {'type': 'file', 'path': path, 'size': len(content), 'oid': digest[:40]}
  return info | {'lfs': {'oid': digest, 'size': len(content), 'pointerSize': 130}}


def _folder_info(path):
  return {'type': 'directory', 'path': path, 'oid': '0' * 40, 'size': 0}


def _tree(files, inside, query):
  prefix = f'{inside}/' if inside else ''
  found = {p: c for p, c in files.items() if p.startswith(prefix)}
  is_recursive = query.get('recursive', ['false'])[0].lower() in ('true', '1')
  folders = {p[: p.index('/', len(prefix))] for p in found if '/' in p[len(prefix) :]}
  if is_recursive:
    folders = {p.rsplit('/', n)[0] for p in found for n in range(1, p.count('/') + 1)}
  shown = {p: c for p, c in found.items() if is_recursive or '/' not in p[len(prefix) :]}
  return [_folder_info(p) for p in sorted(folders)] + [_file_info(p, c) for p, c in shown.items()]
