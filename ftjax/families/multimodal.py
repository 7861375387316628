"""Models of several modalities, of which the text part is read: its config.json and the names of
its tensors.

Such a config.json has the text model's own under text_config, and the files have its tensors under
a prefix. What belongs to images is left out by name; a tensor or key that is in no list here is an
error. What is written is the text model alone, with the names that its own class has.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ftjax.families import hf_config, label_head, table
from ftjax.families.hf_config import HfConfig
from ftjax.runtime.errors import DataError

TIED, TEXT = 'tie_word_embeddings', 'text_config'
MODULES = 'model.'  # begins the names of the modules of a text model
# Keys beside text_config that say how text is classified, stored or generated.
_INHERITED = (
  *('id2label', 'label2id', 'num_labels', 'problem_type', 'quantization_config', 'dtype'),
  *('torch_dtype', 'transformers_version', 'bos_token_id', 'eos_token_id', 'pad_token_id'),
)


@dataclasses.dataclass(frozen=True)
class Wrapper:
  """A model with a text part.

  text_types: model_types of the text part; the first is that of a text_config without one. keys: of
  config.json beside text_config, which change nothing in the text part. left_out: names of the
  tensors that belong to other parts. prefixes: (beginning of a tensor's name in the files, what
  takes its place), the first that fits counts; two spellings are common. head: the name of the text
  part's head. modules: what begins the names of the text part's modules in transformers' class, in
  place of 'model.'; adapters of PEFT have these names.
  """

  text_types: tuple[str, ...]
  keys: frozenset[str]
  left_out: re.Pattern
  prefixes: tuple[tuple[str, str], ...] = (
    ('language_model.model.', 'model.'),
    ('language_model.lm_head.', 'lm_head.'),
    ('model.language_model.', 'model.'),
  )
  head: str = 'lm_head.weight'
  modules: str = 'model.language_model.'

  def name(self, stored: str) -> str | None:
    """Returns what the text model calls a tensor of the files; None where it is left out. A name
    that is not known here stays as it is.
    """
    if self.left_out.fullmatch(stored):
      return None
    for prefix, own in self.prefixes:
      if stored.startswith(prefix):
        return own + stored.removeprefix(prefix)
    return stored


_IMAGES = re.compile(r'(model\.)?(vision_tower|multi_modal_projector)\..*')
# model_type of the config.json -> how its text part is found.
WRAPPERS = {
  'gemma3': Wrapper(
    text_types=('gemma3_text',),
    keys=frozenset(
      (
        *('vision_config', 'mm_tokens_per_image', 'image_token_index', 'boi_token_index'),
        *('eoi_token_index', 'image_token_id', 'boi_token_id', 'eoi_token_id'),
      )
    ),
    left_out=_IMAGES,
  ),
  # `mtp` predicts tokens beyond the next one.
  'qwen3_5': Wrapper(
    text_types=('qwen3_5_text',),
    keys=frozenset(
      (
        *('vision_config', 'image_token_id', 'video_token_id'),
        *('vision_start_token_id', 'vision_end_token_id'),
      )
    ),
    left_out=re.compile(r'(model\.)?visual\..*|mtp\..*'),
    modules=MODULES,  # AutoModelForCausalLM makes a model of the text part alone
  ),
  'mistral3': Wrapper(
    text_types=('mistral', 'ministral3'),
    keys=frozenset(
      (
        *('vision_config', 'vision_feature_layer', 'spatial_merge_size', 'image_token_index'),
        *('image_token_id', 'multimodal_projector_bias', 'projector_hidden_act'),
      )
    ),
    left_out=_IMAGES,
  ),
}


def of(config: Mapping[str, Any]) -> Wrapper | None:
  """Returns how the text part of a config.json is found; None where it is a text model's own."""
  return WRAPPERS.get(str(config.get('model_type')))


def own_name(name: str, modules: str) -> str:
  """Returns what a tensor or module of a text model is called in a class whose text part has names
  that begin with `modules`.
  """
  return modules + name.removeprefix(MODULES) if name.startswith(MODULES) else name


def beginnings() -> list[str]:
  """Returns what may begin the names of the modules of a text part, in any wrapper."""
  found = [w.modules for w in WRAPPERS.values()]
  found += [old for w in WRAPPERS.values() for old, new in w.prefixes if new == MODULES]
  return [p for p in dict.fromkeys(found) if p != MODULES]


def text_config(config: dict[str, Any], names: Callable[[], Collection[str]]) -> dict[str, Any]:
  """Returns the config.json of the text part; a text model's own as it is.

  Args:
    config: the config.json.
    names: returns the names of the tensors in the files; asked where the config.json leaves open
      whether the head is the embedding.

  Raises:
    DataError: there is no text_config, it is of a model_type that is not supported, or a key beside
      it may change the computation and is not known.
  """
  wrapper = of(config)
  if wrapper is None:
    return config
  c = HfConfig(config)
  text = c.mapping(TEXT)
  if not text:
    raise DataError(
      f'config.json: model_type={c.model_type!r} has no {TEXT}, which describes its text part'
    )
  kind = text.get('model_type') or wrapper.text_types[0]
  if kind not in wrapper.text_types:
    raise DataError(
      f'config.json: {TEXT} has model_type={kind!r}, which is not supported in '
      f'model_type={c.model_type!r}; supported: {", ".join(wrapper.text_types)}'
    )
  hf_config.check_names(config, wrapper.keys | {TEXT, TIED, *_INHERITED})
  inherited = {k: config[k] for k in _INHERITED if config.get(k) is not None}
  task = label_head.CLASSES.get(label_head.task(c), 'ForCausalLM')
  found = inherited | text
  found['model_type'] = kind
  found['architectures'] = [table.hf_class(table.find(found), task)]
  found[TIED] = _tied(c, HfConfig(found), names, wrapper)
  return found


def _tied(
  c: HfConfig, text: HfConfig, names: Callable[[], Collection[str]], wrapper: Wrapper
) -> bool:
  """Returns whether the head is the embedding.

  transformers 4 reads the flag of text_config and 5 the one beside it, which its classes write
  though it may differ; both go by the files where these have a head. So do we where they differ.
  """
  inner, outer = text.flag(TIED, of_class=True), c.flag(TIED, of_class=True)
  if inner == outer:
    return inner
  return wrapper.head not in {wrapper.name(n) for n in names()}
