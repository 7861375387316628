"""Two processes evaluate like one: in the loop, at the end, and with samples."""

import json
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from cluster import arguments, run

from ftjax.evaluation import result


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


@pytest.mark.full
def test_two_processes_evaluate_like_one(tmp_path):
  sums = [
    {'prompt': f'{a} + {b} =', 'choices': [str(a + b), str(a + b + 1)], 'label': str(a + b)}
    for a in range(5)
    for b in range(2)
  ]
  said = [{'prompt': f'{a} + 1 =', 'answer': str(a + 1)} for a in range(5)]
  sums, said = write(tmp_path / 'sums.jsonl', sums), write(tmp_path / 'said.jsonl', said)
  settings = (
    f'eval.tasks=("sums=choice:{sums}","said=match:{said}","mine=reward/length(at_most=3):{said}")',
    'eval.in_loop=("sums","said","mine")',
    'eval.in_loop_rows=4',
    'eval.max_share=1.0',
    'eval.samples=2',
    'eval.temperature=0.7',
    'eval.max_tokens=4',
    'eval.batch_size=4',
  )
  run(1, arguments(tmp_path / 'one', *settings), tmp_path / 'one_logs')
  run(2, arguments(tmp_path / 'two', *settings), tmp_path / 'two_logs')
  for task in ('sums', 'said', 'mine'):
    ours, theirs = (
      result.load(str(tmp_path / w / 'eval' / f'{task}.jsonl')) for w in ('two', 'one')
    )
    assert ours.keys() == theirs.keys() == {'base', 'tuned'}
    for model in ours:
      for a, b in zip(ours[model], theirs[model], strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-3)  # of weights trained on two meshes
        assert (a.id, a.sample, a.prediction, a.response) == (
          b.id,
          b.sample,
          b.prediction,
          b.response,
        )
  rows = [
    [x for x in map(json.loads, (tmp_path / w / 'metrics.jsonl').open()) if x['split'] == 'eval']
    for w in ('two', 'one')
  ]
  assert [x['step'] for x in rows[0]] == [4, 8]
  for a, b in zip(*rows, strict=True):
    names = [n for n in b if '/' in n]
    assert {'sums/accuracy', 'said/accuracy', 'mine/reward'} <= set(names)
    assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, abs=1e-3)
