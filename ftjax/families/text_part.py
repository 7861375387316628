"""The text model inside the folder of a multimodal one: its config.json and its tensors.

The folder is read as if it held the text model alone, under the names of transformers' class for
text. What belongs to the other parts is named by the family, and left out; anything else is an
error as everywhere.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ftjax.families.hf_config import HfConfig
from ftjax.runtime.errors import DataError

_TIED = 'tie_word_embeddings'


@dataclasses.dataclass(frozen=True)
class TextPart:
  """Where a family's text model stands in a multimodal folder.

  model_type: of the whole; its config.json has that of the text model as text_config. text_type:
  model_type of text_config. hf_class: transformers' class of the text model, 'Qwen3_5ForCausalLM'.
  prefixes: (beginning of a tensor's name, what the text model has in its place). left_out:
  beginnings of the names of tensors that belong to other parts. keys: of the outer config.json that
  describe other parts.
  """

  model_type: str
  text_type: str
  hf_class: str
  prefixes: tuple[tuple[str, str], ...]
  left_out: tuple[str, ...]
  keys: frozenset[str]

  def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the text model; of another config.json the same.

    Raises:
      DataError: text_config is missing or of another type, or the two differ in what ties the head.
    """
    if config.get('model_type') != self.model_type:
      return dict(config)
    text = HfConfig(config).mapping('text_config')
    if not text:
      raise DataError(
        f'config.json: model_type={self.model_type!r} has no text_config; for a folder of the text '
        f'model alone, model_type is {self.text_type!r}'
      )
    if text.get('model_type', self.text_type) != self.text_type:
      raise DataError(
        f'config.json: text_config.model_type={text["model_type"]!r}; expected {self.text_type!r}'
      )
    if _TIED in config and text.get(_TIED, config[_TIED]) != config[_TIED]:
      raise DataError(
        f'config.json: {_TIED}={config[_TIED]!r} and text_config has {text[_TIED]!r}; set both to '
        'true if the weights hold no lm_head.weight, else to false'
      )
    own = {'model_type', 'architectures', 'text_config'} | self.keys
    others = {k: v for k, v in config.items() if k not in own}
    return others | text | {'architectures': [self.hf_class], 'model_type': self.text_type}

  def names(self, stored: Iterable[str]) -> dict[str, str]:
    """Returns {name of a text model's tensor: its name in the files}, without those left out.

    Raises:
      DataError: two tensors have one name.
    """
    out: dict[str, str] = {}
    for name in stored:
      if name.startswith(self.left_out):
        continue
      found = ((old, new) for old, new in self.prefixes if name.startswith(old))
      old, new = next(found, ('', ''))
      own = new + name.removeprefix(old)
      if own in out:
        raise DataError(f'the weights hold {out[own]} and {name}, which are one tensor; delete one')
      out[own] = name
    return out
