"""A thousand strings that break tokenizers: code, CJK, emoji, digits, runs of spaces; the same ones
on every machine.

Used by make_goldens.py, which stores what transformers makes of them, and by test_tokenizer.py.
"""

# ruff: noqa: RUF001 (look-alike characters are the point)
import hashlib

_PIECES = (
  'the quick brown fox',
  'Hello',
  'WORLD',
  "it's",
  "they'll",
  "I'VE",
  'naïve café',
  'Straße',
  'coöperate',
  'x',
  'antidisestablishment',
  'def f(x: int) -> str:',
  'return {"a": [1, 2, 3]}',
  'for (int i = 0; i < 10; ++i) {',
  '}',
  '// TODO',
  '#include <stdio.h>',
  'x += y ** 2',
  'https://example.org/a?b=c&d=%20',
  'SELECT * FROM t WHERE id=42;',
  '\\frac{1}{2}',
  '<div class="a">',
  '</div>',
  '$HOME/.bashrc',
  '`ls -la`',
  '日本語のテキスト',
  '中文字符',
  '한국어 문장',
  'ภาษาไทย',
  'Привет, мир',
  'שלום',
  'مرحبا بالعالم',
  'हिन्दी',
  'ελληνικά',
  '，。！？',
  '「引用」',
  '😀',
  '👩‍👩‍👧‍👦',
  '🇩🇪',
  '👍🏽',
  '❤️',
  '→',
  '∑∫√',
  '½',
  'x²',
  '①②',
  '٣٤',
  '१२',
  '２０２４',
  'Ⅻ',
  'e\u0301',
  '\u200b',
  '\ufeff',
  '\u00a0',
  '\u3000',
  '0',
  '7',
  '42',
  '007',
  '3.14159',
  '1,000,000',
  '1e-9',
  '0xDEADBEEF',
  '2024-02-29',
  '12:34:56',
  '1234567890' * 2,
  '-5',
  '+1 (555) 010-9999',
  '!',
  '...',
  '?!',
  '---',
  '===',
  '"quoted"',
  "'",
  '(',
  ')',
  '@user',
  '#tag',
  '50%',
  '$9.99',
  '\x00',
  '\x07',
  '\x7f',
  '~',
  '_snake_case_',
  'camelCase',
)
_GAPS = (
  '',
  '',
  ' ',
  ' ',
  ' ',
  ' ',
  '  ',
  '   ',
  '    ',
  '        ',
  '\n',
  '\n\n',
  '\n\n\n',
  '\t',
  '\t\t',
  '\n    ',
  '\n\t',
  ' \n',
  '  \n  ',
  '\r\n',
  ', ',
  '. ',
)
_SPECIALS = ('<|im_start|>', '<|im_end|>', '<|endoftext|>', '<|im_start|>user\n', '<|im_end|>\n')


def mixed_strings(count: int = 1000, specials: tuple[str, ...] = _SPECIALS) -> list[str]:
  """`count` strings of 1 to 12 pieces; about a tenth hold a special token."""
  return [_string(i, specials) for i in range(count)]


def _string(i: int, specials: tuple[str, ...]) -> str:
  # Hash bytes, not `random`: its sequences are no promise between Python versions.
  stream = hashlib.shake_256(f'mixed string {i}'.encode()).digest(64)
  parts = [_GAPS[stream[0] % len(_GAPS)]]
  for k in range(1 + stream[1] % 12):
    piece, gap, special = stream[2 + 3 * k : 5 + 3 * k]
    parts.append(_PIECES[piece % len(_PIECES)])
    parts.append(_GAPS[gap % len(_GAPS)])
    if specials and special < 6:
      parts.append(specials[special % len(specials)])
  return ''.join(parts)
