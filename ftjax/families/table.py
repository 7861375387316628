"""The families that can be read, and which one a config.json or an architecture belongs to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftjax.families import (
  bert,
  deberta,
  gemma,
  gguf,
  gpt2,
  granite,
  label_head,
  llama,
  mistral,
  mixtral,
  modernbert,
  olmo,
  phi,
  qwen,
  qwen3_5,
  qwen3_moe,
  roberta,
  smollm3,
  t5,
)
from ftjax.families.family import Family
from ftjax.families.gguf_file import GgufFile
from ftjax.models.architecture import Architecture
from ftjax.runtime import named_object
from ftjax.runtime.errors import ConfigError, DataError

KEY = 'model.family'
FAMILIES: dict[str, Family] = {
  'llama': llama.LLAMA,
  'qwen2': qwen.QWEN2,
  'qwen3': qwen.QWEN3,
  'gemma2': gemma.GEMMA2,
  'gemma3': gemma.GEMMA3,
  'mixtral': mixtral.MIXTRAL,
  'qwen3_moe': qwen3_moe.QWEN3_MOE,
  'qwen3_5': qwen3_5.QWEN3_5,
  'gpt2': gpt2.GPT2,
  'smollm3': smollm3.SMOLLM3,
  'olmo2': olmo.OLMO2,
  'olmo3': olmo.OLMO3,
  'granite': granite.GRANITE,
  'granitemoehybrid': granite.GRANITE_HYBRID,
  'phi3': phi.PHI3,
  'mistral': mistral.MISTRAL,
  'ministral3': mistral.MINISTRAL3,
  'bert': bert.BERT,
  'distilbert': bert.DISTILBERT,
  'roberta': roberta.ROBERTA,
  'xlm_roberta': roberta.XLM_ROBERTA,
  'modernbert': modernbert.MODERNBERT,
  'deberta': deberta.DEBERTA,
  't5': t5.T5,
  'mt5': t5.MT5,
}


def named(name: str) -> Family:
  """Returns the family of a name in FAMILIES, or 'package.module:FAMILY'.

  Raises:
    ConfigError: there is none.
  """
  found = FAMILIES.get(name)
  return named_object.instance(KEY, name, Family) if found is None else found


def of(arch: Architecture) -> Family:
  """Returns the family of an architecture."""
  return named(arch.family)


def is_known(config: Mapping[str, Any]) -> bool:
  """Returns whether a shipped family reads this config.json."""
  return any(config.get('model_type') in f.model_types for f in FAMILIES.values())


def find(config: Mapping[str, Any], own: str = '') -> str:
  """Returns the name of the family that reads a config.json, by its model_type.

  Args:
    config: the config.json.
    own: value of model.family: a family that is asked first; '' for none.

  Raises:
    ConfigError: `own` names no family.
    DataError: no family reads it.
  """
  kind = config.get('model_type')
  families = ({own: named(own)} if own else {}) | FAMILIES
  for name, family in families.items():
    if kind in family.model_types:
      return name
  known = ', '.join(t for family in families.values() for t in family.model_types)
  raise DataError(
    f'config.json: model_type={kind!r} is not supported; supported: {known}, and the text part of '
    f'some multimodal models (docs/families.md). A family of your own is named by '
    f'{KEY}=package.module:FAMILY'
  )


def of_gguf(arch: str, metadata: Mapping[str, Any]) -> Family | None:
  """Returns the first shipped family of a general.architecture of GGUF files whose mark the
  metadata has, else the first without a mark; None without one.
  """
  found = [f for f in FAMILIES.values() if f.gguf and f.gguf.arch == arch]
  marked = [f for f in found if f.gguf.mark and metadata.get(f'{arch}.{f.gguf.mark}')]
  return next((f for f in (*marked, *found) if f in marked or not f.gguf.mark), None)


def gguf_architecture(family: Family, file: GgufFile) -> Architecture:
  """Returns the architecture of a GGUF file of a family.

  Raises:
    DataError: a key is missing, or something that is not computed here.
  """
  known = family.gguf
  embed, head = (gguf.gguf_name(family.rows, name) for name in family.tied)
  if known is None or embed not in file.shapes:
    raise DataError(f'{file.place}: {embed} is missing')
  config = {
    'model_type': family.model_types[0],
    'vocab_size': file.shapes[embed][0],
    'tie_word_embeddings': head not in file.shapes,
  }
  config |= dict(known.fixed) | known.read(file)
  try:
    found = architecture(config)
  except DataError as error:
    raise DataError(f'{file.place}, as {error}') from error
  gguf.check_settings(file, found, known)
  return found


def in_gguf(arch: Architecture) -> Architecture:
  """Returns the same model as of the family that its GGUF files are of; its leaves have the same
  names.
  """
  other = of(arch).gguf_family
  return dataclasses.replace(arch, family=other) if other else arch


def gguf_archs() -> list[str]:
  """Returns the architectures of GGUF files that shipped families have."""
  return list(dict.fromkeys(f.gguf.arch for f in FAMILIES.values() if f.gguf))


def architecture(config: Mapping[str, Any], own: str = '') -> Architecture:
  """Returns the architecture of a config.json; `own` as in `find`.

  Raises:
    ConfigError, DataError: see `find` and Family.architecture.
  """
  name = find(config, own)
  return named(name).architecture(dict(config), name)


def check_own(own: str, arch: Architecture, key: str) -> None:
  """Raises ConfigError where model.family names a family, and the model's is another.

  Args:
    own: value of model.family.
    arch: of the model, from `architecture`.
    key: what named the model, for the message.
  """
  if own and arch.family != own:
    raise ConfigError(
      f'{KEY}={own!r} reads model_type {", ".join(named(own).model_types)}, but {key} is of the '
      f'family {arch.family!r}; remove {KEY}, or give another model'
    )


def config(arch: Architecture) -> dict[str, Any]:
  """Returns a HF config.json for an architecture that came from elsewhere (GGUF, or random)."""
  name = hf_class(arch.family, label_head.CLASSES.get(arch.task, ''))
  return of(arch).write(arch) | label_head.write(arch, name)


def hf_class(family: str, task: str) -> str:
  """Returns transformers' class of a family for `ForCausalLM` or `ForSequenceClassification`."""
  found = named(family)
  scores = task == 'ForSequenceClassification' and found.score_class
  return (found.score_class if scores else found.hf_class) + task
