"""Tokenizes conversations, completions and documents, and computes which tokens are supervised.

Masks come from character spans of the rendered text (spans.py), never from searching for tokens.
The end-of-turn token is supervised, white space that the template writes after it is not.

Training tokenizes chunks of rows with `encode`; generation and evaluation call `encode_prompt`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax.data import dialect, sentinels, source_text, spans
from ftjax.data.formats import Bad, Chat, Completion, Example, Text
from ftjax.data.spans import Piece
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError

LOSS_ON = ('assistant', 'completion', 'all')
ON_OVERLENGTH = ('error', 'drop', 'truncate_left', 'truncate_right')


@dataclasses.dataclass(frozen=True)
class Encoded:
  """One training example.

  Attributes:
    tokens: int32[n].
    supervised: bool[n]; True where the loss includes the prediction of this token. Never the first.
    is_chat: whether a template rendered it.
    boundary_tokens: number of tokens with both the end of a prompt and the start of a completion;
      unsupervised in a chat, and tokenized apart in a completion.
    boundary: index at which the second side of a pair begins; else 0.
    value: margin of a pair, label or score (preference_rows.py).
    weight: factor of the loss of its tokens, the row's `weight`. difficulty: that of the row, by
      which a curriculum may be ordered; NaN without one.
    unrendered: paths of content of the row that its rendering does not contain, such as
      'messages[1].reasoning_content'.
    bos: 1 where the first token is BOS, else 0.
    head: tokens up to the end of the system turn, BOS included; never less than `bos`.
      'truncate_left' keeps them, see `fit`.
    labels: int32[n] of annotated_examples.py, where a token has a label; else None.
    sequence: int8[n], the text that a token is of, 0 or 1, and -1 for one around it; else None.
  """

  tokens: np.ndarray
  supervised: np.ndarray
  is_chat: bool
  boundary_tokens: int = 0
  boundary: int = 0
  value: float = 0.0
  weight: float = 1.0
  difficulty: float = float('nan')
  bos: int = 0
  head: int = 0
  unrendered: tuple[str, ...] = ()
  labels: np.ndarray | None = None
  sequence: np.ndarray | None = None


def check_loss_on(loss_on: str) -> None:
  """Raises ConfigError unless `loss_on` is one of `LOSS_ON`."""
  if loss_on not in LOSS_ON:
    raise ConfigError(f'data.loss_on={loss_on!r}; expected one of {list(LOSS_ON)}')


def _template_name(tokenizer: Tokenizer) -> str:
  return dialect.of(tokenizer).name


def unrendered_reason(places: Sequence[str], tokenizer: Tokenizer) -> str:
  """Returns the reason for a row with content that a template does not render, with a remedy."""
  return (
    f'the {_template_name(tokenizer)} does not render {sentinels.list_places(places)}; remove it '
    "from the row, use a template that renders it, or set data.on_unrendered='warn' to train "
    'without it'
  )


def _mask(piece: Piece, tokenizer: Tokenizer, ids, starts, ends) -> Encoded:
  """Supervises the tokens that lie inside the piece's spans, each up to its stop token."""
  supervised = np.zeros(len(ids), bool)
  boundary_tokens = 0
  special = tokenizer.is_special[ids]
  for start, end in piece.spans:
    inside = (starts >= start) & (ends <= end) & (ends > start)
    across = int(np.sum((starts < start) & (ends > start)))
    boundary_tokens += across
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
      words = np.flatnonzero(inside & ~np.isin(ids, tokenizer.stop_ids))
      if not any(piece.text[starts[i] : ends[i]].strip() for i in words if i != stops[-1]):
        text = piece.text[start : starts[stops[-1]]]
        why = (
          f'its text {text[:30]!r} shares a token with the text before it'
          if across
          else 'the template renders nothing else of it'
        )
        raise ValueError(
          f'{_template_name(tokenizer)}: of an assistant turn nothing but the stop token would be '
          f'supervised; {why}'
        )
    supervised |= inside
  head = int(np.searchsorted(ends, piece.head, 'right')) if piece.head else 0
  return _finish(ids, supervised, tokenizer, boundary_tokens, head)


def _finish(ids, supervised, tokenizer: Tokenizer, boundary_tokens: int, head: int) -> Encoded:
  """Removes one BOS where the text begins with two, and unsupervises the first token."""
  if _doubled_bos(ids, tokenizer):
    ids, supervised, head = ids[1:], supervised[1:].copy(), max(head - 1, 0)
  supervised[:1] = False  # nothing predicts the first token
  bos = _count_bos(ids, tokenizer)
  return Encoded(ids, supervised, True, boundary_tokens, bos=bos, head=max(bos, head))


def _count_bos(ids, tokenizer: Tokenizer) -> int:
  return int(len(ids) > 0 and tokenizer.bos_id is not None and ids[0] == tokenizer.bos_id)


def _doubled_bos(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> bool:
  return len(ids) > 1 and tokenizer.bos_id is not None and ids[0] == ids[1] == tokenizer.bos_id


def _encode_chats(chats: Sequence[Chat], tokenizer: Tokenizer, loss_on: str):
  """Returns the examples of each conversation, or Bad."""
  planned: list[spans.Rendered | Bad] = []
  for example in chats:
    try:
      planned.append(spans.pieces(example, tokenizer, loss_on))
    except ValueError as error:
      if tokenizer.template is None:
        raise
      planned.append(Bad(str(error)))
  pieces = [p for plan in planned if not isinstance(plan, Bad) for p in plan.pieces]
  tokens = iter(tokenizer.encode_spans([p.text for p in pieces]))
  out: list[list[Encoded] | Bad] = []
  for plan in planned:
    if isinstance(plan, Bad):
      out.append(plan)
      continue
    encoded = [(p, next(tokens)) for p in plan.pieces]
    try:
      found = [_mask(piece, tokenizer, *ids) for piece, ids in encoded]
      if plan.unrendered:
        found = [dataclasses.replace(e, unrendered=plan.unrendered) for e in found]
      out.append(found)
    except ValueError as error:
      out.append(Bad(spans.with_places(str(error), plan.unrendered)))
  return out


_NOTHING_BUT_STOP = (
  'of the completion nothing but the stop token would be supervised; it holds no other token of '
  'its own'
)


def _require_eos(tokenizer: Tokenizer) -> int:
  if tokenizer.eos_id is None:
    raise DataError(
      f'{tokenizer.name} names no eos_token (tokenizer_config.json) and no eos_token_id '
      '(generation_config.json, config.json); a model trained on it could never learn to stop'
    )
  return tokenizer.eos_id


def _once(tokenizer: Tokenizer, ids, end: Sequence[int] = ()) -> np.ndarray:
  """Returns the tokenizer's prefix, ids and `end`: int32[n]; none is added twice."""
  prefix = list(tokenizer.prefix_ids)
  if prefix and list(ids[: len(prefix)]) == prefix:
    prefix = []
  if len(ids) and len(end) and ids[-1] == end[0]:
    end = ()
  return np.concatenate([prefix, ids, end]).astype(np.int32)


def _split_ids(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer):
  """Yields per (prompt, answer) the ids of both, and whether they had to be tokenized apart.

  The prompt's ids are those of the prompt alone, and both together decode to prompt + answer. Where
  no ids of the answer do so after the prompt's own, the prompt's ids are those of the joint text
  up to and including the token that spans the border.
  """
  prompts = tokenizer.encode_batch([prompt for prompt, _ in texts])
  wholes = tokenizer.encode_batch([prompt + answer for prompt, answer in texts])
  for (text, answer), prompt, whole in zip(texts, prompts, wholes, strict=True):
    n = len(prompt)
    if len(whole) >= n and np.array_equal(whole[:n], prompt):
      yield prompt, whole[n:], False
      continue
    found = _continuation(tokenizer, prompt, whole, answer)
    if found is None:
      ((whole, starts, _),) = tokenizer.encode_spans([text + answer])
      n = int(np.searchsorted(starts, len(text)))
      prompt, found = whole[:n], whole[n:]
    yield prompt, found, True


# Texts after which a tokenizer adds no start of a text: the answer's ids follow theirs.
_ANCHORS = ('', '\n', '.', 'a', '0', ')', '\t')


def _continuation(tokenizer: Tokenizer, prompt, whole, answer: str) -> np.ndarray | None:
  """Returns ids of an answer that decode to it after a prompt's ids; None if none are found.

  A tokenizer may put a space before every text (SentencePiece's U+2581), which an answer that
  continues a word must not have.
  """
  wanted = tokenizer.decode(whole, skip_special=False)
  for anchor in _ANCHORS:
    ((ids, starts, _),) = tokenizer.encode_spans([anchor + answer])
    n = int(np.searchsorted(starts, len(anchor)))
    found = ids[n:]
    if tokenizer.decode([*prompt, *found], skip_special=False) == wanted:
      return found
  return None


def _encode_completions(rows: Sequence[Completion], tokenizer: Tokenizer, loss_on: str):
  """Encodes BOS, prompt, completion, EOS; the prompt's ids are those of `encode_prompt`."""
  eos = _require_eos(tokenizer)
  out: list[list[Encoded] | Bad] = []
  for prompt, answer, apart in _split_ids([(r.prompt, r.completion) for r in rows], tokenizer):
    before = _once(tokenizer, prompt)
    end = [] if len(answer) and answer[-1] == eos else [eos]
    ids = np.concatenate([before, answer, end]).astype(np.int32)
    supervised = np.arange(len(ids)) >= (0 if loss_on == 'all' else len(before))
    supervised[:1] = False
    bos = _count_bos(ids, tokenizer)
    found = Encoded(ids, supervised, False, int(apart), bos=bos, head=bos)
    empty = loss_on != 'all' and len(answer) + len(end) < 2
    out.append(Bad(_NOTHING_BUT_STOP) if empty else [found])
  return out


def _encode_texts(rows: Sequence[Text], tokenizer: Tokenizer):
  """Encodes BOS where the tokenizer adds one, the document, EOS; all but the first supervised."""
  eos = _require_eos(tokenizer)
  out: list[list[Encoded] | Bad] = []
  for ids in tokenizer.encode_batch([r.text for r in rows]):
    ids = _once(tokenizer, ids, [eos])
    bos = _count_bos(ids, tokenizer)
    out.append([Encoded(ids, np.arange(len(ids)) > 0, False, bos=bos, head=bos)])
  return out


def encode(examples: Sequence[Example], tokenizer: Tokenizer, loss_on: str):
  """Tokenizes and masks many examples; the tokenizer runs once over all of a kind.

  Args:
    examples: conversations, completions and documents, in any order.
    tokenizer: with a template if there are conversations.
    loss_on: 'assistant' (every assistant turn), 'completion' (the last one), or 'all' (everything).
      Documents are always supervised whole.

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
  """Tokenizes prompts with one answer each, supervised up to its stop token.

  The prompt's ids are those of `encode_prompt`, so that all answers to a prompt follow the same
  ids: where a token would span the border of prompt and answer, the two are tokenized apart. The
  answer of a conversation is its last message.

  Raises:
    DataError: the tokenizer lacks what all rows of a kind need (a template, an EOS).
  """
  texts: list[tuple[str, str, int] | Bad] = []
  places: list[tuple[str, ...]] = []
  for example in examples:
    places.append(())
    if isinstance(example, Completion):
      texts.append((example.prompt, example.completion, 0))
      continue
    try:
      found = spans.pieces(example, tokenizer, 'completion')
      (piece,) = found.pieces
      ((start, end),) = piece.spans
      texts.append((piece.text[:start], piece.text[start:end], piece.head))
      places[-1] = found.unrendered
    except ValueError as error:
      texts.append(Bad(str(error)))
  ids = _split_ids([t[:2] for t in texts if not isinstance(t, Bad)], tokenizer)
  out: list[Encoded | Bad] = []
  for example, text, unrendered in zip(examples, texts, places, strict=True):
    if isinstance(text, Bad):
      out.append(text)
      continue
    found = _answer(example, *next(ids), tokenizer)
    if not isinstance(found, Bad):
      head = found.bos
      if text[2]:
        ((_, _, ends),) = tokenizer.encode_spans([text[0]])
        head = max(head, int(np.searchsorted(ends, text[2], 'right')))
      found = dataclasses.replace(found, head=head, unrendered=unrendered)
    out.append(found)
  return out


def _answer(example: Chat | Completion, prompt, answer, apart: bool, tokenizer: Tokenizer):
  """Returns the example of the ids of a prompt and its answer, or Bad."""
  is_chat = isinstance(example, Chat)
  if is_chat:
    prompt = prompt[1:] if _doubled_bos(prompt, tokenizer) else prompt
    stops = np.flatnonzero(tokenizer.is_special[answer])
    if not len(stops):
      return Bad(
        f'{_template_name(tokenizer)}: the answer ends without a special token, so its end '
        'cannot be found; let the template write one, or give prompt/completion rows'
      )
    answer = answer[: stops[-1] + 1]
  else:
    eos, prompt = _require_eos(tokenizer), _once(tokenizer, prompt)
    answer = answer if len(answer) and answer[-1] == eos else np.append(answer, eos)
  if len(answer) < 2:
    return Bad(_NOTHING_BUT_STOP)
  ids = np.concatenate([prompt, answer]).astype(np.int32)
  supervised = np.arange(len(ids)) >= max(len(prompt), 1)
  return Encoded(ids, supervised, is_chat, int(apart), bos=_count_bos(ids, tokenizer))


def encode_prompt(
  prompt: Chat | str, tokenizer: Tokenizer, on_unrendered: str = 'error'
) -> list[int]:
  """Tokenizes a prompt, a conversation or plain text, by the same rules as training.

  Of an encoder-decoder these are the ids that its encoder reads.

  Args:
    on_unrendered: 'error', or 'warn' to drop content that the template does not render.

  Raises:
    ValueError: the template refuses the conversation, or does not render all of it.
  """
  if tokenizer.start_id is not None:
    return source_text.encode_prompt(prompt, tokenizer)
  if isinstance(prompt, str):
    return _once(tokenizer, tokenizer.encode(prompt)).tolist()
  text, unrendered = spans.prompt(prompt, tokenizer)
  if unrendered and on_unrendered == 'error':
    raise ValueError(unrendered_reason(unrendered, tokenizer))
  ids = tokenizer.encode(text)
  return ids[1:] if _doubled_bos(ids, tokenizer) else ids


def turn_end(tokenizer: Tokenizer) -> int | None:
  """Returns the token that ends an assistant's turn in the template, as training supervises it.

  None without a template, or where it does not render a plain question and answer.
  """
  if tokenizer.template is None:
    return None
  messages = ({'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'})
  (found,) = encode([Chat(messages, None)], tokenizer, 'completion')
  if isinstance(found, Bad):
    return None
  return int(found[-1].tokens[np.flatnonzero(found[-1].supervised)[-1]])


def head_length(example: Encoded, seq_len: int) -> int:
  """Returns how many of the first tokens 'truncate_left' keeps: BOS and a short system turn.

  A system turn of more than half of `seq_len` is not kept. For a pair, `seq_len` is that of one
  side.
  """
  return example.head if example.head <= seq_len // 2 else example.bos


def fit(example: Encoded, seq_len: int, on_overlength: str) -> Encoded | None:
  """Applies the over-length policy.

  'truncate_left' keeps BOS, the system turn where it fits (`head_length`), and the end;
  'truncate_right' keeps the beginning. Where the system turn was cut, `head` is smaller than
  before.

  Returns:
    the example, a shorter one, or None where it is dropped (policy 'drop', or no supervised token
    is left after truncation).

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
  head = min(example.head, seq_len)
  kept = np.arange(seq_len)
  if on_overlength == 'truncate_left':
    head = head_length(example, seq_len)
    kept[head:] += n - seq_len
  supervised = example.supervised[kept]
  supervised[:1] = False
  if on_overlength == 'truncate_left':
    supervised[head : head + 1] = False  # its context was removed
  if not supervised.any():
    return None
  return dataclasses.replace(example, tokens=example.tokens[kept], supervised=supervised, head=head)
