"""An ftjax model as EleutherAI's lm-eval sees it: log-likelihoods of continuations and of whole
texts, and completions, with the scorer and the engine that evaluation uses.

Text becomes tokens as in lm-eval's own backend for transformers (lm_eval 0.4.13,
models/huggingface.py), so that the figures are comparable. Imports lm_eval, which the extra [eval]
brings: what needs this file imports it late, after lm_eval_tasks.need().

Every process of a run of several answers all requests: their arrays are shared between the
processes, so lm-eval's own distribution by rank stays out of it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models import utils as lm_eval_models
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ftjax.cluster import processes
from ftjax.data import chat_template
from ftjax.data.tokenizer import Tokenizer
from ftjax.generation.completion import Completion, stops
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.generation.scorer import Scorer
from ftjax.runtime.errors import ConfigError, DataError, NonFiniteError

# (texts or None, context ids, continuation ids), as TemplateLM hands it over.
Pair = tuple[tuple[str, str] | None, list[int], list[int]]

_MAX_CHOICES = 8  # of one prompt in one program; more are scored in several
# Marks the end of the message that the model is to go on with.
_END = '\u241e '
# What a task may ask of generation, with the values that change nothing; None: any value.
_OPTIONS: Mapping[str, tuple | None] = {
  'do_sample': None,
  'temperature': None,
  'top_k': None,
  'top_p': None,
  'num_beams': (1,),
  'num_return_sequences': (1,),
  'repetition_penalty': (1, 1.0),
  'min_length': (0,),
  'min_p': (0, 0.0),
}


class LmEvalModel(TemplateLM):
  """A model that lm-eval's `evaluate` accepts.

  Args:
    params: nested dict, on the mesh that the engine and the scorer work on.
    tokenizer: of the model.
    engine: generates; its slots are the completions that are decoded at once.
    scorer: scores continuations.
    batch_size: prompts that are scored at once.
    seed: of sampling.
    max_length: the most tokens that the model reads at once; 0: what it was made for.
    add_bos: whether a text begins with BOS; None: as the tokenizer's own files have it.
    template_kwargs: further names that the chat template sees, such as `enable_thinking`.
    beat: called between batches, for a watchdog.

  Attributes:
    lengths: by (task, document), of the last completion: its tokens, and whether it was cut at the
      most tokens.

  Raises:
    ConfigError: a tokenizer with neither BOS nor EOS, add_bos without a BOS, or a max_length that
      the model cannot read.
  """

  def __init__(
    self,
    params: dict,
    tokenizer: Tokenizer,
    engine: Engine,
    scorer: Scorer,
    *,
    batch_size: int,
    seed: int = 0,
    max_length: int = 0,
    add_bos: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    beat: Callable[[], None] = lambda: None,
  ):
    super().__init__()
    self._params, self._own, self._engine, self._scorer = params, tokenizer, engine, scorer
    self._seed, self._beat, self._add_bos = seed, beat, add_bos
    self._template_kwargs = dict(template_kwargs or {})
    self.batch_size, self.max_length = batch_size, max_length or scorer.arch.max_len
    self.lengths: dict[tuple[str | None, int | None], tuple[int, bool]] = {}
    if not 2 <= self.max_length <= scorer.arch.max_len or batch_size < 1:
      raise ConfigError(
        f'lm-eval: max_length={max_length}, batch_size={batch_size}; expected 2 to '
        f'{scorer.arch.max_len} tokens, which the model was made for, and 1 prompt at least'
      )
    known = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    if not known:
      raise ConfigError(
        f'lm-eval: {tokenizer.name} has neither BOS nor EOS, which texts are scored after; '
        'name one in tokenizer_config.json'
      )
    if add_bos and tokenizer.bos_id is None and not tokenizer.prefix_ids:
      raise ConfigError(f'lm-eval: add_bos_token: {tokenizer.name} has no BOS; leave it out')
    self._prefix = known[0]

  # What lm-eval asks about the model.

  @property
  def eot_token_id(self) -> int:
    """Returns the id of EOS."""
    return self._prefix if self._own.eos_id is None else self._own.eos_id

  @property
  def prefix_token_id(self) -> int:
    """Returns the id that a text without a context is scored after: BOS, else EOS."""
    return self._prefix

  @property
  def max_gen_toks(self) -> int:
    """Returns the most tokens of a completion where the task does not say."""
    return 256

  @property
  def tokenizer_name(self) -> str:
    """Returns the name that lm-eval keeps cached requests under."""
    return f'ftjax_{self._own.fingerprint[:16]}'

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the source of the chat template; None where none is to be applied."""
    return self._own.template if chat_template else None

  def apply_chat_template(
    self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
  ) -> str:
    """Returns the text of a conversation; without a generation prompt the model continues with the
    last message. A system message that the template refuses is left out.

    Raises:
      ConfigError: the model has no chat template.
      DataError: the template refuses the conversation.
    """
    if self._own.template is None:
      raise ConfigError(
        f'lm-eval: {self._own.name} has no chat template; name the task lm_eval:NAME instead of '
        'lm_eval_chat:NAME, or leave --apply_chat_template out'
      )
    messages = [dict(m) for m in chat_history]
    if not add_generation_prompt:
      messages[-1]['content'] += _END
    try:
      text = self._render(messages, add_generation_prompt)
    except DataError:
      kept = [m for m in messages if m['role'] != 'system']
      if not kept or len(kept) == len(messages):
        raise
      text = self._render(kept, add_generation_prompt)
    if add_generation_prompt:
      return text
    begun, mark, behind = text.rpartition(_END.strip())
    if not mark:
      raise DataError('lm-eval: the chat template does not show the message to go on with')
    return begun if behind.startswith(' ') else begun.rstrip()

  def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    return chat_template.trace(
      str(self._own.template),
      messages,
      generation_prompt=add_generation_prompt,
      special_tokens=self._own.special_texts,
      kwargs=self._template_kwargs,
    ).text

  # Text to tokens.

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Returns the ids of a text; with BOS where the tokenizer or `add_bos` puts one, but never a
    second one.
    """
    del kwargs
    start = self._own.decode([self._prefix], skip_special=False)
    return self._encode(string, start, add_special_tokens)

  def _encode(self, text: str, start: str | None, is_framed: bool | None = None) -> list[int]:
    """Returns the ids of a text; nothing is added where it begins with `start` already."""
    if is_framed is None:
      is_framed = self._add_bos
      if start is not None and text.startswith(start):
        is_framed = False
    ids = self._own.encode(text)
    if is_framed is False:
      return ids
    before = self._own.prefix_ids
    if is_framed and not before and self._own.bos_id is not None:
      before = (self._own.bos_id,)
    return [*before, *ids, *self._own.suffix_ids]

  # Log-likelihoods.

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Returns for each (context, continuation) its log-probability in nats, and whether greedy
    decoding would give the continuation.

    Raises:
      DataError: a continuation without tokens, or with more than the model reads.
      NonFiniteError: a log-probability that is no number.
    """
    for request in requests:
      if not request.args[1]:
        raise DataError(f'{_place(request)}: the continuation to score is empty')
    return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

  def _loglikelihood_tokens(
    self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """Returns the same of tokens; a context that is too long loses its beginning."""
    del kwargs
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, (texts, context, continuation) in enumerate(requests):
      if not context or not 0 < len(continuation) <= self.max_length:
        raise DataError(
          f'lm-eval: {texts or "a text"!r:.200}: {len(context)} tokens of context and '
          f'{len(continuation)} to score; expected at least one of each, and at most '
          f'{self.max_length} to score'
        )
      # The last token is only a label, which the model does not read.
      room = self.max_length + 1 - len(continuation)
      # Whole texts stand after one token: to read that once would save nothing, and a batch would
      # hold one row of many texts.
      alone = i if len(context) == 1 else -1
      groups.setdefault((tuple(context[-room:]), alone), []).append(i)
    rows = [
      (prompt, some)
      for (prompt, _), found in groups.items()
      for some in _batches(found, _MAX_CHOICES)
    ]
    # Rows with as many choices together, like lengths together.
    sizes = [(max(len(requests[i][2]) for i in found) - 1).bit_length() for _, found in rows]
    order = sorted(range(len(rows)), key=lambda r: (len(rows[r][1]), sizes[r], len(rows[r][0])))
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    with _bar(len(requests), 'lm-eval: scored', disable_tqdm) as bar:
      for _, group in itertools.groupby(order, key=lambda r: len(rows[r][1])):
        for some in _batches(list(group), self.batch_size):
          self._score([rows[r] for r in some], requests, answers)
          bar.update(sum(len(rows[r][1]) for r in some))
    return answers

  def _score(
    self,
    rows: list[tuple[tuple[int, ...], list[int]]],
    requests: Sequence[Pair],
    answers: list[tuple[float, bool]],
  ) -> None:
    """Puts the answers to one batch of prompts with as many continuations each."""
    self._beat()
    padded = [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
    found = self._scorer.score_greedy(
      self._params,
      [prompt for prompt, _ in padded],
      [[requests[i][2] for i in members] for _, members in padded],
    )
    for (_, members), logps, greedy in zip(rows, found.logp, found.is_greedy, strict=False):
      for i, logp, is_greedy in zip(members, logps, greedy, strict=True):
        if not np.isfinite(logp):
          raise NonFiniteError(f'lm-eval: {requests[i][0]!r:.200}: log-probability {logp}')
        answers[i] = float(logp), bool(is_greedy)
        if requests[i][0] is not None:
          self.cache_hook.add_partial('loglikelihood', requests[i][0], answers[i])

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-probability in nats of each whole text after BOS (or EOS), in windows of
    `max_length` tokens that overlap as little as possible.
    """
    pairs: list[Pair] = []
    owners: list[int] = []
    for i, request in enumerate(requests):
      windows = get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self._prefix,
        max_seq_len=self.max_length,
        context_len=1,
      )
      for window in windows:
        pairs.append((None, *make_disjoint_window(window)))
        owners.append(i)
    totals = [0.0] * len(requests)
    for i, (logp, _) in zip(owners, self._loglikelihood_tokens(pairs, disable_tqdm), strict=True):
      totals[i] += logp
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  # Completions.

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Returns the completion of each (context, generation arguments) up to the first of its stop
    texts. A context that is too long loses its beginning.

    Raises:
      ConfigError: generation arguments that ftjax does not have, or no room for a context.
    """
    groups: dict[str, list[int]] = {}
    wanted = [_Wanted(r, self._own.eos_token, self.max_gen_toks) for r in requests]
    for i, want in enumerate(wanted):
      groups.setdefault(repr((want.sampling, want.until)), []).append(i)
    texts = [''] * len(requests)
    with _bar(len(requests), 'lm-eval: generated', disable_tqdm) as bar:
      for members in groups.values():
        for i, found in zip(members, self._generate(members, wanted, bar.update), strict=True):
          texts[i] = self._text(found, wanted[i].until)
          instance = wanted[i].request
          self.lengths[instance.task_name, instance.doc_id] = len(found.tokens), found.truncated
          self.cache_hook.add_partial('generate_until', instance.args, texts[i])
    return texts

  def _generate(
    self, members: list[int], wanted: 'list[_Wanted]', done: Callable[[int], object]
  ) -> list[Completion]:
    """Returns the completions of requests with the same sampling and stop texts."""
    some = [wanted[i] for i in members]

    def beat(ended: int) -> None:
      self._beat()
      done(ended)

    rollout = self._engine.generate(
      self._params,
      [self._prompt(want) for want in some],
      group=1,
      max_tokens=[want.most for want in some],
      sampling=some[0].sampling,
      seed=self._seed,
      prompt_ids=members,
      ended=stops(tuple(text for text in some[0].until if text), self._own),
      beat=beat,
    )
    return [found for (found,) in rollout.completions]

  def _prompt(self, want: '_Wanted') -> list[int]:
    """Returns the ids of a context, its last ones where it is too long."""
    room = self.max_length - want.most
    if room < 1:
      raise ConfigError(
        f'{_place(want.request)}: max_gen_toks={want.most} leaves no room for a prompt in '
        f'{self.max_length} tokens; lower max_gen_toks in the generation_kwargs of the task'
      )
    ids = self._encode(want.request.args[0], self._own.bos_token or None)
    return ids[-room:] or [self._prefix]

  def _text(self, found: Completion, until: list[str]) -> str:
    text = self._own.decode(found.before_stop(self._engine.stop_ids))
    return lm_eval_models.postprocess_generated_text(text, until, None)


class _Wanted:
  """What one request asks for: sampling, most tokens, stop texts.

  Raises:
    ConfigError: something that ftjax does not have.
  """

  def __init__(self, request: Instance, eos: str, usual: int):
    self.request = request
    options = dict(lm_eval_models.normalize_gen_kwargs(request.args[1], usual))
    self.until = lm_eval_models.handle_stop_sequences(options.pop('until'), eos or None)
    self.most = options.pop('max_gen_toks')
    for name, value in options.items():
      if name not in _OPTIONS or (_OPTIONS[name] is not None and value not in _OPTIONS[name]):
        raise ConfigError(
          f'{_place(request)}: generation_kwargs {name}={value!r}: ftjax has {sorted(_OPTIONS)}, '
          'one beam and no penalties; change the YAML of the task'
        )
    if self.most < 1:
      raise ConfigError(f'{_place(request)}: max_gen_toks={self.most}; expected 1 at least')
    temperature = options.get('temperature', 0.0) if options['do_sample'] else 0.0
    truncation = (options.get('top_k') or 0, options.get('top_p') or 1.0)
    self.sampling = Sampling(float(temperature), int(truncation[0]), float(truncation[1]))


def _batches(items: list[int], size: int) -> list[list[int]]:
  return [items[i : i + size] for i in range(0, len(items), size)]


def _place(request: Instance) -> str:
  return f'lm-eval: task {request.task_name}, document {request.doc_id}'


def _bar(total: int, title: str, is_hidden: bool) -> tqdm:
  return tqdm(total=total, desc=title, disable=is_hidden or not processes.is_main())
