"""A run's model under test: evaluation's texts in, completions and log-probabilities out.

Completions come from the slot engine, as rollouts do: prompts of like lengths together, on weights
in the compute dtype that are split over `tensor` alone.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from ftjax.cluster import processes
from ftjax.data import encode, formats, prompt_rows, source_target
from ftjax.data.formats import Chat
from ftjax.evaluation.model import Completion, Draw, Likelihood
from ftjax.experiment.run import Run
from ftjax.experiment.transcript import Transcripts
from ftjax.generation import weights
from ftjax.generation.beam_search import Beams, Writer
from ftjax.generation.completion import stops
from ftjax.generation.engine import Engine
from ftjax.generation.padding import bucket
from ftjax.generation.sampling import Sampling
from ftjax.generation.scorer import Scorer
from ftjax.models.architecture import Architecture
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
  from ftjax.experiment.lm_eval_model import LmEvalModel

log = logging.getLogger(__name__)

# Share of a device's free memory that a copy of the weights may take; the cache needs some too.
_ROOM = 0.7
# Prompts are split by length where each part fills the slots so many times.
_ROUNDS = 4


def free_bytes() -> float:
  """Returns the free memory of this process's first device; infinity where it is not known."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' not in stats:
    return math.inf
  return stats['bytes_limit'] - stats['bytes_in_use']


class Programs:
  """What all models of one architecture share: the compiled programs, and the tokenizer's rules."""

  def __init__(self, run: Run):
    c, tokenizer = run.config, run.model.tokenizer
    self.run = run
    self.dtype = jnp.dtype(c.model.compute_dtype)
    self.batch_size = c.eval.batch_size
    self.engine = Engine(
      *(run.arch, self.dtype, run.model.stop_ids, tokenizer.pad_id),
      slots=self.batch_size,
      vocab_size=tokenizer.vocab_size,
      writer=Writer(tokenizer.start_id, Beams(c.eval.num_beams, c.eval.length_penalty)),
    )
    self.scorer = Scorer(run.arch, self.dtype, run.mesh, tokenizer.start_id)
    self.transcripts = Transcripts(tokenizer, run.model.stop_ids)

  def decoding_params(self, params: dict) -> dict:
    """Returns the weights that the engine decodes with: `params` themselves where they lie as they
    should, else a copy that the caller drops.
    """
    run, mesh = self.run, weights.rollout_mesh(self.run.mesh)
    leaves = jax.tree.leaves(params)
    if mesh.shape == run.mesh.shape and all(x.dtype == self.dtype for x in leaves):
      return params
    size = sum(x.size for x in leaves) * self.dtype.itemsize // mesh.shape['tensor']
    # The hosts may differ in what is free; they must not in the program.
    has_room = processes.from_main(lambda: size <= _ROOM * free_bytes())
    if not has_room and run.mesh.shape['context'] == 1:  # else nothing could be decoded
      log.info(
        'evaluation decodes with the weights as training has split them, which is slow: a copy of '
        '%.3g GiB a device does not fit beside them; a larger mesh.tensor makes it smaller',
        size / 2**30,
      )
      return params
    return weights.rollout_params(params, run.arch, mesh, self.dtype)


def _refuse_encoder_decoder(arch: Architecture, what: str) -> None:
  if arch.is_encoder_decoder:
    raise ConfigError(
      f'eval.tasks, eval.general: {what} needs a decoder, and the model is an encoder-decoder '
      f'(family {arch.family!r}); take this task out'
    )


class LocalModel:
  """Weights under test; an `evaluation.model.Model`.

  Args:
    programs: of their architecture.
    params: nested dict on the run's mesh.
  """

  def __init__(self, programs: Programs, params: dict):
    self._programs, self._params = programs, params
    self._tokenizer = programs.run.model.tokenizer
    self._max_len = programs.run.arch.max_len
    # Tasks of different kinds may share the rows of one file.
    self._known: dict[str, list[list[Completion]]] = {}

  def for_lm_eval(self) -> 'LmEvalModel':
    """Returns the same weights as lm-eval asks them. Imports lm-eval.

    Raises:
      ConfigError: the model is an encoder-decoder.
    """
    _refuse_encoder_decoder(self._programs.run.arch, 'lm-eval')
    from ftjax.experiment.lm_eval_model import LmEvalModel

    programs = self._programs
    return LmEvalModel(
      self._params,
      self._tokenizer,
      programs.engine,
      programs.scorer,
      batch_size=programs.batch_size,
      beat=programs.run.watchdog.beat,
    )

  def complete(
    self,
    prompts: Sequence[Chat | str],
    places: Sequence[str],
    draw: Draw,
    done: Callable[[int], None],
  ) -> list[list[Completion]]:
    """Implements `Model.complete`."""
    ids = [self._encode(p, place) for p, place in zip(prompts, places, strict=True)]
    for own, place in zip(ids, places, strict=True):
      self._check_length(place, len(own), draw.max_tokens, 'of a completion (eval.max_tokens)')
    key = digest([ids, repr(draw)])
    if key not in self._known:
      self._known[key] = self._generate(ids, draw, done)
    else:
      done(len(ids) * draw.samples)
    return self._known[key]

  def _generate(
    self, ids: list[list[int]], draw: Draw, done: Callable[[int], None]
  ) -> list[list[Completion]]:
    params = self._programs.decoding_params(self._params)
    out: list[list[Completion]] = [[] for _ in ids]
    for part in self._parts([len(own) for own in ids]):
      found = self._programs.engine.generate(
        params,
        [ids[i] for i in part],
        group=draw.samples,
        max_tokens=draw.max_tokens,
        sampling=Sampling(draw.temperature),
        seed=draw.seed,
        prompt_ids=part,
        ended=stops(draw.stop, self._tokenizer),
        beat=lambda ended: self._beat(ended, done),
      )
      for i, own in zip(part, found.completions, strict=True):
        out[i] = [self._completion(ids[i], c, draw.stop) for c in own]
    return out

  def _beat(self, ended: int, done: Callable[[int], None]) -> None:
    self._programs.run.watchdog.beat()
    done(ended)

  def _parts(self, lengths: Sequence[int]) -> list[list[int]]:
    """Returns the indices of prompts in parts that are generated together. All sequences of a part
    have a cache for its longest prompt, so a few long prompts would slow many short ones down.
    """
    least = _ROUNDS * self._programs.batch_size
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
      is_new = not parts or (
        len(parts[-1]) >= least and bucket(lengths[i]) > bucket(lengths[parts[-1][-1]])
      )
      if is_new:
        parts.append([])
      parts[-1].append(i)
    return parts

  def _completion(self, prompt, found, stop: Sequence[str]) -> Completion:
    stop_ids = self._programs.engine.stop_ids
    text = self._programs.transcripts.completion(found.before_stop(stop_ids))
    text = min((text.partition(s)[0] for s in stop), key=len, default=text)
    read = self._tokenizer.decode(prompt, skip_special=False)
    return Completion(text.strip(), read, len(found.tokens), found.truncated)

  def _encode(self, prompt: Chat | str, place: str) -> list[int]:
    try:
      return encode.encode_prompt(prompt, self._tokenizer)
    except ValueError as error:
      raise DataError(f'{place}: {error}') from error

  def _encode_response(self, prompt: Chat | str, response: str, place: str) -> list[int]:
    """Returns the ids of `response` after a prompt, with the stop token."""
    example = prompt_rows.with_answer(prompt, response)
    is_written = self._tokenizer.start_id is not None  # by a decoder of its own
    if is_written:
      (found,) = source_target.encode([example], self._tokenizer)
    else:
      (found,) = encode.encode([example], self._tokenizer, 'completion')
    if isinstance(found, formats.Bad):
      raise DataError(f'{place}: the choice {response!r} cannot be rendered: {found.reason}')
    return found[-1].tokens[found[-1].supervised].tolist()

  def _check_length(self, place: str, prompt: int, more: int, what: str) -> None:
    if prompt + more > self._max_len:
      raise DataError(
        f'{place}: {prompt} tokens of the prompt and {more} {what}; the model may see '
        f'{self._max_len}: shorten the row or take it out'
      )

  def score(
    self,
    prompts: Sequence[Chat | str],
    responses: Sequence[Sequence[str]],
    places: Sequence[str],
    done: Callable[[int], None],
  ) -> list[tuple[Likelihood, ...]]:
    """Implements `Model.score`."""
    rows = list(zip(prompts, responses, places, strict=True))
    before = [self._encode(p, place) for p, _, place in rows]
    ids = [[self._encode_response(p, r, place) for r in own] for p, own, place in rows]
    for prompt, own, (_, texts, place) in zip(before, ids, rows, strict=True):
      if not prompt or not all(own):
        raise DataError(f'{place}: the prompt or a choice of {list(texts)} has no tokens')
      self._check_length(place, len(prompt), max(map(len, own)), 'of a response')
    logps = self._logps(before, ids, done)
    return [
      tuple(Likelihood(x, len(i)) for x, i in zip(own, tokens, strict=True))
      for own, tokens in zip(logps, ids, strict=True)
    ]

  def _logps(
    self, prompts: list[list[int]], choices: list[list[list[int]]], done: Callable[[int], None]
  ) -> list[list[float]]:
    """Returns the log-probability of each choice: rows with as many choices together, like lengths
    together.
    """
    out: list[list[float]] = [[] for _ in prompts]
    size = self._programs.batch_size

    def key(i: int) -> tuple[int, int, int]:
      return len(choices[i]), bucket(len(prompts[i])), max(map(len, choices[i]))

    order = sorted(range(len(prompts)), key=key)
    for count in dict.fromkeys(len(choices[i]) for i in order):
      own = [i for i in order if len(choices[i]) == count]
      for at in range(0, len(own), size):
        index = own[at : at + size]
        padded = [*index, *[index[-1]] * (size - len(index))]
        found = self._programs.scorer.score(
          self._params, [prompts[i] for i in padded], [choices[i] for i in padded]
        )
        for i, scores in zip(index, found.tolist(), strict=False):
          out[i] = scores
        self._beat(len(index), done)
    return out

  def score_texts(
    self, texts: Sequence[str], places: Sequence[str], done: Callable[[int], None]
  ) -> list[Likelihood]:
    """Implements `Model.score_texts`: after BOS, or EOS where there is none, as lm-eval does; with
    neither, the first token is read and not scored. Windows do not overlap but for one token.

    Raises:
      ConfigError: the model is an encoder-decoder, which gives answers to prompts.
    """
    _refuse_encoder_decoder(self._programs.run.arch, 'the likelihood of a text without a prompt')
    tokenizer = self._tokenizer
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    windows: list[tuple[list[int], list[int]]] = []
    counts = []
    for text, place in zip(texts, places, strict=True):
      ids = tokenizer.encode(text)
      if start is not None and ids[:1] != [start]:
        ids = [start, *ids]
      if len(ids) < 2:
        raise DataError(f'{place}: the text {text!r} has no tokens to score')
      step = self._max_len - 1
      own = [(ids[i : i + 1], ids[i + 1 : i + 1 + step]) for i in range(0, len(ids) - 1, step)]
      windows += own
      counts.append((len(own), len(ids) - 1))
    logps = iter(self._logps([w[0] for w in windows], [[w[1]] for w in windows], lambda n: None))
    out = []
    for number, tokens in counts:
      out.append(Likelihood(sum(next(logps)[0] for _ in range(number)), tokens))
      done(1)
    return out
