r"""Compares formulas with `math-verify` and sympy.

math-verify's parser of plain expressions calls Python's eval, and even its LaTeX grammar passes
numbers to sympy's; `_patched` replaces that one. It also replaces the comparison of numbers,
which rounds to a number of decimal places: tiny numbers would all be equal. `symbolic_equal` may
hang or use much memory; rewards.py runs it in a worker that has limits.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import re
from collections.abc import Iterator

# A longer answer is rejected unread.
MAX_CHARS = 200
# Relative difference below which numbers with a decimal point are the same, and exact ones; digits
# to which the latter are computed.
_FLOAT_TOLERANCE = 1e-14
_EXACT_TOLERANCE = 1e-50
_DIGITS = 60

# Commands that an answer may have although the gold answer has none: arithmetic, functions, layout.
_COMMAND = re.compile(r'\\([A-Za-z]+)')
_COMMANDS = frozenset(
  _COMMAND.findall(
    r'\frac\dfrac\tfrac\cfrac\sqrt\cdot\times\div\pi\circ\infty\binom\left\right\big\Big\bigl\bigr'
    r'\displaystyle\ln\log\exp\sin\cos\tan\cot\sec\csc\arcsin\arccos\arctan\sinh\cosh\tanh'
  )
)
_TEXT = re.compile(r'\\(?:text[a-z]*|mbox)\s?\{')
_ENVIRONMENT = re.compile(r'\\(?:begin|end)\{\w{1,20}\}')
# One spelling of each relation; an order in either direction: 3 <= x is x >= 3.
_SPELLINGS = (
  (re.compile(r'\\(?:[lr]vert|mid)(?![A-Za-z])'), '|'),
  (re.compile(r'\\(?:le|ge)(?:q|qslant)?(?![A-Za-z])|[\u2264\u2265]'), r'\\le'),
  (re.compile(r'\\[lg]t(?![A-Za-z])|>'), '<'),
  (re.compile(r'\\neq?(?![A-Za-z])'), r'\\ne'),
)
# Marks between two parts, one of which may be wrong; others are checked as commands.
_RELATIONS = ('=', '<', ',', ';', '|', '?', '~', ':', '&', '{\\}', '\\%')
_WORD = re.compile(r'[A-Za-z]{4,}|[A-Z]{3,}')
_INDEX = re.compile(r'(?<!\\log)_\{?(\w+)')
_OF_ANGLES = re.compile(r'\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])')
_DEGREES = re.compile(r'([0-9]+(?:\.[0-9]+)?)\s?\^\{\\circ\}')
# Powers of powers, long exponents and factorials, which are expensive to evaluate.
_TOWER = re.compile(r'\*\*|\^[^+=]{0,20}\^|\^\s*\{?\s*-?[0-9]{4}|[0-9]{4}\s*!|!.{0,9}!')


@functools.cache
def can_do_symbols() -> bool:
  """Returns whether math-verify is installed."""
  return importlib.util.find_spec('math_verify') is not None


def symbolic_equal(answer: str, gold: str) -> bool:
  """Returns whether math-verify finds two LaTeX texts equal.

  Its rules take 71=72 and 72 \\approx 71 for 72, and a word for a product of letters. Therefore
  answers are rejected beforehand that have commands, relations, lists, words or indices which the
  gold answer lacks, or towers of powers.
  """
  if any(len(t) > MAX_CHARS for t in (answer, gold)):
    return False
  if _TOWER.search(answer) and not _TOWER.search(gold):
    return False
  plain, wanted = _spelt(answer), _spelt(gold)
  commands = set(_COMMAND.findall(plain)) - _COMMANDS
  if not commands <= set(_COMMAND.findall(wanted)):
    return False
  # The grammar drops words: `5 \text{ or 6}` would be 5.
  if bool(_TEXT.search(plain)) != bool(_TEXT.search(wanted)):
    return False
  if any(mark in plain and mark not in wanted for mark in _RELATIONS):
    return False
  if plain.count('=') > wanted.count('=') or set(_INDEX.findall(plain)) != set(
    _INDEX.findall(wanted)
  ):
    return False
  if any(not c.isascii() and c not in wanted for c in plain):
    return False
  if set(_words(plain)) != set(_words(wanted)):
    return False
  letters, known = (set(_COMMAND.sub('', t)) for t in (plain, wanted))
  if any(c not in known and c.swapcase() in known for c in letters):  # x is not X
    return False
  with _patched():
    return _same_symbols(answer, gold)


def _spelt(text: str) -> str:
  """Returns LaTeX with its relations in one spelling."""
  for pattern, spelling in _SPELLINGS:
    text = pattern.sub(spelling, text)
  return text


def _words(text: str) -> list[str]:
  """Returns runs of letters that are words, though a grammar of formulas parses them as products:
  four or more letters, three or more capitals.
  """
  text = _COMMAND.sub('|', _ENVIRONMENT.sub('|', text))
  return _WORD.findall(''.join(text.split()))


@contextlib.contextmanager
def _patched() -> Iterator[None]:
  """Replaces sympy's eval of strings: inside, only numbers are parsed, everything else is rejected.

  math-verify then compares numbers by `_same_number` and symbols by `_same_symbol` (its own ignores
  case and takes a word for a product of its letters).
  """
  import sympy
  from math_verify import grader
  from sympy.parsing import sympy_parser

  def number(code: str, *names) -> sympy.Number:
    found = re.fullmatch(r"(Integer|Float) ?\( ?'?([0-9.]{1,100})'? ?\)", code)
    if not found:
      raise ValueError(f'not evaluated: {code[:60]!r}')
    return {'Integer': sympy.Integer, 'Float': sympy.Float}[found[1]](found[2])

  kept = sympy_parser.eval_expr, grader.sympy_numeric_eq, grader.sympy_compare_symbols
  sympy_parser.eval_expr = number
  grader.sympy_numeric_eq, grader.sympy_compare_symbols = _same_number, _same_symbol
  try:
    yield
  finally:
    sympy_parser.eval_expr, grader.sympy_numeric_eq, grader.sympy_compare_symbols = kept


def _same_number(first, second, *places: int) -> bool:
  """Returns whether two sympy numbers are equal: exactly if both are rational, with a relative
  tolerance of _FLOAT_TOLERANCE if one has a decimal point, else of _EXACT_TOLERANCE. Matrices are
  compared entry by entry. Formulas with variables are equal if the difference of their expansions
  is 0; math-verify simplifies further otherwise.
  """
  import sympy
  from math_verify import grader

  if isinstance(first, sympy.MatrixBase) and isinstance(second, sympy.MatrixBase):
    if first.shape != second.shape:
      return False
    pairs = zip(first.flat(), second.flat(), strict=True)
    return all(grader.sympy_expr_eq(a, b, *places) for a, b in pairs)
  shares = [grader.get_pct_val(x) for x in (first, second)]
  if all(x is not None for x in shares):
    first, second = shares
  first, second = (grader.safe_sympy_doit(x) for x in (first, second))
  if not (getattr(first, 'is_number', False) and getattr(second, 'is_number', False)):
    return _same_formula(first, second)
  if not (first.is_finite and second.is_finite):
    return bool(first.is_infinite and first == second)
  if first.is_Rational and second.is_Rational:
    return bool(first == second)
  tolerance = _FLOAT_TOLERANCE if first.has(sympy.Float) or second.has(sympy.Float) else None
  try:
    a, b = (x.evalf(_DIGITS) for x in (first, second))
    gap, size = abs(a - b), max(abs(a), abs(b))
    return bool(gap <= (tolerance or _EXACT_TOLERANCE) * size)
  except (TypeError, ValueError, ArithmeticError, AttributeError):
    return False


def _same_formula(first, second) -> bool:
  import sympy

  try:
    gap = sympy.expand(first) - sympy.expand(second)
    return bool(sympy.expand(sympy.nsimplify(gap, rational=True)) == 0)
  except (TypeError, ValueError, ArithmeticError, AttributeError):
    return False


def _same_symbol(first, second) -> bool:
  """Returns whether two expressions, one of them a symbol, are the same; case counts, e is a
  number."""
  import sympy

  first, second = (sympy.E if x == sympy.Symbol('e') else x for x in (first, second))
  return bool(first == second)


def _same_symbols(answer: str, gold: str) -> bool:
  import math_verify

  logging.getLogger('math_verify').setLevel(logging.ERROR)
  # Its removal of units would turn 2ab into 2; latex.py has removed them.
  usual = math_verify.LatexExtractionConfig().normalization_config
  config = [
    math_verify.LatexExtractionConfig(
      boxed_match_priority=0, normalization_config=dataclasses.replace(usual, units=False)
    )
  ]

  def read(text):
    if _OF_ANGLES.search(text):  # else 60 degrees would be read as 60
      text = _DEGREES.sub(r'(\1 \\cdot \\frac{\\pi}{180})', text)
    # Their time limits need the main thread's signals; ours is the worker's.
    found = math_verify.parse(
      f'\\boxed{{{text}}}', config, fallback_mode='no_fallback', parsing_timeout=None
    )
    return [f for f in found if not isinstance(f, str)]

  wanted, got = read(gold), read(answer)
  return bool(wanted and got) and bool(math_verify.verify(wanted, got, timeout_seconds=None))
