"""Compares short answers with gold answers: exact, normalized, by SQuAD's tokens, yes or no."""

import collections
import re
import unicodedata
from collections.abc import Sequence

from ftjax.evaluation.metric import mean, proportion
from ftjax.grading import latex, math_answers, squad
from ftjax.grading.final_answer import final_answer

EXACT_MATCH = proportion('exact_match', 'exact match')
TOKEN_F1 = mean('token_f1', 'token F1')

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_AROUND_SIGN = re.compile(r' ?([^\w ]) ?')
_YES, _NO = frozenset({'yes', 'true'}), frozenset({'no', 'false'})


def exact_match(answer: str, output: str) -> bool:
  """Returns whether two texts are equal after stripping white space."""
  return answer.strip() == output.strip()


# Punctuation around a word, without signs that change a value (- + % $ / #).
_AROUND = frozenset('.,;:!?\'"`*_()[]{}<>…“”«»„、。「」『』\u2018\u2019\u201a')


def normalize(text: str) -> str:
  """Returns the text in NFKC, case folded, without punctuation around words and extra spaces.

  Punctuation inside a word stays (3.5, don't), and so does a point before a digit (.5). Articles
  stay: 'a' may be the answer.
  """
  words = []
  for word in unicodedata.normalize('NFKC', text).casefold().split():
    start, end = 0, len(word)
    while end > start and word[end - 1] in _AROUND:
      end -= 1
    while start < end and word[start] in _AROUND:
      if word[start] == '.' and word[start + 1 : start + 2].isdigit():
        break
      start += 1
    if start < end:
      words.append(word[start:end])
  return ' '.join(words)


def normalized_match(answer: str, output: str) -> bool:
  """Returns whether two texts are equal after `normalize`.

  An answer of punctuation alone is compared exactly, so that no empty output matches it.
  """
  wanted = normalize(answer)
  return wanted == normalize(output) if wanted else exact_match(answer, output)


def squad_values(prediction: str, golds: Sequence[str]) -> dict[str, tuple[float, ...]]:
  """Returns {'exact_match': (0 or 1,), 'token_f1': (0..1,)}, each the best over the gold answers.

  Texts are normalized by grading/squad.py, which keeps what changes a number. A gold answer of
  which nothing is left is compared as it is: '' is the gold answer of an unanswerable question.

  Raises:
    ValueError: no gold answers.
  Source: Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822 for empty answers.
  """
  if not golds:
    raise ValueError('no gold answers; expected at least one')
  exact, f1 = zip(*(_squad(prediction, gold) for gold in golds), strict=True)
  return {'exact_match': (float(max(exact)),), 'token_f1': (float(max(f1)),)}


def _squad(prediction: str, gold: str) -> tuple[float, float]:
  given, wanted = squad.normalize(prediction), squad.normalize(gold)
  if not wanted:
    equal = float(exact_match(gold, prediction))
    return equal, equal
  return float(given == wanted), token_f1(given.split(), wanted.split())


def token_f1(given: Sequence[str], wanted: Sequence[str]) -> float:
  """Returns the F1 of the words in common, each as often as both have it; 1 if both are empty."""
  if not given or not wanted:
    return float(not given and not wanted)
  common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
  return 2 * common / (len(given) + len(wanted))


def parse_yes_no(text: str) -> str:
  """Returns 'yes', 'no', or '' for a text that commits to neither.

  The first word decides if it is yes, no, true or false. Otherwise the whole text does, if it has
  words of one side only: 'The answer is no.'
  """
  words = [w.casefold() for w in _WORD.findall(unicodedata.normalize('NFKC', text))]
  sides = [('yes' if w in _YES else 'no') for w in words if w in _YES or w in _NO]
  if words and (words[0] in _YES or words[0] in _NO):
    return sides[0]
  return sides[0] if len(set(sides)) == 1 else ''


def parse_math(completion: str, prompt: str, mode: str) -> str:
  """Returns the answer that a completion states, numbers in one form: equal answers are equal
  votes of maj@k. '' for none, and for several different ones.

  Args:
    prompt: everything that the model read, whose end may have opened a thought.
    mode: 'strict' or 'flexible', see `math_answers.statements`.
  """
  text = final_answer(completion, prompt)
  found = set() if text is None else {_form(s) for s in math_answers.statements(text, mode)}
  return found.pop() if len(found) == 1 else ''


def _form(statement: str) -> str:
  number = math_answers.parse_number(statement)
  if number is None:
    return _AROUND_SIGN.sub(r'\1', ' '.join(latex.normalize(statement).split()))
  return number.latex() + '\\%' * number.percent
