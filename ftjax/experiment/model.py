"""A model before its weights: architecture, tokenizer and files, read from a folder or random."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping

from ftjax.data import encode, synthetic
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import model_record
from ftjax.experiment.vocabulary import Vocabulary
from ftjax.families import hf_config, llama, table
from ftjax.families import label_head as families_head
from ftjax.hf import label_files, load, sentence_files
from ftjax.hf.label_files import Labels
from ftjax.hf.new_rows import NewRows
from ftjax.models.architecture import Architecture
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError


@dataclasses.dataclass
class Model:
  """A model before its weights: architecture, tokenizer, and the files they came from.

  source: HF folder, GGUF file or hub name; '' for a random one.
  stop_ids: tokens that end a completion: the tokenizer's, and the one its template ends turns with.
  hash_weights: returns the SHA-256 of the weights' content. new_rows: of tokens that are added to
  the model; None without.
  """

  source: str
  arch: Architecture
  tokenizer: Tokenizer
  stop_ids: tuple[int, ...]
  config: dict
  files: dict[str, bytes]
  hash_weights: Callable[[], str]
  new_rows: NewRows | None = None

  @functools.cached_property
  def fingerprint(self) -> str:
    """The SHA-256 of the weights' content and of the architecture; all processes ask for it.

    The same weights under another rope or another epsilon are another model; padding in memory
    makes none. Before the weights are loaded this reads them; see model_record.py.
    """
    facts = dataclasses.replace(self.arch.plain(), vocab_multiple=1).facts()
    new = [dataclasses.asdict(self.new_rows)] if self.new_rows else []
    return digest([self.hash_weights(), facts, *new])


def random_config(random: dict) -> dict:
  """Returns model.random as a HF config.json, complete for the family `llama`."""
  config = {'model_type': 'llama', 'vocab_size': synthetic.VOCAB_SIZE} | random
  kind = config['model_type']
  if kind in ('t5', 'mt5'):
    config = {'is_encoder_decoder': True, 'decoder_start_token_id': 0, 'pad_token_id': 0} | config
  elif kind != 'gpt2':  # which has no such key
    config = {'num_key_value_heads': None} | config  # as many as heads
  if kind == 'llama':
    return llama.DEFAULTS | config
  pad = hf_config.class_defaults(str(kind)).get('pad_token_id')
  if pad is not None and isinstance(config['vocab_size'], int) and pad >= config['vocab_size']:
    config = {'pad_token_id': None} | config  # transformers refuses an id beyond the vocabulary
  return config


def open_model(
  path: str,
  random: dict,
  seed: int,
  head: Labels | None = None,
  workdir: str = '',
  family: str = '',
  vocabulary: Vocabulary = Vocabulary(),  # noqa: B008 - frozen
  tokenizer_files: Mapping[str, bytes] | None = None,
  encoders: bool = False,
) -> Model:
  """Reads config and tokenizer of a model, and none of its weights.

  Args:
    path: HF folder, GGUF file or hub name; '' for a random model.
    random: a HF config to make a random model from.
    seed: of the random weights.
    head: the labels that the model is given, label_files.REWARD of a reward model; None for a
      language model.
    workdir: whose record may hold the fingerprint of the weights.
    family: value of model.family.
    vocabulary: what the config changes of the vocabulary.
    tokenizer_files: in place of those of `path`, such as an adapter's.
    encoders: whether an encoder may be a language model here, which predicts masked tokens.

  Raises:
    ConfigError: a model with labels where a language model is wanted, an encoder where a text is
      generated or learned, a model of another family, or a token that cannot be added.
  """
  if path:
    found = load.tokenizer_files(path)
    if tokenizer_files is not None:
      kept = {n: found[n] for n in ('generation_config.json',) if n in found}
      found = kept | dict(tokenizer_files) | {'config.json': found['config.json']}
    config = load.read_config(path)
    hash_weights = functools.partial(model_record.fingerprint, path, workdir)
  else:
    found = synthetic.byte_tokenizer()
    config = random_config(random)
    found['config.json'] = json.dumps(config).encode()
    hash_weights = functools.partial(digest, [config, seed])
  name = path or 'model.random'
  found, config, tokenizer, rows = vocabulary.apply(found, config, name)
  arch = table.architecture(config, family)
  table.check_own(family, arch, f'model.path={path}' if path else 'model.random')
  check_writes(arch, path, head, encoders)
  if tokenizer.vocab_size > arch.vocab_size:
    raise DataError(
      f'{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {arch.vocab_size}'
    )
  end = encode.turn_end(tokenizer)
  stops = tuple(dict.fromkeys((*tokenizer.stop_ids, *([] if end is None else [end]))))
  if head is not None:
    found, config = label_files.describe(arch.family, found, config, tokenizer, stops, head)
    arch = table.architecture(config, family)
    if head.is_embedding:
      found |= sentence_files.of_model(arch, head)
  elif arch.is_encoder and arch.masked_head is None:
    config = dict(config) | {'architectures': [table.hf_class(arch.family, 'ForMaskedLM')]}
    arch = table.architecture(config, family)
  arch = dataclasses.replace(arch, vocab_multiple=vocabulary.multiple)
  return Model(path, arch, tokenizer, stops, config, found, hash_weights, rows)


def label_head(path: str, family: str = '') -> Labels | None:
  """Returns the labels of a model's own files; None of a language model."""
  config = load.read_config(path)
  arch = table.architecture(config, family)
  if not arch.num_labels:
    return None
  problem = config.get('problem_type')
  known = problem if problem in label_files.PROBLEMS else ''
  return Labels(arch.task, () if arch.task == 'span' else label_names(arch), known)


def label_names(arch: Architecture) -> tuple[str, ...]:
  """Returns the names of a model's labels in the order of their numbers."""
  return arch.labels or families_head.default_names(arch.num_labels)


def check_writes(arch: Architecture, path: str, head: Labels | None, encoders: bool) -> None:
  """Raises ConfigError where a language model is wanted and the model is none; see `open_model`."""
  if head is not None:
    return
  if arch.num_labels == 1:
    raise ConfigError(f'model.path={path} is a reward model; it scores text and cannot write it')
  if arch.num_labels:
    raise ConfigError(
      f'model.path={path} is a classifier of {arch.num_labels} labels; it cannot write text'
    )
  if arch.is_encoder and not encoders:
    raise ConfigError(
      f'model.path={path}: the family {arch.family!r} is an encoder, whose tokens attend to later '
      'ones: it cannot learn to write text. Give a decoder (docs/families.md), or an algorithm '
      'that labels text or predicts masked tokens'
    )
