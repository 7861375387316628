"""Cross-validation: the folds, the rows that runs get, and the figures of held-out rows."""

import json
import pathlib

import numpy as np
import pytest
import study_runs
import tiny_run
from sklearn import model_selection
from study_runs import labelled_rows, make_config, records, run

from ftjax.evaluation import tasks
from ftjax.evaluation.statistics import intervals
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.studies import folds, rows

LABELS = ['yes'] * 40 + ['no'] * 15 + ['perhaps'] * 5


def lines(path):
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.mark.parametrize('repeats', [1, 3])
def test_folds_are_those_of_scikit_learn(repeats):
  found = folds.deal(60, folds=5, repeats=repeats, seed=7, labels=LABELS)
  theirs = model_selection.RepeatedStratifiedKFold(n_splits=5, n_repeats=repeats, random_state=7)
  parts = list(theirs.split(np.zeros(60), LABELS))
  for number, (_, held_out) in enumerate(parts):
    repeat, fold = divmod(number, 5)
    assert np.flatnonzero(found[repeat] == fold).tolist() == held_out.tolist()
  if repeats == 1:
    plain = model_selection.StratifiedKFold(5, shuffle=True, random_state=7)
    for fold, (_, held_out) in enumerate(plain.split(np.zeros(60), LABELS)):
      assert np.flatnonzero(found[0] == fold).tolist() == held_out.tolist()


def test_folds_without_labels_are_those_of_scikit_learn():
  found = folds.deal(23, folds=4, repeats=2, seed=1)
  theirs = model_selection.RepeatedKFold(n_splits=4, n_repeats=2, random_state=1)
  for number, (_, held_out) in enumerate(theirs.split(np.zeros(23))):
    repeat, fold = divmod(number, 4)
    assert np.flatnonzero(found[repeat] == fold).tolist() == held_out.tolist()


def test_folds_are_disjoint_whole_and_stratified():
  found = folds.deal(60, folds=5, repeats=2, seed=0, labels=LABELS)
  for own in found:
    assert sorted(set(own.tolist())) == [0, 1, 2, 3, 4]  # each row is in one fold
    for name in set(LABELS):
      counts = np.bincount(own[np.array(LABELS) == name], minlength=5)
      assert counts.max() - counts.min() <= 1
  assert (found[0] != found[1]).any()


@pytest.mark.parametrize('labels', [None, LABELS])
def test_a_group_is_never_in_two_folds(labels):
  groups = [str(i % 13) for i in range(60)]
  found = folds.deal(60, folds=4, repeats=2, seed=3, labels=labels, groups=groups)
  for own in found:
    for group in set(groups):
      assert len({f for f, g in zip(own.tolist(), groups, strict=True) if g == group}) == 1
    assert set(own.tolist()) == {0, 1, 2, 3}


def test_more_folds_than_rows_or_groups_are_refused():
  with pytest.raises(ConfigError, match=r'study\.folds=5, but data\.train has only 3 rows'):
    folds.deal(3, folds=5, repeats=1, seed=0)
  with pytest.raises(ConfigError, match='only 2 groups'):
    folds.deal(6, folds=3, repeats=1, seed=0, groups=['a', 'a', 'a', 'b', 'b', 'b'])


def kfold(tmp_path, **settings):
  path = tmp_path / 'rows.jsonl'
  labelled_rows(30, path, groups=settings.pop('groups', None))
  usual = {
    'study__kind': 'kfold',
    'study__folds': 3,
    'study__repeats': 2,
    'data__train': str(path),
    'data__eval_fraction': 0.0,
    'eval__tasks': (f'truth=choice:{path}',),
  }
  return make_config(**(usual | settings))


def test_each_row_is_held_out_once_in_each_repeat(tmp_path):
  found = run(kfold(tmp_path), tmp_path / 's')
  all_rows = lines(tmp_path / 'rows.jsonl')
  assert len(found['runs']) == 6 and found['metric'] == 'truth/accuracy'
  for repeat in range(2):
    held_out = []
    for fold in range(3):
      folder = tmp_path / 's' / 'folds' / f'repeat{repeat}-fold{fold}'
      own, train = (lines(folder / part / 'source0.jsonl') for part in ('held_out', 'train'))
      assert len(own) + len(train) == 30 and not [row for row in own if row in train]
      answers = [row['messages'][-1]['content'] for row in own]
      assert abs(answers.count('no') - 10 / 3) < 1  # stratified by the answers
      held_out += own
    assert sorted(map(str, held_out)) == sorted(map(str, all_rows))
  out = lines(tmp_path / 's' / 'out_of_fold' / 'truth.jsonl')
  tuned = [(r['id'], r['repeat']) for r in out if r['model'] == 'tuned']
  assert sorted(tuned) == sorted((str(i), r) for i in range(30) for r in range(2))
  assert {r['place'] for r in out if r['id'] == '4'} == {f'{tmp_path}/rows.jsonl:5'}


def test_the_rows_of_a_fold_are_asked_without_their_answers(tmp_path):
  run(kfold(tmp_path), tmp_path / 's')
  folder = tmp_path / 's' / 'folds' / 'repeat0-fold0'
  asked, own = lines(folder / 'truth.jsonl'), lines(folder / 'held_out' / 'source0.jsonl')
  assert len(asked) == len(own) == 10
  for task, row in zip(asked, own, strict=True):
    assert task['messages'] == row['messages'][:-1]
    assert task['choices'] == ['no', 'yes'] and task['label'] == row['messages'][-1]['content']


def test_out_of_fold_figures_are_those_of_a_plain_loop(tmp_path):
  found = run(kfold(tmp_path), tmp_path / 's')
  entry = found['summary']['truth']['metrics'][0]
  right, clusters = [], []
  for repeat in range(2):
    for fold in range(3):
      name = f'repeat{repeat}-fold{fold}'
      for row in lines(tmp_path / 's' / 'runs' / name / 'eval' / 'truth.jsonl'):
        if row['model'] == 'tuned':
          right.append(float(row['prediction'] == row['label']))
          clusters.append(row['id'])
  theirs = intervals.proportion(np.array(right), clusters)
  assert entry['tuned']['value'] == pytest.approx(np.mean(right))
  assert entry['tuned']['low'] == pytest.approx(theirs.low)
  assert entry['tuned']['high'] == pytest.approx(theirs.high)
  # A row that is answered twice counts less than two rows.
  once = intervals.proportion(np.array(right), range(len(right)))
  assert entry['tuned']['high'] - entry['tuned']['low'] > once.high - once.low
  gain = entry['difference']
  assert gain['value'] == pytest.approx(entry['tuned']['value'] - entry['base']['value'])
  values = [o['value'] for r in records(tmp_path / 's').values() for o in r['outcomes']]
  assert found['summary']['runs']['mean'] == pytest.approx(np.mean(values))


def test_copies_of_a_group_stay_together(tmp_path):
  groups = [f'g{i % 7}' for i in range(30)]
  run(kfold(tmp_path, groups=groups, study__repeats=1), tmp_path / 's')
  for fold in range(3):
    folder = tmp_path / 's' / 'folds' / f'repeat0-fold{fold}'
    own, train = (
      {row['group'] for row in lines(folder / part / 'source0.jsonl')}
      for part in ('held_out', 'train')
    )
    assert not own & train


def test_copies_without_a_group_are_counted(tmp_path, caplog):
  path = tmp_path / 'rows.jsonl'
  labelled_rows(30, path)
  path.write_text(path.read_text() + path.read_text().splitlines()[0] + '\n')
  c = kfold(tmp_path)
  path.write_text(path.read_text() + path.read_text().splitlines()[0] + '\n')
  run(c, tmp_path / 's')
  assert '1 rows are copies of others' in caplog.text


def test_a_failed_fold_is_named_and_left_out(tmp_path, monkeypatch):
  c = kfold(tmp_path, study__repeats=1)
  name = json.dumps([f'{tmp_path}/s/folds/repeat0-fold1/train/source0.jsonl'])
  monkeypatch.setenv('STUDY_TRAINER_FAULT', f'exit:4:data.train={name}')
  found = run(c, tmp_path / 's')
  assert 'Failed, and not in these figures: repeat0-fold1.' in found['findings']
  assert found['summary']['truth']['results'] == 20


def test_rows_of_several_sources_keep_format_and_weight(tmp_path):
  a, b = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'
  labelled_rows(20, a)
  b.write_text(
    ''.join(json.dumps({'prompt': f'{i}?', 'completion': 'yes'}) + '\n' for i in range(10))
  )
  c = make_config(data__train=(f'{a}@3', f'{b}::prompt_completion@1'))
  found = rows.read(c, str(tmp_path))
  assert len(found.rows) == 30 and found.answers()[20:] == ['yes'] * 10
  written = found.write(str(tmp_path / 'out'), [0, 5, 25], has_weights=True)
  assert written == (
    f'{tmp_path}/out/source0.jsonl@3',
    f'{tmp_path}/out/source1.jsonl::prompt_completion@1',
  )
  assert [len(lines(w.partition('@')[0].partition('::')[0])) for w in written] == [2, 1]
  assert found.write(str(tmp_path / 'out'), [25], has_weights=False) == (
    f'{tmp_path}/out/source1.jsonl::prompt_completion',
  )


def test_rows_for_each_kind_of_task(tmp_path):
  path = tmp_path / 'a.jsonl'
  labelled_rows(6, path)
  found = rows.read(make_config(data__train=str(path)), str(tmp_path))
  for kind in ('choice', 'match', 'answer_perplexity', 'label'):
    made = rows.task_rows(found, kind, found.answers())
    rows.write_lines(str(tmp_path / 'task.jsonl'), made)
    task = tasks.load_task('t', kind, str(tmp_path / 'task.jsonl'))
    assert [row.id for row in task.rows] == [str(i) for i in range(6)]
    assert [row.answer or row.choices[0] for row in task.rows] == [
      'no',
      'yes',
      'yes',
      'no',
      'yes',
      'yes',
    ]


def test_answers_that_are_no_choices_are_refused(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(
    ''.join(json.dumps({'prompt': f'{i}?', 'completion': str(i)}) + '\n' for i in range(60))
  )
  found = rows.read(make_config(data__train=str(path)), str(tmp_path))
  with pytest.raises(DataError, match=r'a\.jsonl:1: no "choices", and the rows have 60 different'):
    rows.task_rows(found, 'choice', found.answers())


def test_a_column_to_stratify_by_that_rows_lack(tmp_path):
  with pytest.raises(ConfigError, match=r'study\.stratify=topic: .*rows\.jsonl:1 has no such'):
    run(kfold(tmp_path, study__stratify='topic'), tmp_path / 's')


@pytest.mark.full
def test_real_folds_equal_runs_that_are_started_by_hand(tmp_path):
  """Real training: each fold's run, again by ftjax.train with the fold's files, gives the same."""
  path = tmp_path / 'rows.jsonl'
  labelled_rows(24, path)
  extra = [f'data.train={path}', f'eval.tasks=truth=choice:{path}', 'study.folds=2', 'steps=20']
  extra += ['study.rungs=()', 'study.space=()', 'study.kind=kfold', 'data.eval_fraction=0']
  extra += ['study.trials=20', 'study.reduction=3']
  flags = [f'--config.{x}' for x in extra]
  workdir = tmp_path / 's'
  process = study_runs.start(
    ['--config=tiny_study', *flags, f'--workdir={workdir}'], tmp_path / 'log'
  )
  assert process.wait(timeout=900) == 0, (tmp_path / 'log').read_text()
  right = []
  for fold in range(2):
    folder, own = workdir / 'folds' / f'repeat0-fold{fold}', tmp_path / f'own{fold}'
    keys = ['study.kind=', 'study.space=()', 'study.rungs=()', 'study.trials=20']
    keys += ['study.reduction=3', 'steps=20', 'data.eval_fraction=0']
    keys += [f'data.train={folder}/train/source0.jsonl']
    keys += [f'data.eval={folder}/held_out/source0.jsonl']
    keys += [f'eval.tasks=truth=choice:{folder}/truth.jsonl']
    flags = [f'--config.{k}' for k in keys]
    code, text = tiny_run.run('train', ['--config=tiny_study', *flags, f'--workdir={own}'])
    assert code == 0, text
    right += [
      r['values']['right'][0] for r in lines(own / 'eval/truth.jsonl') if r['model'] == 'tuned'
    ]
  study = json.loads((workdir / 'study.json').read_text())
  entry = study['summary']['truth']['metrics'][0]
  assert entry['tuned']['value'] == pytest.approx(np.mean(right))
