"""Writes the likeliest tokens of distill.teacher over the training data of a config, for training
without the teacher; the files are those of data/teacher_file.py."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from ftjax.cluster import processes
from ftjax.data import batches, teacher_file
from ftjax.data.token_cache import Corpus
from ftjax.experiment import resume
from ftjax.experiment import run as experiment
from ftjax.experiment.auxiliary import AuxiliaryModel
from ftjax.experiment.run import Run
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError, NonFiniteError
from ftjax.training.prefetch import local_rows, place

log = logging.getLogger(__name__)


def write(c: ml_collections.ConfigDict) -> None:
  """Writes to distill.file what is not there yet; all processes call it.

  Args:
    c: a validated config of distillation with distill.teacher and distill.file.

  Raises:
    ConfigError: no teacher or no file in the config, or a teacher that does not fit the student.
    NonFiniteError: a log-prob that is not finite.
  """
  home = c.distill.file
  for key in ('teacher', 'file'):
    if not c.distill.get(key):
      raise ConfigError(
        f'distill.{key} is empty: ftjax.teacher reads the model in distill.teacher and writes to '
        'the folder in distill.file'
      )
  with_teacher = c.copy_and_resolve_references()
  with with_teacher.unlocked():
    with_teacher.distill.file = ''  # else the run would read what is written here
  run = experiment.start(with_teacher, home)
  teacher = run.auxiliary.find('teacher')
  teacher.check(run.model.tokenizer, c.seq_len)
  check_size(c, run.arch.vocab_size)
  facts = functools.partial(
    teacher_file.Facts,
    tokenizer=run.model.tokenizer.fingerprint,
    teacher=c.distill.teacher,
    weights=teacher.fingerprint(functools.partial(resume.first_fingerprint, run), run.workdir),
    temperature=c.distill.temperature,
    top_k=c.distill.top_k,
    vocab=run.arch.vocab_size,
    compute_dtype=c.model.compute_dtype,
  )
  measure = _Measure(run, teacher, c)
  for corpus in run.data.corpora:
    _write(run, measure, teacher_file.Writer(home, corpus, facts(data=corpus.fingerprint)), corpus)


def check_size(c: ml_collections.ConfigDict, vocab: int) -> None:
  """Raises ConfigError where distill.top_k is more than the vocabulary has rows."""
  if c.distill.top_k > vocab:
    raise ConfigError(
      f'distill.top_k={c.distill.top_k}: the vocabulary has {vocab} rows; expected at most as many'
    )


def _write(run: Run, measure: '_Measure', writer: teacher_file.Writer, corpus: Corpus) -> None:
  processes.from_main(writer.begin)
  computed = 0
  with tqdm(
    total=len(corpus), desc='teacher', unit=' examples', disable=not processes.is_main()
  ) as bar:
    for start in writer.starts:
      examples = range(start, writer.stop(start))
      if not processes.from_main(functools.partial(writer.is_whole, start)):
        computed += len(examples)
        found = measure(corpus, examples)
        processes.from_main(functools.partial(writer.write, start, *found))
      bar.update(len(examples))
      run.watchdog.beat()
  processes.from_main(writer.finish)
  log.info(
    '%s: %d examples read, %d computed, in %s',
    *(corpus.name, len(corpus) - computed, computed, writer.folder),
  )


class _Measure:
  """Computes the likeliest tokens; the teacher is loaded at the first call."""

  def __init__(self, run: Run, teacher: AuxiliaryModel, c: ml_collections.ConfigDict):
    self._run, self._teacher, self._params = run, teacher, None
    self._where = run.batch_shardings(micro=False)
    forward = Forward(teacher.architecture(), jnp.dtype(c.model.compute_dtype))

    @jax.jit
    def top(params, batch):
      own = forward.find_params(params, teacher.name)
      found = forward.top_logprobs(own, batch, c.distill.top_k, c.distill.temperature)
      return jax.tree.map(lambda a: jax.sharding.reshard(a, jax.P()), found)

    self._top: Callable[[dict, dict], tuple[jax.Array, jax.Array]] = top

  def __call__(self, corpus: Corpus, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids int32[n, k], log-probs float32[n, k + 1]) of the predicted tokens of examples.

    Raises:
      NonFiniteError: a log-prob that is not finite.
    """
    if self._params is None:
      self._params = {self._teacher.name: self._run.load_auxiliary(self._teacher)}
    c, parts = self._run.config, list(self._of(corpus, examples))
    ids, logp = (np.concatenate(p) for p in zip(*parts, strict=True))
    is_whole = c.distill.top_k == self._run.arch.vocab_size  # then there is no other token
    if not np.isfinite(logp[:, :-1] if is_whole else logp).all():
      raise NonFiniteError(
        f'{c.distill.teacher} gives log-probs that are not finite between '
        f'{corpus.where(examples[0])} and {corpus.where(examples[-1])}'
      )
    return ids, logp

  def _of(self, corpus: Corpus, examples: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields ids and log-probs row by row; several examples share a row."""
    c, size = self._run.config, self._run.config.eval.batch_size
    own = local_rows(self._where['tokens'], (size, c.seq_len), 0)
    packed = batches.fill_in_order(corpus.lengths[examples[0] : examples[-1] + 1], c.seq_len, True)
    rows = [[examples[0] + i for i in row] for row in packed]
    inverse = np.argsort(sharding.zigzag(c.seq_len, self._run.mesh.shape['context']))
    for first in range(0, len(rows), size):
      batch = batches.batch_of(corpus, rows[first : first + size], size, c.seq_len, own)
      with self._run.watchdog.phase('evaluate'):
        placed = place(batch, {k: self._where[k] for k in batch})
        found = [np.asarray(a)[:, inverse] for a in self._top(self._params, placed)]
      for row, ids in enumerate(rows[first : first + size]):
        # Not the batch's weights: a process fills its own rows alone.
        places, start = [], 0
        for i in ids:
          supervised = corpus.example(i)[1]
          places.append(start + np.flatnonzero(supervised[1:]))
          start += len(supervised)
        at = np.concatenate(places)
        yield found[0][row, at], found[1][row, at]
