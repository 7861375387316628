"""Speed of a chat and of an evaluation, of one checkout of ftjax or of several side by side.

  make assets
  .venv/bin/python benchmarks/generation_speed.py --tree . --tree /path/to/another/checkout

Every checkout is a process of its own (the Python that runs this script), and they take turns.
  chat: a conversation of --turns questions, greedy, each answer of at most --tokens tokens. The
    first time programs are compiled (`compilations`, `cold_seconds`), the second time those of a
    new conversation after a longer one (`compilations_again`). Of the third, `first_ms` is the
    median time to the first token over turns, `tokens_per_s` counts all of a turn.
  eval: --rows prompts of 10 to 200 tokens at --batch at once, greedy, until the model stops or
    --tokens. `cold_seconds` with compilation, `seconds` again without.
Values are medians over rounds, ratios are of the first checkout to each other one. `digest` is of
all generated texts: equal where all checkouts generate the same. One line of JSON per checkout,
then one of ratios.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_QUESTIONS = (
  'Hello! Who are you?',
  'Name three animals that live in the sea.',
  'Which of them is the largest?',
  'Write one sentence about it for a child of six who has never seen the sea.',
  'Thanks. Now tell me how bread is made, step by step, in a few short lines.',
  'And how long does that take?',
  'What could go wrong, and what would you do about it?',
  'Give me a title for a story in which a whale bakes bread.',
)
_TEXT = 'the sea is deep and blue while old ships sail slowly past green islands every day'


def _module(*names: str):
  """The first module that the checkout has: checkouts from before issue 16 have other names."""
  for name in names:
    try:
      return importlib.import_module(name)
    except ModuleNotFoundError:
      continue
  raise SystemExit(f'none of {names} is in this checkout')


class Compilations:
  """Counts what XLA compiles."""

  def __init__(self):
    import jax

    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._hear)

  def _hear(self, event: str, seconds: float, **_) -> None:
    self.count += event == '/jax/core/compile/backend_compile_duration'


def play_chat(job: dict) -> dict:
  """Holds the conversation twice."""
  generator = _module('ftjax.serving.generator', 'ftjax.generator')
  counted = Compilations()
  model = generator.Generator(job['model'], generator.Settings(max_tokens=job['tokens']))

  def talk() -> tuple[list[float], list[float], list[int], list[str]]:
    messages, firsts, seconds, texts = [], [], [], []
    for number, question in enumerate((_QUESTIONS * 9)[: job['turns']]):
      messages.append({'role': 'user', 'content': question})
      shown, begin = [], time.perf_counter()
      reply = model.respond(messages, number, lambda _, s=shown: s.append(time.perf_counter()))
      seconds.append(time.perf_counter() - begin)
      firsts.append(shown[0] - begin)
      texts.append(reply.text)
      messages.append({'role': 'assistant', 'content': reply.text.strip() or '-'})
    counts = [len(model.tokenizer.encode(t)) + 1 for t in texts]
    return firsts, seconds, counts, texts

  before = counted.count
  _, cold, _, texts = talk()
  compilations = counted.count - before
  talk()
  compilations_again = counted.count - before - compilations
  firsts, seconds, counts, again = talk()
  assert again == texts, 'greedy answers are the same again'
  drawn = [(n - 1) / (s - f) for n, s, f in zip(counts, seconds, firsts, strict=True) if n > 8]
  return {
    'cold_seconds': sum(cold),
    'compilations': compilations,
    'compilations_again': compilations_again,
    'first_ms': 1000 * statistics.median(firsts),
    'first_ms_of_turn_1': 1000 * firsts[0],
    'seconds': sum(seconds),
    'tokens_per_s': sum(counts) / sum(seconds),
    'tokens_per_s_after_first': statistics.median(drawn),
    'digest': _digest(texts),
  }


def play_eval(job: dict) -> dict:
  """Scores the base of a run on one task, twice."""
  keys = _module('ftjax.config.keys', 'ftjax.config')
  run = _module('ftjax.experiment.run', 'ftjax.experiment')
  compare = _module('ftjax.experiment.compare', 'ftjax.compare')
  counted = Compilations()
  with tempfile.TemporaryDirectory() as folder:
    rows = Path(folder) / 'rows.jsonl'
    rows.write_text('\n'.join(map(json.dumps, _rows(job['rows'], job['words']))))
    c = keys.default()
    c.model.path, c.seq_len = job['model'], 256
    c.eval.tasks, c.eval.batch_size = (f'generated=match:{rows}',), job['batch']
    c.eval.max_tokens, c.eval.prompts = job['tokens'], ()
    began = run.start(c, f'{folder}/run', with_data=False)
    evaluator = getattr(compare, 'Evaluator', None) or compare.Judge
    judge = evaluator(began)
    params = began.load_params(began.model.source, c.model.param_dtype)
    before, out = counted.count, {}
    for name in ('cold_seconds', 'seconds'):
      judge.folder = f'{folder}/{name}'
      begin, cpu = time.perf_counter(), time.process_time()
      (results,) = judge.base(params).values()
      results = results['base'] if isinstance(results, dict) else results  # of older checkouts
      out[name] = time.perf_counter() - begin
      out['cpu_' + name] = time.process_time() - cpu
      out.setdefault('compilations', counted.count - before)
    return out | {'digest': _digest([r.prediction for r in results])}


def _rows(count: int, most: int) -> list[dict]:
  chance, words, rows = random.Random(0), _TEXT.split(), []
  for i in range(count):
    text = ' '.join(chance.choice(words) for _ in range(chance.randint(1, most)))
    rows.append({'prompt': f'{text}. {_QUESTIONS[i % 8]} ({i})', 'answer': 'whale'})
  return rows


def _digest(texts: list[str]) -> str:
  return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def main() -> None:
  """Times every checkout, or is one of the timed processes."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--tree', action='append', help='a checkout; may be given again')
  parser.add_argument('--what', choices=('chat', 'eval'), action='append')
  parser.add_argument('--model', default=str(ROOT / '.cache' / 'smollm2'))
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--turns', type=int, default=8)
  parser.add_argument('--tokens', type=int, default=48)
  parser.add_argument('--rows', type=int, default=48)
  parser.add_argument('--words', type=int, default=170, help='of the longest row')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    job = json.loads(args.worker)
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what others print is no result
    print(json.dumps({'chat': play_chat, 'eval': play_eval}[job['what']](job)), file=out)
    return
  trees = args.tree or [str(ROOT)]
  for what in args.what or ['chat', 'eval']:
    job = vars(args) | {'what': what, 'model': os.path.abspath(args.model)}
    found = {tree: [] for tree in trees}
    for number in range(args.rounds):
      for tree in trees if number % 2 else trees[::-1]:
        found[tree].append(_time(tree, job))
    medians = {tree: _median(rounds) for tree, rounds in found.items()}
    for tree, row in medians.items():
      print(json.dumps({'what': what, 'tree': tree} | row), flush=True)
    first, *others = medians.values()
    for other in others:
      ratios = {k: round(v / other[k], 3) for k, v in first.items() if k != 'digest' and other[k]}
      print(json.dumps({'what': what, 'same_texts': first['digest'] == other['digest']} | ratios))


def _time(tree: str, job: dict) -> dict:
  # Compilation is part of what is timed.
  env = os.environ | {'PYTHONPATH': os.path.abspath(tree), 'TF_CPP_MIN_LOG_LEVEL': '2'}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  command = [sys.executable, __file__, '--worker', json.dumps(job)]
  done = subprocess.run(command, env=env, stdout=subprocess.PIPE, cwd=tree, check=True)
  return json.loads(done.stdout)


def _median(rounds: list[dict]) -> dict:
  digests = {r['digest'] for r in rounds}
  assert len(digests) == 1, 'every round generates the same'
  out = {k: round(statistics.median(r[k] for r in rounds), 3) for k in rounds[0] if k != 'digest'}
  return out | {'digest': digests.pop()}


if __name__ == '__main__':
  main()
