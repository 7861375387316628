"""An OpenAI-compatible server on loopback, with a log of what it was asked and canned faults.

Its model answers 'PROMPT -> SAMPLE' by default. Its log-probabilities are those of a table: a
token is a word with the white space before it, and its probability depends on the word before it.
"""

import itertools
import json
import math
import re
import socket
import threading
import time
import zlib
from http import server

from loopback import Loopback


def words(text):
  """['A', ' b', '\\n'] of 'A b\\n'; the text is their concatenation."""
  return re.findall(r'\s*\S+|\s+$', text)


def logp(before, word):
  """Log-probability of a word after another: any fixed function of both."""
  return -math.log(2 + len(word.strip()) + len(before.strip()) / 7)


def rendered(messages, is_open):
  """Tokens of a conversation in the layout of chatml; `is_open`: the assistant begins."""
  turns = [
    ['<|im_start|>', m['role'], '\n', *words(m['content']), '<|im_end|>', '\n'] for m in messages
  ]
  return [x for turn in turns for x in turn] + ['<|im_start|>', 'assistant', '\n'] * is_open


def prompt_logprobs(tokens):
  """vLLM's form: None, then {id: {logprob, rank, decoded_token}} of each further token."""
  return [None] + [
    {str(zlib.crc32(b.encode())): {'logprob': logp(a, b), 'rank': 1, 'decoded_token': b}}
    for a, b in itertools.pairwise(tokens)
  ]


class FakeEndpoint(Loopback):
  """The server; a context manager.

  Attributes:
    faults: what becomes of the next requests, one each: a function of the handler that answers in
      place of the model, or returns False to let it answer.
    always: such a function for all requests, after `faults`.
    delay: of a body, in seconds.
    has_echo, has_prompt_logprobs: what the server can.
    requests: (path, body, headers) in the order in which they came.
    most: the most requests that were there at once.
  """

  def __init__(self, models=('tiny',), key=''):
    self.models, self.key = models, key
    self.faults, self.always = [], None
    self.delay = lambda body: 0.0
    self.has_echo = self.has_prompt_logprobs = True
    self.requests, self.most, self._now = [], 0, 0
    self._lock = threading.Lock()
    fake = self

    class Handler(server.BaseHTTPRequestHandler):
      fake, is_there = self, False

      def log_message(self, *_):
        pass

      def do_GET(self):
        fake.requests.append((self.path, None, dict(self.headers)))
        self.reply({'data': [{'id': name} for name in fake.models]})

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        with fake._lock:
          fake.requests.append((self.path, body, dict(self.headers)))
          fault = fake.faults.pop(0) if fake.faults else fake.always
          fake._now += 1
          fake.most = max(fake.most, fake._now)
          self.is_there = True
        try:
          if fault is None or fault(self) is False:
            fake._answer(self, body)
        finally:
          self.leave()

      def leave(self):
        """Counts the request as gone, before its client can know and send the next."""
        with fake._lock:
          fake._now -= self.is_there
          self.is_there = False

      def reply(self, body, status=200, **headers):
        self.leave()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Length': str(len(raw)), **headers}.items():
          self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(raw)

      def drop(self, after=b''):
        """Ends the connection in the middle of an answer."""
        self.leave()
        self.wfile.write(after)
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    self._server = server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self._server.daemon_threads = True
    self._server.block_on_close = False

  @property
  def base(self):
    return f'{self.url}/v1'

  def bodies(self, path=None):
    """Bodies of the requests of a path, 'completions' or 'chat/completions'."""
    return [b for p, b, _ in self.requests if b and (path is None or p == f'/v1/{path}')]

  def _answer(self, handler, body):
    if self.key and handler.headers.get('authorization') != f'Bearer {self.key}':
      given = handler.headers.get('authorization', '')
      error = {'message': f'Incorrect API key provided: {given}', 'code': 'invalid_api_key'}
      return handler.reply({'error': error}, 401)
    if body['model'] not in self.models:
      message = f'The model `{body["model"]}` does not exist.'
      return handler.reply({'error': {'message': message, 'code': 404}}, 404)
    time.sleep(self.delay(body))
    return handler.reply(self.chat(body) if 'messages' in body else self.completion(body))

  def chat(self, body):
    text = f'{body["messages"][-1]["content"]} -> {body.get("seed", "greedy")}'
    reply = {
      'choices': [{'message': {'role': 'assistant', 'content': text}, 'finish_reason': 'stop'}],
      'usage': {'prompt_tokens': 3, 'completion_tokens': len(words(text))},
    }
    if self.has_prompt_logprobs and 'prompt_logprobs' in body:
      tokens = rendered(body['messages'], body.get('add_generation_prompt', True))
      reply['prompt_logprobs'] = prompt_logprobs(tokens)
    return reply

  def completion(self, body):
    tokens, logprobs = ['!'], [-1.0]
    prompt = words(body['prompt'])
    if self.has_echo and body.get('echo'):
      tokens = prompt + tokens
      logprobs = [None, *(logp(a, b) for a, b in itertools.pairwise(prompt)), *logprobs]
    choice = {'text': f'{body["prompt"]} -> {body.get("seed", "greedy")}', 'finish_reason': 'stop'}
    if 'logprobs' in body:
      choice['logprobs'] = {'tokens': tokens, 'token_logprobs': logprobs}
    return {
      'choices': [choice],
      'usage': {'prompt_tokens': len(prompt), 'completion_tokens': 1},
    }
