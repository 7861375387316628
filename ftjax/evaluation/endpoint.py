"""A model under test behind an OpenAI-compatible server: 'endpoint:URL#name'.

Conversations go to /chat/completions, texts to /completions. Each sample is a request of its own
with a seed of its own: not every server knows `n`, and what is missing after an error is then one
request. Log-probabilities come from `echo` with `logprobs` for texts (OpenAI's older models, vLLM,
SGLang), and from vLLM's `prompt_logprobs` for conversations. What the server has answered is kept
as long as the object lives, and is never asked twice; nothing is stored, since nobody knows whether
the server has the same weights tomorrow. The API key comes from the environment alone.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax.data.formats import Chat
from ftjax.evaluation import endpoint_format as form
from ftjax.evaluation import http_client, served_models
from ftjax.evaluation.model import Completion, Draw, Likelihood
from ftjax.runtime import redaction
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError, RunError, caught

log = logging.getLogger(__name__)

PREFIX = 'endpoint:'
KEY_VARIABLE, OPENAI_VARIABLE = 'FTJAX_ENDPOINT_KEY', 'OPENAI_API_KEY'

_EXAMPLE = 'endpoint:http://localhost:8000/v1#name-of-the-model'
_CHAT, _TEXT = 'chat/completions', 'completions'
_BEAT = 5.0  # seconds between calls of `done` while the server works
_TOO_LONG = re.compile(r'context|too long|maximum|max_model_len|exceed', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Spec:
  """A model behind a server. url: up to /v1, without a slash at its end. name: of the model."""

  url: str
  name: str

  @property
  def text(self) -> str:
    """Returns what `parse` reads."""
    return f'{PREFIX}{self.url}#{self.name}'


def is_endpoint(text: str) -> bool:
  """Returns whether a model of eval.models is meant as an endpoint."""
  return text.strip().startswith(PREFIX)


def parse(text: str) -> Spec:
  """Returns the parts of 'endpoint:URL#name'.

  Raises:
    ConfigError: another form, or a URL that cannot be used; a password in it is not shown.
  """
  url, hash_sign, name = text.strip().removeprefix(PREFIX).partition('#')
  url, name = url.strip(), name.strip()
  shown = redaction.redact_text(re.sub(r'\?[^#]*', f'?{redaction.REDACTED}', text))

  def wrong(reason: str) -> ConfigError:
    return ConfigError(f'eval.models: {shown!r}: {reason}; expected {_EXAMPLE}')

  if not is_endpoint(text):
    raise wrong(f'it does not begin with {PREFIX}')
  if not hash_sign or not name:
    raise wrong('no model name after #')
  if not re.fullmatch(r'[\x21-\x7e]+', url) or not name.isprintable():
    raise wrong(
      'white space or characters that are not ASCII in the URL, or a line end in the name'
    )
  try:
    parts = urllib.parse.urlsplit(url)
    host, _ = parts.hostname, parts.port
    (host or '').encode('idna')  # as the socket will
  except ValueError as error:
    raise wrong(str(error)) from error
  if parts.scheme not in ('http', 'https') or not host:
    raise wrong('the URL is not one of http:// or https:// with a host')
  if '@' in parts.netloc:
    raise wrong(f'a user or password in the URL; give the API key in {KEY_VARIABLE}')
  if parts.query or '?' in url:
    raise wrong(f'a query in the URL; give the API key in {KEY_VARIABLE}')
  path = parts.path.rstrip('/')
  for end in (_CHAT, _TEXT):
    if path.endswith('/' + end):
      raise wrong(f'the URL ends in /{end}, which is added by itself')
  return Spec(f'{parts.scheme}://{parts.netloc.lower()}{path}', name)


def api_key(url: str, environment: Mapping[str, str]) -> str:
  """Returns the API key for a server, '' for none.

  It is FTJAX_ENDPOINT_KEY. For OpenAI's own hosts OPENAI_API_KEY comes first; it is sent nowhere
  else, since it is often set for other programs.
  """
  host = urllib.parse.urlsplit(url).hostname or ''
  names = [KEY_VARIABLE]
  if host == 'openai.com' or host.endswith('.openai.com'):
    names = [OPENAI_VARIABLE, KEY_VARIABLE]
  return next((k for n in names if (k := environment.get(n, '').strip())), '')


@dataclasses.dataclass(frozen=True)
class _Job:
  """One request. read: of its reply. place: of a row that needs it."""

  path: str
  body: Mapping[str, Any]
  read: Callable[[Mapping[str, Any]], Any]
  place: str


class Endpoint:
  """A `Model` behind a server.

  Args:
    spec: which model.
    limits: how it is asked.
    environment: where the API key is; the process's own where None.
  """

  def __init__(
    self,
    spec: Spec,
    limits: http_client.Limits,
    *,
    environment: Mapping[str, str] | None = None,
  ):
    self.spec, self._limits = spec, limits
    key = api_key(spec.url, os.environ if environment is None else environment)
    self._client = http_client.Client(spec.url, key, limits)
    self._kept: dict[str, Any] = {}  # by key of the request: what was read of the reply
    self._name = ''  # the server's for the model
    self._most = 'max_tokens'  # OpenAI's newer models call it max_completion_tokens

  def check_name(self) -> None:
    """Raises ConfigError where the server has other models, and not this one; see served_models."""
    served_models.check(self._client, self.spec.name)

  def complete(
    self,
    prompts: Sequence[Chat | str],
    places: Sequence[str],
    draw: Draw,
    done: Callable[[int], None],
  ) -> list[list[Completion]]:
    """Returns draw.samples completions of each prompt.

    Args:
      prompts: conversations that the assistant answers next, or texts to continue.
      places: of their rows, for messages.
      done: called in this thread with how many more completions are there, also with 0 while the
        server works.

    Raises:
      ConfigError: the server does not know the model, refuses the key or redirects.
      DataError: the server refuses a prompt, or gives no usable answer; names URL and place. The
        completions so far are kept: a further call asks for those that are missing.
    """
    rows, jobs = [], dict[str, _Job]()
    for prompt, place in zip(prompts, places, strict=True):
      keys = []
      for sample in range(draw.samples):
        body = self._body(prompt) | self._settings(prompt, draw, sample)
        path = _TEXT if isinstance(prompt, str) else _CHAT
        keys.append(_add(jobs, _Job(path, body, form.answer, place)))
      rows.append(keys)
    self._ask(jobs, [{k} for keys in rows for k in keys], done)
    out = []
    for prompt, keys in zip(prompts, rows, strict=True):
      text, found = form.transcript(prompt), [self._kept[k] for k in keys]
      out.append([Completion(a.text, text, a.tokens, a.is_cut) for a in found])
    if jobs and not any(self._kept[k].tokens for k in jobs):
      log.warning('%s counts no tokens: lengths and cost of its completions are 0', self.spec.url)
    return out

  def score(
    self,
    prompts: Sequence[Chat | str],
    responses: Sequence[Sequence[str]],
    places: Sequence[str],
    done: Callable[[int], None],
  ) -> list[tuple[Likelihood, ...]]:
    """Returns for each prompt how probable each of its responses is.

    After a text, the stop token does not count: a request cannot hold it. After a conversation, all
    that the server's template puts around the response counts, the stop token too. Where the
    tokenizer joins the end of the prompt with the begin of a response, the tokens from there on
    count, for all responses of this prompt.

    Args:
      done: called in this thread with how many more prompts are done.

    Raises:
      ConfigError: the server has no log-probabilities of prompts; see `complete`.
      DataError: see `complete`.
    """
    rows, jobs = [], dict[str, _Job]()
    for prompt, texts, place in zip(prompts, responses, places, strict=True):
      whole = [self._scoring(prompt, text, place, jobs) for text in texts]
      rows.append((self._scoring(prompt, None, place, jobs) if texts else '', whole))
    self._ask(jobs, [{k for k in (before, *whole) if k} for before, whole in rows], done)
    out = []
    for prompt, (before, whole), place in zip(prompts, rows, places, strict=True):
      first = self._kept[before] if before else form.Scored((), (), ())
      found = [self._kept[k] if k else first for k in whole]
      out.append(_likelihoods(first, found, isinstance(prompt, Chat), place))
    return out

  def score_texts(
    self, texts: Sequence[str], places: Sequence[str], done: Callable[[int], None]
  ) -> list[Likelihood]:
    """Returns how probable each whole text is. Its first token counts only where the server puts
    one before it (BOS). A text that is longer than the server's context is an error.

    Raises:
      ConfigError, DataError: see `score`.
    """
    jobs: dict[str, _Job] = {}
    keys = [self._scoring(t, None, p, jobs) for t, p in zip(texts, places, strict=True)]
    self._ask(jobs, [{k} - {''} for k in keys], done)
    out = []
    for key in keys:
      logps = [x for x in (self._kept[key].logps if key else ()) if x is not None]
      out.append(Likelihood(sum(logps), len(logps)))
    return out

  def _body(self, prompt: Chat | str) -> dict[str, Any]:
    body = {'prompt': prompt} if isinstance(prompt, str) else form.chat_body(prompt)
    return {'model': self.spec.name} | body

  def _settings(self, prompt: Chat | str, draw: Draw, sample: int) -> dict[str, Any]:
    out: dict[str, Any] = {'max_tokens': draw.max_tokens, 'temperature': draw.temperature}
    if draw.temperature:
      # Of the prompt alone, not of its neighbours; below 2**31 for all servers.
      seed = digest([draw.seed, sample, form.transcript(prompt)])
      out |= {'top_p': 1.0, 'seed': int(seed[:8], 16) >> 1}
    if draw.stop:
      out['stop'] = list(draw.stop)  # most servers take at most four
    return out

  def _scoring(
    self, prompt: Chat | str, response: str | None, place: str, jobs: dict[str, _Job]
  ) -> str:
    """Adds the request that scores a prompt, with a response unless it is None; returns its key, ''
    where there is no text.
    """
    if isinstance(prompt, str):
      text = prompt + (response or '')
      if not text:
        return ''
      # Not 0 tokens: servers read it as no limit.
      body = self._body(text) | {'max_tokens': 1, 'temperature': 0.0, 'echo': True, 'logprobs': 1}
      path, read = _TEXT, form.scored_prompt
    else:
      body = self._body(prompt) | {'max_tokens': 1, 'temperature': 0.0, 'prompt_logprobs': 0}
      if response is not None:
        body['messages'] = [*body['messages'], {'role': 'assistant', 'content': response}]
        body['add_generation_prompt'] = False
      path, read = _CHAT, form.scored_chat
    return _add(jobs, _Job(path, body, read, place))

  def _ask(
    self, jobs: Mapping[str, _Job], rows: Sequence[set[str]], done: Callable[[int], None]
  ) -> None:
    """Sends the requests that are not answered yet, and keeps what is read of the replies.

    Args:
      rows: for each unit of `done`, the keys of the requests that it needs.
    """
    left = [keys - self._kept.keys() for keys in rows]
    needs: dict[str, list[set[str]]] = {}
    for keys in left:
      for key in keys:
        needs.setdefault(key, []).append(keys)
    if ready := sum(not keys for keys in left):
      done(ready)
    todo, answered = queue.SimpleQueue(), queue.SimpleQueue()
    for key in needs:
      todo.put(key)
    self._client.open()

    def work() -> None:
      with contextlib.suppress(queue.Empty):
        while True:
          key = todo.get_nowait()
          # Kept here: replies that come after another request has failed are kept too.
          self._kept[key] = self._answer(jobs[key])
          answered.put(key)

    def run() -> None:
      if error := caught(work):
        answered.put(error)

    # Daemons: an interrupted run does not wait for the server.
    for _ in range(min(self._limits.concurrency, len(needs))):
      threading.Thread(target=run, daemon=True, name='endpoint').start()
    try:
      self._collect(answered, needs, done, sum(map(bool, left)), len(rows))
    finally:
      with contextlib.suppress(queue.Empty):
        while True:
          todo.get_nowait()
      self._client.close()

  def _collect(self, answered, needs, done, open_rows: int, total: int) -> None:
    while open_rows:
      try:
        found = answered.get(timeout=_BEAT)
      except queue.Empty:
        done(0)
        continue
      if isinstance(found, RunError):
        there = total - open_rows
        kept = f' ({there} of {total} answers of {self.spec.name} were there)' if there else ''
        raise type(found)(f'{found}{kept}') from found
      if isinstance(found, Exception):
        raise found
      ready = 0
      for keys in needs[found]:
        keys.discard(found)
        ready += not keys
      open_rows -= ready
      done(ready)

  def _answer(self, job: _Job) -> Any:
    try:
      return job.read(self._send(job))
    except form.FormError as error:
      if job.read is not form.answer:
        raise self._no_scores(str(error)) from error
      raise DataError(f'{job.place}: {self.spec.url}/{job.path}: {error}') from error
    except http_client.RefusedError as error:
      raise self._refused(job, error) from error

  def _refused(self, job: _Job, error: http_client.RefusedError) -> RunError:
    where, names = f'{self.spec.url}/{job.path}', []
    if error.status in (404, 405, 501):
      names = served_models.names(self._client)
    if names and self.spec.name not in names:
      return served_models.unknown(where, self.spec.name, error, names)
    is_too_long = error.status in (400, 413, 422) and _TOO_LONG.search(error.message)
    if job.read is not form.answer and not is_too_long:
      return self._no_scores(str(error))
    if error.status in (404, 405, 501):
      return ConfigError(
        f'{where} does not answer for the model {self.spec.name!r}: {error}; expected {_EXAMPLE}'
      )
    return DataError(f'{job.place}: {where} refuses the prompt: {error}')

  def _send(self, job: _Job) -> dict[str, Any]:
    while True:
      most = self._most
      body = {most if k == 'max_tokens' else k: v for k, v in job.body.items()}
      try:
        reply = self._client.post(job.path, body)
      except http_client.RefusedError as error:
        is_other_name = most == 'max_tokens' and 'max_completion_tokens' in error.message
        if error.status != 400 or not is_other_name:
          raise
        self._most = 'max_completion_tokens'
      else:
        self._check_name(reply.get('model'))
        return reply

  def _check_name(self, name: Any) -> None:
    """Warns once where another model answers. 'gpt-4o-2024-08-06' answers for 'gpt-4o'."""
    if not isinstance(name, str) or not name or name == self._name:
      return
    self._name = name
    if not name.startswith(self.spec.name) and not self.spec.name.endswith(name):
      shown = redaction.redact_text(name[:200])
      log.warning('%s answers as %r, not as %r', self.spec.url, shown, self.spec.name)

  def _no_scores(self, reason: str) -> ConfigError:
    return ConfigError(
      f'{self.spec.text} gives no log-probabilities of prompts: {reason}. Tasks that choose by '
      'likelihood, perplexity and preference accuracy need them: texts by echo with logprobs of '
      '/completions, conversations by prompt_logprobs of /chat/completions (vLLM has both). Take '
      'such tasks out of eval.tasks, or the model out of eval.models'
    )


def _add(jobs: dict[str, _Job], job: _Job) -> str:
  """Adds a request; returns its key, the same for equal requests."""
  try:
    key = digest([job.path, job.body])
  except (TypeError, RecursionError) as error:
    raise DataError(f'{job.place}: the prompt cannot be written as JSON: {error}') from error
  jobs[key] = job
  return key


def _likelihoods(
  before: form.Scored, whole: Sequence[form.Scored], is_chat: bool, place: str
) -> tuple[Likelihood, ...]:
  """Returns how probable the rest of each of `whole` is after `before`."""
  starts = [_same(before.tokens, x.tokens) for x in whole]
  if is_chat and any(s < len(before.tokens) for s in starts):
    raise DataError(
      f'{place}: the chat template of the server renders an answer otherwise than its prompt '
      'ends, so its log-probabilities are not those of the answer alone; read the answer of a '
      'completion instead'
    )
  start, out = min(starts, default=0), []
  for one in whole:
    end = len(one.tokens)
    # A line end after the stop token belongs to the next turn.
    while is_chat and end > start and not one.texts[end - 1].strip():
      end -= 1
    logps = [x for x in one.logps[start:end] if x is not None]
    if len(logps) < end - start:
      raise DataError(f'{place}: the server gives no log-probability to the first token of a text')
    out.append(Likelihood(sum(logps), len(logps)))
  return tuple(out)


def _same(first: Sequence[str], second: Sequence[str]) -> int:
  """Returns how many tokens two texts begin with in common."""
  for at, (a, b) in enumerate(zip(first, second, strict=False)):
    if a != b:
      return at
  return min(len(first), len(second))
