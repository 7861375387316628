"""The GSM8K recipe: what demo/gsm8k.py makes is what the config trains and judges on."""

import gzip
import importlib.util
import json
import pathlib

import pytest

from ftjax.config import task_specs
from ftjax.evaluation import tasks
from ftjax.evaluation.kind import Answer
from ftjax.grading import rewards

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = [
  {'question': f'{n} apples and {n} more?', 'answer': f'<<{n}+{n}={2 * n}>>\n#### {2 * n}'}
  for n in range(710)
]


def imported(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def gsm8k():
  return imported(ROOT / 'demo' / 'gsm8k.py')


def written(path, rows):
  opened = gzip.open if path.suffix == '.gz' else open
  with opened(path, 'wt', encoding='utf-8') as out:
    out.write('\n'.join(map(json.dumps, rows)))
  return path


def read(path):
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_rows_are_kept_apart(gsm8k, tmp_path):
  train, test = written(tmp_path / 'a.jsonl.gz', ROWS), written(tmp_path / 'b.jsonl', ROWS[:3])
  gsm8k.main(tmp_path / 'own', train)
  found = {n: read(tmp_path / 'own' / f'{n}.jsonl') for n in ('train', 'dev', 'test')}
  assert {n: len(rows) for n, rows in found.items()} == {'train': 10, 'dev': 200, 'test': 500}
  asked = [r['messages'][0]['content'] for rows in found.values() for r in rows]
  assert len(set(asked)) == 710
  gsm8k.main(tmp_path / 'theirs', train, test)
  assert [len(read(tmp_path / 'theirs' / f'{n}.jsonl')) for n in found] == [510, 200, 3]


def test_rows_of_another_kind_are_refused(gsm8k, tmp_path):
  bad = written(tmp_path / 'a.jsonl', [*ROWS[:2], {'question': 'x', 'answer': '12'}])
  with pytest.raises(SystemExit, match='row 3'):
    gsm8k.main(tmp_path, bad)


def test_reward_and_tasks_read_the_same_number(gsm8k, tmp_path):
  gsm8k.main(tmp_path, written(tmp_path / 'a.jsonl', ROWS))
  c = imported(ROOT / 'configs' / 'grpo_gsm8k.py').get_config()
  rows = read(tmp_path / 'test.jsonl')[:4]
  wanted = [r['answer'].rpartition(' ')[2] for r in rows]
  said = [rows[0]['answer'], f'#### {wanted[1]}.', f'It is {wanted[2]}', f'#### {wanted[3]}0']
  batch = rewards.Batch(
    prompts=[r['messages'][0]['content'] for r in rows],
    completions=said,
    columns={'answer': [r['answer'] for r in rows]},
    prompt_ids=[[1]] * 4,
    token_ids=[[1]] * 4,
    is_truncated=[False] * 4,
  )
  with rewards.Rewards(rewards.parse(c.rollout.rewards), ['answer']) as judges:
    scored = judges.score(batch)
  found = {}
  for spec in c.eval.tasks:
    name, kind, _ = task_specs.parse(spec)
    task = tasks.load_task(name, kind, str(tmp_path / 'test.jsonl'))
    found[name] = [
      task.kind.score(r, Answer(text=text, prompt=r.question))['right']
      for r, text in zip(task.rows, said, strict=False)
    ]
  assert found['strict'] == [bool(x) for x in scored.total] == [True, True, False, False]
  assert found['flexible'] == [True, True, True, False]
