"""A config on a mesh, with its model and data. fit.py trains a run, compare.py evaluates it."""

import dataclasses
import fractions
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding

from ftjax.cluster import processes
from ftjax.cluster.watchdog import Watchdog
from ftjax.config import algorithms, section
from ftjax.data.batches import ARRAYS, eval_batches
from ftjax.data.sides import ARRAYS as SOURCE_ARRAYS
from ftjax.data.token_cache import Corpus
from ftjax.experiment import (
  adapters,
  dropout,
  evaluation_names,
  init_from,
  label_names,
  model_record,
  preflight,
  size_checks,
  vocabulary,
  weights,
)
from ftjax.experiment import auxiliary as auxiliary_lib
from ftjax.experiment import data as examples
from ftjax.experiment.auxiliary import AuxiliaryModel, AuxiliaryModels
from ftjax.experiment.model import Model, open_model
from ftjax.hf import file_marks, peft, peft_weights
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.models.forward import Forward
from ftjax.models.layers import Declared
from ftjax.models.routing import RouterLog
from ftjax.runtime import sharding, trees
from ftjax.runtime.digest import digest
from ftjax.storage import files, program_cache
from ftjax.training.prefetch import local_rows, place

log = logging.getLogger(__name__)


def batches_in(epochs: float, rows: int, batch_size: int) -> int:
  """Returns how many batches hold `epochs` passes over `rows`, at least 1; the last may go over.

  `epochs` counts as the simplest fraction that is the same float: 1.1 as 11/10 and 5/3 as 5/3, so
  that 1.1 epochs of 100 rows in batches of 10 are 11 batches; in floats 1.1 * 100 is above 110.
  """
  limits = (10**digits for digits in range(1, 17))
  exact = fractions.Fraction(epochs)
  simple = (exact.limit_denominator(limit) for limit in limits)
  chosen = next((f for f in simple if float(f) == epochs), exact)
  return max(1, math.ceil(chosen * rows / batch_size))


@dataclasses.dataclass
class Run:
  """A config on the mesh of one machine or of several."""

  config: ml_collections.ConfigDict
  workdir: str
  mesh: Mesh
  model: Model
  data: examples.Data | examples.PromptData | None  # None: the run trains nothing
  watchdog: Watchdog
  router_log: RouterLog = dataclasses.field(default_factory=RouterLog)

  @property
  def arch(self) -> Architecture:
    return self.model.arch

  @property
  def forward(self) -> Forward:
    """The forward pass of the model as the config computes it."""
    c = self.config
    dropped = self.dropout
    return Forward(
      self.arch,
      jnp.dtype(c.model.compute_dtype),
      c.remat,
      label_dropout=dropped.classifier,
      rates=dropped.inner,
      router_log=self.router_log,
    )

  @property
  def dropout(self) -> dropout.Dropped:
    """The rates of dropout in a training step."""
    return dropout.find(self.config, self.arch, self.model.config)

  @property
  def steps(self) -> int:
    """Optimizer updates in all. Without data 1000, if the config gives epochs instead of steps."""
    c = self.config
    if self.data is None:
      return c.steps or 1000
    rows, taken = self.data.mixture.rows_per_epoch, algorithms.prompts_per_rollout(c)
    return c.steps or batches_in(c.epochs, rows, taken) * algorithms.steps_per_batch(c)

  @property
  def last_step(self) -> int:
    """The step after which this start ends."""
    c = self.config
    return min(self.steps, c.stop_at or self.steps)

  def cursor(self, step: int) -> int:
    """Returns the rows, or prompts, that are consumed after `step` updates. Several updates may use
    one batch.
    """
    c = self.config
    taken = -(-step // algorithms.steps_per_batch(c))
    return taken * algorithms.prompts_per_rollout(c)

  @property
  def auxiliary(self) -> AuxiliaryModels:
    """The models of the run beside the one it trains."""
    return auxiliary_lib.find(self.config, self.arch)

  def passes(self) -> tuple[tuple[Architecture, int], ...]:
    """Returns the models that a training step computes, with 3 for forward and backward, 1 for
    forward alone and 0 for none; all of them twice where the step takes two gradients, or makes
    two passes.
    """
    c = self.config
    found = self.auxiliary.passes(self.arch)
    return found * ((2 if c.optim.sam_radius else 1) * (2 if c.loss.r_drop else 1))

  def trained_archs(self) -> dict[str, Architecture]:
    """Returns the architecture of each model that the optimizer trains, by the prefix of its
    parameters' names; '' is the model itself.
    """
    others = {f'{m.name}/': m.architecture() for m in self.auxiliary.in_state if m.is_trained}
    return {'': self.arch} | others

  def trained_leaves(self) -> dict[str, Declared]:
    """Returns {name: declaration} of the parameters of all models that the optimizer trains. Leaves
    that a model shares with another are not repeated.
    """
    out = dict(kinds.declared(self.arch))
    for model in self.auxiliary.in_state:
      if model.is_trained:
        out |= {f'{model.name}/{n}': p for n, p in model.leaves().items()}
    return out

  def parameter_names(self, of: Callable[[Declared], bool]) -> set[str]:
    """Returns the names of the trained models' parameters whose declaration `of` is true for."""
    return {n for n, p in self.trained_leaves().items() if of(p)}

  def parameter_shardings(self) -> dict:
    """Returns the shardings of the trained models' parameters, a nested dict of NamedSharding."""
    leaves = self.trained_leaves()
    return sharding.shardings(self.mesh, trees.unflatten({n: p.axes for n, p in leaves.items()}))

  def abstract_params(self) -> dict:
    """Returns the parameters of the trained models, a nested dict of ShapeDtypeStruct."""
    return self.abstract_leaves(self.trained_leaves())

  def abstract_leaves(self, leaves: Mapping[str, Declared]) -> dict:
    """Returns declared parameters as a nested dict of ShapeDtypeStruct."""
    usual = self.config.model.param_dtype
    return trees.unflatten(
      {n: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype or usual)) for n, p in leaves.items()}
    )

  def batch_shardings(self, micro: bool) -> dict[str, NamedSharding]:
    """Returns the shardings of a batch: of arrays [A, M, T] with `micro`, else [B, T]; arrays of
    whole rows have no T.
    """
    axes = (None, 'batch') if micro else ('batch',)
    by_token, by_row = algorithms.of(self.config).fields(self.config)
    names = (*ARRAYS, *by_token, *(SOURCE_ARRAYS if algorithms.source_len(self.config) else ()))
    by_row = (*by_row, *algorithms.of(self.config).documents(self.config))
    wide = algorithms.of(self.config).wide(self.config)
    groups = ((names, (*axes, 'seq')), (by_row, axes), (wide, (*axes, 'seq', None)))
    return {
      name: NamedSharding(self.mesh, sharding.spec(*where))
      for group, where in groups
      for name in group
    }

  def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a step's batch, with shardings."""
    c = self.config
    shape = (c.grad_accum, algorithms.rows_per_step(c) // c.grad_accum, c.seq_len)
    by_token, by_row = algorithms.of(c).fields(c)
    whole = dict.fromkeys(by_row, ()) | dict(algorithms.of(c).documents(c))
    known = dict.fromkeys((*ARRAYS, *by_token), (shape, 'int32'))
    known |= dict.fromkeys(('weights', *by_token), (shape, 'float32'))
    known |= {k: ((*shape[:2], *rest), 'float32') for k, rest in whole.items()}
    known |= {k: ((*shape, n), dtype) for k, (n, dtype) in algorithms.of(c).wide(c).items()}
    source = ((*shape[:2], algorithms.source_len(c)), 'int32')
    known |= dict.fromkeys(SOURCE_ARRAYS, source)
    return {
      k: jax.ShapeDtypeStruct(known[k][0], jnp.dtype(known[k][1]), sharding=s)
      for k, s in self.batch_shardings(micro=True).items()
    }

  def eval_batches(self) -> Iterator[dict[str, jax.Array]]:
    """Yields device arrays [B, T] over the evaluation rows."""
    return self.batches_of(self.data.evaluation)

  def batches_of(self, corpora: Sequence[Corpus]) -> Iterator[dict[str, jax.Array]]:
    """Yields device arrays [B, T] over all rows of corpora, in order."""
    c, where = self.config, self.batch_shardings(micro=False)
    shape = (c.eval.batch_size, c.seq_len)
    settings = dict(packed=algorithms.is_packed(c), documents=algorithms.of(c).documents(c))
    settings |= {'wanted': local_rows(where['tokens'], shape, 0), 'sides': self.data.sides}
    for corpus in corpora:
      for batch in eval_batches(corpus, *shape, **settings):
        yield place(batch, {k: where[k] for k in batch})

  def load_params(self, source: str, dtype: str) -> dict:
    """Returns the model's weights from a folder, or random ones by the seed where it is ''. A
    nested dict of sharded arrays.
    """
    return self._load(source, self.arch, dtype)

  def _load(self, source: str, arch: Architecture, dtype: str) -> dict:
    c = self.config
    with self.watchdog.phase('restore'):
      if source and (source == self.model.source or c.init_from):
        model_record.hash_while_loading(source, self.workdir)  # a resume needs its fingerprint
      new = self.model.new_rows
      return weights.load(source, arch, self.mesh, dtype, c.seed, c.model.family, new)

  @property
  def first_source(self) -> str:
    """Folder of the weights that training starts from, of init_from or model.path; '': random. Of
    an adapter run its base.
    """
    return init_from.find(self.config).base or self.model.source

  def first_hash(self) -> str:
    """Returns the SHA-256 of the weights' content in `first_source`; all processes ask for it."""
    source = self.first_source
    if source == self.model.source:
      return self.model.hash_weights()
    return model_record.fingerprint(source, self.workdir)

  def load_first(self) -> dict:
    """Returns the model's weights as they are before the first step.

    Raises:
      DataError: the adapter of init_from was trained on another base.
      ConfigError: the section lora describes another adapter than that.
    """
    source, dtype = self.first_source, self.config.model.param_dtype
    adapter = init_from.find(self.config).adapter
    if not adapter:
      return self.load_params(source, dtype)
    folder = peft.read(adapter)
    peft.check_same(folder, self.arch)  # before the base is read
    params = self.load_params(source, dtype)
    with self.watchdog.phase('restore'):
      peft.check_base(folder, source or 'model.random', self.first_hash())
      places = trees.flatten(sharding.shardings(self.mesh, kinds.axes(self.arch)))
      flat = trees.flatten(params)
      leaves = peft_weights.load_adapter(folder, self.arch, places, flat)
    return trees.unflatten(flat | leaves)

  def load_auxiliary(self, model: AuxiliaryModel, first: dict | None = None) -> dict:
    """Returns the own weights of an auxiliary model as they are before the first step. Arrays of
    `first` may be among them.

    first: what `load_first` returns, where it is in memory.
    """
    c = self.config
    if model.shares_base and not model.leaves():
      return {}  # the base would be in memory twice while it is read
    with self.watchdog.phase('restore'):
      if model.path:
        model_record.hash_while_loading(model.path, self.workdir)
      load_first = self.load_first if first is None else lambda: first
      return model.load(load_first, self.first_hash, self.mesh, c.model.param_dtype, c.seed)


def start(c: ml_collections.ConfigDict, workdir: str, with_data: bool = True) -> Run:
  """Returns a run without weights and state; sets the mesh of the process.

  Raises:
    ConfigError: a mesh or batch that does not divide, or a workdir that cannot be written.
    CheckError: the hosts differ; see preflight.py.
    DataError: model or data files that cannot be used.
  """
  watchdog = Watchdog(c.watchdog.to_dict())
  with watchdog.phase('restore'):
    workdir = files.absolute(workdir)  # Orbax takes no relative path
    # Before the workdir is made, perhaps in a folder that has the name of an organization.
    pinned = _pin_models(c, workdir)
    preflight.check(c, workdir, is_training=with_data)
    evaluation_names.check(c)
    model_record.keep_commits(pinned, workdir)
    configure_jax(c)
    if keeps_programs(c):
      _keep_programs(program_folder(workdir))
    elif not processes.is_alone():
      jax.config.update('jax_enable_compilation_cache', False)
    mesh = sharding.make_mesh({a: c.mesh[a] for a in sharding.AXES})
    jax.set_mesh(mesh)
    label_names.resolve(c, workdir)
    wanted = vocabulary.of(section.flat(c))
    model = open_model(
      *(c.model.path, c.model.random.to_dict(), c.seed, label_names.head(c)),
      *(workdir, c.model.family, wanted),
      encoders=algorithms.of(c).predicts_masked,
    )
    label_names.resolve_mask(c, model)
    continued = bool(c.lora.rank and init_from.find(c).adapter)
    model = dataclasses.replace(model, arch=adapters.adapted(model.arch, c, continued))
    read = [file_marks.outline(c.model.path), model.tokenizer.fingerprint, model.stop_ids]
    processes.check_same('model.path', digest(read))
  size_checks.check(c, model.arch, mesh)
  dropout.check(c, model.arch, model.config)
  data = None
  if with_data:
    with watchdog.phase('tokenize'):
      if not processes.is_alone():
        share = (jax.process_index(), jax.process_count())
        examples.tokenize_share(c, model.tokenizer, workdir, *share)
        processes.wait_for_all()
      # The other processes read from the shared cache what the first one wrote.
      data = processes.main_first(lambda: examples.open_data(c, model.tokenizer, workdir))
      processes.check_same('data', digest(data.fingerprints()))
    data.log_summary()
  return Run(c, workdir, mesh, model, data, watchdog)


def _pin_models(c: ml_collections.ConfigDict, workdir: str) -> dict[str, str]:
  """Puts the commits of hub models into the config; returns {path as given: path with commit}."""
  others = [a.source_key for a in algorithms.of(c).auxiliary(c) if a.source_key]
  others += ['init_from'] if c.lora.rank else []  # an adapter, which a resume reads again
  values, pinned = section.flat(c), {}
  for key in ('model.path', *others):
    pinned[values[key]] = model_record.pin(values[key], workdir)
    c.update_from_flattened_dict({key: pinned[values[key]]})
  return pinned


def without_data(c: ml_collections.ConfigDict, mesh: Mesh, arch: Architecture) -> Run:
  """Returns a run without data and files, to compile its step; `mesh` is the current one.

  Raises:
    ConfigError: a size that does not divide.
  """
  arch = adapters.adapted(arch, c)
  size_checks.check(c, arch, mesh)
  return Run(
    c, '', mesh, Model('', arch, None, (), {}, {}, str), None, Watchdog(c.watchdog.to_dict())
  )


def configure_jax(c: ml_collections.ConfigDict) -> None:
  """Makes the process compute exact float32 products if compute_dtype is float32."""
  precise = c.model.compute_dtype == 'float32'
  jax.config.update('jax_default_matmul_precision', 'highest' if precise else 'default')


def keeps_programs(c: ml_collections.ConfigDict) -> bool:
  """Returns whether the run has a compile cache. With several processes on CPUs, a step that was
  read from one hangs in its first collective (jax 0.12).
  """
  return c.compile_cache and (processes.is_alone() or jax.default_backend() != 'cpu')


def program_folder(workdir: str) -> str:
  """Returns the folder of compiled programs, unless JAX_COMPILATION_CACHE_DIR names another."""
  return files.join(workdir, 'xla_cache')


def _keep_programs(folder: str) -> None:
  """Keeps compiled programs in `folder`, and removes damaged entries first. A folder of the user's
  own is left unchanged: other runs may be writing to it.
  """
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    processes.from_main(lambda: program_cache.check(folder))
    jax.config.update('jax_compilation_cache_dir', folder)
  if not os.environ.get('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # XLA's own caches would put the folder's path into the key: a workdir that moved would miss.
  jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
