"""Models under test behind a server: what is sent, what is read, and every way to fail."""

import dataclasses
import datetime
import email.utils
import itertools
import json
import logging
import math
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from fake_endpoint import FakeEndpoint, logp, rendered, words

from ftjax.data.formats import Chat
from ftjax.evaluation import endpoint, endpoint_format, http_client
from ftjax.evaluation.endpoint import Endpoint, Spec, parse
from ftjax.evaluation.model import Completion, Draw, Likelihood
from ftjax.runtime.errors import ConfigError, DataError

QUICK = http_client.Limits(timeout=10, pause=0.01)
GREEDY = Draw(max_tokens=8)
KEY = 'a1b2c3d4e5f6'


def ask(text, *before, **rest):
  messages = [*before, {'role': 'user', 'content': text}]
  return Chat(tuple(messages), **rest)


def connect(fake, limits=QUICK, name='tiny', key='', **rest):
  environment = {endpoint.KEY_VARIABLE: key}
  return Endpoint(Spec(fake.base, name), limits, environment=environment, **rest)


def complete(model, prompts, draw=GREEDY, done=lambda n: None):
  places = [f'rows.jsonl:{i + 1}' for i in range(len(prompts))]
  return model.complete(prompts, places, draw, done)


def texts(found):
  return [[c.text for c in row] for row in found]


@pytest.fixture
def fake():
  with FakeEndpoint() as server:
    yield server


# The name in the config


@pytest.mark.parametrize(
  ('text', 'url', 'name'),
  [
    ('endpoint:http://localhost:8000/v1#qwen-72b', 'http://localhost:8000/v1', 'qwen-72b'),
    (' endpoint:https://API.x.org/V1/#org/name ', 'https://api.x.org/V1', 'org/name'),
    ('endpoint:http://[::1]:80/v1#a#b: c', 'http://[::1]:80/v1', 'a#b: c'),
  ],
)
def test_a_name_is_read(text, url, name):
  spec = parse(text)
  assert spec == Spec(url, name)
  assert parse(spec.text) == spec


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('endpoint:', 'no model name'),
    ('endpoint:http://x/v1', 'no model name'),
    ('endpoint:http://x/v1#', 'no model name'),
    ('endpoint:#name', 'white space'),
    ('endpoint:http://x y/v1#name', 'white space'),
    ('endpoint:http://é/v1#name', 'ASCII'),
    ('endpoint:http://x/v1#a\nb', 'line end'),
    ('endpoint:ftp://x/v1#name', 'http://'),
    ('endpoint:file:///etc/passwd#name', 'http://'),
    ('endpoint:localhost:8000/v1#name', 'http://'),
    ('endpoint:http:///v1#name', 'a host'),
    ('endpoint:http://x:99999/v1#name', 'Port'),
    ('endpoint:http://[::1/v1#name', 'IPv6'),
    ('endpoint:http://a..b/v1#name', 'label'),
    (f'endpoint:http://{"a" * 64}/v1#name', 'label'),
    ('endpoint:http://x/v1/chat/completions#name', 'by itself'),
    ('endpoint:http://x/v1/completions/#name', 'by itself'),
    ('https://x/v1#name', 'does not begin'),
  ],
)
def test_another_form_of_name_is_refused(text, reason):
  with pytest.raises(ConfigError, match=reason) as caught:
    parse(text)
  assert 'eval.models' in str(caught.value)


def test_a_secret_in_the_url_is_refused_and_not_shown():
  for text in (f'endpoint:http://me:{KEY}@x/v1#n', f'endpoint:http://x/v1?k={KEY}#n'):
    with pytest.raises(ConfigError, match=endpoint.KEY_VARIABLE) as caught:
      parse(text)
    assert KEY not in str(caught.value)


def test_openais_key_goes_to_openai_alone():
  both = {'FTJAX_ENDPOINT_KEY': ' ours\n', 'OPENAI_API_KEY': 'theirs'}
  assert endpoint.api_key('http://localhost:1/v1', both) == 'ours'
  assert endpoint.api_key('https://api.openai.com/v1', both) == 'theirs'
  assert endpoint.api_key('https://eu.api.openai.com/v1', both) == 'theirs'
  theirs = {'OPENAI_API_KEY': 'theirs', 'FTJAX_ENDPOINT_KEY': ''}
  for host in ('openai.com.evil.org', 'notopenai.com', 'localhost', '10.0.0.1'):
    assert endpoint.api_key(f'https://{host}/v1', theirs) == ''


# Completions


def test_a_conversation_and_a_text(fake):
  system = {'role': 'system', 'content': 'Be brief.'}
  chat = ask('Hi', system, template_kwargs={'enable_thinking': False})
  draw = dataclasses.replace(GREEDY, stop=('\n',))
  found = complete(connect(fake), [chat, 'Once'], draw)
  assert found == [
    [Completion('Hi -> greedy', 'system: Be brief.\n\nuser: Hi\n\nassistant:', 3, False)],
    [Completion('Once -> greedy', 'Once', 1, False)],
  ]
  assert fake.bodies('chat/completions') == [
    {
      'model': 'tiny',
      'messages': [system, {'role': 'user', 'content': 'Hi'}],
      'chat_template_kwargs': {'enable_thinking': False},
      'max_tokens': 8,
      'temperature': 0.0,
      'stop': ['\n'],
    }
  ]
  assert fake.bodies('completions') == [
    {'model': 'tiny', 'prompt': 'Once', 'max_tokens': 8, 'temperature': 0.0, 'stop': ['\n']}
  ]


def test_nothing_is_asked_for_no_rows(fake):
  model = connect(fake)
  assert complete(model, []) == model.score([], [], [], print) == []
  assert model.score([ask('a')], [[]], [''], lambda n: None) == [()]
  assert model.score_texts([''], [''], lambda n: None) == [Likelihood(0, 0)]
  assert not fake.requests


def test_samples_are_drawn_by_prompt_seed_and_number(fake):
  draw = Draw(8, samples=3, temperature=0.7, seed=1)
  first = complete(connect(fake), [ask('a'), ask('b'), 'a'], draw)
  seeds = [c.text.split(' -> ')[1] for row in first for c in row]
  assert len(set(seeds)) == 9 and all(0 <= int(s) < 2**31 for s in seeds)
  assert all(b['temperature'] == 0.7 and b['top_p'] == 1.0 for b in fake.bodies())
  # Neighbours and order do not matter; another seed does.
  assert complete(connect(fake), ['a', ask('b')], draw) == [first[2], first[1]]
  other = complete(connect(fake), [ask('a')], Draw(8, 3, 0.7, seed=2))
  assert not {*texts(other)[0]} & {*texts(first)[0]}


def test_order_is_kept_when_replies_come_in_another(fake):
  fake.delay = lambda body: 0.005 * (20 - int(body['messages'][-1]['content']))
  counts = []
  found = complete(connect(fake), [ask(str(i)) for i in range(20)], done=counts.append)
  assert texts(found) == [[f'{i} -> greedy'] for i in range(20)]
  assert sum(counts) == 20
  assert 1 < fake.most <= 8


def test_concurrency_is_bounded(fake):
  fake.delay = lambda body: 0.02
  complete(connect(fake, http_client.Limits(concurrency=2)), [ask(str(i)) for i in range(8)])
  assert fake.most == 2


def test_equal_prompts_are_asked_once(fake):
  counts, model = [], connect(fake)
  assert texts(complete(model, [ask('a'), ask('b'), ask('a')], done=counts.append)) == [
    ['a -> greedy'], ['b -> greedy'], ['a -> greedy'],
  ]  # fmt: skip
  complete(model, [ask('b')], done=counts.append)
  assert len(fake.requests) == 2 and sum(counts) == 4
  complete(model, [ask('b')], Draw(9))  # other settings, another request
  assert len(fake.requests) == 3


def reply(message=None, finish='stop', usage=None, **choice):
  choice |= {'message': message} if message is not None else {}
  return {'choices': [choice | {'finish_reason': finish}], 'usage': usage}


CALL = {'type': 'function', 'function': {'name': 'f', 'arguments': '{"x": "é"}'}}


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    (reply({'content': ' Bonjour, ça va ? 😀\n'}), 'Bonjour, ça va ? 😀'),
    (reply({'content': ''}), ''),
    (reply({'content': None}), ''),
    (reply({'content': [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]}), 'ab'),
    (reply({'content': None, 'refusal': 'I will not.'}), 'I will not.'),
    (reply({'content': '4', 'reasoning_content': '2+2'}), '<think>\n2+2\n</think>\n\n4'),
    (reply({'content': '4', 'reasoning': '2+2\n'}), '<think>\n2+2\n</think>\n\n4'),
    (reply({'content': None, 'reasoning': '2+'}, 'length'), '<think>\n2+'),
    (reply({'content': None, 'tool_calls': [CALL]}), '{"name": "f", "arguments": {"x": "é"}}'),
    (
      reply(
        {'content': 'So:', 'tool_calls': [CALL, {'function': {'name': 'g', 'arguments': '{'}}]}
      ),
      'So:\n\n[{"name": "f", "arguments": {"x": "é"}}, {"name": "g", "arguments": "{"}]',
    ),
    (
      reply({'content': None, 'function_call': {'name': 'f', 'arguments': {}}}),
      '{"name": "f", "arguments": {}}',
    ),
    (reply(text=' a '), 'a'),
    (reply({'content': 'half \ud83d pair'}), 'half ? pair'),
  ],
)
def test_forms_of_answers(fake, body, expected):
  fake.always = lambda handler: handler.reply(body)
  (row,) = complete(connect(fake), [ask('a')])
  assert row[0].text == expected
  row[0].text.encode()


def test_cut_answers_and_counts_of_tokens(fake, caplog):
  fake.faults = [
    lambda h: h.reply(reply({'content': 'a'}, 'length', {'completion_tokens': 8})),
    lambda h: h.reply(reply({'content': 'a'}, 'length', {'completion_tokens': -1})),
    lambda h: h.reply(reply({'content': 'a'}, None, 'no object')),
  ]
  model = connect(fake, http_client.Limits(concurrency=1))
  found = [complete(model, [ask(x)])[0][0] for x in 'abc']
  assert [(c.tokens, c.is_cut) for c in found] == [(8, True), (0, True), (0, False)]
  assert 'counts no tokens' in caplog.text


def test_tools_and_their_calls_are_sent_in_openais_form(fake):
  before = (
    {'role': 'user', 'content': 'Weather?'},
    {
      'role': 'assistant',
      'content': '',
      'tool_calls': [
        {'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 'Orléans'}}},
        {'function': {'name': 'g', 'arguments': '{}'}, 'id': 'mine'},
      ],
    },
    {'role': 'tool', 'content': 'sun'},
    {'role': 'tool', 'content': 'rain'},
  )
  functions = ({'name': 'f', 'parameters': {}}, {'type': 'function', 'function': {'name': 'g'}})
  complete(connect(fake), [ask('So?', *before, tools=functions)])
  (body,) = fake.bodies()
  assert body['tools'] == [
    {'type': 'function', 'function': {'name': 'f', 'parameters': {}}},
    {'type': 'function', 'function': {'name': 'g'}},
  ]
  _, turn, first, second, _ = body['messages']
  assert turn['tool_calls'] == [
    {
      'id': 'call_1_0',
      'type': 'function',
      'function': {'name': 'f', 'arguments': '{"x": "Orléans"}'},
    },
    {'id': 'mine', 'type': 'function', 'function': {'name': 'g', 'arguments': '{}'}},
  ]
  assert (first['tool_call_id'], second['tool_call_id']) == ('call_1_0', 'mine')


def test_openais_newer_name_of_max_tokens(fake):
  def only_newer(handler):
    if 'max_tokens' not in fake.requests[-1][1]:
      return False
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    handler.reply({'error': {'message': message}}, 400)

  fake.always = only_newer
  found = complete(connect(fake, http_client.Limits(concurrency=1)), [ask('a'), ask('b')])
  assert texts(found) == [['a -> greedy'], ['b -> greedy']]
  assert [b.get('max_completion_tokens') for b in fake.bodies()] == [None, 8, 8]


# Failures that pass


def test_too_many_requests(fake):
  """All threads wait as long as the server asks for."""
  times = []

  def limited(handler):
    times.append(time.monotonic())
    handler.reply({'error': {'message': 'slow down'}}, 429, Retry_After='1')

  fake.faults = [limited]
  start = time.monotonic()
  found = complete(connect(fake), [ask('a')])
  assert texts(found) == [['a -> greedy']]
  assert 1.0 <= time.monotonic() - start < 5
  assert len(fake.requests) == 2


@pytest.mark.parametrize('status', [408, 409, 429, 500, 502, 503, 504, 529])
def test_statuses_that_pass(fake, status):
  fake.faults = [lambda h: h.reply(b'<html>busy</html>', status)] * 2
  assert texts(complete(connect(fake), [ask('a')])) == [['a -> greedy']]
  assert len(fake.requests) == 3


@pytest.mark.parametrize(
  'fault',
  [
    lambda h: h.drop(),
    lambda h: h.drop(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"choices"'),
    lambda h: h.drop(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"ch'),
    lambda h: h.drop(b'\x00\xff rubbish\r\n\r\n'),
    lambda h: h.reply(b'{"choices": ['),
    lambda h: h.reply(b''),
    lambda h: h.reply(b'\xff\xfe'),
    lambda h: h.reply(b'[' * 200_000),
    lambda h: h.reply([1]),
    lambda h: h.reply({'error': {'message': 'overloaded', 'code': 503}}),
    lambda h: h.reply({'error': 'overloaded'}),
  ],
)
def test_broken_replies_are_asked_again(fake, fault):
  fake.faults = [fault]
  assert texts(complete(connect(fake), [ask('a')])) == [['a -> greedy']]
  assert len(fake.requests) == 2


def test_a_slow_server(fake):
  """A request without an answer is given up; so is one whose answer comes byte by byte."""
  fake.faults = [lambda h: time.sleep(0.6)]
  limits = http_client.Limits(timeout=0.2, pause=0.01)
  assert texts(complete(connect(fake, limits), [ask('a')])) == [['a -> greedy']]

  def trickle(handler):
    handler.send_response(200)
    handler.send_header('Content-Length', '1000')
    handler.end_headers()
    for _ in range(20):
      try:
        handler.wfile.write(b' ')
        handler.wfile.flush()
      except OSError:
        return
      time.sleep(0.05)

  fake.always = trickle
  start = time.monotonic()
  with pytest.raises(DataError, match=r'no answer in time \(timeout 0.2 s\)'):
    complete(connect(fake, limits), [ask('a')])
  assert time.monotonic() - start < 3


def test_500_forever(fake, caplog):
  fake.always = lambda h: h.reply({'error': {'message': 'out of memory'}}, 500)
  with pytest.raises(DataError, match=r'out of memory') as caught:
    complete(connect(fake), [ask('a')])
  assert f'{fake.base}/chat/completions' in str(caught.value)
  assert len(fake.requests) == QUICK.attempts
  assert caplog.text.count('asked again') == 1


def test_a_server_that_wants_a_long_pause(fake):
  fake.always = lambda h: h.reply({}, 429, Retry_After='3600')
  with pytest.raises(DataError, match='asks to wait 3600 s'):
    complete(connect(fake), [ask('a')])
  assert len(fake.requests) == 1


def test_no_server():
  model = Endpoint(Spec('http://127.0.0.1:9/v1', 'tiny'), QUICK, environment={})
  with pytest.raises(DataError, match=r'http://127.0.0.1:9/v1/chat/completions.*refused'):
    complete(model, [ask('a')])


def test_answers_before_an_error_are_kept(fake):
  """The second call asks for what is missing, and for nothing else."""

  def fault(handler):
    if fake.requests[-1][1]['messages'][-1]['content'] != 'c':
      return False
    handler.reply({'error': 'boom'}, 500)

  fake.always = fault
  model, counts = connect(fake, http_client.Limits(concurrency=1, pause=0.01)), []
  rows = [ask(x) for x in 'abcd']
  with pytest.raises(DataError, match=r'boom \(2 of 4 answers of tiny were there\)'):
    complete(model, rows, done=counts.append)
  assert sum(counts) == 2
  fake.always, before = None, len(fake.requests)
  assert texts(complete(model, rows)) == [[f'{x} -> greedy'] for x in 'abcd']
  assert [b['messages'][-1]['content'] for b in fake.bodies()[before:]] == ['c', 'd']


def test_an_error_ends_requests_that_wait(fake):
  """One is refused for good while others wait for a minute."""

  def fault(handler):
    if fake.requests[-1][1]['messages'][-1]['content'] == 'a':
      time.sleep(0.2)
      return handler.reply({'error': 'no such parameter'}, 400)
    return handler.reply({}, 429, Retry_After='60')

  fake.always = fault
  start = time.monotonic()
  with pytest.raises(DataError, match='no such parameter'):
    complete(connect(fake), [ask(x) for x in 'abcd'])
  assert time.monotonic() - start < 5
  deadline = time.monotonic() + 5
  while time.monotonic() < deadline and any(t.name == 'endpoint' for t in threading.enumerate()):
    time.sleep(0.01)
  assert not [t for t in threading.enumerate() if t.name == 'endpoint']


def test_a_watcher_hears_of_a_slow_server(fake, monkeypatch):
  monkeypatch.setattr(endpoint, '_BEAT', 0.05)
  fake.delay, counts = lambda body: 0.3, []
  complete(connect(fake), [ask('a')], done=counts.append)
  assert counts.count(0) >= 3 and sum(counts) == 1


@pytest.mark.parametrize(
  ('headers', 'expected'),
  [
    ({'retry-after': '7'}, 7),
    ({'retry-after': '0.5'}, 0.5),
    ({'retry-after-ms': '250', 'retry-after': '7'}, 0.25),
    ({'retry-after': 'Wed, 21 Oct 2026 07:28:30 GMT'}, 30),
    ({'retry-after': 'Wed, 21 Oct 2026 07:00:00 GMT'}, 0),
    ({'retry-after': '-3'}, None),
    ({'retry-after': 'soon'}, None),
    ({'retry-after': '1e9'}, None),
    ({}, None),
  ],
)
def test_retry_after(headers, expected):
  now = datetime.datetime(2026, 10, 21, 7, 28, tzinfo=datetime.UTC)
  assert email.utils.format_datetime(now).startswith('Wed, 21 Oct 2026 07:28:00')
  assert http_client.retry_after(headers, now) == expected


# Failures that stay


def test_another_model_name(fake):
  with pytest.raises(ConfigError, match=r"no model 'huge'.*does not exist.*the server has 'tiny'"):
    complete(connect(fake, name='huge'), [ask('a')])
  assert len(fake.bodies()) == 1


def test_a_server_that_answers_for_another_model(fake, caplog):
  for name, is_same in (('tiny', True), ('tiny-2026-01-01', True), ('other', False)):
    caplog.clear()
    fake.always = lambda h, name=name: h.reply(reply({'content': 'a'}) | {'model': name})
    complete(connect(fake), [ask('a'), ask('b')])
    assert caplog.text.count('answers as') == (not is_same)


def test_another_path(fake):
  fake.always = lambda h: h.reply(b'<html>Not Found</html>', 404)
  with pytest.raises(ConfigError, match=r'Not Found.*expected endpoint:http'):
    complete(connect(fake), [ask('a')])


def test_the_key_is_sent_and_never_shown(caplog):
  caplog.set_level(logging.DEBUG)
  with FakeEndpoint(key=KEY) as fake:
    assert texts(complete(connect(fake, key=KEY), [ask('a')])) == [['a -> greedy']]
    assert fake.requests[-1][2]['Authorization'] == f'Bearer {KEY}'
    with pytest.raises(ConfigError, match='wants a key'):
      complete(connect(fake), [ask('a')])
    wrong = 'f6e5d4c3b2a1'
    with pytest.raises(ConfigError, match=r'key was refused: 401: Incorrect API key') as caught:
      complete(connect(fake, key=wrong), [ask('a')])  # the server repeats the key
    assert len(fake.requests) == 3
    fake.always = lambda h: h.reply({'error': f'trouble with {wrong}'}, 500)
    with pytest.raises(DataError, match='trouble') as later:
      complete(connect(fake, key=wrong), [ask('a')])
  shown = f'{caught.value} {later.value} {caplog.text} {vars(connect(fake, key=wrong))}'
  assert wrong not in shown and KEY not in caplog.text


@pytest.mark.parametrize('key', ['two words', 'line\nend', 'schlüssel', 'a\tb'])
def test_a_key_that_no_header_can_have(fake, key):
  with pytest.raises(ConfigError, match='one word') as caught:
    connect(fake, key=key)
  assert key not in str(caught.value)


def test_a_key_over_plain_http_is_warned_of(caplog):
  environment = {endpoint.KEY_VARIABLE: KEY}
  Endpoint(Spec('http://127.0.0.1/v1', 'a'), QUICK, environment=environment)
  Endpoint(Spec('https://example.org/v1', 'a'), QUICK, environment=environment)
  assert not caplog.text
  Endpoint(Spec('http://example.org/v1', 'a'), QUICK, environment=environment)
  assert 'unencrypted' in caplog.text and KEY not in caplog.text


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(fake, status):
  with FakeEndpoint() as other:
    fake.always = lambda h: h.reply(b'', status, Location=f'{other.base}/chat/completions')
    with pytest.raises(ConfigError, match=f'redirects to {other.base}'):
      complete(connect(fake, key=KEY), [ask('a')])
    assert not other.requests


def encrypted(fake, folder):
  """Makes a server speak TLS, with a certificate of its own; returns the certificate's file."""
  if shutil.which('openssl') is None:
    pytest.skip('openssl, which makes the certificate, is not installed')
  key, certificate = folder / 'key.pem', folder / 'certificate.pem'
  command = ['openssl', 'req', '-x509', '-nodes', '-newkey', 'ec', '-pkeyopt']
  command += ['ec_paramgen_curve:prime256v1', '-subj', '/CN=localhost', '-days', '2']
  command += ['-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', str(key), '-out']
  subprocess.run([*command, str(certificate)], check=True, capture_output=True)
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(certificate, key)
  fake._server.socket = context.wrap_socket(
    fake._server.socket, server_side=True, do_handshake_on_connect=False
  )
  return certificate


def test_an_encrypted_server(fake, tmp_path, monkeypatch):
  certificate = encrypted(fake, tmp_path)
  spec = Spec(fake.base.replace('http:', 'https:'), 'tiny')
  monkeypatch.delenv('SSL_CERT_FILE', raising=False)
  with pytest.raises(ConfigError, match=r'certificate is not trusted: self.signed'):
    complete(Endpoint(spec, QUICK, environment={endpoint.KEY_VARIABLE: KEY}), [ask('a')])
  assert not fake.requests
  monkeypatch.setenv('SSL_CERT_FILE', str(certificate))
  assert texts(complete(Endpoint(spec, QUICK, environment={}), [ask('a')])) == [['a -> greedy']]


def test_a_server_that_never_ends_the_handshake(monkeypatch):
  """Connecting has a shorter limit than answering."""
  monkeypatch.setattr(http_client, '_CONNECT', 0.1)
  with socket.create_server(('127.0.0.1', 0)) as silent:
    spec = Spec(f'https://127.0.0.1:{silent.getsockname()[1]}/v1', 'tiny')
    start = time.monotonic()
    with pytest.raises(DataError, match='no answer in time'):
      complete(Endpoint(spec, http_client.Limits(timeout=60, pause=0.01), environment={}), ['a'])
    assert time.monotonic() - start < 5


def test_a_used_up_quota(fake):
  error = {'message': 'You exceeded your quota', 'code': 'insufficient_quota'}
  fake.always = lambda h: h.reply({'error': error}, 429)
  with pytest.raises(ConfigError, match='quota'):
    complete(connect(fake), [ask('a')])
  assert len(fake.requests) == 1


@pytest.mark.parametrize(
  ('status', 'body'),
  [
    (400, {'error': {'message': 'maximum context length is 8 tokens'}}),
    (400, {'object': 'error', 'message': 'maximum context length is 8 tokens'}),
    (422, {'detail': [{'msg': 'maximum context length is 8 tokens', 'loc': ['body']}]}),
    (413, b'maximum context length is 8 tokens'),
  ],
)
def test_a_prompt_that_is_too_long(fake, status, body):
  fake.always = lambda h: h.reply(body, status)
  model = connect(fake)
  for call in (
    lambda: model.complete(['x'], ['rows.jsonl:7'], GREEDY, lambda n: None),
    lambda: model.score_texts(['x'], ['rows.jsonl:7'], lambda n: None),
  ):
    with pytest.raises(DataError, match=f'rows.jsonl:7.*{status}: maximum context length'):
      call()


@pytest.mark.parametrize(
  'body', [{}, {'choices': []}, {'choices': [{}]}, {'choices': [{'message': 3}]},
           {'choices': [{'message': {'content': 3}}]}, {'choices': 'a'},
           {'choices': [{'message': {'tool_calls': [3]}}]}],
)  # fmt: skip
def test_replies_of_another_form(fake, body):
  fake.always = lambda h: h.reply(body)
  with pytest.raises(DataError, match=r'rows.jsonl:1: http'):
    complete(connect(fake), [ask('a')])


def test_a_prompt_that_is_no_json(fake):
  with pytest.raises(DataError, match=r'rows.jsonl:1.*JSON'):
    complete(connect(fake), [ask('a', tools=({'function': {'when': datetime.date.today()}},))])


# Log-probabilities


def test_score_of_responses_to_a_text(fake):
  counts = []
  found = connect(fake).score(
    ['The sky is', 'Grass is'],
    [[' blue', ' a shade of grey', ''], [' green']],
    ['', ''],
    counts.append,
  )
  expected = (
    Likelihood(pytest.approx(logp(' is', ' blue')), 1),
    Likelihood(
      pytest.approx(
        logp(' is', ' a') + logp(' a', ' shade') + logp(' shade', ' of') + logp(' of', ' grey')
      ),
      4,
    ),
    Likelihood(0, 0),
  )
  assert found == [expected, (Likelihood(pytest.approx(logp(' is', ' green')), 1),)]
  assert sum(counts) == 2
  assert all(b['echo'] and b['max_tokens'] == 1 for b in fake.bodies('completions'))


def test_score_where_prompt_and_response_share_a_token(fake):
  """'Gra' + 'ss' is the token ' Grass': all responses then count from there on, so that their
  differences are those of the whole texts.
  """
  ((joined, apart, none),) = connect(fake).score(
    ['x Gra'], [['ss is', ' y', '']], [''], lambda n: None
  )
  assert joined.logp == pytest.approx(logp('x', ' Grass') + logp(' Grass', ' is'))
  assert apart.logp == pytest.approx(logp('x', ' Gra') + logp(' Gra', ' y'))
  assert none.logp == pytest.approx(logp('x', ' Gra'))
  assert (joined.tokens, apart.tokens, none.tokens) == (2, 2, 1)


def test_score_of_responses_to_a_conversation(fake):
  """What the template puts around the response counts, up to the stop token."""
  chat = ask('Is ice cold?', {'role': 'system', 'content': 'Answer.'})
  ((yes, no),) = connect(fake).score([chat], [['yes', 'not at all']], [''], lambda n: None)
  end = '<|im_end|>'
  assert yes == Likelihood(pytest.approx(logp('\n', 'yes') + logp('yes', end)), 2)
  assert no.tokens == 4
  assert no.logp == pytest.approx(
    logp('\n', 'not') + logp('not', ' at') + logp(' at', ' all') + logp(' all', end)
  )
  whole = fake.bodies('chat/completions')
  assert {b.get('add_generation_prompt', True) for b in whole} == {True, False}
  assert rendered(chat.messages, True)[-3:] == ['<|im_start|>', 'assistant', '\n']


def test_scores_of_texts(fake):
  text = 'Le ciel est bleu. ' + '😀 ' * 3
  found = connect(fake).score_texts([text, 'one', text], ['', '', ''], lambda n: None)
  tokens = words(text)
  expected = math.fsum(logp(a, b) for a, b in itertools.pairwise(tokens))
  assert found[0] == found[2] == Likelihood(pytest.approx(expected), len(tokens) - 1)
  assert found[1] == Likelihood(0, 0)
  assert len(fake.requests) == 2


def refuse(status, message):
  return lambda h: h.reply({'error': {'message': message}}, status)


@pytest.mark.parametrize(
  'always',
  [
    None,
    refuse(400, 'Only no echo is supported'),
    refuse(404, 'This is a chat model and not supported in the v1/completions endpoint'),
    refuse(501, 'not implemented'),
    lambda h: h.reply(reply(text='a')),
    lambda h: h.reply(reply(text='a', logprobs={'tokens': ['a'], 'token_logprobs': []})),
    lambda h: h.reply(
      reply(text='a', logprobs={'tokens': ['a', 'b'], 'token_logprobs': [math.nan, 0.0]})
    ),
    lambda h: h.reply(
      reply(text='a', logprobs={'tokens': ['a', 'b', 'c'], 'token_logprobs': [None, -(10**400), 0]})
    ),
    lambda h: h.reply(reply({'content': 'a'}) | {'prompt_logprobs': [None, 3]}),
    lambda h: h.reply(
      reply({'content': 'a'}) | {'prompt_logprobs': [None, {'3': {'logprob': None}}]}
    ),
  ],
)
def test_a_server_without_log_probabilities(fake, always):
  fake.has_echo = fake.has_prompt_logprobs = False
  fake.always = always
  model = connect(fake)
  for call in (
    lambda: model.score(['a b'], [[' c', ' d']], [''], lambda n: None),
    lambda: model.score([ask('a b')], [['c', 'd']], [''], lambda n: None),
    lambda: model.score_texts(['a b'], [''], lambda n: None),
  ):
    with pytest.raises(ConfigError, match=r'no log-probabilities of prompts.*eval.tasks'):
      call()


def test_a_first_token_without_log_probability(fake):
  with pytest.raises(DataError, match=r'rows.jsonl:3.*first token'):
    connect(fake).score([''], [['a b', 'c']], ['rows.jsonl:3'], lambda n: None)


def test_a_template_that_ends_prompts_otherwise(fake):
  """The prompt ends in an opened thought, which a whole conversation does not have."""

  def fault(handler):
    body = fake.requests[-1][1]
    found = fake.chat(body)
    if body.get('add_generation_prompt', True):
      found['prompt_logprobs'].append({'5': {'logprob': -1.0, 'decoded_token': '<think>'}})
    handler.reply(found)

  fake.always = fault
  with pytest.raises(DataError, match=r'rows.jsonl:3.*chat template'):
    connect(fake).score([ask('a')], [['b']], ['rows.jsonl:3'], lambda n: None)


def test_vllms_log_probabilities_with_likelier_tokens():
  """The token of the prompt is the first of each entry."""
  entry = {'9': {'logprob': -2.0, 'decoded_token': 'b'}, '4': {'logprob': -0.5, 'rank': 1}}
  found = endpoint_format.scored_chat(json.loads(json.dumps({'prompt_logprobs': [None, entry]})))
  assert found.tokens == ('', '9') and found.logps == (None, -2.0)
