"""Base against tuned: scores both on eval.tasks, generates completions of eval.prompts, prints and
stores the comparison.
"""

import functools
import json
import logging

import jax.numpy as jnp

from ftjax.cluster import processes
from ftjax.config import task_specs
from ftjax.data import encode, formats, prompt_rows
from ftjax.evaluation import report, tasks
from ftjax.evaluation import run as evaluation
from ftjax.experiment.run import Run
from ftjax.experiment.transcript import Transcripts
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.generation.scorer import Scorer
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files
from ftjax.telemetry import console

log = logging.getLogger(__name__)

_GREEDY = Sampling()


class Evaluator:
  """Scores one run's models. The base is scored once and cached under a hash of all that its scores
  depend on.
  """

  def __init__(self, run: Run):
    c = run.config
    self.run = run
    self.tasks = tasks.load_tasks(task_specs.parse_all(c.eval.tasks))
    # Every process builds all batches and puts its own part of them on its devices.
    processes.check_same('eval.tasks', digest([t.digest for t in self.tasks]))
    self.folder = files.join(run.workdir, 'eval')
    self._dtype = jnp.dtype(c.model.compute_dtype)
    tokenizer = run.model.tokenizer
    self._engine = Engine(
      *(run.arch, self._dtype, run.model.stop_ids, tokenizer.pad_id),
      slots=c.eval.batch_size,
      vocab_size=tokenizer.vocab_size,
    )
    self._transcripts = Transcripts(tokenizer, run.model.stop_ids)
    self._prompts = [self._encode(p) for p in c.eval.prompts]
    longest = max(map(len, self._prompts), default=0) + c.eval.max_tokens
    if self._prompts and longest > run.arch.max_len:
      raise ConfigError(
        f'eval.prompts: {longest} tokens with eval.max_tokens={c.eval.max_tokens}, the model was '
        f'made for {run.arch.max_len} positions'
      )
    self._scorer = Scorer(run.arch, self._dtype, run.mesh)

  def _encode(self, prompt: str) -> list[int]:
    """Returns the ids of a prompt of eval.prompts: a user turn where there is a template, else
    plain text.
    """
    tokenizer = self.run.model.tokenizer
    if tokenizer.template is None:
      return encode.encode_prompt(prompt, tokenizer)
    return encode.encode_prompt(
      formats.Chat(({'role': 'user', 'content': prompt},), None), tokenizer
    )

  def _encode_row(self, row: tasks.Row) -> list[int]:
    return encode.encode_prompt(row.asked, self.run.model.tokenizer)

  def _encode_choice(self, row: tasks.Row, choice: str) -> list[int]:
    """Returns the ids of `choice` as the response to a row, with the stop token."""
    tokenizer = self.run.model.tokenizer
    example = prompt_rows.with_answer(row.asked, choice)
    (found,) = encode.encode([example], tokenizer, 'completion')
    if isinstance(found, formats.Bad):
      raise DataError(f'{row.place}: the choice {choice!r} cannot be rendered: {found.reason}')
    return found[-1].tokens[found[-1].supervised].tolist()

  def _functions(self, params: dict) -> evaluation.Functions:
    beat = self.run.watchdog.beat  # at every batch of rows
    tokenizer = self.run.model.tokenizer

    def score(prompts, choices):
      beat()
      return self._scorer.score(params, prompts, choices)

    @functools.cache  # tasks of different kinds may share the rows of one file
    def generated(prompts, most):
      return self._complete(params, prompts, most)

    def generate(prompts, most):
      beat()
      return generated(tuple(map(tuple, prompts)), most)

    return evaluation.Functions(
      encode_prompt=self._encode_row,
      encode_choice=self._encode_choice,
      score=score,
      generate=generate,
      decode=self._transcripts.completion,
      prompt_text=functools.partial(tokenizer.decode, skip_special=False),
    )

  def _score(
    self, model: evaluation.Functions, task: tasks.Task, title: str
  ) -> list[evaluation.Result]:
    c = self.run.config
    with self.run.watchdog.phase('evaluate'):
      return evaluation.evaluate(
        task,
        model,
        batch_size=c.eval.batch_size,
        max_len=self.run.arch.max_len,
        max_tokens=c.eval.max_tokens,
        title=title,
      )

  def base(self, params: dict | None = None) -> dict[str, list[evaluation.Result]]:
    """Returns the base's results by task, from the cache or scored with `params`; loads the weights
    where none are given.
    """
    c, out = self.run.config, {}
    held = c.lora.base if c.lora.rank else c.model.param_dtype
    settings = {
      'compute_dtype': c.model.compute_dtype,
      'param_dtype': f'nf4/{c.lora.block}' if held == 'nf4' else held,
      'max_tokens': c.eval.max_tokens,
    }
    base = functools.cache(
      lambda: self._functions(self._base_params() if params is None else params)
    )
    for task in self.tasks:
      model = self.run.model
      key = evaluation.cache_key(
        task, model=model.fingerprint, template=model.tokenizer.fingerprint, settings=settings
      )

      def make(task=task):
        return self._score(base(), task, 'base')

      place = (files.join(self.folder, 'base'), key, task)
      known = processes.from_main(functools.partial(evaluation.is_cached, *place))
      if processes.is_main():
        out[task.name], _ = evaluation.cached(*place, make)
      elif not known:
        make()
    return out

  def _base_params(self) -> dict:
    return self.run.load_params(self.run.model.source, self.run.config.model.param_dtype)

  def tuned(self, params: dict) -> None:
    """Scores the tuned model, compares it with the base, prints and stores the report."""
    base, model, summaries = self.base(), self._functions(params), []
    for task in self.tasks:
      results = self._score(model, task, 'tuned')
      if not processes.is_main():
        continue
      evaluation.save(
        files.join(self.folder, f'{task.name}.jsonl'), {'base': base[task.name], 'tuned': results}
      )
      summaries.append(report.compare(task, base[task.name], results))
    answers = self._answers(params)
    if (summaries or answers) and processes.is_main():
      files.makedirs(self.folder)
      report.save(files.join(self.folder, 'summary.json'), summaries, answers)
      print('\n' + report.text(summaries, answers) + '\n', flush=True)

  def answer(self, params: dict, step: int) -> None:
    """Appends greedy completions of eval.prompts to samples.jsonl."""
    c = self.run.config
    if not self._prompts:
      return
    pairs = zip(c.eval.prompts, self._generate(params), strict=True)
    if not processes.is_main():
      return
    rows = [{'step': step, 'prompt': p, 'answer': a} for p, a in pairs]
    self._write([r for r in self._samples() if r['step'] < step] + rows)
    for row in rows:
      log.info(console.sample(step, row['prompt'], row['answer']))

  def _complete(self, params: dict, prompts, most: int) -> list[list[int]]:
    """Returns greedy completions of prompts, of at most `most` tokens, without stop tokens."""
    found = self._engine.generate_at_once(
      params, prompts, max_tokens=most, sampling=_GREEDY, beat=self.run.watchdog.beat
    )
    return [c.before_stop(self._engine.stop_ids) for c in found]

  def _generate(self, params: dict) -> list[str]:
    """Returns the texts of greedy completions of eval.prompts."""
    most = self.run.config.eval.max_tokens
    with self.run.watchdog.phase('evaluate'):
      ids = self._complete(params, self._prompts, most)
    return [self._transcripts.completion(i).strip() for i in ids]

  def cut(self, step: int, drop_eval: bool) -> None:
    """Removes the rows of samples.jsonl after `step`, which will be written again; with `drop_eval`
    those of `step` too.
    """
    path = files.join(self.run.workdir, 'samples.jsonl')
    if not processes.is_main() or not files.exists(path):
      return
    last = step - drop_eval
    kept = [r for r in self._samples() if r['step'] <= last]
    files.write_text(path, ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in kept))

  def _samples(self) -> list[dict]:
    path = files.join(self.run.workdir, 'samples.jsonl')
    lines = files.read_text(path).split('\n') if files.exists(path) else []
    return [json.loads(line) for line in lines if line]

  def _write(self, rows: list[dict]) -> None:
    if rows:
      text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
      files.write_text(files.join(self.run.workdir, 'samples.jsonl'), text)

  def _answers(self, params: dict) -> list[report.Answer]:
    """Returns the base's completions from before step 1 with those of `params`; none where training
    did not start from the base.
    """
    c = self.run.config
    before = processes.from_main(
      lambda: {r['prompt']: r['answer'] for r in self._samples() if r['step'] == 0}
    )
    if c.init_from or not before or not self._prompts:
      return []
    after = zip(c.eval.prompts, self._generate(params), strict=True)
    return [report.Answer(p, before[p], text) for p, text in after if p in before]
