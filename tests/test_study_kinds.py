"""Learning curves, seeds x settings, the report of a study; what is refused before it starts."""

import itertools
import json
import subprocess
import sys

import chromium
import numpy as np
import pytest
import study_runs
import tiny_run
from study_runs import labelled_rows, make_config, run

from ftjax.config import choices, config_file, search_space, validation
from ftjax.reporting import study as report
from ftjax.reporting import xy_chart
from ftjax.runtime.errors import ConfigError
from ftjax.studies import kinds, learning_curve
from ftjax.studies import metric as study_metric


def task_file(path, count=80):
  rows = [
    {'id': str(i), 'prompt': f'{i}?', 'choices': ['no', 'yes'], 'label': 'no' if i % 3 else 'yes'}
    for i in range(count)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return f'truth=choice:{path}'


def with_task(tmp_path, **settings):
  path = tmp_path / 'rows.jsonl'
  labelled_rows(400, path)
  usual = {
    'data__train': str(path),
    'data__eval_fraction': 0.0,
    'eval__tasks': (task_file(tmp_path / 'task.jsonl'),),
  }
  return make_config(**(usual | settings))


def curve(tmp_path, **settings):
  usual = {'study__kind': 'learning_curve', 'study__seeds': (0, 1, 2)}
  return with_task(tmp_path, **(usual | settings))


def test_subsets_are_nested_and_seeded(tmp_path):
  run(curve(tmp_path), tmp_path / 's')
  for seed in range(3):
    sets = []
    for size in (20, 40, 120, 400):
      folder = tmp_path / 's' / 'subsets' / f'rows{size}-seed{seed}'
      found = (folder / 'source0.jsonl').read_text().splitlines()
      assert len(found) == size
      sets.append(set(found))
    assert all(a < b for a, b in itertools.pairwise(sets))
  assert learning_curve.order(9, 1, 2) == learning_curve.order(9, 1, 2)
  assert learning_curve.order(9, 1, 2) != learning_curve.order(9, 1, 3)


def test_rows_of_a_group_join_together():
  groups = [f'g{i % 5}' for i in range(20)]
  found = [groups[i] for i in learning_curve.order(20, 0, 0, groups)]
  assert len([k for k, _ in itertools.groupby(found)]) == 5


def test_a_learning_curve_forecasts_and_checks_itself(tmp_path):
  found = run(curve(tmp_path), tmp_path / 's')
  summary = found['summary']
  assert summary['rows'] == [20, 40, 120, 400] and np.shape(summary['values']) == (4, 3)
  forecast = {round(e['rows']): e for e in summary['forecast']}
  assert sorted(forecast) == [400, 800, 2000]
  assert forecast[400]['value'] <= forecast[800]['value'] <= forecast[2000]['value'] <= 1
  assert all(e['low'] <= e['value'] <= e['high'] for e in forecast.values())
  check = summary['check']
  assert check['from_rows'] == [20, 40, 120]
  assert check['measured'] == pytest.approx(np.mean(summary['values'][3]))
  assert check['is_inside'] == (check['low'] <= check['measured'] <= check['high'])
  assert any('With 400 more rows (800 in all)' in s for s in found['findings'])


def test_a_curve_of_two_sizes_has_no_law(tmp_path):
  found = run(curve(tmp_path, study__fractions=(0.1, 1.0), study__seeds=(0,)), tmp_path / 's')
  assert found['summary']['law'] is None and 'needs three' in found['findings'][0]


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'data__eval_fraction': 0.1}, r'learning_curve with data\.eval_fraction=0\.1'),
    ({'study__fractions': (0.0001, 1.0)}, r'study\.fractions=\(0\.0001, 1\.0\) of 400 rows'),
  ],
)
def test_curves_that_mean_nothing(tmp_path, settings, text):
  with pytest.raises(ConfigError, match=text):
    run(curve(tmp_path, **settings), tmp_path / 's')


def test_settings_with_seeds_have_both_errors_apart(tmp_path):
  space = ('optim.lr=1e-4,1e-3', 'batch_size=4,8')
  c = with_task(tmp_path, study__kind='seeds', study__space=space, study__seeds=(0, 1, 2))
  found = run(c, tmp_path / 's')
  settings = found['summary']['settings']
  assert len(settings) == 4 and len(found['runs']) == 12
  assert 'optim.lr=0.001' in settings[0]['label']  # the best one is first
  for setting in settings:
    assert setting['low'] <= setting['value'] <= setting['high']
    assert setting['between_sd'] >= 0 and setting['within_se'] > 0
    assert setting['value'] == pytest.approx(np.mean(setting['values']))
  assert len(found['summary']['differences']) == 3
  assert found['winner'] == settings[0]['runs'][0]


def test_seeds_of_one_setting_and_a_loss(tmp_path):
  c = make_config(study__kind='seeds', study__seeds=(0, 1))
  (setting,) = run(c, tmp_path)['summary']['settings']
  assert setting['label'] == 'the config' and setting['within_se'] is None
  assert setting['between_sd'] == pytest.approx(np.std(setting['values'], ddof=1))


def test_every_kind_is_in_the_table_of_choices():
  assert {'', *kinds.KINDS} == set(choices.STUDIES)


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'study__space': ('optim.lr=1,2',)}, 'study.space=.* does nothing with study.kind=;'),
    ({'study__kind': 'gird'}, "study.kind='gird'; expected one of .*did you mean grid"),
    ({'study__kind': 'grid'}, 'study.space is empty'),
    ({'study__space': ('optim.lr',)}, "study.space: 'optim.lr'; expected KEY=VALUES"),
    ({'study__space': ('optim.l=1,2',)}, 'optim.l: there is no such key; did you mean optim.lr'),
    ({'study__space': ('optim.lr=log:0:1',)}, 'a logarithmic range begins above 0'),
    ({'study__space': ('optim.lr=log:1:a',)}, 'expected two numbers'),
    ({'study__space': ('optim.lr=log:2:1',)}, 'expected LOW below HIGH'),
    ({'study__space': ('batch_size=log:2:9',)}, 'batch_size takes whole numbers; .*logint'),
    ({'study__space': ('batch_size=4,4',)}, 'expected different values'),
    ({'study__space': ('batch_size=4,x',)}, 'batch_size=x; expected an integer'),
    ({'study__space': ('batch_size=4', 'batch_size=8')}, 'batch_size is given twice'),
    ({'study__space': ('study.seed=1,2',)}, 'belongs to the study'),
    ({'study__space': (3,)}, 'study.space: 3; expected texts'),
    ({'study__space': ('optim.lr=uniform:1:2',)}, 'a grid takes values'),
    ({'study__trials': 0, 'study__kind': 'random'}, 'study.trials=0; expected at least 1'),
    ({'study__folds': 1, 'study__kind': 'kfold', 'study__space': ()}, 'study.folds=1; expected'),
    ({'study__rungs': (30, 10)}, 'study.rungs=.*ascending'),
    ({'study__rungs': (90,)}, 'expected fewer than steps=90'),
    ({'study__rungs': (9,), 'steps': 0}, 'give steps, in place of epochs'),
    ({'study__rungs': (9,), 'study__space': ('steps=20,30',)}, 'steps in study.space'),
    ({'study__reduction': 1}, 'study.reduction=1; expected at least 2'),
    ({'study__seeds': (0, 0), 'study__kind': 'seeds'}, 'each seed once'),
    ({'study__seeds': ('a',), 'study__kind': 'seeds'}, 'expected whole numbers'),
    ({'study__fractions': (0.5, 0.1), 'study__kind': 'learning_curve'}, 'ascending shares'),
    ({'study__launch': 'train {workdir}'}, 'lacks {config_overrides}'),
    ({'study__launch': '{config_overrides} {workdir} {wrong}'}, 'has {wrong}; expected'),
    ({'study__parallel': 0}, 'study.parallel=0'),
    ({'study__seed': -1}, 'study.seed=-1'),
    ({'study__kind': 'seeds', 'study__space': ('seed=1,2',)}, 'seed is changed by study.seeds'),
  ],
)
def test_bad_values_name_their_key(settings, text):
  usual = {'study__kind': 'grid', 'study__space': ('optim.lr=1e-3,1e-2',)}
  if settings == {'study__space': ('optim.lr=1,2',)}:
    usual = {}
  if 'study__kind' in settings and 'study__space' not in settings:
    usual = {}
  if settings.get('study__kind') == 'random':
    usual = {'study__space': ('optim.lr=1e-3,1e-2',)}
  with pytest.raises(ConfigError, match=text):
    validation.validate(make_config(**(usual | settings)))


@pytest.mark.parametrize(
  ('metric', 'text'),
  [
    ('eval/accuracy', "study.metric='eval/accuracy'; expected a figure .*truth/accuracy"),
    ('truth/f3', "study.metric='truth/f3'; expected truth/NAME with one of"),
    ('eval/truth/accuracy', "add 'truth' to eval.in_loop"),
  ],
)
def test_metrics_that_the_runs_do_not_measure(tmp_path, metric, text):
  c = with_task(tmp_path, study__metric=metric)
  with pytest.raises(ConfigError, match=text):
    study_metric.find(c)


def test_the_usual_metric(tmp_path):
  found = study_metric.find(with_task(tmp_path))
  assert (found.name, found.better, found.form) == ('truth/accuracy', 'max', 'fraction')
  found = study_metric.find(make_config())
  assert (found.name, found.better, found.is_best) == ('eval/loss', 'min', False)
  c = make_config(checkpoint__best_metric='eval/loss', eval__every=10)
  assert study_metric.find(c).is_best


def test_the_best_or_the_last_evaluation_counts(tmp_path):
  rows = [{'step': s, 'split': 'eval', 'loss': x} for s, x in ((10, 3.0), (20, 1.0), (30, 2.0))]
  text = ''.join(json.dumps(row) + '\n' for row in rows) + '{"step": 40, "spl'
  (tmp_path / 'metrics.jsonl').write_text(text)
  last = study_metric.StudyMetric('eval/loss', '', 'loss', 'min')
  best = study_metric.StudyMetric('eval/loss', '', 'loss', 'min', is_best=True)
  assert (last.read(str(tmp_path)), best.read(str(tmp_path))) == (2.0, 1.0)
  assert best.read(str(tmp_path), stop_at=10) == 3.0 and last.read(str(tmp_path), 40) is None


@pytest.mark.parametrize(
  ('text', 'places', 'values'),
  [
    ('optim.lr=log:1e-4:1e-2', (0.0, 0.5, 1.0), (1e-4, 1e-3, 1e-2)),
    ('optim.b2=uniform:0.9:0.99', (0.0, 0.5, 1.0), (0.9, 0.945, 0.99)),
    ('lora.rank=int:1:4', (0.0, 0.26, 0.51, 0.99), (1, 2, 3, 4)),
    ('lora.rank=logint:1:64', (0.0, 0.999), (1, 64)),
    ('remat=none,full', (0.0, 0.49, 0.5, 1.0), ('none', 'none', 'full', 'full')),
    ('model.path=a/b | c,d', (0.0, 0.9), ('a/b', 'c,d')),
    ('data.packing=true,false', (0.0, 0.9), (True, False)),
  ],
)
def test_values_of_a_dimension(text, places, values):
  (dimension,) = search_space.parse_all([text], make_config())
  assert tuple(map(dimension.at, places)) == pytest.approx(values)
  if dimension.form != 'choices':
    for value in values:
      assert dimension.at(dimension.place(value)) == value


def call(*arguments):
  command = [sys.executable, '-m', 'ftjax.study', *arguments]
  done = subprocess.run(
    command, cwd=tiny_run.ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
  )
  return done.returncode, done.stdout + done.stderr


def test_the_entry_refuses_before_anything_starts(tmp_path):
  code, text = call('--config=tiny_sft', f'--workdir={tmp_path}/s')
  assert code == 2 and 'study.kind is empty' in text
  code, text = call(
    '--config=tiny_study', '--config.study.space=optim.lr=log:1:0', f'--workdir={tmp_path}/s'
  )
  assert code == 2 and "study.space: 'optim.lr=log:1:0'" in text
  assert not (tmp_path / 's').exists()
  (tmp_path / 'file').write_text('')
  code, text = call('--config=tiny_study', f'--workdir={tmp_path}/file')
  assert code == 2 and 'Traceback' not in text and f'{tmp_path}/file' in text


@pytest.mark.full
def test_a_study_of_a_real_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tiny_run.ROOT)
  monkeypatch.setenv('PYTHONPATH', str(tiny_run.ROOT))
  monkeypatch.setenv('XLA_FLAGS', tiny_run.xla_flags())
  c = config_file.load(config_file.find('tiny_study'))
  c.study.trials, c.steps, c.study.rungs = 1, 6, (2,)
  found = run(c, tmp_path)
  (row,) = found['runs']
  assert row['status'] == 'done' and row['starts'] == 2
  assert row['eval/loss'] < row['at step 2']
  metrics = tiny_run.metrics(tmp_path / 'runs' / '000')
  assert [step for split, step in metrics if split == 'train'] == list(range(1, 7))
  assert [step for split, step in metrics if split == 'eval'] == [2, 6]
  assert metrics['eval', 6]['loss'] == row['eval/loss']
  assert (tmp_path / 'runs' / '000' / 'export' / 'model.safetensors').exists()


CONTENT = report.Content(
  ('The best <b>run</b> is 003.', 'More rows would help.'),
  (report.Table('Runs', 'The best first.', ('run', 'optim.lr'), (('<i>003</i>', '0.001'),)),),
  (
    report.Forest(
      'By fold', 'Minus all.', (report.Estimate('fold 1', 0.1, -0.1, 0.3, 'fraction'),)
    ),
  ),
  (
    report.Chart(
      'score by rows',
      'A point is a run.',
      {
        'measured': xy_chart.Line([10, 100, 1000], [0.5, 0.7, float('nan')], is_joined=False),
        'law': xy_chart.Line([10.0, 1000.0], [0.5, 0.8], low=[0.4, 0.6], high=[0.6, 0.9]),
      },
      log_x=True,
    ),
  ),
)


def test_the_page_escapes_texts_and_names_its_parts():
  page = report.render('my <study>', {'kind': 'grid', 'space': ['a', 'b']}, CONTENT)
  assert '<b>run</b>' not in page and '&lt;b&gt;run&lt;/b&gt;' in page and '<i>003' not in page
  for part in ('findings', 'charts', 'differences', 'tables'):
    assert f'id="{part}"' in page and f'href="#{part}"' in page
  assert page.count('<svg') >= 3 and 'nan' not in page.lower().replace('finance', '')
  empty = report.render('s', {}, report.Content(('Nothing.',)))
  assert 'id="charts"' not in empty and 'Nothing.' in empty


def test_the_text_of_a_report():
  text = report.text(CONTENT)
  assert text.splitlines()[0] == 'The best <b>run</b> is 003.'
  assert 'run         optim.lr' in text


@pytest.mark.skipif(chromium.find() is None, reason='no chromium')
def test_the_page_opens_in_a_browser(tmp_path):
  c = study_runs.make_config(
    study__kind='grid', study__space=('optim.lr=1e-4,1e-3,1e-2,1e-1',), study__rungs=(10,)
  )
  run(c, tmp_path)
  with chromium.Browser() as browser:
    browser.open(tmp_path / 'study.html')
    assert browser.ask('document.querySelector("h1").textContent') == tmp_path.name
    assert browser.ask('document.querySelectorAll("#tables tbody tr").length') == 4
    assert browser.ask('document.documentElement.scrollWidth <= window.innerWidth')
    assert not browser.problems() and len(browser.requests()) == 1
    browser.open(tmp_path / 'study.html', width=375)
    assert browser.ask('document.documentElement.scrollWidth <= window.innerWidth')
