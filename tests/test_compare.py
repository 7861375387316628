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
  loads, asked, load, evaluator = [], [], run.load_params, compare.Evaluator(run)
  engine = evaluator.programs.engine
  generate = engine.generate
  monkeypatch.setattr(run, 'load_params', lambda *a: loads.append(a) or load(*a))
  monkeypatch.setattr(engine, 'generate', lambda *a, **k: asked.append(0) or generate(*a, **k))
  base = {name: found['base'] for name, found in evaluator.base().items()}
  assert len(asked) == 1 and len(loads) == 1
  given = [[r.response for r in base[kind]] for kind in ('match', 'math', 'math_strict')]
  assert given[0] == given[1] == given[2] and len(given[0]) == 5
  evaluator.base()
  assert len(asked) == 1 and len(loads) == 1
  assert evaluator.tuned(load('', 'float32')) == {'gate': None}  # other weights are asked anew
  assert len(asked) == 2
  summary = json.loads((tmp_path / 'eval' / 'summary.json').read_text())
  assert summary['models'] == ['base', 'tuned']
  assert list(summary['tasks']) == ['match', 'math', 'math_strict']
