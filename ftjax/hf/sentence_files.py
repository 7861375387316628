"""The files of a model folder that make it one of sentence-transformers: how a vector of a text
follows from the states of its tokens.

modules.json lists the steps; 1_Pooling/config.json has the pooling, in the form that all versions
of the library read. Written vectors have length 1 (2_Normalize), since training compares cosines.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftjax.hf import model_folder, weight_files
from ftjax.hf.gguf_tokenizer import dump_json
from ftjax.hf.label_files import Labels
from ftjax.models import score_head
from ftjax.models.architecture import Architecture
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files as files_lib

_MODULES, _POOLING, _LENGTH = model_folder.SENTENCE_FILES
_LIBRARY = 'sentence_transformers.models.'
# Our names of pools, and the library's older and newer ones.
_OLD = {
  'first': 'pooling_mode_cls_token',
  'mean': 'pooling_mode_mean_tokens',
  'last': 'pooling_mode_lasttoken',
}
_NEW = {'cls': 'first', 'mean': 'mean', 'lasttoken': 'last'}
_OTHERS = (
  *('pooling_mode_max_tokens', 'pooling_mode_mean_sqrt_len_tokens'),
  'pooling_mode_weightedmean_tokens',
)


def files(pool: str, dim: int, max_tokens: int) -> dict[str, bytes]:
  """Returns the files by name.

  Args:
    pool: 'mean', 'first' or 'last'.
    dim: D, numbers of a vector.
    max_tokens: longest text; the library cuts longer ones.
  """
  steps = [
    ('', 'Transformer'),
    (os.path.dirname(_POOLING), 'Pooling'),
    ('2_Normalize', 'Normalize'),
  ]
  modules = [
    {'idx': i, 'name': str(i), 'path': path, 'type': f'{_LIBRARY}{name}'}
    for i, (path, name) in enumerate(steps)
  ]
  modes = dict.fromkeys((*_OLD.values(), *_OTHERS), False) | {_OLD[pool]: True}
  return {
    _MODULES: dump_json(modules),
    _POOLING: dump_json({'word_embedding_dimension': dim} | modes),
    _LENGTH: dump_json({'max_seq_length': max_tokens, 'do_lower_case': False}),
  }


def of_model(arch: Architecture, labels: Labels) -> dict[str, bytes]:
  """Returns the files of a model of vectors."""
  longest = min(labels.max_tokens or arch.max_len, arch.max_len)
  return files(labels.pool or score_head.usual_pool(arch), arch.model_dim, longest)


def pool_in(found: Mapping[str, bytes]) -> str:
  """Returns the pool of the files of a model of vectors; '' where they have none."""
  if _POOLING not in found:
    return ''
  return _pool(weight_files.parse_json(found[_POOLING], _POOLING), _POOLING)


def find_pool(path: str | os.PathLike) -> str:
  """Returns the pool of a model folder, or of a name on the hub; '' for one that is not of
  sentence-transformers.

  Raises:
    ConfigError: a pool, or a step after it, that is not computed here.
    DataError: files that cannot be read.
  """
  folder = files_lib.as_path(model_folder.locate(path, weights=False))
  if not (folder / _MODULES).is_file():
    return ''
  steps = _json(folder, _MODULES)
  if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
    raise DataError(f'{folder / _MODULES}: expected a list of modules')
  kinds = {str(s.get('type', '')).rpartition('.')[2]: s for s in steps}
  if further := [kind for kind in kinds if kind not in ('Transformer', 'Pooling', 'Normalize')]:
    raise ConfigError(
      f'{folder / _MODULES}: the step {further[0]} is not computed here; set embedding.pool to '
      'train vectors without it'
    )
  if 'Pooling' not in kinds:
    return ''
  name = str(kinds['Pooling'].get('path', ''))
  if name != os.path.dirname(_POOLING) or not (folder / _POOLING).is_file():
    raise DataError(f'{folder / _MODULES}: the folder of Pooling is {name!r}; expected 1_Pooling')
  return _pool(_json(folder, _POOLING), folder / _POOLING)


def _json(folder: Path, name: str) -> Any:
  return weight_files.parse_json(model_folder.read(folder, name), str(folder / name))


def _pool(config: Any, place: Path | str) -> str:
  config = config if isinstance(config, dict) else {}
  modes = config.get('pooling_mode')
  if modes is None:
    known = {old: own for own, old in _OLD.items()}
    set_ = [k for k, v in config.items() if k.startswith('pooling_mode_') and v is True]
    found = [known.get(k, '') for k in set_]
  else:
    set_ = modes if isinstance(modes, list) else [modes]
    found = [_NEW.get(str(m), '') for m in set_]
  if len(found) != 1 or not found[0]:
    raise ConfigError(
      f'{place}: the pooling is {set_}, which is not computed here; set embedding.pool to mean, '
      'first or last, to train with another one'
    )
  return found[0]
