"""The code of docs/packing_delta_net.md, run. Reads neither torch nor jax."""

import contextlib
import io
import pathlib
import re

PAGE = pathlib.Path(__file__).resolve().parent.parent / 'docs' / 'packing_delta_net.md'
_BLOCK = re.compile(r'^```(\w+)\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def blocks(kind: str) -> list[str]:
  """Returns the page's blocks of a language."""
  return [m[2] for m in _BLOCK.finditer(PAGE.read_text(encoding='utf-8')) if m[1] == kind]


def printed(*codes: str) -> str:
  """Returns what pieces of code print, run one after the other in one namespace."""
  out, names = io.StringIO(), {}
  with contextlib.redirect_stdout(out):
    for code in codes:
      exec(compile(code, str(PAGE), 'exec'), names)
  return out.getvalue()
