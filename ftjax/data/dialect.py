"""Finds out by probing what a chat template renders, and converts conversations to its form.

Templates differ in the roles they know, the key of a message they read reasoning from, and whether
they expect the arguments of a tool call as an object or as JSON text. `Dialect.translate` renames
and converts the keys of a row; `Dialect.form` returns the content that the rendering would not
contain. Nothing is decided by searching the template's source.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.data import chat_template, sentinels
from ftjax.data.sentinels import REASONING, Path, Sentinels
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
_MOST_FORMS = 20_000  # kept per dialect
SHORT = 8  # messages of a conversation whose spans depend on its form alone


@dataclasses.dataclass(frozen=True)
class Facts:
  """Results of probing a template.

  Attributes:
    developer: the role to give a developer message.
    reasoning: keys of a message that are rendered as reasoning; reasoning_parts: whether a content
      part of type 'thinking' is, where no key is.
    arguments: 'object' or 'text' where only this form of a call's arguments is rendered as JSON,
      'any' where both or neither are.
    tools: 'function' ({'type': 'function', 'function': {...}}) or 'bare' ({'name': ...}) where only
      this form is rendered, else 'any'.
  """

  developer: str
  reasoning: tuple[str, ...]
  reasoning_parts: bool
  arguments: str
  tools: str


@dataclasses.dataclass(frozen=True)
class Form:
  """Properties of all conversations of one shape.

  Attributes:
    missing: paths of content that no rendering contains. by_value: the template refuses the
      sentinel conversation, so each row's own rendering must be searched.
    dropped: messages with content that is rendered only in shorter prefixes.
    prompts: per message the text that opens the assistant's turn, where the rendered prefix is a
      prefix of the whole; else None. Only for short conversations.
  """

  missing: tuple[Path, ...]
  by_value: bool
  dropped: frozenset[int]
  prompts: tuple[str | None, ...]


class Dialect:
  """One template with its arguments and the tokenizer's special tokens. Created by `of`."""

  def __init__(self, tokenizer: Tokenizer, kwargs: Mapping[str, Any] | None):
    if tokenizer.template is None:
      raise DataError(
        f'{tokenizer.name} has no chat template, and the data holds conversations. Put a '
        'chat_template.jinja into the model folder (that of the instruct model of the same family, '
        'for example), or give prompt/completion or text rows'
      )
    self._template, self._kwargs = tokenizer.template, kwargs
    self._special = tokenizer.special_texts
    self.name = f'{chat_template.name_template(tokenizer.template)} of {tokenizer.name}'
    self.tags = sentinels.tag_pattern(chat_template.find_tags(tokenizer.template))
    self._forms: dict[Any, Form] = {}

  def trace(self, messages: Messages, tools: Tools, prompt: bool = False) -> chat_template.Traced:
    """Renders a conversation and records where its messages begin; `prompt`: open the next turn."""
    return chat_template.trace(
      self._template,
      messages,
      generation_prompt=prompt,
      special_tokens=self._special,
      tools=tools,
      kwargs=self._kwargs,
    )

  def render(self, messages: Messages, tools: Tools, prompt: bool = False) -> str:
    """Renders a conversation; `prompt`: open the assistant's next turn."""
    return self.trace(messages, tools, prompt).text

  def _try(self, messages: Messages, tools: Tools = None, prompt: bool = False) -> str:
    try:
      return self.render(messages, tools, prompt)
    except DataError:
      return ''

  @functools.cached_property
  def facts(self) -> Facts:
    """The results of probing: some thirty small conversations are rendered, once."""
    keys = tuple(k for k in REASONING if self._shows_reasoning({k: 'zqreason'}, 'zqanswer'))
    parts = [{'type': 'thinking', 'thinking': 'zqreason'}, {'type': 'text', 'text': 'zqanswer'}]
    return Facts(
      developer=self._developer(),
      reasoning=keys,
      reasoning_parts=not keys and self._shows_reasoning({}, parts),
      arguments=self._arguments(),
      tools=self._tools(),
    )

  def _developer(self) -> str:
    def shown(role: str) -> bool:
      first, user = {'role': role, 'content': 'zqsystem'}, {'role': 'user', 'content': 'zquser'}
      return 'zqsystem' in self._try([first, user], prompt=True)

    return 'system' if not shown('developer') and shown('system') else 'developer'

  def _shows_reasoning(self, more: Mapping[str, Any], content: Any) -> bool:
    user, end = {'role': 'user', 'content': 'zquser'}, {'role': 'assistant', 'content': 'zqend'}
    plain = {'role': 'assistant', 'content': content, **more}
    calling = plain | {'tool_calls': [_call({'zqkey': 'zqvalue'})]}
    result = {'role': 'tool', 'content': 'zqresult', 'tool_call_id': 'zqcallids'}
    for talk in ([user, plain], [user, plain, user, end], [user, calling, result, end]):
      text = self._try(talk)
      # A template that prints the list itself does not render reasoning.
      if 'zqreason' in text and not re.search(r"""['"]thinking['"]: ['"]zqreason""", text):
        return True
    return False

  def _arguments(self) -> str:
    tools = [_tool(bare=False)]
    as_object, as_text = False, False
    user, result = {'role': 'user', 'content': 'zquser'}, {'role': 'tool', 'content': 'zqresult'}
    result |= {'tool_call_id': 'zqcallids', 'name': 'zqname'}
    for content in ('', 'zqanswer'):
      for offered in (tools, None):
        for end in ([], [result, {'role': 'assistant', 'content': 'zqend'}]):
          for given in ({'zqkey': 'zqvalue'}, '{"zqkey": "zqvalue"}'):
            calls = [_call(given)]
            turn = {'role': 'assistant', 'content': content, 'tool_calls': calls}
            text = self._try([user, turn, *end], offered)
            if isinstance(given, str):
              as_text |= '"zqkey": "zqvalue"' in text
            else:
              as_object |= 'zqkey' in text and 'zqvalue' in text and "{'zqkey'" not in text
    return 'any' if as_object == as_text else 'object' if as_object else 'text'

  def _tools(self) -> str:
    user, answer = {'role': 'user', 'content': 'zquser'}, {'role': 'assistant', 'content': 'zqend'}
    system = {'role': 'system', 'content': 'zqsystem'}
    words = ('zqname', 'zqabout', 'zqparam', 'zqhint')
    shown = []
    for bare in (False, True):
      texts = [
        self._try(talk, [_tool(bare)], prompt=talk[-1] is user)
        for talk in ([user], [system, user], [user, answer])
      ]
      shown.append(max(sum(w in text for w in words) for text in texts))
    return 'any' if shown[0] == shown[1] else 'function' if shown[0] > shown[1] else 'bare'

  def translate(self, messages: Messages, tools: Tools) -> tuple[list[Mapping[str, Any]], Tools]:
    """Returns the conversation in the form that the template renders.

    Raises:
      ValueError: arguments of a tool call that have no such form.
    """
    out = [
      self._message(m)
      if len(m) > 2 or m['role'] == 'developer'  # else: role and content alone
      else m
      for m in messages
    ]
    if tools is not None and self.facts.tools != 'any':
      tools = [_tool_form(t, self.facts.tools) for t in tools]
    return out, tools

  def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
    facts = self.facts
    if message['role'] == 'developer':
      message = {**message, 'role': facts.developer}
    if any(k in message for k in REASONING):
      message = self._reasoning(message)
    if isinstance(message.get('tool_calls'), list) and facts.arguments != 'any':
      calls = [_convert_call(c, facts.arguments) for c in message['tool_calls']]
      message = {**message, 'tool_calls': calls}
    return message

  def _reasoning(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Renames reasoning to the key that is rendered; keys with different values are all kept."""
    given = {k: message[k] for k in REASONING if message.get(k)}
    values = list(given.values())
    if not given or any(v != values[0] for v in values):
      return message
    facts = self.facts
    rest = {k: v for k, v in message.items() if k not in REASONING}
    if facts.reasoning:
      key = next((k for k in given if k in facts.reasoning), facts.reasoning[0])
      return rest | {key: values[0]}
    if facts.reasoning_parts and isinstance(values[0], str) and isinstance(rest['content'], str):
      text = [{'type': 'text', 'text': rest['content']}] if rest['content'] else []
      return rest | {'content': [{'type': 'thinking', 'thinking': values[0]}, *text]}
    return rest | {next(iter(given)): values[0]}

  def form(self, messages: Messages, tools: Tools, prompt: bool = False) -> Form:
    """Returns the properties of conversations of this shape, after `translate`.

    Args:
      prompt: whether the rendering opens the assistant's next turn.
    """
    shape = tuple([sentinels.message_shape(m, self.tags) for m in messages])
    key = (
      prompt,
      shape,
      sentinels.ids_shape(messages),
      None if tools is None else sentinels.tools_shape(tools, self.tags),
    )
    found = self._forms.get(key)
    if found is None:
      if len(self._forms) >= _MOST_FORMS:
        self._forms.clear()
      found = self._forms[key] = self._learn(messages, tools, prompt)
    return found

  def _learn(self, messages: Messages, tools: Tools, prompt: bool) -> Form:
    marked = Sentinels(messages, tools, self.tags)
    nothing = (None,) * len(messages)
    try:
      traced = self.trace(marked.messages, marked.tools, prompt)
    except DataError:
      return Form((), True, frozenset(), nothing)
    missing, dropped = [], set()
    prefixes: dict[int, frozenset[Path]] = {}
    kinds: dict[Any, bool] = {}  # whether a kind of missing content is in the rendering of a prefix
    for path in marked.missing(traced.text):
      k = path[1]
      if path[0] != 'messages' or k + 1 == len(messages):
        missing.append(path)
        continue
      kind = (messages[k]['role'], tuple(messages[k]), path[2:])
      if kind not in kinds:
        if k not in prefixes:
          text = self._try(marked.messages[: k + 1], marked.tools)
          prefixes[k] = frozenset(marked.missing(text))
        kinds[kind] = path not in prefixes[k]
      if kinds[kind]:
        dropped.add(k)
      else:
        missing.append(path)
    prompts = nothing
    if len(messages) <= SHORT and not prompt:
      prompts = tuple(self._prompt(marked, traced, k) for k in range(len(messages)))
    return Form(tuple(missing), False, frozenset(dropped), prompts)

  def _prompt(self, marked: Sentinels, traced: chat_template.Traced, k: int) -> str | None:
    if marked.messages[k]['role'] != 'assistant':
      return None
    return self.check_turn(marked.messages, marked.tools, traced, k)

  def check_turn(
    self, messages: Messages, tools: Tools, traced: chat_template.Traced, k: int
  ) -> str | None:
    """Returns the text that opens turn k where the rendered prefixes agree with the trace.

    None where they do not: the prompt of turn k, or the conversation up to its end, is no prefix of
    the whole, or has another length than the trace.
    """
    start, end = span_of(traced, k)
    if start is None or end is None:
      return None
    prompt = self._try(messages[:k], tools, prompt=True)
    whole = traced.text if k + 1 == len(messages) else self._try(messages[: k + 1], tools)
    if len(whole) != end or not traced.text.startswith(whole):
      return None
    if len(prompt) >= start and whole.startswith(prompt):
      return prompt[start:]
    opening = self.opening(messages[:k], tools, prompt)
    return opening if opening is not None and whole.startswith(opening, start) else None

  def opening(self, messages: Messages, tools: Tools, prompt: str) -> str | None:
    """Returns the text that a rendered prompt adds to its conversation, or None.

    It is empty only for templates that never add a generation prompt.
    """
    history = self._try(messages, tools)
    if not history or not prompt.startswith(history):
      return None
    added = prompt[len(history) :]
    return added if added or not self._opens_turns else None

  @functools.cached_property
  def _opens_turns(self) -> bool:
    user = [{'role': 'user', 'content': 'zquser'}]
    return self._try(user) != self._try(user, prompt=True)


def span_of(traced: chat_template.Traced, k: int) -> tuple[int | None, int | None]:
  """Returns start and end of message k, each None where the trace has none."""
  last = k + 1 == len(traced.starts)
  return traced.starts[k], len(traced.text) if last else traced.starts[k + 1]


def of(tokenizer: Tokenizer, kwargs: Mapping[str, Any] | None = None) -> Dialect:
  """Returns the dialect of a tokenizer's template; made once per template and arguments.

  Raises:
    DataError: no template.
  """
  key = (tokenizer.template, json.dumps(kwargs, sort_keys=True, default=str) if kwargs else '')
  found = tokenizer.dialects.get(key)
  if found is None:
    found = tokenizer.dialects[key] = Dialect(tokenizer, kwargs)
  return found


def _call(arguments: Any) -> dict[str, Any]:
  function = {'name': 'zqname', 'arguments': arguments}
  return {'type': 'function', 'id': 'zqcallids', 'function': function}


def _tool(bare: bool) -> dict[str, Any]:
  properties = {'zqparam': {'type': 'string', 'description': 'zqhint'}}
  parameters = {'type': 'object', 'properties': properties, 'required': ['zqparam']}
  function = {'name': 'zqname', 'description': 'zqabout', 'parameters': parameters}
  return function if bare else {'type': 'function', 'function': function}


def _tool_form(tool: Mapping[str, Any], form: str) -> Mapping[str, Any]:
  inner = tool.get('function')
  if form == 'function' and inner is None and 'name' in tool:
    return {
      'type': 'function',
      'function': {k: v for k, v in tool.items() if (k, v) != ('type', 'function')},
    }
  if form == 'bare' and isinstance(inner, Mapping):
    return inner
  return tool


def _convert_call(call: Any, form: str) -> Any:
  """Converts the arguments of a tool call to an object or to JSON text; others are kept."""
  if not isinstance(call, Mapping):
    return call
  if isinstance(call.get('function'), Mapping):
    return {**call, 'function': _convert_call(call['function'], form)}
  arguments = call.get('arguments')
  if form == 'object' and isinstance(arguments, str):
    found = sentinels.as_object(arguments)
    if found is None:
      shown = arguments if len(arguments) <= 60 else f'{arguments[:57]}...'
      raise ValueError(
        f'the arguments of the tool call {call.get("name")!r} are {shown!r}, which is no JSON '
        'object, and the chat template renders an object'
      )
    return {**call, 'arguments': found}
  if form == 'text' and isinstance(arguments, Mapping):
    return {**call, 'arguments': json.dumps(arguments, ensure_ascii=False)}
  return call
