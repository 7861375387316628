"""Faults of answers: empty, cut, far too long or short, with parts of template or prompt."""

import re
from collections.abc import Sequence

import numpy as np

from ftjax.audit.finding import Finding
from ftjax.audit.rows import Row, found
from ftjax.evaluation import ngrams

# Templates put these around turns; in the text of a message they are leftovers.
_MARKERS = re.compile(
  r'<\|(?:im_start|im_end|im_sep|user|assistant|system|end|endoftext|eot_id|eom_id|begin_of_text|'
  r'end_of_text|start_header_id|end_header_id|start|message|channel|return|END_OF_TURN_TOKEN|'
  r'START_OF_TURN_TOKEN|USER_TOKEN|CHATBOT_TOKEN|SYSTEM_TOKEN)\|>|<(?:start|end)_of_turn>|'
  r'\[/?INST\]|<</?SYS>>|<\uff5c[^\uff5c<>]{1,30}\uff5c>|(?m:^\s*### ?(?:Instruction|Response|'
  r'Input|Assistant|Human|User):)|(?m:^(?:Human|Assistant|USER|ASSISTANT): )|(?<![\w<])</?s>(?!\w)'
)
_PHRASES = re.compile(
  r"\bas an? (?:AI|artificial intelligence|large language|language)\b(?: language)?(?: model)?|"
  r"\bI(?:'m| am) (?:just |only )?an? (?:AI|large language model|language model)\b|"
  r"\bmy (?:knowledge|training)(?: data)? cut-?off\b|\bas of my last (?:knowledge )?update\b|"
  r"\bI(?:'m| am) sorry,? but I (?:can(?:'|no)?t|am (?:not able|unable))\b|"
  r"\b(?:trained|developed|created) by (?:OpenAI|Anthropic|Google DeepMind)\b|"
  r"\bI(?: do not|'m not able to| cannot| can't) (?:have (?:personal|access to)|browse)\b",
  re.I,
)  # fmt: skip
_ENDS = frozenset('.!?:)]}>|/*_=~"\'`\u2026\u3002\uff01\uff1f\u0964\u061f\u00bb\u201d\u2019')
# A text that ends with one of these words is cut.
_OPEN_TEXT = (
  'a an and the of to or with for from which who whose because although if whether into onto upon '
  'between will would could should must his her its their our your my these those very but than et '
  'ou le la les un une des du de dans avec pour par sur qui dont ce cette ces und oder der die das '
  'den dem ein eine einer mit von zu dass el los las una y con para il che di e'
)
_OPEN_WORDS = frozenset(_OPEN_TEXT.split())
_FEWEST_WORDS = 6  # of an answer that can be cut
_LONG_WORDS = 20  # of an answer that nearly always has an end mark
_USUAL_SHARE = 0.9  # of the long answers that have one, where it is expected
_MIN_LONG = 20  # long answers from which that share is taken


def empty(rows: Sequence[Row]) -> list[Finding]:
  """Finds answers without a letter or a digit, and rows of a set with answers that have none."""
  out = []
  if not any(row.answers for row in rows):
    return out
  for i, row in enumerate(rows):
    if not row.answers or any(
      not ngrams.words(text) and not _is_symbol(text) for text in row.answers
    ):
      out.append(found('empty_answer', rows, i, row.shown, 'after this prompt'))
  return out


def _is_symbol(text: str) -> bool:
  """Returns whether a text without words is an answer all the same: '+', '<=', a smiley."""
  text = text.strip()
  return bool(text) and text.lower() not in (
    '-',
    '--',
    '.',
    '...',
    '?',
    '_',
    '*',
    '\u2026',
    '""',
    "''",
  )


def equal_sides(rows: Sequence[Row]) -> list[Finding]:
  """Finds pairs whose chosen and rejected answers are equal."""
  return [
    found('equal_sides', rows, i, row.answer)
    for i, row in enumerate(rows)
    if row.is_pair and len(row.answers) > 1 and len({ngrams.whole(a) for a in row.answers}) == 1
  ]


def truncated(rows: Sequence[Row]) -> list[Finding]:
  """Finds answers that end in mid-sentence.

  That is one that ends with a comma, an opening bracket or a word after which a sentence continues;
  and a long one without an end mark, in a set whose long answers nearly all have one.
  """
  out: dict[int, Finding] = {}
  unended: list[int] = []
  long = 0
  for i, row in enumerate(rows):
    text = row.answer.rstrip()
    words = text.split()
    if len(words) < _FEWEST_WORDS:
      continue
    if why := _open_end(text, words):
      out[i] = found('truncated_answer', rows, i, text, why, len(text) - 50)
    if len(words) >= _LONG_WORDS:
      long += 1
      if text[-1] not in _ENDS and not _is_listing(text):
        unended.append(i)
  if long >= _MIN_LONG and len(unended) <= (1 - _USUAL_SHARE) * long:
    for i in unended:
      text = rows[i].answer.rstrip()
      why = f'ends in {text[-12:]!r} without an end mark'
      out.setdefault(i, found('truncated_answer', rows, i, text, why, len(text) - 50))
  return [out[i] for i in sorted(out)]


def _open_end(text: str, words: Sequence[str]) -> str:
  """Returns why a text is cut; '' where nothing shows it."""
  if text[-1] in ',([{' or (text[-1] == '-' and text[-2:-1].isalpha()):
    return f'ends with {text[-1]!r}'
  last = words[-1]
  if last in _OPEN_WORDS:
    return f'ends with the word {last!r}'
  if text.count('```') % 2:
    return 'ends in a block of code that is not closed'
  return ''


def _is_listing(text: str) -> bool:
  """Returns whether the last line is an entry of a list, a command or a link."""
  line = text.rsplit('\n', 1)[-1].strip()
  return bool(re.match(r'[-*+\u2022#>$|]|\d+[.)]', line)) or '://' in line.rsplit(' ', 1)[-1]


def over_length(rows: Sequence[Row]) -> list[Finding]:
  """Finds rows of more tokens than they may have."""
  return [
    found('over_length', rows, i, row.answer, f'{row.tokens} tokens of at most {row.most_tokens}')
    for i, row in enumerate(rows)
    if row.tokens is not None and 0 < row.most_tokens < row.tokens
  ]


# Times longer than the longest twentieth begins, and shorter than the shortest one ends. Quartiles
# would say little: many sets have short and long rows.
_LONGER, _SHORTER = 5.0, 8.0
_MIN_ROWS = 20


def length_outliers(rows: Sequence[Row]) -> list[Finding]:
  """Finds rows whose question or answer is far longer or shorter than the others: more than five
  times the 95th percentile, or less than an eighth of the 5th.
  """
  out: dict[int, Finding] = {}
  for name in ('question', 'answer'):
    texts = [row.question if name == 'question' else row.answer for row in rows]
    for i, detail in _far(np.array([len(t.strip()) for t in texts], np.int64)):
      out.setdefault(i, found('length_outlier', rows, i, texts[i], f'{name} of {detail}'))
  return [out[i] for i in sorted(out)]


def _far(lengths: np.ndarray) -> list[tuple[int, str]]:
  """Returns (index, how long) of outliers among lengths int64[n]; those of 0 do not count."""
  given = np.flatnonzero(lengths)
  if len(given) < _MIN_ROWS:
    return []
  low, middle, high = np.percentile(lengths[given], [5, 50, 95])
  is_far = (lengths[given] > _LONGER * high) | (lengths[given] * _SHORTER < low)
  usual = round(float(middle))
  return [(int(i), f'{lengths[i]:,} characters, usual are {usual:,}') for i in given[is_far]]


def template_leaks(rows: Sequence[Row], special: frozenset[str] = frozenset()) -> list[Finding]:
  """Finds markers of chat templates in texts.

  Args:
    rows: of the training data.
    special: texts of the tokenizer's special tokens; those without a letter do not count.
  """
  own = sorted((t for t in special if len(t) > 3 and re.search(r'\w', t)), key=len, reverse=True)
  pattern = re.compile('|'.join(map(re.escape, own))) if own else None
  out = []
  for i, row in enumerate(rows):
    for text in row.texts:
      match = _MARKERS.search(text) or (pattern and pattern.search(text))
      if match:
        detail = f'contains {match[0].strip()!r}'
        out.append(found('template_leak', rows, i, text, detail, match.start()))
        break
  return out


def assistant_phrases(rows: Sequence[Row]) -> list[Finding]:
  """Finds answers in which the assistant describes itself as a model, as copied from one."""
  out = []
  for i, row in enumerate(rows):
    for text in row.answers if row.prompt else ():
      if match := _PHRASES.search(text):
        out.append(found('assistant_phrase', rows, i, text, match[0], match.start()))
        break
  return out


def prompt_repeated(rows: Sequence[Row]) -> list[Finding]:
  """Finds answers that contain the whole question, of at least six words."""
  out = []
  for i, row in enumerate(rows):
    question = ngrams.whole(row.question)
    if len(question.split()) < _FEWEST_WORDS:
      continue
    if any(question in ngrams.whole(text) for text in row.answers):
      out.append(found('prompt_repeated', rows, i, row.answer))
  return out
