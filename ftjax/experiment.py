"""The one place that wires a config to mesh, tokenizer, model and data. fit.py trains what stands
here, compare.py judges it.
"""

import dataclasses
import json
import logging
import math
import secrets
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ftjax import config as config_lib
from ftjax.data import cache, encode, made, sources
from ftjax.data.batches import Stream, eval_batches
from ftjax.data.schedule import Mixture, SourceSchedule
from ftjax.data.tokenizer import Tokenizer
from ftjax.hf import classifier, load
from ftjax.losses import preference
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
class Run:
  """A config brought to a machine, or to several."""

  config: ml_collections.ConfigDict
  workdir: str
  mesh: Mesh
  model: Model
  data: Data | None  # None: the run trains nothing
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
    return c.steps or max(1, math.ceil(c.epochs * self.data.mixture.rows_per_epoch / c.batch_size))

  @property
  def has_reference(self) -> bool:
    """Whether the loss compares with the model as it was at the start."""
    c = self.config
    return c.algorithm == 'dpo' and preference.LOSSES[c.dpo.loss].needs_reference

  def parameter_shardings(self) -> dict:
    """Nested dict of NamedSharding."""
    return sharding.shardings(self.mesh, transformer.axes(self.arch))

  def batch_shardings(self, micro: bool) -> dict[str, NamedSharding]:
    """Of the arrays of a batch, [A, M, T] with `micro`, else [B, T]; of `values` without T."""
    axes = (None, 'batch') if micro else ('batch',)
    where = NamedSharding(self.mesh, sharding.spec(*axes, 'seq'))
    out = dict.fromkeys(('tokens', 'labels', 'weights', 'segments', 'positions'), where)
    if example_shape(self.config) != 'text':
      out['values'] = NamedSharding(self.mesh, sharding.spec(*axes))
    return out

  def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a step in shapes."""
    c = self.config
    shape = (c.grad_accum, c.batch_size // c.grad_accum, c.seq_len)
    floats = {'weights': shape, 'values': shape[:2]}
    return {
      k: jax.ShapeDtypeStruct(
        floats.get(k, shape), jnp.float32 if k in floats else jnp.int32, sharding=s
      )
      for k, s in self.batch_shardings(micro=True).items()
    }

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Host arrays [A, M, T] of an optimizer step; rows of other hosts' devices are padding."""
    c = self.config
    shape = (c.grad_accum, c.batch_size // c.grad_accum)
    own = local_rows(self.batch_shardings(micro=True)['tokens'], (*shape, c.seq_len), 1)
    rows = [a * shape[1] + m for a in range(shape[0]) for m in own]
    batch = self.data.stream.batch(step, rows)
    return {k: v.reshape(*shape, *v.shape[1:]) for k, v in batch.items()}

  def eval_batches(self) -> Iterator[dict[str, jax.Array]]:
    """Device arrays [B, T] over the evaluation rows."""
    c, where = self.config, self.batch_shardings(micro=False)
    shape = (c.eval.batch_size, c.seq_len)
    own = local_rows(where['tokens'], shape, 0)
    for corpus in self.data.evaluation:
      for batch in eval_batches(corpus, *shape, packed=is_packed(c), wanted=own):
        yield place(batch, where)

  def load_params(self, source: str, dtype: str) -> dict:
    """Weights from `source`, or random ones by the seed where it is ''. Nested dict, sharded."""
    with self.watchdog.phase('restore'):
      return self._load(source, dtype)

  def _load(self, source: str, dtype: str) -> dict:
    if source:
      arch = from_hf(load.read_config(source)) if self.arch.num_labels else self.arch
      where = sharding.shardings(self.mesh, transformer.axes(arch))
      params = load.load_params(source, arch, where, jnp.dtype(dtype))
      if arch.num_labels == self.arch.num_labels:
        return params
      # A language model becomes a reward model: its head goes, a random score comes.
      make = jax.jit(lambda key: transformer.init(self.arch, key, jnp.dtype(dtype))['score'])
      params = {k: v for k, v in params.items() if k != 'head'}
      return params | {'score': make(jax.random.key(self.config.seed))}
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
  _check_shared(c, workdir)
  configure_jax(c)
  if c.compile_cache:
    _keep_programs(files.join(workdir, 'xla_cache'))
  mesh = sharding.make_mesh({a: c.mesh[a] for a in sharding.AXES})
  jax.set_mesh(mesh)
  watchdog = Watchdog(c.watchdog.to_dict())
  with watchdog.phase('restore'):
    model = open_model(c.model.path, c.model.random.to_dict(), c.seed, labels=num_labels(c))
    peers.check_same('model.path', digest([model.fingerprint, load.outline(c.model.path)]))
  check_sizes(c, model.arch, mesh)
  data = None
  if with_data:
    with watchdog.phase('tokenize'):
      # The others find in the shared cache what the first process made.
      data = peers.main_first(lambda: open_data(c, model, workdir))
      peers.check_same('data', digest(data.fingerprints()))
    for corpus in data.corpora:
      _tell(corpus, c.data.on_overlength)
  return Run(c, workdir, mesh, model, data, watchdog)


def example_shape(c: ml_collections.ConfigDict) -> str:
  """What a training example is: 'text', or one of data.judged.SHAPES."""
  if c.algorithm == 'dpo':
    return 'pair' if preference.LOSSES[c.dpo.loss].paired else 'label'
  if c.algorithm == 'reward_model':
    return {'pairs': 'pair', 'scores': 'score'}[c.reward_model.objective]
  return 'text'


def is_packed(c: ml_collections.ConfigDict) -> bool:
  """Whether several examples share a row; judged ones have each their own."""
  return c.data.packing and example_shape(c) == 'text'


def num_labels(c: ml_collections.ConfigDict) -> int:
  """`Architecture.num_labels` of the model that a config trains."""
  return int(c.algorithm == 'reward_model')


def _check_shared(c: ml_collections.ConfigDict, workdir: str) -> None:
  """All processes must see one workdir and mean one config.

  Raises:
    ConfigError: another process's workdir is another folder. DataError: configs differ.
  """
  if peers.is_alone():
    return
  own = ('data.cache', 'log.')  # may differ from host to host
  plain = {k: v for k, v in config_lib.plain(c).items() if not k.startswith(own)}
  peers.check_same('config', digest(plain))
  name = files.join(workdir, peers.from_main(lambda: f'.shared.{secrets.token_hex(8)}'))
  peers.from_main(lambda: files.write_text(name, ''))
  blind = [p for p, sees in enumerate(peers.gather(files.exists(name))) if not sees]
  if peers.is_main():
    files.remove(name)
  if blind:
    raise ConfigError(
      f'--workdir={workdir} is another folder on process {blind[0]}: all hosts need the same one, '
      'on a shared file system or gs://'
    )


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
  if counts.chosen_over or counts.rejected_over:
    log.warning(
      '%s: longer than half a row were %d chosen and %d rejected sides of pairs over seq_len',
      *(corpus.name, counts.chosen_over, counts.rejected_over),
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


def open_model(path: str, random: dict, seed: int, weights: bool = True, labels: int = 0) -> Model:
  """Reads config and tokenizer of a model; `random`: a HF config to make one from; `weights`: read
  them for the fingerprint; `labels`: 1 makes a reward model of it, where it is none.

  Raises:
    ConfigError: a reward model where a language model is wanted.
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
  if arch.num_labels and not labels:
    raise ConfigError(f'model.path={path} is a reward model; it scores text and cannot write it')
  arch = dataclasses.replace(arch, num_labels=labels)
  # The same weights under another rope or another epsilon are another model.
  fingerprint = digest([fingerprint, dataclasses.asdict(arch)])
  tokenizer = Tokenizer(found, path or 'model.random')
  if tokenizer.vocab_size > arch.vocab_size:
    raise DataError(
      f'{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {arch.vocab_size}'
    )
  end = encode.turn_end(tokenizer)
  stops = tuple(dict.fromkeys((*tokenizer.stop_ids, *([] if end is None else [end]))))
  if labels:
    found, config = classifier.describe(found, config, tokenizer, stops)
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
    ('batch_size / grad_accum', c.batch_size // c.grad_accum),
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
  folder, shape = c.data.cache or files.join(workdir, 'data_cache'), example_shape(c)

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
      # A labelled row also holds its prompt with another answer.
      seq_len=c.seq_len // 2 if shape == 'label' else c.seq_len,
      loss_on=c.data.loss_on,
      on_overlength=c.data.on_overlength,
      shape=shape,
    )
    return specs, [
      cache.build_or_open(s, model.tokenizer, progress=True, **settings) for s in specs
    ]

  specs, training = corpora(c.data.train)
  _, evaluation = corpora(c.data.eval, is_eval=True)
  if c.data.eval_fraction and not evaluation:
    sides = [cache.split(corpus, c.data.eval_fraction, c.seed) for corpus in training]
    training, evaluation = ([side[i] for side in sides] for i in (0, 1))
  settings = dict(seed=c.seed, packed=is_packed(c))
  schedules = [
    SourceSchedule(x.lengths, c.seq_len, fingerprint=x.fingerprint, **settings) for x in training
  ]
  mixture = Mixture(schedules, [s.weight for s in specs])
  return Data(Stream(mixture, training, c.seq_len, c.batch_size), mixture, training, evaluation)
