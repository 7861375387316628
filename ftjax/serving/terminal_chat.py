"""A conversation on the terminal, or read from a file or pipe on standard input.

On a terminal lines are edited with readline, where Python has it, with a history. Responses go to
standard output as they are generated; hints go to standard error. Between a question and its
response nothing else is printed.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

HELP = """\
/reset       begins a new conversation; the system message stays
/save FILE   writes the conversation as a row of training data, {"messages": [...]}
/help        shows this
/exit        ends the chat, as Ctrl-D does
Ctrl-C stops an answer; what was shown of it stays in the conversation.
A line that begins with a space is sent as it is, also where it looks like a command."""

_HISTORY_LINES = 1000

Message = dict[str, str]


class Reply(NamedTuple):
  """A response, and a hint to be shown after it ('' for none)."""

  text: str
  hint: str = ''


# (messages, number of the question, called with the whole text so far as it grows)
Respond = Callable[[list[Message], int, Callable[[str], None]], Reply]


class _Printer:
  """Prints a growing text; `text` is what is on the terminal."""

  def __init__(self):
    self.text = ''

  def show(self, text: str) -> None:
    if len(text) > len(self.text):
      print(text[len(self.text) :], end='', flush=True)
      self.text = text


class TerminalChat:
  """The conversation and its commands.

  Args:
    respond: generates a response. It may raise ValueError for a conversation that has none (too
      long, refused by the template); the question is then dropped.
    system: system message, '' for none.
    is_terminal: whether a person types.
  """

  def __init__(self, respond: Respond, system: str = '', is_terminal: bool = False):
    self._respond, self._is_terminal = respond, is_terminal
    self._system: list[Message] = [{'role': 'system', 'content': system}] if system else []
    self.messages: list[Message] = [*self._system]
    self._questions = 0
    self._saved: set[str] = set()  # files that this chat wrote, and may write again

  def run(self, read: Callable[[str], str] = input) -> None:
    """Reads lines with `read(prompt)` until the end of input or /exit.

    Raises:
      KeyboardInterrupt: where standard input is no terminal.
    """
    while True:
      try:
        line = read('> ')
      except EOFError:
        if self._is_terminal:
          print()
        return
      except KeyboardInterrupt:
        if not self._is_terminal:
          raise
        _hint('\nCtrl-D or /exit ends the chat')
        continue
      if line.startswith('/') and '/' not in line[1:].split(' ')[0]:
        if self._command(line) == 'exit':
          return
      elif line.strip():
        self.ask(line)

  def _command(self, line: str) -> str:
    """Runs a command and returns its name."""
    name, _, argument = line[1:].strip().partition(' ')
    argument = argument.strip()
    if name == 'save':
      self._save(argument)
    elif name not in ('reset', 'help', 'exit'):
      _hint(f'unknown command /{name}; /help lists them. Begin the line with a space to send it')
    elif argument:
      _hint(f'/{name} takes no argument')
      return ''
    elif name == 'reset':
      self.messages = [*self._system]
      _hint('new conversation')
    elif name == 'help':
      _hint(HELP)
    return name

  def _save(self, file: str) -> None:
    if not file:
      _hint('/save needs the name of a file: /save FILE')
      return
    path = os.path.abspath(os.path.expanduser(file))
    if os.path.exists(path) and path not in self._saved:
      _hint(f'{file} exists and is not overwritten; give another name')
      return
    try:
      with open(path, 'w', encoding='utf-8') as out:
        out.write(json.dumps({'messages': self.messages}, ensure_ascii=False) + '\n')
    except OSError as error:
      _hint(f'{file}: {error.strerror}')
      return
    self._saved.add(path)
    _hint(f'{file}: {len(self.messages)} messages')

  def ask(self, question: str) -> None:
    """Adds a question and its response, printed as it is generated, to the conversation."""
    # A terminal may send bytes that are no UTF-8.
    question = question.encode(errors='surrogateescape').decode(errors='replace')
    messages = [*self.messages, {'role': 'user', 'content': question}]
    printer = _Printer()
    try:
      reply = self._respond(messages, self._questions, printer.show)
    except KeyboardInterrupt:
      if not self._is_terminal:
        raise
      print(flush=True)
      reply = Reply(printer.text, '[stopped]' if printer.text.strip() else '[stopped: no answer]')
    except ValueError as error:  # also DataError and ConfigError
      _hint(f'error: {error}')
      return
    else:
      printer.show(reply.text)
      print(flush=True)
    self._questions += 1
    if reply.hint:
      _hint(reply.hint)
    # Without a response the next question would follow this one, which templates refuse.
    if reply.text.strip():
      self.messages = [*messages, {'role': 'assistant', 'content': reply.text.strip()}]


def _hint(text: str) -> None:
  sys.stdout.flush()
  print(text, file=sys.stderr, flush=True)


def run(respond: Respond, system: str = '', history: str = '') -> None:
  """Chats on this process's standard input and output.

  Args:
    respond, system: see `TerminalChat`.
    history: file of earlier questions, '' for none; used on a terminal with readline.
  """
  is_terminal = sys.stdin.isatty()
  chat = TerminalChat(respond, system, is_terminal)
  readline = _readline() if is_terminal else None
  if is_terminal:
    _hint('Type a message; /help lists commands, Ctrl-D ends the chat.')
  if readline is None or not history:
    chat.run()
    return
  if os.path.exists(os.path.expanduser(history)):
    _history(readline.read_history_file, history)
  try:
    chat.run()
  finally:
    readline.set_history_length(_HISTORY_LINES)
    _history(readline.write_history_file, history)


def _readline() -> ModuleType | None:
  """The module that gives `input` line editing and a history, where Python was built with it."""
  try:
    return importlib.import_module('readline')
  except ImportError:
    return None


def _history(action: Callable[[str], None], file: str) -> None:
  """Reads or writes the history; a chat continues without it."""
  try:
    action(os.path.expanduser(file))
  except OSError as error:
    _hint(f'--history={file}: {error.strerror}')
