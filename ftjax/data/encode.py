"""Examples to tokens and masks: which token of a conversation, completion or document is
supervised.

Masks come from character spans of the rendered text, never from searching for tokens. For an
assistant turn k the span begins where the generation prompt after messages[:k] ends and ends where
messages[:k+1] ends. A template that rewrites history (drops earlier reasoning, say) has no such
spans; then every supervised turn becomes an example of its own, exactly as it would be sampled.
The turn's end-of-turn token is supervised, white space that the template writes after it is not.

`cache.py` calls this over chunks of rows; generation and evaluation call `encode_prompt`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax.data import chat
from ftjax.data.formats import Bad, Chat, Completion, Example, Text
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError

LOSS_ON = ('assistant', 'completion', 'all')
ON_OVERLENGTH = ('error', 'drop', 'truncate_left', 'truncate_right')


@dataclasses.dataclass(frozen=True)
class Encoded:
  """One training example.

  Attributes:
    tokens: int32[n].
    supervised: bool[n]; True where the loss is charged for predicting this token. Never the first.
    is_chat: whether a template rendered it.
    straddled: tokens that hold the end of a prompt and the start of an answer at once; unsupervised
      in a chat, and tokenized apart in a completion.
    boundary: of a pair, where its second side begins; else 0. See judged.py, also for
    value: what a row says of its answers, a number.
    unrendered: places of content that the rendering does not contain, as in
      'messages[1].reasoning_content'.
  """

  tokens: np.ndarray
  supervised: np.ndarray
  is_chat: bool
  straddled: int = 0
  boundary: int = 0
  value: float = 0.0
  unrendered: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Piece:
  """A rendered text and the (start, end) spans of characters that are the assistant's."""

  text: str
  spans: tuple[tuple[int, int], ...]
  cut: bool  # whether spans end at a stop token


def check_loss_on(loss_on: str) -> None:
  """Raises ConfigError unless `loss_on` is one of `LOSS_ON`."""
  if loss_on not in LOSS_ON:
    raise ConfigError(f'data.loss_on={loss_on!r}; expected one of {list(LOSS_ON)}')


def _render(tokenizer: Tokenizer, messages, tools, generation_prompt: bool) -> str:
  if tokenizer.template is None:
    raise DataError(
      f'{tokenizer.name} has no chat template, and the data holds conversations. Put a '
      'chat_template.jinja into the model folder (that of the instruct model of the same family, '
      'for example), or give prompt/completion or text rows'
    )
  return chat.render(
    tokenizer.template,
    messages,
    generation_prompt=generation_prompt,
    bos_token=tokenizer.bos_token,
    eos_token=tokenizer.eos_token,
    tools=tools,
  )


def _template_name(tokenizer: Tokenizer) -> str:
  return f'{chat.name_template(tokenizer.template or "")} of {tokenizer.name}'


def _check_template(example: Chat, tokenizer: Tokenizer) -> None:
  """Refuses rows of which a template would silently show nothing."""
  template = tokenizer.template or ''
  if example.tools and 'tools' not in template:
    raise ValueError(f'the row offers tools, which the {_template_name(tokenizer)} never shows')
  if any(m.get('tool_calls') for m in example.messages) and 'tool_calls' not in template:
    raise ValueError(f'the row calls a tool, which the {_template_name(tokenizer)} never shows')


def _turns(example: Chat, loss_on: str) -> list[int]:
  """Indices of the assistant messages to be supervised."""
  trained = example.trained or tuple(m['role'] == 'assistant' for m in example.messages)
  turns = [i for i, t in enumerate(trained) if t and example.messages[i]['role'] == 'assistant']
  if loss_on == 'completion':
    last = max(i for i, m in enumerate(example.messages) if m['role'] == 'assistant')
    turns = [i for i in turns if i == last]
  if not turns:
    raise ValueError(f'no assistant message is supervised with data.loss_on={loss_on!r}')
  return turns


def _pieces(example: Chat, tokenizer: Tokenizer, loss_on: str) -> list[_Piece]:
  """Renders a conversation: one piece where prefixes hold, else one per supervised turn."""
  _check_template(example, tokenizer)
  messages, tools = example.messages, example.tools
  full = _render(tokenizer, messages, tools, False)
  if loss_on == 'all':
    return [_Piece(full, ((0, len(full)),), cut=False)]
  turns = _turns(example, loss_on)
  rendered = []
  for k in turns:
    prompt = _render(tokenizer, messages[:k], tools, True)
    whole = full if k + 1 == len(messages) else _render(tokenizer, messages[: k + 1], tools, False)
    rendered.append((prompt, whole))
  if all(full.startswith(whole) and whole.startswith(prompt) for prompt, whole in rendered):
    return [_Piece(full, tuple((len(p), len(w)) for p, w in rendered), cut=True)]
  for k, (prompt, whole) in zip(turns, rendered, strict=True):
    if not whole.startswith(prompt):
      same = next(i for i, (a, b) in enumerate(zip(prompt + '\0', whole + '\1')) if a != b)  # noqa: B905
      hint = ' (begin the row with a system or user message)' if k == 0 else ''
      raise ValueError(
        f'{_template_name(tokenizer)}: what it renders as the prompt of messages[{k}] is not how '
        f'the conversation with messages[{k}] begins: {prompt[same : same + 40]!r} against '
        f'{whole[same : same + 40]!r} after {same} characters{hint}'
      )
  return [_Piece(whole, ((len(prompt), len(whole)),), cut=True) for prompt, whole in rendered]


def _mask(piece: _Piece, tokenizer: Tokenizer, ids, starts, ends) -> Encoded:
  """Supervises the tokens that lie inside the piece's spans, each up to its stop token."""
  supervised = np.zeros(len(ids), bool)
  straddled = 0
  special = np.isin(ids, list(tokenizer.special_ids))
  for start, end in piece.spans:
    inside = (starts >= start) & (ends <= end) & (ends > start)
    straddled += int(np.sum((starts < start) & (ends > start)))
    if piece.cut:
      stops = np.flatnonzero(inside & special)
      if not len(stops) or piece.text[ends[stops[-1]] : end].strip():
        raise ValueError(
          f'{_template_name(tokenizer)}: an assistant turn ends in '
          f'{piece.text[start:end][-30:]!r} without a special token, so a tuned model could never '
          'learn to stop. Let the template write the end-of-turn or EOS token after the answer, '
          'or give prompt/completion rows'
        )
      inside[stops[-1] + 1 :] = False
    supervised |= inside
  return _finish(ids, supervised, tokenizer, straddled)


def _finish(ids, supervised, tokenizer: Tokenizer, straddled: int) -> Encoded:
  """Leaves one BOS where the text begins with two, and nothing supervised before position 1."""
  if _doubled_bos(ids, tokenizer):
    ids, supervised = ids[1:], supervised[1:].copy()
  supervised[:1] = False  # nothing predicts the first token
  return Encoded(ids, supervised, True, straddled)


def _doubled_bos(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> bool:
  return len(ids) > 1 and tokenizer.bos_id is not None and ids[0] == ids[1] == tokenizer.bos_id


def _encode_chats(chats: Sequence[Chat], tokenizer: Tokenizer, loss_on: str):
  """Per conversation its examples, or Bad."""
  planned: list[list[_Piece] | Bad] = []
  for example in chats:
    try:
      planned.append(_pieces(example, tokenizer, loss_on))
    except ValueError as error:
      if tokenizer.template is None:
        raise
      planned.append(Bad(str(error)))
  pieces = [p for plan in planned if not isinstance(plan, Bad) for p in plan]
  spans = iter(tokenizer.encode_spans([p.text for p in pieces]))
  out: list[list[Encoded] | Bad] = []
  for plan in planned:
    if isinstance(plan, Bad):
      out.append(plan)
      continue
    encoded = [(p, next(spans)) for p in plan]
    try:
      out.append([_mask(piece, tokenizer, *found) for piece, found in encoded])
    except ValueError as error:
      out.append(Bad(str(error)))
  return out


def _require_eos(tokenizer: Tokenizer) -> int:
  if tokenizer.eos_id is None:
    raise DataError(
      f'{tokenizer.name} names no eos_token (tokenizer_config.json) and no eos_token_id '
      '(generation_config.json, config.json); a model trained on it could never learn to stop'
    )
  return tokenizer.eos_id


def _once(tokenizer: Tokenizer, ids, end: Sequence[int] = ()) -> np.ndarray:
  """int32[n]: what the tokenizer puts before a text, ids, `end`; neither doubled where the text
  brings it along.
  """
  prefix = list(tokenizer.prefix_ids)
  if prefix and list(ids[: len(prefix)]) == prefix:
    prefix = []
  if len(ids) and len(end) and ids[-1] == end[0]:
    end = ()
  return np.concatenate([prefix, ids, end]).astype(np.int32)


def _split_ids(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer):
  """Per (prompt, answer): ids of the prompt as it stands alone, ids of the answer, and whether the
  two had to be tokenized apart.
  """
  prompts = tokenizer.encode_batch([prompt for prompt, _ in texts])
  wholes = tokenizer.encode_batch([prompt + answer for prompt, answer in texts])
  for (_, answer), prompt, whole in zip(texts, prompts, wholes, strict=True):
    n = len(prompt)
    apart = len(whole) < n or not np.array_equal(whole[:n], prompt)
    yield prompt, (np.array(tokenizer.encode(answer), np.int32) if apart else whole[n:]), apart


def _encode_completions(rows: Sequence[Completion], tokenizer: Tokenizer, loss_on: str):
  """BOS, prompt, completion, EOS. The prompt's ids are those that sampling from it will see."""
  eos = _require_eos(tokenizer)
  out: list[list[Encoded] | Bad] = []
  for prompt, answer, apart in _split_ids([(r.prompt, r.completion) for r in rows], tokenizer):
    before = _once(tokenizer, prompt)
    end = [] if len(answer) and answer[-1] == eos else [eos]
    ids = np.concatenate([before, answer, end]).astype(np.int32)
    supervised = np.arange(len(ids)) >= (0 if loss_on == 'all' else len(before))
    supervised[:1] = False
    out.append([Encoded(ids, supervised, False, int(apart))])
  return out


def _encode_texts(rows: Sequence[Text], tokenizer: Tokenizer):
  """BOS where the tokenizer adds one, the document, EOS; everything is supervised but the first."""
  eos = _require_eos(tokenizer)
  out: list[list[Encoded] | Bad] = []
  for ids in tokenizer.encode_batch([r.text for r in rows]):
    ids = _once(tokenizer, ids, [eos])
    out.append([Encoded(ids, np.arange(len(ids)) > 0, False)])
  return out


def encode(examples: Sequence[Example], tokenizer: Tokenizer, loss_on: str):
  """Tokens and masks of many examples; tokenizers run once over all of a kind.

  Args:
    examples: conversations, completions, documents, mixed as they come.
    tokenizer: with a template if there are conversations.
    loss_on: 'assistant' (every assistant turn), 'completion' (the last one), or 'all' (everything).
      Documents are supervised whole under each of them.

  Returns:
    per example a list of `Encoded` (several where the template rewrites history), or `Bad`.

  Raises:
    DataError: the tokenizer lacks what all rows of a kind need (a template, an EOS).
  """
  check_loss_on(loss_on)
  out: list[list[Encoded] | Bad] = [Bad('')] * len(examples)
  for kind, encode_kind in (
    (Chat, lambda group: _encode_chats(group, tokenizer, loss_on)),
    (Completion, lambda group: _encode_completions(group, tokenizer, loss_on)),
    (Text, lambda group: _encode_texts(group, tokenizer)),
  ):
    where = [i for i, e in enumerate(examples) if isinstance(e, kind)]
    if where:
      for i, result in zip(where, encode_kind([examples[i] for i in where]), strict=True):
        out[i] = result
  for i, result in enumerate(out):
    if not isinstance(result, Bad) and not all(e.supervised.any() for e in result):
      out[i] = Bad('no token of this row is supervised')
  return out


def encode_answers(
  examples: Sequence[Chat | Completion], tokenizer: Tokenizer
) -> list[Encoded | Bad]:
  """Tokens of prompts with one answer each, the answer supervised up to the token that ends it.

  The prompt's ids are those of `encode_prompt`, so that all answers to a prompt follow the same
  ids: where a token would hold the end of the prompt and the start of the answer, the two are
  tokenized apart. Of a conversation the answer is its last message.

  Raises:
    DataError: the tokenizer lacks what all rows of a kind need (a template, an EOS).
  """
  texts: list[tuple[str, str] | Bad] = []
  for example in examples:
    if isinstance(example, Completion):
      texts.append((example.prompt, example.completion))
      continue
    try:
      (piece,) = _pieces(example, tokenizer, 'completion')
      ((start, end),) = piece.spans
      texts.append((piece.text[:start], piece.text[start:end]))
    except ValueError as error:
      texts.append(Bad(str(error)))
  ids = _split_ids([t for t in texts if not isinstance(t, Bad)], tokenizer)
  out: list[Encoded | Bad] = []
  for example, text in zip(examples, texts, strict=True):
    if isinstance(text, Bad):
      out.append(text)
    else:
      out.append(_answer(example, *next(ids), tokenizer))
  return out


def _answer(example: Chat | Completion, prompt, answer, apart: bool, tokenizer: Tokenizer):
  """Encoded of the ids of a prompt and its answer, or Bad."""
  is_chat = isinstance(example, Chat)
  if is_chat:
    prompt = prompt[1:] if _doubled_bos(prompt, tokenizer) else prompt
    stops = np.flatnonzero(np.isin(answer, list(tokenizer.special_ids)))
    if not len(stops):
      return Bad(
        f'{_template_name(tokenizer)}: the answer ends without a special token, so where it is '
        'complete cannot be seen; let the template write one, or give prompt/completion rows'
      )
    answer = answer[: stops[-1] + 1]
  else:
    eos, prompt = _require_eos(tokenizer), _once(tokenizer, prompt)
    answer = answer if len(answer) and answer[-1] == eos else np.append(answer, eos)
  ids = np.concatenate([prompt, answer]).astype(np.int32)
  supervised = np.arange(len(ids)) >= max(len(prompt), 1)
  if not supervised.any():
    return Bad('no token of this row is supervised')
  return Encoded(ids, supervised, is_chat, int(apart))


def encode_prompt(prompt: Chat | str, tokenizer: Tokenizer) -> list[int]:
  """Ids to sample from, by the same rules as in training: a conversation so far, or plain text."""
  if isinstance(prompt, str):
    return _once(tokenizer, tokenizer.encode(prompt)).tolist()
  _check_template(prompt, tokenizer)
  ids = tokenizer.encode(_render(tokenizer, prompt.messages, prompt.tools, True))
  return ids[1:] if _doubled_bos(ids, tokenizer) else ids


def turn_end(tokenizer: Tokenizer) -> int | None:
  """The token that ends an assistant's turn in the tokenizer's template, which training teaches.

  None without a template, or where it renders no plain question and answer.
  """
  if tokenizer.template is None:
    return None
  messages = ({'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'})
  (found,) = encode([Chat(messages, None)], tokenizer, 'completion')
  if isinstance(found, Bad):
    return None
  return int(found[-1].tokens[np.flatnonzero(found[-1].supervised)[-1]])


def fit(example: Encoded, seq_len: int, on_overlength: str) -> Encoded | None:
  """Applies the over-length policy; the caller counts by comparing lengths.

  Returns:
    the example, a shorter one, or None where it is dropped (policy 'drop', or nothing supervised is
    left after truncation).

  Raises:
    ValueError: policy 'error' and a longer example.
  """
  n = len(example.tokens)
  if n <= seq_len:
    return example
  if on_overlength == 'drop':
    return None
  if on_overlength == 'error':
    raise ValueError(
      f'{n} tokens, more than seq_len={seq_len}; raise seq_len, or set data.on_overlength to '
      "'drop', 'truncate_left' or 'truncate_right'"
    )
  kept = slice(n - seq_len, n) if on_overlength == 'truncate_left' else slice(0, seq_len)
  supervised = example.supervised[kept].copy()
  supervised[:1] = False
  if not supervised.any():
    return None
  return dataclasses.replace(example, tokens=example.tokens[kept], supervised=supervised)
