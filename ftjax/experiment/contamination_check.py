"""The texts of a run's training data, compared with its evaluation rows; see contamination.py.

The rows are read again as text, before templates and tokens. What was found is kept in
DIR/eval/contamination.json, under a hash of the data.
"""

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from tqdm import tqdm

from ftjax.cluster import processes
from ftjax.config import algorithms
from ftjax.data import formats, preference_rows, prompts, sources, synthetic
from ftjax.data.formats import Bad, Chat, Completion
from ftjax.data.policy import TEXT_SHAPES
from ftjax.data.token_cache import Corpus
from ftjax.evaluation import contamination, near_duplicates, ngrams, verbatim
from ftjax.evaluation.contamination import Finding, Item, Report
from ftjax.evaluation.kind import COMPLETE
from ftjax.evaluation.result import Result
from ftjax.evaluation.tasks import Row, Task
from ftjax.experiment import data as examples
from ftjax.experiment.run import Run
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files

log = logging.getLogger(__name__)

SPLIT = 'data/eval'  # the rows of data.eval or data.eval_fraction; no task has such a name
_VERSION = 1  # raise it when the same data would get other findings
_SPLIT_ROWS = 5000  # most rows of the split that are compared, evenly spread
_BEAT_ROWS = 1000  # after which the watchdog hears of the progress
_COMPARED_ROWS = 5000  # most training rows, the first ones, whose near-duplicates are counted

Example = formats.Example | preference_rows.Pair | preference_rows.LabeledExample


def check(run: Run, tasks: Sequence[Task]) -> dict[str, Report]:
  """Returns which evaluation rows are in the training data, {task name or SPLIT: report}.

  Nothing where eval.contamination is off or there are no tasks, and in all processes but the main
  one. A run that has no data (`python -m ftjax.evaluate`) finds what was kept of the same tasks.

  Raises:
    DataError: a source that cannot be read any more.
  """
  c = run.config
  if not (c.eval.contamination and tasks and processes.is_main()):
    return {}
  path = files.join(run.workdir, 'eval', 'contamination.json')
  if run.data is None:
    return _kept(path, tasks)
  key = _key(run, tasks)
  reports = _load(path, key)
  if reports is None:
    reports, facts = _compare(run, tasks)
    files.makedirs(files.join(run.workdir, 'eval'))
    sets = {name: dataclasses.asdict(report) for name, report in reports.items()}
    digests = {task.name: task.digest for task in tasks}
    content = {'key': key, 'tasks': digests, 'training': facts, 'sets': sets}
    files.write_text(path, json.dumps(content, ensure_ascii=False) + '\n')
  for name, report in reports.items():
    _log(name, report)
  return reports


def add_copied(
  run: Run, tasks: Sequence[Task], results: Mapping[str, Mapping[str, Sequence[Result]]]
) -> dict[str, dict[str, Sequence[Result]]]:
  """Returns results with the value `copied`, (words of training text, words) of each completion,
  for tasks that have completions. Reads the training data once.

  Args:
    tasks: that were run.
    results: {task: {model: results}}.
  """
  out = {name: dict(own) for name, own in results.items()}
  if not run.config.eval.contamination or run.data is None:
    return out
  places, texts, prompts = [], [], []
  for task in tasks:
    if task.kind.respond != COMPLETE:
      continue
    asked = {row.id: '\n'.join(item_of(row).prompt) for row in task.rows}
    for model, own in results[task.name].items():
      places += [(task.name, model, i) for i in range(len(own))]
      texts += [r.response for r in own]
      prompts += [asked[r.id] for r in own]
      out[task.name][model] = list(own)
  if not any(texts):
    return out
  rows = _progress(_rows(run, 'train'), _row_count(run, 'train'))
  for (task, model, i), found in zip(places, verbatim.check(texts, rows, prompts), strict=True):
    own = out[task][model]
    values = {**own[i].values, 'copied': (float(found.copied), float(found.words))}
    own[i] = dataclasses.replace(own[i], values=values)
  return out


def to_summary(report: Report, scores_clean: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the entry "contamination" of a task in summary.json.

  Args:
    report: of the task.
    scores_clean: {model: {"value", "low", "high"}} on the rows of `report.clean_ids()`.
  """
  return {
    'ngram': contamination.NGRAM,
    'n': len(report.findings),
    'contaminated': report.contaminated,
    'near_duplicates': report.near_duplicates,
    'whole': report.whole,
    'template_share': report.template_share,
    'scores_clean': dict(scores_clean),
    'against': list(report.against),
  }


def texts_of(example: Example) -> list[str]:
  """Returns the texts of a parsed row: of each message its reasoning and its content."""
  if isinstance(example, preference_rows.Pair):
    return list(dict.fromkeys([*texts_of(example.chosen), *texts_of(example.rejected)]))
  if isinstance(example, preference_rows.LabeledExample):
    return texts_of(example.answer)
  if isinstance(example, Completion):
    return [example.prompt, example.completion]
  if isinstance(example, Chat):
    return _of_messages(example.messages)
  return [example.text]


def _of_messages(messages: Sequence[Mapping[str, Any]]) -> list[str]:
  found = [m.get(key) for m in messages for key in ('reasoning_content', 'content')]
  return [text for text in found if isinstance(text, str) and text]


def _of_prompt(prompt: prompts.Prompt) -> list[str]:
  """Returns the texts of a prompt for rollouts, and the answer that its rewards compare with."""
  texts = [prompt.text] if isinstance(prompt.text, str) else _of_messages(prompt.text)
  answer = prompt.columns.get('answer')
  return [*texts, answer] if isinstance(answer, str) else texts


def item_of(row: Row) -> Item:
  """Returns a row of a task as texts; where the choices are whole texts, those."""
  if row.asked is None:
    return Item(row.id, row.choices)
  if isinstance(row.asked, str):
    return Item(row.id, (row.asked,), row.answers)
  return Item(row.id, tuple(_of_messages(row.asked.messages)), row.answers)


def _key(run: Run, tasks: Sequence[Task]) -> str:
  found = {k: v for k, v in run.data.fingerprints().items() if k != 'data order'}
  return digest([_VERSION, found, [[t.name, t.digest] for t in tasks]])


def _load(path: str, key: str) -> dict[str, Report] | None:
  """Returns the reports of an earlier comparison of the same data; None without one."""
  found = _read(path)
  return found[1] if found and found[0]['key'] == key else None


def _kept(path: str, tasks: Sequence[Task]) -> dict[str, Report]:
  """Returns the reports of those tasks whose rows are the ones that were compared in training."""
  found = _read(path)
  if found is None:
    return {}
  compared = found[0].get('tasks', {})
  return {t.name: found[1][t.name] for t in tasks if compared.get(t.name) == t.digest}


def _read(path: str) -> tuple[dict[str, Any], dict[str, Report]] | None:
  """Returns (the content, the reports) of contamination.json; None without a readable one."""
  if not files.exists(path):
    return None
  try:
    content = json.loads(files.read_text(path))
    if not isinstance(content['key'], str):
      raise TypeError('the key is no text')
    out = {}
    for name, fields in content['sets'].items():
      findings = tuple(Finding(**f) for f in fields.pop('findings'))
      out[name] = Report(findings, tuple(fields.pop('against')), **fields)
    return content, out
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    log.warning('%s: cannot be read (%s); it is left aside', path, error)
    return None


def _compare(run: Run, tasks: Sequence[Task]) -> tuple[dict[str, Report], dict[str, Any]]:
  """Returns (reports, facts on the training rows)."""
  sets = {task.name: [item_of(row) for row in task.rows] for task in tasks}
  if run.data.evaluation:
    sets[SPLIT] = _split_items(run)
  found = contamination.Check(sets)
  del sets
  total, step = _row_count(run, 'train'), 0
  hashes, first = np.zeros(total, np.uint64), []
  for place, texts in _progress(_rows(run, 'train'), total):
    found.add(place, texts)
    whole = hashlib.blake2b('\0'.join(texts).encode(errors='surrogatepass'), digest_size=8)
    hashes[step] = int.from_bytes(whole.digest(), 'little')
    if step < _COMPARED_ROWS:
      first.append([ngrams.words(text) for text in texts])
    step += 1
  names = [s.path for s in sources.parse_specs(run.config.data.train)]
  different = len(ngrams.distinct(hashes[:step]))
  facts = {'rows': step, 'repeated': step - different} | _near(first)
  return found.reports(names), facts


def _near(rows: list[list[list[str]]]) -> dict[str, int | None]:
  """Returns how many of the first training rows are near-duplicates; None without datasketch."""
  try:
    near_duplicates.need_datasketch('the count of near-duplicates among training rows')
  except ConfigError as error:
    log.info('%s', error)
    return {'compared': 0, 'near_duplicates': None}
  return {'compared': len(rows), 'near_duplicates': near_duplicates.count(rows)}


def _row_count(run: Run, key: str) -> int:
  """Returns at least the number of rows of `_rows`."""
  if isinstance(run.data, examples.PromptData):
    found = run.data.sources if key == 'train' else run.data.evaluation
    return sum(len(x.rows) for x in found)
  return sum(map(len, run.data.corpora if key == 'train' else run.data.evaluation))


def _split_items(run: Run) -> list[Item]:
  """Returns the rows of the split, or evenly spread ones of many."""
  stride = max(1, -(-_row_count(run, 'eval') // _SPLIT_ROWS))
  rows = (row for i, row in enumerate(_rows(run, 'eval')) if i % stride == 0)
  return [Item(place, tuple(texts[:-1] or texts), tuple(texts[1:][-1:])) for place, texts in rows]


def _progress(rows: Iterator, total: int) -> Iterator:
  # A log file gets a line every 30 s.
  often = 0.2 if sys.stderr.isatty() else 30.0
  settings = dict(desc='contamination', unit=' rows', leave=False, mininterval=often)
  return iter(tqdm(rows, total=total, **settings))


def _rows(run: Run, key: str) -> Iterator[tuple[str, list[str]]]:
  """Yields (file and line, texts) of the rows that the run uses: 'train' or 'eval'."""
  for number, row in enumerate(_places_and_texts(run, key)):
    if number % _BEAT_ROWS == 0:
      run.watchdog.beat()
    yield row


def _places_and_texts(run: Run, key: str) -> Iterator[tuple[str, list[str]]]:
  c, data = run.config, run.data
  if isinstance(data, examples.PromptData):
    for found in data.sources if key == 'train' else data.evaluation:
      for prompt in found.rows:
        yield prompt.place, _of_prompt(prompt)
    return
  corpora = data.corpora if key == 'train' else data.evaluation
  named = c.data.eval if key == 'eval' and c.data.eval else c.data.train
  folder = examples.cache_folder(c, run.workdir)
  specs = [synthetic.resolve(spec, folder) for spec in sources.parse_specs(named)]
  for spec, corpus in zip(specs, corpora, strict=True):
    yield from _rows_of(c, spec, corpus, run.model.tokenizer.template is not None)


def _rows_of(
  c: ml_collections.ConfigDict, spec: sources.Spec, corpus: Corpus, has_template: bool
) -> Iterator[tuple[str, list[str]]]:
  """Yields the rows of a source whose examples are in the corpus; both are in the source's order,
  and a row may have several examples, or none where it was left out or is on the other side of a
  split.
  """
  shape, form = algorithms.of(c).example(c), spec.format
  names = sources.source_names(spec)
  used = map(corpus.row_of, range(len(corpus)))
  wanted = next(used, None)
  for file, line, row in sources.scan(spec):
    if shape in TEXT_SHAPES and form is None and not isinstance(row, Bad):
      form = _detected(row)
    if (file, line) != wanted:
      continue
    while wanted == (file, line):
      wanted = next(used, None)
    if shape in TEXT_SHAPES:
      example = formats.parse(row, form, has_template, is_named=spec.format is not None)
    else:
      example = preference_rows.parse(row, shape, spec.format, has_template)
    yield f'{names[file]}:{line}', texts_of(example)


def _detected(row: Mapping[str, Any]) -> str | None:
  try:
    return formats.detect(row)
  except ValueError:  # data.on_bad_row leaves it out
    return None


def _log(name: str, report: Report) -> None:
  """Logs a warning on an evaluation set with rows that were trained on."""
  bad = [f for f in report.findings if not f.is_clean]
  if not bad:
    return
  what = 'data.eval' if name == SPLIT else f'eval.tasks {name}'
  log.warning(
    '%s: %d of %d rows are in the training data (%d contaminated, %d near-duplicates), such as %s, '
    'see %s: their scores show memory too',
    *(what, len(bad), len(report.findings), report.contaminated, report.near_duplicates),
    *(bad[0].id, bad[0].place or bad[0].near),
  )
