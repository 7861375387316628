"""Base against tuned, as a run asks for it."""

import json

import tiny_rollouts

from ftjax.experiment import compare


def test_tasks_on_one_file_are_logged_once(tmp_path, monkeypatch):
  rows = [{'prompt': f'{i} + 1 =', 'answer': str(i + 1)} for i in range(5)]
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  names = tuple(f'{kind}={kind}:{path}' for kind in ('match', 'math', 'math_strict'))
  run = tiny_rollouts.start(
    tmp_path, **{'eval.tasks': names, 'eval.batch_size': 2, 'eval.max_tokens': 4}
  )
  loads, asked, load, judge = [], [], run.load_params, compare.Evaluator(run)
  generate = judge._engine.generate_at_once
  monkeypatch.setattr(run, 'load_params', lambda *a: loads.append(a) or load(*a))
  monkeypatch.setattr(
    judge._engine,
    'generate_at_once',
    lambda p, prompts, **k: asked.append(0) or generate(p, prompts, **k),
  )
  base = judge.base()
  assert len(asked) == 3 and len(loads) == 1  # 5 rows, 2 at once
  said = [[r.prediction for r in base[kind]] for kind in ('match', 'math', 'math_strict')]
  assert said[0] == said[1] == said[2] and len(said[0]) == 5
  judge.base()
  assert len(asked) == 3 and len(loads) == 1
  judge.tuned(load('', 'float32'))  # other weights are asked anew
  assert len(asked) == 6
