"""Writes the Modelfile with which Ollama makes a model of a GGUF file.

Ollama's templates are Go templates, not jinja. Most chat templates write each message between a
fixed text before and after its content, by role. Those texts are found by rendering, and the Go
template made of them is used only where it renders test conversations as the chat template does.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ftjax.data import chat_template
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

NAME = 'Modelfile'
MARK = '# Written by ftjax.convert; an export replaces it.\n'
_ROLES = ('system', 'user', 'assistant')


def text(file_name: str, tokenizer: Tokenizer) -> str:
  """Returns the Modelfile of a GGUF file in the same folder.

  Without a chat template a prompt is continued as it is. Where the chat template has no form that
  Ollama knows, a comment stands in place of TEMPLATE: Ollama then compares the template in the
  GGUF file with those that it knows.
  """
  parts = [MARK, f'FROM ./{file_name}\n']
  if tokenizer.template is None:
    parts.append(f'TEMPLATE {_quoted("{{ .Prompt }}")}\n')
  elif (turns := _turns(tokenizer)) is None:
    parts.append('# No TEMPLATE: the chat template is not a text before and after each message.\n')
  else:
    parts.append(f'TEMPLATE {_quoted(turns.go())}\n')
    if turns.system:
      parts.append(f'SYSTEM {_quoted(turns.system)}\n')
  stops = dict.fromkeys(tokenizer.token(i) for i in tokenizer.stop_ids)
  parts += [f'PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n' for stop in stops if stop]
  return ''.join(parts)


def _quoted(value: str) -> str:
  return f'"""{value}"""'


class _Turns(NamedTuple):
  """The fixed texts of a chat template.

  lead: before the first message. around: {role: (text before, text after)}. prompt: what a
  completion follows. system: content of the system message where a conversation has none.
  """

  lead: str
  around: Mapping[str, tuple[str, str]]
  prompt: str
  system: str

  def render(self, messages: Sequence[Mapping[str, str]]) -> str:
    """Returns what Ollama makes of a conversation with `go` and SYSTEM."""
    if self.system and messages[0]['role'] != 'system':
      messages = [{'role': 'system', 'content': self.system}, *messages]
    turns = [(*self.around[m['role']], m['content']) for m in messages]
    return self.lead + ''.join(b + content + e for b, e, content in turns) + self.prompt

  def go(self) -> str:
    """Returns the Go template."""
    cases = [
      f'if eq .Role "{role}" }}}}{begin}{{{{ .Content }}}}{end}{{{{ '
      for role, (begin, end) in self.around.items()
    ]
    inner = 'else '.join(cases)
    return f'{self.lead}{{{{ range .Messages }}}}{{{{ {inner}end }}}}{{{{ end }}}}{self.prompt}'


def _turns(tokenizer: Tokenizer) -> _Turns | None:
  """Returns the fixed texts of a chat template; None where it is of another form."""
  try:
    turns = _split(tokenizer)
    tests = _conversations(str(tokenizer.template))
    if any(turns.render(c) != _render(tokenizer, c) for c in tests):
      return None
  except DataError:  # the template refuses a conversation, one with a system message say
    return None
  pieces = [turns.lead, turns.prompt, turns.system, *itertools.chain(*turns.around.values())]
  # They mean something in a Go template, or end the text of a Modelfile.
  return None if any(mark in p for mark in ('{{', '}}', '"""') for p in pieces) else turns


def _conversations(template: str) -> list[list[dict[str, str]]]:
  """Returns the conversations on which both templates are compared.

  Templates that take something out of earlier answers, reasoning say, search for its tags.
  """
  roles = ('user', 'assistant') * 2 + ('user',)
  turns = [{'role': r, 'content': f'{r} {i}: x < y &\n\n{{1}}'} for i, r in enumerate(roles)]
  tagged = [
    [turns[0], {'role': 'assistant', 'content': f'a{tag}b'}, turns[2]]
    for tag in chat_template.find_tags(template)
  ]
  system = {'role': 'system', 'content': 'Be brief.'}
  return [turns[:1], turns[:3], turns, [system, *turns[:1]], [system, *turns], *tagged]


def _render(
  tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], prompt: bool = True
) -> str:
  rendered = chat_template.trace(
    str(tokenizer.template),
    messages,
    generation_prompt=prompt,
    special_tokens=tokenizer.special_texts,
  ).text
  # llama.cpp puts BOS before every text itself where the tokenizer does.
  bos = tokenizer.bos_token
  return rendered.removeprefix(bos) if bos and tokenizer.prefix_ids else rendered


def _split(tokenizer: Tokenizer) -> _Turns:
  """Returns the texts around messages, found in conversations whose contents are known.

  Raises:
    DataError: the template refuses one of them, or leaves a content out.
  """
  system, user, assistant = ({'role': r, 'content': f'content of {r}'} for r in _ROLES)

  def gaps(*messages: Mapping[str, str]) -> list[str]:
    rest, out = _render(tokenizer, messages, False), []
    for m in messages:
      before, found, rest = rest.partition(m['content'])
      if not found:
        raise DataError(f'the chat template leaves out {m["content"]!r}')
      out.append(before)
    return [*out, rest]

  start, before_user, before_assistant, before_again, _ = gaps(system, user, assistant, user)
  head, user_end = gaps(user)
  *_, assistant_end = gaps(user, assistant)
  open_user = before_again.removeprefix(assistant_end)
  close_system = before_user.removesuffix(open_user)
  bos = tokenizer.bos_token
  lead = bos if bos and head.startswith(bos) and not open_user.startswith(bos) else ''
  open_system = start.removeprefix(lead)
  head = head.removeprefix(lead).removesuffix(open_user)
  around = {
    'system': (open_system, close_system),
    'user': (open_user, user_end),
    'assistant': (before_assistant.removeprefix(user_end), assistant_end),
  }
  prompt = _render(tokenizer, [user]).removeprefix(_render(tokenizer, [user], False))
  return _Turns(lead, around, prompt, head.removeprefix(open_system).removesuffix(close_system))
