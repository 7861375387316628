"""The one place that wires a config to mesh, tokenizer, model and data. fit.py trains what stands
here, compare.py judges it.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ftjax import config as config_lib
from ftjax.data import cache, encode, made, prompts, sources
from ftjax.data.batches import Stream, eval_batches
from ftjax.data.schedule import Mixture, SourceSchedule
from ftjax.data.tokenizer import Tokenizer
from ftjax.hf import load
from ftjax.models import transformer
from ftjax.models.architecture import Architecture, from_hf
from ftjax.runtime import files, peers, sharding
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.runtime.manifest import digest
from ftjax.runtime.watchdog import Watchdog
from ftjax.training.feed import local_rows, place

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Model:
  """A model before its weights: architecture, tokenizer, and the files they came from.

  stop_ids: tokens that end an answer: the tokenizer's, and the one its template ends turns with.
  source: HF folder or GGUF file, '' for a random one. fingerprint: sha256 of the weights' content
  and of the architecture.
  """

  source: str
  arch: Architecture
  tokenizer: Tokenizer
  stop_ids: tuple[int, ...]
  config: dict
  files: dict[str, bytes]
  fingerprint: str


@dataclasses.dataclass
class Data:
  """Training rows by step, and evaluation rows; see data/."""

  stream: Stream
  mixture: Mixture
  corpora: list[cache.Corpus]
  evaluation: list[cache.Corpus]

  def fingerprints(self) -> dict[str, str]:
    """sha256 of the order of training rows, and of each source."""
    groups = {'data': self.corpora, 'eval': self.evaluation}
    named = {f'{k} {i}': x.fingerprint for k, xs in groups.items() for i, x in enumerate(xs)}
    return {'data order': self.mixture.fingerprint} | named


@dataclasses.dataclass
class PromptData:
  """Prompts by number, and held-out ones; see data/prompts.py."""

  mixture: Mixture
  sources: list[prompts.Prompts]
  evaluation: list[prompts.Prompts]

  def fingerprints(self) -> dict[str, str]:
    """sha256 of the order of prompts, and of each source."""
    groups = {'data': self.sources, 'eval': self.evaluation}
    named = {f'{k} {i}': x.fingerprint for k, xs in groups.items() for i, x in enumerate(xs)}
    return {'data order': self.mixture.fingerprint} | named

  def prompt(self, number: int) -> prompts.Prompt:
    """Prompt `number` since the start of training."""
    row = self.mixture.row(number)
    return self.sources[row.source].rows[row.examples[0]]


def batch_fields(c: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Arrays float32[A, M, T] of a batch beside those of data/batches.py."""
  if c.algorithm != 'grpo':
    return ()
  old = config_lib.steps_per_batch(c) > 1
  ref = bool(c.grpo.kl_coef) and c.grpo.kl != 'reward'
  return ('advantages', 'sampler_logp', *['old_logp'] * old, *['ref_logp'] * ref)


@dataclasses.dataclass
class Run:
  """A config brought to a machine, or to several."""

  config: ml_collections.ConfigDict
  workdir: str
  mesh: Mesh
  model: Model
  data: Data | PromptData | None  # None: the run trains nothing
  watchdog: Watchdog

  @property
  def arch(self) -> Architecture:
    return self.model.arch

  @property
  def steps(self) -> int:
    """Optimizer updates in all; without data, where the config leaves them to it, a thousand."""
    c = self.config
    if self.data is None:
      return c.steps or 1000
    batches = math.ceil(c.epochs * self.data.mixture.rows_per_epoch / c.batch_size)
    return c.steps or max(1, batches) * config_lib.steps_per_batch(c)

  def cursor(self, step: int) -> int:
    """Rows, or prompts, that were taken when `step` updates are done: never told from a count of
    updates alone, for several may go over one batch.
    """
    c = self.config
    return -(-step // config_lib.steps_per_batch(c)) * c.batch_size

  def parameter_shardings(self) -> dict:
    """Nested dict of NamedSharding."""
    return sharding.shardings(self.mesh, transformer.axes(self.arch))

  def batch_shardings(self, micro: bool) -> dict[str, NamedSharding]:
    """Of the arrays of a batch, [A, M, T] with `micro`, else [B, T]."""
    where = NamedSharding(self.mesh, sharding.spec(*((None,) if micro else ()), 'batch', 'seq'))
    names = ('tokens', 'labels', 'weights', 'segments', 'positions', *batch_fields(self.config))
    return dict.fromkeys(names, where)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Host arrays [A, M, T] of an optimizer step; rows of other hosts' devices are padding."""
    c = self.config
    micro, shape = c.batch_size // c.grad_accum, (c.grad_accum, c.batch_size // c.grad_accum)
    own = local_rows(self.batch_shardings(micro=True)['tokens'], (*shape, c.seq_len), 1)
    rows = [a * micro + m for a in range(c.grad_accum) for m in own]
    return {k: v.reshape(*shape, -1) for k, v in self.data.stream.batch(step, rows).items()}

  def eval_batches(self) -> Iterator[dict[str, jax.Array]]:
    """Device arrays [B, T] over the evaluation rows."""
    c, where = self.config, self.batch_shardings(micro=False)
    shape = (c.eval.batch_size, c.seq_len)
    own = local_rows(where['tokens'], shape, 0)
    for corpus in self.data.evaluation:
      for batch in eval_batches(corpus, *shape, packed=c.data.packing, wanted=own):
        yield place(batch, where)

  def load_params(self, source: str, dtype: str) -> dict:
    """Weights from `source`, or random ones by the seed where it is ''. Nested dict, sharded."""
    with self.watchdog.phase('restore'):
      return self._load(source, dtype)

  def _load(self, source: str, dtype: str) -> dict:
    if source:
      return load.load_params(source, self.arch, self.parameter_shardings(), jnp.dtype(dtype))
    make = jax.jit(lambda key: transformer.init(self.arch, key, jnp.dtype(dtype)))
    return make(jax.random.key(self.config.seed))


def start(c: ml_collections.ConfigDict, workdir: str, with_data: bool = True) -> Run:
  """Everything of a run but weights and state; the mesh is set for the process.

  Raises:
    ConfigError: a mesh or batch that does not divide, or a workdir that cannot be written.
    DataError: model or data files that cannot be used.
  """
  files.probe(workdir)
  workdir = files.absolute(workdir)  # Orbax takes no relative path
  configure_jax(c)
  if c.compile_cache:
    _keep_programs(files.join(workdir, 'xla_cache'))
  mesh = sharding.make_mesh({a: c.mesh[a] for a in sharding.AXES})
  jax.set_mesh(mesh)
  watchdog = Watchdog(c.watchdog.to_dict())
  with watchdog.phase('restore'):
    model = open_model(c.model.path, c.model.random.to_dict(), c.seed)
    peers.check_same('model.path', model.fingerprint)
  check_sizes(c, model.arch, mesh)
  data = None
  if with_data:
    open_ = open_prompts if c.algorithm in config_lib.ROLLOUT_ALGORITHMS else open_data
    with watchdog.phase('tokenize'):
      # The others find in the shared cache what the first process made.
      data = peers.main_first(lambda: open_(c, model, workdir))
      peers.check_same('data', digest(data.fingerprints()))
    for corpus in data.corpora if isinstance(data, Data) else []:
      _tell(corpus, c.data.on_overlength)
    for found in data.sources if isinstance(data, PromptData) else []:
      log.info('%s: %d prompts, %d longer ones dropped', found.name, len(found.rows), found.dropped)
  return Run(c, workdir, mesh, model, data, watchdog)


def _tell(corpus: cache.Corpus, on_overlength: str) -> None:
  """One line on a source, and one on what its policy for long rows did to it."""
  log.info(
    '%s: %d examples, %d tokens, %.1f %% supervised',
    corpus.name,
    len(corpus),
    corpus.tokens,
    100 * corpus.supervised / corpus.tokens,
  )
  counts = corpus.counts
  lost = counts.dropped + counts.unsupervised
  if lost + counts.truncated:
    of = counts.examples + lost
    log.warning(
      '%s: data.on_overlength=%s: %d of %d examples dropped (%.1f %%), %d shortened (%.1f %%)',
      corpus.name,
      on_overlength,
      lost,
      of,
      100 * lost / of,
      counts.truncated,
      100 * counts.truncated / of,
    )


def without_data(c: ml_collections.ConfigDict, mesh: Mesh, arch: Architecture) -> Run:
  """A run of shapes alone, to compile its step; `mesh` is the current one.

  Raises:
    ConfigError: a size that does not divide.
  """
  check_sizes(c, arch, mesh)
  return Run(
    c, '', mesh, Model('', arch, None, (), {}, {}, ''), None, Watchdog(c.watchdog.to_dict())
  )


def configure_jax(c: ml_collections.ConfigDict) -> None:
  """Process-wide: exact float32 products where float32 is asked for."""
  precise = c.model.compute_dtype == 'float32'
  jax.config.update('jax_default_matmul_precision', 'highest' if precise else 'default')


def _keep_programs(folder: str) -> None:
  """The compile cache."""
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # XLA's own caches would put the folder's path into the key: a workdir that moved would miss.
  jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')


def random_config(random: dict) -> dict:
  """model.random as a HF config.json."""
  return {'model_type': 'llama', 'vocab_size': made.VOCAB_SIZE} | random


def open_model(path: str, random: dict, seed: int, weights: bool = True) -> Model:
  """Reads config and tokenizer of a model; `random`: a HF config to make one from; `weights`: read
  them for the fingerprint.
  """
  if path:
    found = load.tokenizer_files(path)
    config = load.read_config(path)
    # Of all the bytes, which one process reads for all.
    fingerprint = peers.from_main(lambda: load.fingerprint(path)) if weights else ''
  else:
    found = made.byte_tokenizer()
    config = random_config(random)
    found['config.json'] = json.dumps(config).encode()
    fingerprint = digest([config, seed])
  arch = from_hf(config)
  # The same weights under another rope or another epsilon are another model.
  fingerprint = digest([fingerprint, dataclasses.asdict(arch)])
  tokenizer = Tokenizer(found, path or 'model.random')
  if tokenizer.vocab_size > arch.vocab_size:
    raise DataError(
      f'{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {arch.vocab_size}'
    )
  end = encode.turn_end(tokenizer)
  stops = tuple(dict.fromkeys((*tokenizer.stop_ids, *([] if end is None else [end]))))
  return Model(path, arch, tokenizer, stops, config, found, fingerprint)


def check_sizes(c: ml_collections.ConfigDict, arch: Architecture, mesh: Mesh) -> None:
  """Fails before anything is compiled when a size does not divide."""
  declared = transformer.declared(arch)
  sharding.check_divides(
    {n: axes for n, (_, axes, _) in declared.items()},
    {n: shape for n, (shape, _, _) in declared.items()},
    mesh,
  )
  ways = math.prod(mesh.shape[a] for a in sharding.BATCH)
  for key, rows in (
    ('batch_size / grad_accum', config_lib.rows_per_step(c) // c.grad_accum),
    ('eval.batch_size', c.eval.batch_size),
  ):
    if rows % ways:
      raise ConfigError(
        f'{key} = {rows} rows cannot be spread over {ways} devices (mesh.data x fsdp x expert)'
      )
  ways = mesh.shape['context']
  if ways > 1 and c.seq_len % (2 * ways):
    raise ConfigError(
      f'seq_len={c.seq_len} is no multiple of 2 x mesh.context={2 * ways}: each device takes two '
      'chunks of a row'
    )
  if c.seq_len > arch.max_len:
    raise ConfigError(
      f'seq_len={c.seq_len} is more than the {arch.max_len} positions the model was made for'
    )


def open_data(c: ml_collections.ConfigDict, model: Model, workdir: str) -> Data:
  """Tokenizes, or opens the cache, and schedules the rows."""
  folder = c.data.cache or files.join(workdir, 'data_cache')

  def corpora(text, is_eval=False):
    specs = sources.parse_specs(text) if text else []
    if is_eval and (weighted := [s for s in specs if s.weight is not None]):
      raise ConfigError(
        f'data.eval: {weighted[0].path} has weight {weighted[0].weight}; all evaluation rows count '
        'alike: leave the @weight out'
      )
    specs = [made.resolve(spec, folder) for spec in specs]
    settings = dict(
      cache_dir=folder,
      seq_len=c.seq_len,
      loss_on=c.data.loss_on,
      on_overlength=c.data.on_overlength,
    )
    return specs, [
      cache.build_or_open(s, model.tokenizer, progress=True, **settings) for s in specs
    ]

  specs, training = corpora(c.data.train)
  _, evaluation = corpora(c.data.eval, is_eval=True)
  if c.data.eval_fraction and not evaluation:
    sides = [cache.split(corpus, c.data.eval_fraction, c.seed) for corpus in training]
    training, evaluation = ([side[i] for side in sides] for i in (0, 1))
  settings = dict(seed=c.seed, packed=c.data.packing)
  schedules = [
    SourceSchedule(x.lengths, c.seq_len, fingerprint=x.fingerprint, **settings) for x in training
  ]
  mixture = Mixture(schedules, [s.weight for s in specs])
  return Data(Stream(mixture, training, c.seq_len, c.batch_size), mixture, training, evaluation)


def open_prompts(c: ml_collections.ConfigDict, model: Model, workdir: str) -> PromptData:
  """Reads prompts and schedules them, one a row."""
  folder = c.data.cache or files.join(workdir, 'data_cache')
  room = c.seq_len - c.rollout.max_tokens
  groups, weights = [], []
  for text in (c.data.train, c.data.eval):
    specs = sources.parse_specs(text) if text else []
    weights.append([s.weight for s in specs])
    groups.append(
      [
        prompts.read(made.resolve(s, folder), model.tokenizer, room, c.data.on_overlength)
        for s in specs
      ]
    )
  if any(w is not None for w in weights[1]):
    raise ConfigError(f'data.eval: {c.data.eval!r} has weights; leave the @weight out')
  training, evaluation = groups
  schedules = [
    SourceSchedule(x.lengths, c.seq_len, fingerprint=x.fingerprint, seed=c.seed, packed=False)
    for x in training
  ]
  return PromptData(Mixture(schedules, weights[0]), training, evaluation)
