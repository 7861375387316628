"""OpenAI's request and response bodies: conversations to messages, replies to answers and scores.

The forms are those of OpenAI's API reference, with what servers add: reasoning under a key of its
own (DeepSeek, vLLM, llama.cpp), `chat_template_kwargs` and `prompt_logprobs` (vLLM).
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.data.formats import Chat
from ftjax.data.messages import REASONING

# Log-probabilities in nats; servers write -9999 for -inf, and rounding may pass 0.
_LEAST, _ROUNDING = -1e6, 0.01


class FormError(ValueError):
  """A reply that is JSON, but not of OpenAI's form; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Answer:
  """One completion of a server. tokens: 0 where the server does not count them."""

  text: str
  tokens: int
  is_cut: bool


@dataclasses.dataclass(frozen=True)
class Scored:
  """A text as the server tokenizes it.

  tokens: what identifies each of them, a text or an id. texts: theirs. logps: in nats, None where
  the server gives none: of the first one.
  """

  tokens: tuple[str, ...]
  texts: tuple[str, ...]
  logps: tuple[float | None, ...]


def messages(chat: Chat) -> list[dict[str, Any]]:
  """Returns the messages in OpenAI's form: arguments of calls as JSON text, calls and their results
  with ids.
  """
  out: list[dict[str, Any]] = []
  waiting: list[str] = []  # ids of calls without a result so far
  for number, message in enumerate(chat.messages):
    copy = dict(message)
    if calls := copy.get('tool_calls'):
      copy['tool_calls'] = [_call(c, f'call_{number}_{i}') for i, c in enumerate(calls)]
      waiting = [c['id'] for c in copy['tool_calls']]
    if copy.get('role') == 'tool':
      name = copy.get('tool_call_id') or (waiting[0] if waiting else f'call_{number}')
      waiting = [w for w in waiting if w != name]
      copy['tool_call_id'] = name
    out.append(copy)
  return out


def _call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
  function = dict(call.get('function') or {})
  if not isinstance(function.get('arguments'), str):
    function['arguments'] = json.dumps(function.get('arguments') or {}, ensure_ascii=False)
  return {'id': name, 'type': 'function'} | dict(call) | {'function': function}


def chat_body(chat: Chat) -> dict[str, Any]:
  """Returns the keys of a request that a conversation sets."""
  body: dict[str, Any] = {'messages': messages(chat)}
  if chat.tools:
    body['tools'] = [
      t if 'function' in t or 'name' not in t else {'type': 'function', 'function': t}
      for t in chat.tools
    ]
  if chat.template_kwargs:
    body['chat_template_kwargs'] = dict(chat.template_kwargs)
  return body


def transcript(prompt: Chat | str) -> str:
  """Returns a prompt as text. The server alone knows what its template makes of a conversation:
  here it is 'role: content', one paragraph a message, and ends where the assistant begins.
  """
  if isinstance(prompt, str):
    return prompt
  parts = []
  for m in prompt.messages:
    calls = [json.dumps(c, ensure_ascii=False, default=str) for c in m.get('tool_calls') or ()]
    parts.append(f'{m["role"]}: ' + '\n'.join(filter(None, [m.get('content') or '', *calls])))
  return '\n\n'.join([*parts, 'assistant:'])


def _choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
  choices = reply.get('choices')
  if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
    raise FormError(f'a reply without choices; got the keys {sorted(map(str, reply))[:10]}')
  return choices[0]


def _count(reply: Mapping[str, Any], key: str) -> int | None:
  usage = reply.get('usage')
  value = usage.get(key) if isinstance(usage, Mapping) else None
  return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(value: Any, what: str) -> str:
  """Returns a text, or the texts of a list of parts; without half surrogate pairs, which no file
  can hold.
  """
  if isinstance(value, list):
    value = ''.join(_text(p.get('text'), what) for p in value if isinstance(p, Mapping))
  if value is not None and not isinstance(value, str):
    raise FormError(f'{what} is {type(value).__name__}, expected a text')
  return (value or '').encode(errors='replace').decode()


def answer(reply: Mapping[str, Any]) -> Answer:
  """Returns the first completion of a reply.

  Reasoning under its own key stands before the text in <think> tags, as models write it. Tool calls
  follow the text as JSON: one object {"name", "arguments"}, or a list of several.

  Raises:
    FormError: the reply has no completion.
  """
  choice = _choice(reply)
  if 'message' in choice:
    message = choice['message']
    if not isinstance(message, Mapping):
      raise FormError(f'message is {type(message).__name__}, expected an object')
    text = _text(message.get('content'), 'content') or _text(message.get('refusal'), 'refusal')
    thoughts = [_text(message[k], k) for k in REASONING if isinstance(message.get(k), str)]
    thought = next(filter(None, thoughts), '')
    parts = [text.strip(), _calls(message)]
    text = '\n\n'.join(filter(None, parts))
    if thought.strip():
      is_open = not text and choice.get('finish_reason') == 'length'  # cut while it thought
      end = '' if is_open else f'\n</think>\n\n{text}'
      text = f'<think>\n{thought.strip()}{end}'
  elif 'text' in choice:
    text = _text(choice['text'], 'text')
  else:
    raise FormError(f'a choice without message or text; got the keys {sorted(map(str, choice))}')
  tokens = _count(reply, 'completion_tokens') or 0
  return Answer(text.strip(), tokens, choice.get('finish_reason') == 'length')


def _calls(message: Mapping[str, Any]) -> str:
  calls = message.get('tool_calls') or []
  if not calls and message.get('function_call'):
    calls = [{'function': message['function_call']}]
  found = []
  for call in calls if isinstance(calls, list) else [calls]:
    function = call.get('function') if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
      raise FormError('a tool call without a function')
    given = function.get('arguments')
    if isinstance(given, str):
      with contextlib.suppress(ValueError, RecursionError):  # a fault that the task is to see
        given = json.loads(given)
    found.append({'name': function.get('name'), 'arguments': given})
  if not found:
    return ''
  return _text(json.dumps(found[0] if len(found) == 1 else found, ensure_ascii=False), 'tool_calls')


def scored_prompt(reply: Mapping[str, Any]) -> Scored:
  """Returns the tokens of the prompt, of a reply of /completions to `echo` with `logprobs`.

  Raises:
    FormError: the reply has no log-probabilities of the prompt.
  """
  found = _choice(reply).get('logprobs')
  tokens = found.get('tokens') if isinstance(found, Mapping) else None
  logps = found.get('token_logprobs') if isinstance(found, Mapping) else None
  if not isinstance(tokens, list) or not isinstance(logps, list) or len(tokens) != len(logps):
    raise FormError('a reply without logprobs.tokens and logprobs.token_logprobs')
  generated = _count(reply, 'completion_tokens')
  count = len(tokens) - (1 if generated is None else generated)  # one was asked for
  if count < 1:
    raise FormError('log-probabilities of the completion alone')
  texts = tuple(map(str, tokens[:count]))
  return Scored(texts, texts, _finite(logps[:count]))


def scored_chat(reply: Mapping[str, Any]) -> Scored:
  """Returns the tokens of the rendered conversation, of a reply of /chat/completions to
  `prompt_logprobs`.

  Raises:
    FormError: the reply has none.
  """
  found = reply.get('prompt_logprobs')
  if not isinstance(found, list) or len(found) < 2:
    raise FormError('a reply without prompt_logprobs')
  tokens, texts, logps = [''], [''], [None]
  for entry in found[1:]:
    # The token of the prompt is the first; likelier ones follow where a server adds them.
    name, value = next(iter(entry.items()), (None, None)) if isinstance(entry, Mapping) else (0, 0)
    if not isinstance(value, Mapping):
      raise FormError('prompt_logprobs that are no objects of tokens')
    tokens.append(str(name))
    texts.append(str(value.get('decoded_token') or ''))
    logps.append(value.get('logprob'))
  return Scored(tuple(tokens), tuple(texts), _finite(logps))


def _finite(logps: Sequence[Any]) -> tuple[float | None, ...]:
  for at, value in enumerate(logps):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_usable = is_number and _LEAST < value < _ROUNDING
    if not is_usable and (at or value is not None):
      raise FormError(f'the log-probability {value!r} of token {at}')
  return tuple(None if x is None else float(x) for x in logps)
