"""samples.jsonl: greedy completions of eval.prompts before training and at every evaluation."""

import json
import logging

from ftjax.cluster import processes
from ftjax.data import encode
from ftjax.data.formats import Chat
from ftjax.evaluation.model import Draw
from ftjax.experiment.local_model import LocalModel, Programs
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files
from ftjax.telemetry import console

log = logging.getLogger(__name__)


class Samples:
  """The completions of eval.prompts of one run.

  Args:
    programs: of its model.

  Raises:
    ConfigError: a prompt that is too long for the model.
  """

  def __init__(self, programs: Programs):
    run = self._run = programs.run
    c = run.config
    has_template = run.model.tokenizer.template is not None
    # A user turn where there is a template, else plain text.
    self._prompts: list[Chat | str] = [
      Chat(({'role': 'user', 'content': p},)) if has_template else p for p in c.eval.prompts
    ]
    self._path = files.join(run.workdir, 'samples.jsonl')
    lengths = [len(encode.encode_prompt(p, run.model.tokenizer)) for p in self._prompts]
    longest = max(lengths, default=0) + c.eval.max_tokens
    if self._prompts and longest > run.arch.max_len:
      raise ConfigError(
        f'eval.prompts: {longest} tokens with eval.max_tokens={c.eval.max_tokens}, the model was '
        f'made for {run.arch.max_len} positions'
      )

  def _complete(self, model: LocalModel) -> list[str]:
    draw = Draw(self._run.config.eval.max_tokens)
    places = ['eval.prompts'] * len(self._prompts)
    found = model.complete(self._prompts, places, draw, lambda n: None)
    return [own[0].text for own in found]

  def add(self, model: LocalModel, step: int) -> None:
    """Appends the completions after `step` to samples.jsonl, and logs them."""
    if not self._prompts:
      return
    pairs = zip(self._run.config.eval.prompts, self._complete(model), strict=True)
    if not processes.is_main():
      return
    rows = [{'step': step, 'prompt': p, 'answer': a} for p, a in pairs]
    self._write([r for r in self._read() if r['step'] < step] + rows)
    for row in rows:
      log.info(console.sample(step, row['prompt'], row['answer']))

  def cut(self, step: int, drop_eval: bool) -> None:
    """Removes the rows of samples.jsonl after `step`, which will be written again; with `drop_eval`
    those of `step` too.
    """
    if not processes.is_main() or not files.exists(self._path):
      return
    last = step - drop_eval
    self._write([r for r in self._read() if r['step'] <= last])

  def compared(self, model: LocalModel) -> list[dict[str, str]]:
    """Returns [{prompt, base, tuned}]: the completions from before step 1 with those of `model`;
    nothing where training did not start from the base.
    """
    c = self._run.config
    before = processes.from_main(
      lambda: {r['prompt']: r['answer'] for r in self._read() if r['step'] == 0}
    )
    if c.init_from or not before or not self._prompts:
      return []
    after = zip(c.eval.prompts, self._complete(model), strict=True)
    return [{'prompt': p, 'base': before[p], 'tuned': text} for p, text in after if p in before]

  def _read(self) -> list[dict]:
    lines = files.read_text(self._path).split('\n') if files.exists(self._path) else []
    return [json.loads(line) for line in lines if line]

  def _write(self, rows: list[dict]) -> None:
    text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
    files.write_text(self._path, text)
