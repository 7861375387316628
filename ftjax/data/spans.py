"""Renders conversations and finds the character spans of the assistant turns.

The span of assistant turn k begins at the end of the generation prompt after messages[:k] and ends
at the end of messages[:k+1]. One traced rendering of the whole conversation proposes all spans, and
rendered prefixes confirm them: once per form for short conversations (`Dialect.form`), for turns of
each kind and some others in long ones, so that the work stays linear. Otherwise every prefix is
rendered. A template that rewrites history (drops earlier reasoning, for example) renders no
prefixes of the whole; every supervised turn is then a piece of its own, as it would be sampled.

`encode.py` tokenizes the pieces and computes the masks.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftjax.data import chat_template, dialect, sentinels
from ftjax.data.dialect import Dialect, Form, Messages, Tools
from ftjax.data.formats import Chat
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

_MOST_CHECKED = (
  24  # turns of one long conversation, beyond those of each kind, rendered as prefixes
)


@dataclasses.dataclass(frozen=True)
class Piece:
  """A rendered text with its supervised spans.

  Attributes:
    text: the rendering.
    spans: (start, end) characters of the assistant's turns.
    cut: whether spans end at a stop token.
    head: characters up to the end of the system turn; 0 where there is none, or where its end is
      not known.
  """

  text: str
  spans: tuple[tuple[int, int], ...]
  cut: bool
  head: int = 0


@dataclasses.dataclass(frozen=True)
class Rendered:
  """pieces: those of one row. unrendered: paths of the row's content that they do not contain."""

  pieces: tuple[Piece, ...]
  unrendered: tuple[str, ...]


def turns(example: Chat, loss_on: str) -> list[int]:
  """Returns the indices of the assistant messages to supervise.

  Raises:
    ValueError: there is none.
  """
  trained = example.trained or tuple(m['role'] == 'assistant' for m in example.messages)
  found = [i for i, t in enumerate(trained) if t and example.messages[i]['role'] == 'assistant']
  if loss_on == 'completion':
    last = max(i for i, m in enumerate(example.messages) if m['role'] == 'assistant')
    found = [i for i in found if i == last]
  if not found:
    raise ValueError(f'no assistant message is supervised with data.loss_on={loss_on!r}')
  return found


def pieces(example: Chat, tokenizer: Tokenizer, loss_on: str) -> Rendered:
  """Renders a conversation: one piece where prefixes hold, else one per supervised turn.

  Args:
    loss_on: 'assistant', 'completion' or 'all'; see `encode.encode`.

  Raises:
    ValueError: the template refuses the conversation, or the turns cannot be found in its output.
  """
  own = dialect.of(tokenizer, example.template_kwargs)
  messages, tools = own.translate(example.messages, example.tools)
  wanted = [] if loss_on == 'all' else turns(example, loss_on)
  view = _View(own, messages, tools)
  try:
    if loss_on == 'all':
      whole = ((0, len(view.text)),)
      out = [Piece(view.text, whole, False, view.head(len(view.text)))]
    else:
      out = view.pieces(wanted)
  except ValueError as error:
    raise ValueError(with_places(str(error), view.unrendered([]))) from error
  return Rendered(tuple(out), view.unrendered([p.text for p in out if p.text is not view.text]))


def with_places(reason: str, places: Sequence[str]) -> str:
  """Returns a reason that also names the content of a row that is not rendered."""
  return f'{reason}. It does not render {sentinels.list_places(places)}' if places else reason


def prompt(example: Chat, tokenizer: Tokenizer) -> tuple[str, tuple[str, ...]]:
  """Renders the prompt of the assistant's next turn: (text, paths that it does not contain).

  Raises:
    ValueError: the template refuses the conversation.
  """
  own = dialect.of(tokenizer, example.template_kwargs)
  messages, tools = own.translate(example.messages, example.tools)
  view = _View(own, messages, tools, prompt=True)
  return view.text, view.unrendered([])


class _View:
  """One conversation, translated and rendered."""

  def __init__(self, own: Dialect, messages: Messages, tools: Tools, prompt: bool = False):
    self._dialect, self._messages, self._tools = own, messages, tools
    self._traced = self._render(prompt)
    self.text = self._traced.text
    self._form: Form = own.form(messages, tools, prompt)

  def _render(self, prompt: bool) -> chat_template.Traced:
    try:
      return self._dialect.trace(self._messages, self._tools, prompt)
    except DataError as error:
      roles = [m['role'] for m in self._messages]
      begun = next((i for i, r in enumerate(roles) if r not in ('system', 'developer')), 0)
      if roles[begun] == 'assistant':
        opened = [*self._messages[:begun], _OPENING, *self._messages[begun:]]
        if self._dialect._try(opened, self._tools, prompt):
          raise DataError(self._user_first(begun)) from error
      raise

  def _opens(self, k: int) -> bool:
    """Returns whether only system and developer messages precede message k."""
    return all(m['role'] in ('system', 'developer') for m in self._messages[:k])

  def _user_first(self, k: int) -> str:
    return (
      f'{self._dialect.name}: messages[{k}] is an assistant message, and this template expects a '
      'user turn first; begin the row with a system or user message'
    )

  def pieces(self, wanted: Sequence[int]) -> list[Piece]:
    """Returns one piece where the rendered prefixes are prefixes of the whole rendering.

    Else one piece per turn, rendered without the messages after it.
    """
    found = self._proposed(wanted)
    if found is None:
      exact = [self._exact(k) for k in wanted]
      if not all(self.text.startswith(whole) for _, whole in exact):
        return [Piece(w, ((start, len(w)),), True, self.head(start, w)) for start, w in exact]
      found = tuple((start, len(whole)) for start, whole in exact)
    return [Piece(self.text, found, True, self.head(found[0][0]))]

  def _exact(self, k: int) -> tuple[int, str]:
    """(where turn k begins, the conversation up to its end), from rendered prefixes."""
    messages, tools = self._messages, self._tools
    whole = self.text if k + 1 == len(messages) else self._dialect.render(messages[: k + 1], tools)
    try:
      before = self._dialect.render(messages[:k], tools, prompt=True)
    except DataError as error:
      if self._opens(k):
        raise DataError(self._user_first(k)) from error
      raise
    if whole.startswith(before):
      return len(before), whole
    start = self._traced_start(k, before, whole)
    if start is not None:
      return start, whole
    pairs = enumerate(zip(before + '\0', whole + '\1', strict=False))
    same = next(i for i, (a, b) in pairs if a != b)
    if self._opens(k):
      raise ValueError(self._user_first(k))
    raise ValueError(
      f'{self._dialect.name}: what it renders as the prompt of messages[{k}] is not how '
      f'the conversation with messages[{k}] begins: {before[same : same + 40]!r} against '
      f'{whole[same : same + 40]!r} after {same} characters'
    )

  def _traced_start(self, k: int, before: str, whole: str) -> int | None:
    """Returns the start of turn k where its prompt is no prefix, or None.

    So for a template that renders earlier text differently once the turn follows (without a line
    break, for example), but opens the turn in the same way.
    """
    messages, tools = self._messages, self._tools
    start = self._dialect.trace(messages[: k + 1], tools).starts[k]
    opening = self._dialect.opening(messages[:k], tools, before)
    if start is None or opening is None or not whole.startswith(opening, start):
      return None
    start += len(opening)
    known = opening or self._holds_message(k, start, len(whole), whole)
    return start if known else None

  def _proposed(self, wanted: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """Returns the spans of the trace where rendered prefixes confirm each; else None."""
    short = len(self._messages) <= dialect.SHORT
    opens = dict(enumerate(self._form.prompts)) if short else self._checked(wanted)
    if opens is None:
      return None
    found, extra = [], 0
    for k in wanted:
      start, end = dialect.span_of(self._traced, k)
      if opens[k] is None or start is None or end is None:
        return None
      begin = start + len(opens[k])
      if begin > end or not self.text.startswith(opens[k], start):
        return None
      if not self._holds_message(k, begin, end):
        # A template that changes a message may also move it.
        extra += 1
        if extra > _MOST_CHECKED or not opens[k] or self._check(k) != opens[k]:
          return None
      found.append((begin, end))
    return tuple(found)

  def _check(self, k: int) -> str | None:
    return self._dialect.check_turn(self._messages, self._tools, self._traced, k)

  def _checked(self, wanted: Sequence[int]) -> dict[int, str] | None:
    """Returns the text that opens each turn, or None.

    Prefixes are rendered for some turns: the first of each kind, the last, and some at geometric
    distances.
    """
    last = len(wanted) - 1
    chosen, at = {wanted[last]}, last
    while at:
      at //= 2
      chosen.add(wanted[at])
    opens: dict[Any, str] = {}
    kinds = {k: self._kind(k) for k in wanted}
    for k, kind in kinds.items():
      if kind not in opens or k in chosen:
        found = self._check(k)
        if found is None or opens.setdefault(kind, found) != found:
          return None
    return {k: opens[kind] for k, kind in kinds.items()}

  def _kind(self, k: int) -> Any:
    """Returns the features of turn k that a template may depend on: its and its neighbors' keys."""
    neighbours = self._messages[max(k - 1, 0) : k + 2]
    tags = self._dialect.tags
    return (
      k == 0,
      *(
        (
          m['role'],
          tuple(m),
          sentinels.text_shape(m['content'], tags) if isinstance(m.get('content'), str) else None,
          bool(m.get('tool_calls')),
        )
        for m in neighbours
      ),
    )

  def _holds_message(self, k: int, start: int, end: int, text: str | None = None) -> bool:
    """Returns whether a part of the rendering contains the texts of message k unchanged."""
    message, text = self._messages[k], self.text if text is None else text
    for key in ('content', *sentinels.REASONING):
      value = message.get(key)
      if isinstance(value, str):
        for part in self._dialect.tags.split(value)[::2]:
          if text.find(part.strip(), start, end) < 0:
            return False
      elif value is not None:
        return False
    return True

  def head(self, most: int, text: str | None = None) -> int:
    """Returns the characters up to the end of the system turn; 0 if unknown or above `most`."""
    first = next(
      (i for i, m in enumerate(self._messages) if m['role'] not in ('system', 'developer')), 0
    )
    end = self._traced.starts[first]
    if not first or end is None or end > most:
      return 0
    if text is not None and not text.startswith(self.text[:end]):
      return 0
    contents = [m.get('content') for m in self._messages[:first]]
    return end if all(isinstance(c, str) and c.strip() in self.text[:end] for c in contents) else 0

  def unrendered(self, others: Sequence[str]) -> tuple[str, ...]:
    """Returns the paths of content that neither the rendering nor one of `others` contains."""
    texts = [self.text, *others]
    paths = list(self._form.missing)
    messages, tools = self._messages, self._tools
    if self._form.by_value:
      every = sentinels.Sentinels(messages, tools, self._dialect.tags).places
      for path in dict.fromkeys(path for path, _ in every):
        if not self._survives(sentinels.find_value(path, messages, tools), texts):
          paths.append(path)
    else:
      paths += self._cut_texts(texts, {p[1] for p in paths if p[0] == 'messages'})
    names = [sentinels.name_place(p, messages, tools) for p in paths]
    return tuple(dict.fromkeys(names))

  def _cut_texts(self, texts: Sequence[str], known: set[Any]) -> Iterator[sentinels.Path]:
    """Yields the paths of texts of which a part is lost although texts of this form are rendered.

    So for a template that truncates, or renders only certain values.
    """
    at = 0
    for k, message in enumerate(self._messages):
      if k in known or k in self._form.dropped:
        continue
      for key in (*sentinels.REASONING, 'content'):
        value = message.get(key)
        if not isinstance(value, str):
          continue
        found = self.text.find(value.strip(), at)
        if found >= 0:
          at = found + (len(value.strip()) if key == 'content' else 0)
        elif not self._survives(value, texts):
          yield ('messages', k, key)

  def _survives(self, value: Any, texts: Sequence[str]) -> bool:
    if isinstance(value, str):
      return any(not sentinels.lost_words(value, t, self._dialect.tags) for t in texts)
    if isinstance(value, bool) or not isinstance(value, int | float):
      return True
    return any(str(value) in t for t in texts)


_OPENING: Mapping[str, Any] = {'role': 'user', 'content': 'zquser'}
