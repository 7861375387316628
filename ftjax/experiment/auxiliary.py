"""The auxiliary models of a run: reference, value model, reward model.

Everything that the program asks of such a model is answered here: where its weights come from,
whether it is part of the training state, is trained, is saved or read again by a resume, its
fingerprint, and what a training step or a rollout spends on it. The rows of config/algorithms.py
say which models an algorithm has.

A model in the state has its parameters under its own name beside those of the trained model:
`reference/...`, `value/...`. Where the trained model is an adapter on a frozen base, a model that
starts from the same weights shares that base, and has only the other leaves of its own."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from ftjax.cluster import processes
from ftjax.config import algorithms, section
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import adapter_folder, model_record, weights
from ftjax.families import table
from ftjax.hf import file_marks, peft, peft_weights
from ftjax.hf import load as hf_load
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.models.layers import Declared
from ftjax.runtime import sharding, trees
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AuxiliaryModel:
  """One auxiliary model.

  Attributes:
    record: its row of config/algorithms.py.
    path: folder of its own weights; '': it starts from the weights that training starts from.
    policy: architecture of the trained model.
    family: value of model.family.
  """

  record: algorithms.Auxiliary
  path: str
  policy: Architecture
  family: str

  @property
  def name(self) -> str:
    """Its name, which is also that of its parameters in the state."""
    return self.record.name

  @property
  def is_trained(self) -> bool:
    """Whether the optimizer step trains it with the policy."""
    return self.record.is_trained

  @property
  def is_in_state(self) -> bool:
    """Whether its parameters are part of the training state."""
    return self.record.place == 'state'

  @property
  def is_of_rollouts(self) -> bool:
    """Whether it is read when a rollout is made; its weights are in memory, outside the state."""
    return self.record.place == 'rollout'

  @property
  def is_cached(self) -> bool:
    """Whether only its log-probs are kept, computed once before the first step."""
    return self.record.place == 'cache'

  @property
  def is_saved(self) -> bool:
    """Whether checkpoints hold it. A frozen model is read again from where it came."""
    return self.is_in_state and self.is_trained

  @property
  def passes(self) -> int:
    """Cost of a training step in forward passes of this model: 3 for forward and backward, 1 for
    forward alone, 0 where the step does not read it.
    """
    return (3 if self.is_trained else 1) if self.is_in_state else 0

  def architecture(self, read_config: Callable[[str], dict] = hf_load.read_config) -> Architecture:
    """Returns the model's architecture: that of its folder for a model of rollouts and for one
    with an architecture of its own, else the policy's.

    read_config: folder -> config.json as a dict.
    """
    has_own = self.path and (self.is_of_rollouts or self.record.has_own_architecture)
    arch = self._of_path(read_config) if has_own else self.policy
    arch = dataclasses.replace(arch, vocab_multiple=self.policy.vocab_multiple)
    return arch.with_score() if self.record.has_score else arch.untrained()

  def _of_path(self, read_config: Callable[[str], dict]) -> Architecture:
    """Returns the architecture of the model in its folder, which may be an adapter."""
    folder = peft.find(self.path)
    if folder is not None:
      return adapter_folder.architecture(folder, self.family)
    return table.architecture(read_config(self.path), self.family)

  @property
  def shares_base(self) -> bool:
    """Whether its base leaves are those of the trained model, under an adapter."""
    if self.policy.adapter is None:
      return False
    return not self.path or (self.is_in_state and peft.find(self.path) is not None)

  def leaves(self, read_config: Callable[[str], dict] = hf_load.read_config) -> dict[str, Declared]:
    """Returns {name: declaration} of the parameters that it does not share."""
    found, shares_base = kinds.declared(self.architecture(read_config)), self.shares_base
    return {n: p for n, p in found.items() if not (shares_base and p.origin == 'base')}

  def load(
    self, first: Callable[[], dict], base_hash: Callable[[], str], mesh: Mesh, dtype: str, seed: int
  ) -> dict:
    """Returns its own weights as they are before the first step, a nested dict of sharded arrays.

    A model with a score that starts from a language model starts with score 0.

    Args:
      first: returns the weights that the trained model starts from.
      base_hash: returns the SHA-256 of the base under the trained model's adapter.
      mesh: the mesh of training.
      dtype: of all parameters that declare none.
      seed: of random weights.

    Raises:
      ConfigError, DataError: its folder holds another model than the one expected, or an adapter of
        another base.
    """
    arch = self.architecture()
    if self.path and not self.shares_base:
      return weights.load(self.path, arch, mesh, dtype, seed, self.family)
    params = weights.derived_from(first(), arch, mesh, dtype, seed)
    if self.path:
      folder = peft.find(self.path)
      peft.check_base(folder, 'model.path', base_hash())
      places = trees.flatten(sharding.shardings(mesh, kinds.axes(arch)))
      flat = trees.flatten(params)
      params = trees.unflatten(flat | peft_weights.load_adapter(folder, arch, places, flat))
    elif self.record.has_score:
      params |= {'score': jax.tree.map(jnp.zeros_like, params['score'])}
    own = self.leaves()
    return trees.select(params, lambda name: name in own)[0]

  def check(self, policy: Tokenizer, seq_len: int) -> None:
    """Checks the model's folder before anything is loaded.

    Args:
      policy: tokenizer of the trained model.
      seq_len: tokens of the rows that the model reads.

    Raises:
      ConfigError: a model without a score where one is needed, with other tokens than the policy,
        or made for shorter rows.
    """
    if not self.path:
      return
    key = f'{self.record.source_key}={self.path}'
    _check_tokens(key, Tokenizer(hf_load.tokenizer_files(self.path), self.path), policy)
    found = self._of_path(hf_load.read_config)
    if found.adapter is not None and self.is_trained and self.policy.adapter is None:
      raise ConfigError(
        f'{key} is an adapter, and all parameters are trained here: set lora.rank, or name the '
        'merged/ folder of its run'
      )
    self._check_steps(key, found)
    if self.record.has_score and not found.num_labels:
      raise ConfigError(
        f'{key} is no reward model: it has no score. Name the export/ folder of a run with '
        'algorithm=reward_model'
      )
    if self.record.has_own_architecture:
      self._check_teacher(key, found)
    if found.max_len < seq_len:
      raise ConfigError(f'{key} was made for {found.max_len} positions, seq_len={seq_len}')

  def _check_steps(self, key: str, found: Architecture) -> None:
    """Refuses a process reward model in place of a reward model, and the reverse."""
    is_of_steps = found.task == 'token' and found.num_labels == 2
    if self.record.scores_steps and not is_of_steps:
      raise ConfigError(
        f'{key} is no process reward model, which rollout.step_reward needs: name the export/ '
        'folder of a run with algorithm=prm, or leave rollout.step_reward out'
      )
    if self.record.has_score and found.num_labels and is_of_steps:
      raise ConfigError(
        f'{key} is a process reward model: set rollout.step_reward to min, product or last'
      )

  def _check_teacher(self, key: str, found: Architecture) -> None:
    """Refuses a model whose distribution of tokens cannot be compared with the policy's."""
    if found.num_labels:
      raise ConfigError(f'{key} is a reward model; expected a language model')
    if found.adapter is not None:
      raise ConfigError(f'{key} is an adapter: name the merged/ folder of its run')
    if found.vocab_size != self.policy.vocab_size:
      raise ConfigError(
        f'{key} has a vocabulary of {found.vocab_size} rows, and the trained model of '
        f'{self.policy.vocab_size}; expected equal ones'
      )

  def fingerprint(self, first: Callable[[], str], workdir: str) -> str | None:
    """Returns the sha256 that a resume must find again; None for a model whose weights a resume
    finds in the checkpoint.

    Args:
      first: the fingerprint of the weights that training starts from.
      workdir: of the run.
    """
    if not self.path:
      return None if self.is_trained else first()
    folder = peft.find(self.path)
    # Of an adapter on a base of its own also that, and what adapter_config.json says of both.
    base = '' if folder is None or self.shares_base else folder.base.path
    held = [file_marks.outline(path) for path in (self.path, base)]
    processes.check_same(self.record.source_key, digest(held))
    found = model_record.fingerprint(self.path, workdir)
    if folder is None:
      return found
    facts = self._of_path(hf_load.read_config).facts()
    return digest([found, facts, *([model_record.fingerprint(base, workdir)] if base else [])])

  def describe(self) -> str:
    """Returns a few words for the summary at the start of a run."""
    kind = self.name if self.name.endswith('model') else f'{self.name} model'
    if self.is_trained:
      return f'a {kind}, trained too'
    cached = ' (log-probs cached)' if self.is_cached else ''
    return f'the {kind} {self.path}' if self.path else f'a frozen {kind}{cached}'


def _check_tokens(key: str, found: Tokenizer, policy: Tokenizer) -> None:
  """Refuses a model that would read other tokens than the policy wrote."""
  if policy.same_tokens(found):
    return
  sizes = policy.vocab_size, found.vocab_size
  different = f'{sizes[1]} and {sizes[0]} tokens'
  pairs = ((policy.token(i), found.token(i)) for i in range(min(sizes)))
  if other := next((pair for pair in pairs if pair[0] != pair[1]), None):
    different += f', for example {other[1]!r} in place of {other[0]!r}'
  raise ConfigError(
    f'{key} has another tokenizer than the policy {policy.name}: {different}. It would read other '
    'tokens than the policy wrote; train it from a model of the same family'
  )


@dataclasses.dataclass(frozen=True)
class AuxiliaryModels:
  """The auxiliary models of a run, in the order of the algorithm's row."""

  models: tuple[AuxiliaryModel, ...]

  def __iter__(self) -> Iterator[AuxiliaryModel]:
    return iter(self.models)

  def find(self, name: str) -> AuxiliaryModel | None:
    """Returns the model of this name; None where the run has none."""
    return next((m for m in self.models if m.name == name), None)

  @property
  def in_state(self) -> tuple[AuxiliaryModel, ...]:
    """Those whose parameters are part of the training state."""
    return tuple(m for m in self.models if m.is_in_state)

  @property
  def of_rollouts(self) -> tuple[AuxiliaryModel, ...]:
    """Those that are read when a rollout is made."""
    return tuple(m for m in self.models if m.is_of_rollouts)

  def without(self, params: dict) -> dict:
    """Returns the parameters of the trained model alone."""
    names = {m.name for m in self.in_state}
    return {k: v for k, v in params.items() if k not in names}

  def passes(self, policy: Architecture) -> tuple[tuple[Architecture, int], ...]:
    """Returns the models that a training step computes with their `passes`, the policy first."""
    others = ((m.architecture(), m.passes) for m in self.in_state)
    return ((policy, 3), *others)


def find(c: ml_collections.ConfigDict, policy: Architecture) -> AuxiliaryModels:
  """Returns the auxiliary models of a config whose trained model is `policy`."""
  values = section.flat(c)
  found = algorithms.of(c).auxiliary(c)
  return AuxiliaryModels(
    tuple(AuxiliaryModel(a, values.get(a.source_key) or '', policy, c.model.family) for a in found)
  )
