"""Finds out what a model path is: a HF folder, a GGUF file or a hub name; and what to do if none.

Also says which small files of a HF folder belong to its tokenizer: those go byte for byte into
every folder that is written from it. safetensors.py reads the weights of a folder, gguf.py those of
a file.
"""

import difflib
import fnmatch
import functools
import glob
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ftjax.hf import gguf_files, model_card, peft_config, weight_files
from ftjax.runtime.errors import DataError
from ftjax.storage import files, hub

log = logging.getLogger(__name__)

# Small files of a HF folder that belong to the tokenizer, or say how to run the model.
_TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
)
AVERAGE_REPORT = 'average.json'  # of what models the weights are the average
_MODEL_FILES = (*_TOKENIZER_FILES, 'config.json', weight_files.INDEX_FILE, AVERAGE_REPORT)
_WEIGHTS = re.compile(r'model(-\d{5}-of-\d{5})?\.safetensors')
# Of models that read images too; a text model has none.
PROCESSOR_FILES = (
  'preprocessor_config.json',
  'processor_config.json',
  'video_preprocessor_config.json',
)
# Further chat templates are in the subfolder TEMPLATES.
_SIDE_FILES = (
  *_TOKENIZER_FILES,
  *('tokenizer*.json', '*.model', '*.model.v*', '*.tiktoken', '*.jinja', 'chat_template*'),
  *('vocab.*', 'vocab*.json', 'merges.*', 'tekken.json', 'normalizer.json', 'spiece.*'),
  *PROCESSOR_FILES,
)
ADAPTER_WEIGHTS = peft_config.WEIGHTS_FILE
TEMPLATES = 'additional_chat_templates'
# How sentence-transformers makes a vector of a text; see sentence_files.py.
SENTENCE_FILES = ('modules.json', '1_Pooling/config.json', 'sentence_bert_config.json')
# Subfolders of model folders.
FOLDERS = (TEMPLATES, '1_Pooling')
_LONGEST_CARD = 4 << 20  # bytes

# Files of a hub model that are downloaded before its weights, or those of an adapter; the model
# card for its license.
_SMALL = (*_SIDE_FILES, 'config.json', f'{TEMPLATES}/*', weight_files.INDEX_FILE, *SENTENCE_FILES)
_SMALL += (*peft_config.SMALL_FILES, model_card.FILE)


def locate(path: str | os.PathLike, weights: bool) -> str:
  """Returns where a model is on this machine or in a bucket: a hub name is downloaded.

  Only what is needed: config.json, the files of the tokenizer, and with `weights` the safetensors
  files that the index names. Nothing pickled.

  Raises:
    ConfigError, DataError: see `hub.pin`; or the model on the hub has no such files.
  """
  if not hub.is_name(path):
    return os.fspath(path)
  return str(_snapshot(hub.pin(os.fspath(path)), weights))


@functools.cache
def _snapshot(name: str, weights: bool) -> Path:
  """Returns the folder of `org/name@COMMIT` in the hub's cache."""
  folder = hub.download(name, _SMALL, is_shown=False)
  if not (folder / 'config.json').is_file():
    if (folder / 'adapter_config.json').is_file():
      raise DataError(f'{name}: {weight_files.ADAPTER_ALONE}')
    raise DataError(f'{name}: config.json is missing on the hub{_other_weights(name)}')
  if not weights:
    return folder
  wanted = [weight_files.SINGLE_FILE]
  if (folder / weight_files.INDEX_FILE).is_file():
    wanted += sorted(set(map(str, weight_files.weight_map(folder).values())))
  lacking = not all((folder / w).is_file() for w in wanted[1:] or wanted)
  if lacking:
    log.info('downloading the weights of %s into %s', name, folder)
  hub.download(name, [glob.escape(w) for w in wanted], is_shown=lacking)
  if not any((folder / w).is_file() for w in wanted):
    raise DataError(
      f'{name}: neither {weight_files.SINGLE_FILE} nor {weight_files.INDEX_FILE} is on the hub'
      f'{_other_weights(name)}'
    )
  return folder


def find_adapter(path: str | os.PathLike) -> Path | None:
  """Returns the folder of a PEFT adapter, which a hub name is downloaded into; None where a path is
  something else.

  Raises:
    ConfigError, DataError: see `hub.pin`.
  """
  if not hub.is_name(path):
    folder = files.as_path(path)
    return folder if is_adapter(folder) else None
  name = hub.pin(os.fspath(path))
  folder = hub.download(name, _SMALL, is_shown=False)
  if not is_adapter(folder):
    return None
  # Some programs put the base's config.json beside an adapter; weights are not downloaded yet.
  if (folder / 'config.json').is_file() and weight_files.SINGLE_FILE in hub.list_files(name):
    return None
  hub.download(name, [peft_config.WEIGHTS_FILE], is_shown=True)
  return folder


def locate_any(path: str | os.PathLike) -> str:
  """Returns where a model or an adapter is, with its weights; see `locate`."""
  adapter = find_adapter(path)
  return locate(path, weights=True) if adapter is None else str(adapter)


def find_config(folder: str | os.PathLike) -> Path | None:
  """Returns the config file of a model or adapter folder; None where it has none."""
  places = (files.as_path(folder) / n for n in ('config.json', peft_config.CONFIG_FILE))
  return next((p for p in places if files.exists(p)), None)


def is_adapter(folder: Path) -> bool:
  """Returns whether a folder holds an adapter and no whole model."""
  if not files.exists(folder / peft_config.CONFIG_FILE):
    return False
  whole = (weight_files.SINGLE_FILE, weight_files.INDEX_FILE)
  return not any(files.exists(folder / name) for name in whole)


def _other_weights(name: str) -> str:
  """Returns what a hub model without safetensors holds instead, to be put behind a message."""
  names = hub.list_files(name)
  if found := [n for n in names if n.endswith('.gguf')]:
    repo, revision = hub.split(name)
    return (
      f'. It holds {found[0]}: run `hf download {repo} FILE.gguf --revision {revision} '
      '--local-dir DIR` and give DIR/FILE.gguf'
    )
  if found := [n for n in names if n.endswith(('.bin', '.pt', '.pth'))]:
    return f', only pickled weights ({found[0]}){weight_files.PICKLED}'
  shown = ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')
  return f'; it holds {shown or "no files"}'


def is_side_file(name: str) -> bool:
  """Returns whether a file of this name, directly in a model folder, belongs to the tokenizer."""
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in _SIDE_FILES)


def is_model_file(name: str) -> bool:
  """Returns whether a file of this name, directly in a model folder, is a part of the model."""
  known = (*_MODEL_FILES, *peft_config.SMALL_FILES, peft_config.WEIGHTS_FILE, *SENTENCE_FILES)
  return name in known or is_side_file(name) or bool(_WEIGHTS.fullmatch(name))


def side_files(folder: Path) -> list[str]:
  """Returns the names of such files in a folder, and 'additional_chat_templates/NAME', sorted.

  Raises:
    DataError: a name that is no plain file.
  """
  found = sorted(p.name for p in folder.iterdir() if is_side_file(p.name))
  if (folder / TEMPLATES).is_dir():
    inner = sorted(p.name for p in (folder / TEMPLATES).iterdir() if p.is_file())
    found += [f'{TEMPLATES}/{name}' for name in inner]
  return found


def read(folder: Path, name: str) -> bytes:
  """Returns the content of a file that `side_files` named."""
  inside, _, plain = name.rpartition('/')
  return weight_files.file_inside(folder, plain, inside).read_bytes()


def differing_templates(place: str, found: Mapping[str, bytes]) -> str:
  """Returns a warning of chat templates that differ, '' without; the first is used, as in
  transformers.

  Args:
    place: the folder, for the message.
    found: {name: content} of its files.
  """
  texts = {}
  if 'chat_template.jinja' in found:
    texts['chat_template.jinja'] = found['chat_template.jinja'].decode(errors='replace')
  for name in ('tokenizer_config.json', 'chat_template.json'):
    if name in found:
      content = weight_files.parse_json(found[name], f'{place}/{name}')
      text = content.get('chat_template') if isinstance(content, dict) else None
      if isinstance(text, list):
        text = next((t.get('template') for t in text if t.get('name') == 'default'), None)
      if isinstance(text, str):
        texts[name] = text
  if len({text.removesuffix('\n') for text in texts.values()}) <= 1:
    return ''
  used, *others = texts
  return (
    f'{place}: {used} and the chat_template of {" and ".join(others)} differ; {used} is used, as '
    'in transformers. Delete the other one if that is right'
  )


def readme(path: str | os.PathLike) -> bytes:
  """Returns README.md of a model; b'' for a GGUF file, and where none of usual size can be read."""
  folder = files.as_path(locate(path, weights=False))
  try:
    is_there = folder.is_dir() and (folder / model_card.FILE).is_file()
    if not is_there or (folder / model_card.FILE).stat().st_size > _LONGEST_CARD:
      return b''
    return read(folder, model_card.FILE)
  except (DataError, OSError):  # a link to the outside; no permission
    return b''


def gguf_file(path: Path) -> Path | None:
  """Returns the GGUF file that `path` is or holds (of several parts, the first, whichever is
  given); None for a HF folder.

  Raises:
    DataError: neither, or a folder with two models.
  """
  if path.is_file():
    if path.suffix != '.gguf':
      raise DataError(
        f'{path}: a model is a HF folder or a .gguf file; for a safetensors file give its folder'
      )
    return gguf_files.first_of(path)
  if not path.is_dir():
    raise DataError(f'{path}: no such model; expected a HF folder or a .gguf file{remedy(path)}')
  found = sorted(path.glob('*.gguf'))
  tensors = sorted(path.glob('*.safetensors'))
  if tensors and found:
    raise DataError(
      f'{path}: holds {tensors[0].name} and {found[0].name}, two models. Give the .gguf file '
      'itself, or move it out of the folder to use the safetensors'
    )
  if tensors or (path / weight_files.INDEX_FILE).exists():
    return None
  if (first := gguf_files.first_part(found)) is not None:
    return first
  if len(found) > 1:
    raise DataError(
      f'{path}: holds {len(found)} GGUF files ({found[0].name}, {found[1].name}, ...); name one of '
      'them'
    )
  return found[0] if found else None


def remedy(path: Path) -> str:
  """Returns what to do about a path that does not exist, to be put behind a message; or ''."""
  text = os.fspath(path)
  if files.is_remote(path):
    return ''
  if text.startswith('~'):
    return f'. ~ is not expanded here: write {os.path.expanduser(text)}'
  if path.name in ('smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf') and '.cache' in path.parts:
    return '. `make assets` makes it'
  if path.name == 'gemma-3-270m-q4_k_m.gguf' and '.cache' in path.parts:
    return '. `make gemma` makes it, under the Gemma Terms of Use'
  if path.name == 'minilm' and '.cache' in path.parts:
    return '. `make minilm` makes it'
  near = _nearest(path)
  return f'. Did you mean {near}?' if near else ''


def _nearest(path: Path) -> str:
  """Returns the existing path most like one whose first missing part is misspelt; '' if none."""
  here, rest = path, []
  while not here.parent.is_dir():
    if here.parent == here:
      return ''
    rest.append(here.name)
    here = here.parent
  try:
    names = [p.name for p in here.parent.iterdir() if p.is_dir() or p.suffix == '.gguf']
  except OSError:
    return ''
  # Letters of either case first: names of models differ in their digits, which count.
  folded = {n.lower(): n for n in names}
  for name in difflib.get_close_matches(here.name.lower(), folded, n=3, cutoff=0.7):
    found = here.parent.joinpath(folded[name], *reversed(rest))
    if found.exists():
      return str(found)
  return ''


def no_config(folder: Path) -> DataError:
  """Returns the error for a folder without config.json: what it is instead, and what to give."""
  names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
  text = f'{folder}: config.json is missing'
  if 'adapter_config.json' in names:
    return DataError(f'{text}: {weight_files.ADAPTER_ALONE}')
  if 'params.json' in names and any(n.startswith('consolidated') for n in names):
    return DataError(
      f"{text}: these are the weights in their authors' own format. Take the folder in "
      "transformers' format, which has config.json and model.safetensors"
    )
  inner = [*(folder / n for n in names), *_snapshots(folder)]
  inner = [p for p in inner if p.is_dir() and (p / 'config.json').is_file()]
  if inner:
    return DataError(f'{text}, but {inner[0]} has one; give that folder')
  if not names:
    return DataError(f'{text}: the folder is empty; expected a HF folder')
  shown = ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')
  return DataError(
    f'{text} (unfinished download?). It holds {shown}; expected config.json, model.safetensors and '
    'the files of the tokenizer'
  )


def _snapshots(folder: Path) -> list[Path]:
  """Returns the snapshots in a folder models--ORG--NAME of the hub's cache."""
  if files.is_remote(folder) or not (folder / 'snapshots').is_dir():
    return []
  return sorted((folder / 'snapshots').iterdir())
