"""reporting/: every text is harmless, nothing that is missing ends in a traceback, and the figures
are those of the summary.
"""

import copy
import html.parser
import json
import math
import pathlib
import tracemalloc

import jinja2
import numpy as np
import pytest
import report_summaries
from report_summaries import HOSTILE, summary, task, workdir

from ftjax.config import config_file, section
from ftjax.reporting import (
  charts,
  comparison,
  curves,
  examples,
  figures,
  findings,
  line_chart,
  markdown,
  metrics_log,
  page,
  provenance,
  run_files,
  svg,
  text_table,
  watch,
  word_diff,
)

LIMIT = 5_000_000


class Reader(html.parser.HTMLParser):
  """Elements with attributes, and the text, of a page; checks that elements are closed in order."""

  VOID = frozenset({'meta', 'input', 'br', 'img', 'link'})

  def __init__(self, text):
    super().__init__()
    self.elements, self.words, self._open = [], [], []
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if not {'style', 'script'} & set(self._open):
      self.words.append(data)

  def text(self):
    return ' '.join(' '.join(self.words).split())


def read_page(folder, found=None, **settings):
  path = page.write(workdir(folder, found, **settings))
  return Reader(text_of(path))


def text_of(path):
  return pathlib.Path(path).read_text(encoding='utf-8')


# Hostile texts.


def test_no_text_of_a_run_becomes_an_element_an_attribute_or_a_control(tmp_path):
  config = report_summaries.CONFIG | {'model.path': HOSTILE[0], 'data.train': list(HOSTILE)}
  manifest = copy.deepcopy(report_summaries.MANIFEST)
  manifest['data'] = {f'data {i}': {'name': t} for i, t in enumerate(HOSTILE)}
  manifest['packages'] = {t: t for t in HOSTILE}
  path = workdir(tmp_path, report_summaries.hostile(), config=config, manifest=manifest)
  with open(f'{path}/samples.jsonl', 'w', encoding='utf-8') as file:
    file.writelines(json.dumps({'step': 0, 'prompt': t, 'answer': t}) + '\n' for t in HOSTILE)
  with open(f'{path}/metrics.jsonl', 'a', encoding='utf-8') as file:
    for text in HOSTILE:
      file.write(json.dumps({'step': 121, 'split': text[:99], text: 1.0, 'note': text}) + '\n')
  content = text_of(page.write(path))
  found = Reader(content)
  names = {name for name, _ in found.elements}
  assert 'img' not in names and [n for n, _ in found.elements].count('script') == 1
  attributes = {key for _, a in found.elements for key in a}
  assert not [key for key in attributes if key.startswith('on') or key in ('src', 'style')]
  links = {a['href'] for name, a in found.elements if name == 'a'}
  assert all(link.startswith('#') for link in links)
  assert '<script>alert(1)</script>' in found.text() and '{{ 7 * 7 }}' in found.text()
  assert '49' not in [w.strip() for w in found.words]
  assert figures.clean(content) == content  # no control or format character, no half of a pair
  assert len(content.encode()) < LIMIT


def test_no_text_of_a_run_controls_the_terminal_or_widens_the_table():
  found = report_summaries.hostile()
  for text in (text_table.text(found), text_table.cost(found)):
    assert all(c == '\n' or c.isprintable() for c in text)
    assert max(figures.width(line) for line in text.split('\n')) <= 100


def test_no_text_of_a_run_adds_a_row_or_a_cell_to_markdown():
  text = markdown.evaluation(report_summaries.hostile())
  rows = [line for line in text.split('\n') if line.startswith('|')]
  unescaped = {len(markdown.re.sub(r'\\.', '', row).split('|')) for row in rows}
  assert unescaped == {8, 9}  # six columns of scores, seven of differences
  unescaped = markdown.re.sub(r'\\.|`+[^`\n]*`+', '', text)
  assert '<' not in unescaped and '](' not in unescaped and '\n#' not in unescaped


def test_secrets_in_a_config_do_not_reach_the_page(tmp_path):
  secret = 'hf_' + 'a1B2' * 8
  config = report_summaries.CONFIG | {'data.train': f'https://user:pw12345@host/x?token={secret}'}
  path = page.write(workdir(tmp_path, config=config))
  content = text_of(path)
  assert secret not in content and 'pw12345' not in content


def test_the_policy_allows_the_style_and_script_of_the_page_alone(tmp_path):
  content = text_of(page.write(workdir(tmp_path)))
  policy = dict(
    (a.get('http-equiv'), a.get('content')) for n, a in Reader(content).elements if n == 'meta'
  )['Content-Security-Policy']
  assert "default-src 'none'" in policy and 'unsafe' not in policy and policy.count('sha256-') == 2
  assert 'http' not in content.replace('http-equiv', '').replace('http://www.w3.org/2000/svg', '')


# What is missing.


@pytest.mark.parametrize(
  'name', ['config.json', 'manifest.json', 'metrics.jsonl', 'eval/summary.json']
)
@pytest.mark.parametrize(
  'content', [None, b'', b'[1', b'[]', b'3', b'{}', b'\xff\xfe', b'[' * 9999]
)
def test_a_missing_or_damaged_file_costs_its_section_alone(tmp_path, name, content):
  path = workdir(tmp_path, summary(report_summaries.perplexity()), steps=2)
  target = tmp_path / name
  target.unlink() if content is None else target.write_bytes(content)
  found = Reader(text_of(page.write(path))).text()
  assert 'What was trained on what' in found and 'How to reproduce' in found
  if content is None or content in (b'[1', b'[]'):
    assert name in found or 'no step' in found.lower()


def test_an_empty_workdir_has_a_page_of_sentences(tmp_path):
  found = Reader(text_of(page.write(str(tmp_path)))).text()
  for words in ('NOT EVALUATED', 'no metrics.jsonl', 'no config.json', 'no curves'):
    assert words in found


def test_no_examples_no_base_a_null_and_an_old_version_are_sentences(tmp_path):
  empty = {
    'task': 'nothing',
    'kind': 'choice',
    'group': 'task',
    'n': 0,
    'metrics': [],
    'scores': {},
  }
  unsure = task('unsure', models=('base', 'tuned'))
  unsure['scores']['tuned']['mcc'] = {'value': None, 'why': 'all predictions are of one class'}
  found = read_page(tmp_path / 'a', summary(empty, unsure, models=('base', 'tuned'))).text()
  assert 'No examples: nothing could be scored' in found
  assert 'all predictions are of one class' in found
  alone = task('alone', models=('tuned',))
  found = read_page(tmp_path / 'b', summary(alone, models=('tuned',)))
  assert 'no two models to compare' in found.text() and 'NOT COMPARED' in found.text()
  found = read_page(tmp_path / 'c', {'tasks': {'a': {}}, 'answers': []}).text()
  assert 'has version 1' in found
  for old in ({}, {'tasks': {}}, {'version': 2, 'models': [], 'tasks': {}}):
    assert text_table.text(old).startswith('Verdict: NOT EVALUATED')
    assert markdown.evaluation(old) == ''


def test_a_run_without_tasks_shows_its_answers():
  text = text_table.text({'version': 2, 'models': [], 'tasks': {}, 'answers': summary()['answers']})
  assert 'No tasks were evaluated' in text and text.endswith('tuned   negative')


def _places(value, place=()):
  """The places of all entries of nested dicts and lists, of lists the first two."""
  items = value.items() if isinstance(value, dict) else enumerate(value[:2])
  for key, inner in items:
    yield (*place, key)
    if isinstance(inner, (dict, list)):
      yield from _places(inner, (*place, key))


def _damaged(found, place, change):
  found = copy.deepcopy(found)
  inner = found
  for key in place[:-1]:
    inner = inner[key]
  if change == 'drop':
    del inner[place[-1]]
  else:
    inner[place[-1]] = change
  return found


def _show_all(found):
  page.render(_input(found))
  text_table.text(found)
  markdown.evaluation(found)


@pytest.mark.full
@pytest.mark.parametrize('change', [None, 'drop', 'text', 7, [], {}])
def test_no_damage_to_a_summary_ends_in_a_traceback(change):
  one = task(models=('base', 'tuned'))
  one['examples'] = one['examples'][:1]
  one['contamination'] |= {
    'contaminated': 2,
    'scores_clean': {'tuned': report_summaries.score(0.2)},
  }
  one['by_source'], one['cut'] = {'a': {'n': 1, 'base': 0.1, 'tuned': None}}, {'base': 0.1}
  mean = {'value': 0.8, 'low': 0.7, 'high': 0.9, 'between_sd': 0.013, 'within_se': 0.021}
  one['seeds'] = {'a + b': {'accuracy': mean}}
  found = summary(one, models=('base', 'tuned'), gate=report_summaries.GATE)
  for place in _places(found):
    _show_all(_damaged(found, place, change))


@pytest.mark.parametrize(
  ('place', 'change'),
  [
    (('models',), None),
    (('tasks', 'sentiment'), None),
    (('tasks', 'sentiment', 'metrics', 0), {}),
    (('tasks', 'sentiment', 'scores', 'tuned'), 7),
    (('tasks', 'sentiment', 'confusion', 'base', 'counts', 0), []),
    (('gate',), [1]),
  ],
)
def test_a_damaged_summary_is_named_with_the_place(place, change):
  found = _damaged(summary(task(), gate=report_summaries.GATE), place, change)
  _show_all(found)
  text = text_table.text(found)
  assert 'NOT EVALUATED' in text and '/'.join(map(str, place[:3])) in text
  assert findings.notices(found) == []


def test_one_step_a_loss_that_is_not_finite_and_notes(tmp_path):
  path = workdir(tmp_path, steps=1)
  text = (
    '{"step": 2, "split": "train", "loss": "NaN", "grad_norm": "Infinity", "note": "skipped"}\n'
  )
  with open(f'{path}/metrics.jsonl', 'a', encoding='utf-8') as file:
    file.write(text + '{"step": 3, "split": "tr')
  found = Reader(text_of(page.write(path, is_running=True))).text()
  assert 'running, step 2 of 500' in found and '1 not finite' in found
  assert 'step 2: skipped' in found and 'cannot be read' not in found


@pytest.mark.parametrize(
  'values', [[0.0], [5e-324, 1e-323], [1e300, -1e300], [1e16, 1e16 + 2], [1e-9, 1e9], [-3.0, -3.0]]
)
def test_curves_of_any_size_are_drawn(values):
  series = [line_chart.Series('a', np.arange(float(len(values))), np.array(values))]
  for is_log in (False, True):
    drawn = line_chart.draw('x', series, is_log)
    assert 'nan' not in drawn and 'inf"' not in drawn


# Sizes.


def test_a_curve_of_100_000_steps_keeps_its_extremes_in_400_points():
  values = np.random.default_rng(0).normal(size=100_000)
  values[777], values[77_777] = 50, -60
  series = line_chart.Series('a', np.arange(1.0, 100_001), values)
  thin = line_chart.thin(series)
  assert len(thin.steps) <= 400 and (np.diff(thin.steps) > 0).all()
  assert thin.values.max() == 50 and thin.values.min() == -60
  assert {778.0, 77_778.0} <= set(thin.steps.tolist())
  for step, value in zip(thin.steps, thin.values, strict=True):
    assert values[int(step) - 1] == value
  few = line_chart.Series('a', np.arange(400.0), values[:400])
  assert line_chart.thin(few) is few
  same = line_chart.Series('a', np.full(500, 7.0), values[:500])
  assert len(line_chart.thin(same).steps) == 2


@pytest.mark.full
def test_twenty_tasks_with_long_answers_stay_below_the_limit(tmp_path):
  tasks = [task(f'task_{i}') for i in range(20)]
  for one in tasks:
    one['examples'] = report_summaries.examples(('base', 'base_shots', 'tuned'), 200)
    for i, example in enumerate(one['examples']):
      for model in example['responses']:
        words = (f'<{(i * 7 + j * len(model)) % 911}>' for j in range(800))
        example['responses'][model] = ' '.join(words)
  path = page.write(workdir(tmp_path, summary(*tasks), steps=100_000))
  content = pathlib.Path(path).read_bytes()
  assert 1_000_000 < len(content) <= LIMIT
  assert 'more are left out here' in Reader(content.decode()).text()


def test_the_log_of_many_steps_is_small_in_memory():
  lines = [json.dumps(r) for r in report_summaries.log_rows(2000)]
  tracemalloc.start()
  log = metrics_log.MetricsLog()
  for line in lines:
    log.add(line)
  size, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert log.rows == 4000 and size < 2000 * 2 * 20 * 16


# Figures.


def test_the_page_has_the_figures_of_the_summary(tmp_path):
  found = summary(gate=report_summaries.GATE)
  shown = read_page(tmp_path, found).text()
  for one in found['tasks'].values():
    for metric in one['metrics']:
      for scores in one['scores'].values():
        assert figures.interval(scores[metric['name']], metric['form']) in shown
    for difference in one['differences']:
      primary = one['metrics'][0]
      text = figures.interval(difference['metrics'][primary['name']], primary['form'], '+')
      assert text in shown and difference['verdict'] in shown
  for words in (
    'REFUSED BY THE GATE',
    'stereotypes must not rise',
    'expected calibration error',
    'train.jsonl: no text (1 row)',
    'Tokens of an example, train: train.jsonl',
  ):
    assert words in shown


def test_a_worse_tuning_is_named_in_red_and_the_light_is_a_word():
  found = summary()
  assert findings.light(found) == findings.Light('BETTER AND WORSE', 'mixed')
  notices = findings.notices(found)
  assert [n.split('"')[0] for n in notices] == ['Worse on general ability ', 'Worse on safety ']
  refused = summary(gate=report_summaries.GATE)
  assert findings.light(refused).color == 'bad'
  assert findings.notices(refused)[0].startswith('The gate refused the export: stereotypes')
  for outcome, color in (('better', 'good'), ('worse', 'bad'), ('undecided', 'open')):
    assert findings.light(summary(task(outcome=outcome))).color == color


def test_contamination_is_a_notice_with_the_clean_score():
  found = task()
  assert findings.contaminated(found) == ''
  found['contamination'] |= {'contaminated': 12, 'near_duplicates': 3}
  found['contamination']['scores_clean'] = {'tuned': report_summaries.score(0.5)}
  (notice,) = findings.notices(summary(found))
  assert '12 of 400 examples found in train.jsonl (13 words in a row), 3 are near-dup' in notice
  assert 'Accuracy without them: tuned 0.500 [0.460, 0.540].' in notice


def test_an_undecided_task_of_a_small_test_set_is_marked():
  found = task(outcome='undecided', models=('base', 'tuned'))
  for difference in found['differences']:
    difference['is_too_small'] = True
  assert 'UNDECIDED (the test set is too small)' in text_table.text(summary(found))
  assert 'test set too small' in Reader(page.render(_input(summary(found)))).text()
  text = text_table.text(summary(task()))
  assert (
    '400 examples would show a difference of 0.070 in four of five cases' in text
    and 'small)' not in text
  )


def _input(found):
  return run_files.ReportInput('run', summary=found)


def test_details_sources_cut_answers_and_seeds_are_shown():
  found = task(models=('base', 'tuned'))
  found['metrics'].append(
    {'name': 'tokens', 'title': 'length in tokens', 'better': '', 'form': 'number'}
    | {'is_primary': False, 'is_detail': True}
  )
  for scores in found['scores'].values():
    scores['tokens'] = report_summaries.score(12.25)
  found['by_source'] = {'imdb': {'n': 390, 'base': 0.5, 'tuned': 0.75}}
  found['cut'] = {'base': 0.25, 'tuned': 0.0}
  mean = {'value': 0.8, 'low': 0.7, 'high': 0.9, 'between_sd': 0.013, 'within_se': 0.021}
  found['seeds'] = {'run_0 + run_1': {'accuracy': mean}}
  whole = summary(found, models=('base', 'tuned'))
  shown = Reader(page.render(_input(whole))).text()
  for words in (
    'length in tokens 12.25 [12.21, 12.29] 12.25 [12.21, 12.29]',
    'imdb 390 0.500 0.750',
    'Answers cut at eval.max_tokens: base 25.0 %, tuned 0.0 %',
    'run_0 + run_1 accuracy 0.800 [0.700, 0.900] 0.013 0.021',
  ):
    assert words in shown
  text = text_table.text(whole)
  assert 'length in tokens' not in text
  assert 'error of the rows 0.021, sd between seeds beyond it 0.013' in ' '.join(text.split())
  assert 'length in tokens' not in markdown.evaluation(whole)


def test_titles_of_metrics_beside_three_models_can_be_told_apart():
  models = ('base', 'base_shots', 'tuned')
  found = task(models=models)
  own = [('perplexity', 'perplexity per token'), ('byte_perplexity', 'perplexity per byte')]
  found['metrics'] = [
    {'name': n, 'title': t, 'better': 'lower', 'form': 'number', 'is_primary': n == 'perplexity'}
    for n, t in own
  ]
  score = {'value': 280.6, 'low': 248.8, 'high': 316.7, 'se': 17.0}
  found['scores'] = {m: {n: score for n, _ in own} for m in models}
  shown = text_table.table(found, models)
  assert 'perplexity per token (low) *' in shown and 'perplexity per byte (low)' in shown
  assert max(map(len, shown.splitlines())) <= text_table.WIDTH


def test_one_reason_for_several_models_is_one_sentence():
  found = task(models=('base', 'tuned'))
  for scores in found['scores'].values():
    scores['mcc'] = {'value': None, 'why': 'MCC cannot be computed from these results'}
  assert findings.missing(found, ['base', 'tuned', 'other']) == [
    'base, tuned: MCC cannot be computed from these results',
    'other: not evaluated on this task',
  ]


def test_a_table_has_any_number_of_models():
  for n in (1, 2, 3, 4, 12):
    models = [f'a/long/path/of/a/run/number_{i}' for i in range(n)]
    text = text_table.text(summary(task(models=models), models=models))
    assert max(map(len, text.split('\n'))) <= 100
    assert text.count('[0.600, 0.680]') == 1  # the first model's accuracy
    rows = [r for r in markdown.evaluation(summary(task(models=models), models=models)).split('\n')]
    assert any(r.count('|') == n + 4 for r in rows)


@pytest.mark.parametrize(
  ('value', 'form', 'text'),
  [
    (0.8731, 'fraction', '0.873'),
    (27.44, 'points', '27.4'),
    (0, 'number', '0'),
    (12.345678, 'number', '12.35'),
    (123456.7, 'number', '1.23e+05'),
    (0.00012, 'number', '0.00012'),
    (None, 'fraction', '-'),
    (math.nan, 'number', '-'),
    (True, 'number', '-'),
    (10**400, 'number', '-'),
  ],
)
def test_numbers(value, form, text):
  assert figures.number(value, form) == text


def test_widths_are_those_of_a_terminal():
  assert figures.width('日本e\u0301') == 5
  for text in ('日本語' * 9, 'x' * 40, 'é', ''):
    assert figures.width(figures.pad(text, 20)) == 20


def test_ticks_are_round_and_inside():
  rng = np.random.default_rng(1)
  for _ in range(300):
    low, high = np.sort(rng.normal(size=2) * 10.0 ** rng.integers(-9, 9)).tolist()
    found = svg.linear_ticks(low, high)
    room = (high - low) * 1e-6
    assert 2 <= len(found) <= 8 and low - room <= found[0] and found[-1] <= high + room
    low, high = np.sort(10.0 ** rng.uniform(-9, 9, size=2)).tolist()
    found = svg.log_ticks(low, high)
    assert found == sorted(found) and len(found) <= 20


def test_the_words_of_a_diff_are_those_of_the_texts():
  rng = np.random.default_rng(2)
  for _ in range(50):
    a, b = (' '.join(rng.choice(list('abcé日'), size=rng.integers(0, 500))) for _ in range(2))
    first, second = word_diff.diff(a, b)
    assert ''.join(t for t, _ in first) == a and ''.join(t for t, _ in second) == b
  first, second = word_diff.diff('a bad film', 'a good film')
  assert [t for t, mark in first if mark] == ['bad']
  assert [t for t, mark in second if mark] == ['good']
  first, second = word_diff.diff('same text', 'same text')
  assert not any(mark for _, mark in first + second)


def test_examples_whose_models_differ_come_first_and_the_rest_is_counted():
  found = task(models=('base', 'tuned'))
  found['examples'] = report_summaries.examples(('base', 'tuned'), 500)
  changed = [e['id'] for e in found['examples'] if e['values']['base'] != e['values']['tuned']]
  (shown,) = examples.build([found], ['base', 'tuned'], 10**7)
  assert shown['left_out'] == 300 and len(shown['rows']) == 200
  ids = [row['id'] for row in shown['rows']]
  assert set(changed[:200]) <= set(ids) and ids == sorted(ids, key=int)
  (more,) = examples.build([found | {'prompts': 900}], ['base', 'tuned'], 10**7)
  assert more['left_out'] == 700
  (few,) = examples.build([found], ['base', 'tuned'], 20_000)
  assert 0 < len(few['rows']) < 20 and len(few['rows']) + few['left_out'] == 500


def test_lower_is_better_turns_what_improved():
  found = report_summaries.perplexity(('base', 'tuned'))
  found['examples'] = [
    {'id': '1', 'prompt': 'p', 'responses': {}, 'values': {'base': 9.0, 'tuned': 3.0}}
  ]
  (shown,) = examples.build([found], ['base', 'tuned'], 10**6)
  assert shown['rows'][0]['state'] == 'better' and float(shown['rows'][0]['gain']) == 6


def test_a_forest_has_one_scale_and_a_row_without_values_is_empty():
  rows = [
    charts.Estimate('a', {'value': 0.2, 'low': 0.1, 'high': 0.3}, 'fraction', 'better'),
    charts.Estimate('b', {'value': None}, 'fraction', 'undecided'),
    charts.Estimate('c', {'value': -0.2, 'low': -0.3, 'high': -0.1}, 'fraction', 'worse'),
  ]
  drawn, axis = charts.forest(rows)
  assert 'polygon' in drawn[0] and 'polygon' not in drawn[1] and '>0<' in axis
  zeros = {markdown.re.search(r'class="zero" x1="([\d.]+)"', d)[1] for d in drawn}
  assert zeros == {'130'}  # the middle of equal and opposite intervals
  assert charts.forest(rows[1:2]) is None


def test_a_confusion_matrix_keeps_counts_and_shares():
  found = charts.confusion(
    {'labels': ['a', 'b'], 'predictions': ['a', 'b'], 'counts': [[3, 1], [0, 0]]}
  )
  assert [c['count'] for c in found['rows'][0][1]] == [3, 1]
  assert found['rows'][0][1][0] == {'count': 3, 'share': '75.0 %', 'shade': 3, 'is_right': True}
  assert found['rows'][1][1][1]['share'] == '0.0 %'
  many = {'labels': list(range(40)), 'predictions': list(range(40)), 'counts': np.eye(40).tolist()}
  assert charts.confusion(many)['left_out'] == 16


def test_unknown_metrics_are_drawn_under_their_prefix(tmp_path):
  log = metrics_log.MetricsLog()
  names = ['mine/one', 'mine/two', 'odd', 'batch_checksum', 'skipped', 'lr', 'loss']
  names.append('sentiment/accuracy')
  for step in (1, 2):
    log.add(json.dumps({'step': step, 'split': 'train'} | dict.fromkeys(names, 0.0)))
  groups, left_out = curves.groups(log, ['sentiment'])
  found = {g.heading: [c.title for c in g.charts] for g in groups}
  assert list(found) == ['Loss', 'Tasks', 'Optimization', 'mine', 'Others']
  assert left_out == 0 and found == {
    'Optimization': ['learning rate'],
    'Loss': ['loss'], 'Tasks': ['sentiment/accuracy'], 'mine': ['mine/one', 'mine/two'],
    'Others': ['odd'],
  }  # fmt: skip


@pytest.mark.parametrize('name', ['tiny_sft', 'tiny_grpo', 'dpo_sentiment', 'lora_sentiment'])
def test_the_config_of_the_page_is_the_config_of_the_run(tmp_path, name):
  config = section.plain(config_file.load(config_file.find(name)))
  config = json.loads(json.dumps(config))
  again = tmp_path / 'again.py'
  again.write_text(provenance.config_code(config) + '\n')
  assert json.loads(json.dumps(section.plain(config_file.load(str(again))))) == config


def test_runs_side_by_side(tmp_path):
  paths = [workdir(tmp_path / 'one' / 'run'), workdir(tmp_path / 'two' / 'run')]
  other = report_summaries.CONFIG | {'optim.lr': 3e-4}
  (tmp_path / 'two' / 'run' / 'config.json').write_text(json.dumps(other))
  found = comparison.compare(paths, summary(task(models=paths), models=paths))
  reader = Reader(found.page)
  assert 'optim.lr' in reader.text() and '0.0003' in reader.text()
  assert all(path in reader.text() for path in paths)
  assert found.text.startswith('Verdict: BETTER')
  nothing = comparison.compare([str(tmp_path / 'no')], {})
  assert 'NOT EVALUATED' in Reader(nothing.page).text()


def test_reward_curves_of_rollouts_are_drawn():
  log = metrics_log.MetricsLog()
  for step in range(3):
    log.add(json.dumps({'step': step, 'split': 'rollout', 'reward': step / 2, 'reward/math': 1.0}))
  groups, _ = curves.groups(log)
  assert [c.title for c in groups[0].charts] == ['reward', 'reward/math']


# While a run trains.


def test_a_frame_is_at_most_100_columns_and_has_the_last_values():
  log = metrics_log.MetricsLog()
  assert 'no step has been logged' in watch.frame(log, 'run', 10)
  for row in report_summaries.log_rows(200, 20):
    log.add(json.dumps(row))
  log.add(json.dumps({'step': 201, 'split': 'train', 'loss': 'NaN', HOSTILE[0] * 9: 1}))
  log.add(json.dumps({'step': 201, 'split': 'eval', 'note': HOSTILE[5], HOSTILE[5]: 1.0}))
  text = watch.frame(log, HOSTILE[6], 400, quiet=1000.0)
  assert 'step 201 of 400 (50%), about 1 min 40 s of steps left' in text
  assert 'no new row for 16 min 40 s' in text and 'sentiment/accuracy' in text
  assert all(figures.width(line) <= 100 for line in text.split('\n'))
  assert all(c == '\n' or c.isprintable() for c in text)


def test_watching_follows_a_file_that_grows_is_cut_and_ends(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  follower = watch.Follower(str(path))
  assert not follower.read()
  rows = [json.dumps(r) + '\n' for r in report_summaries.log_rows(30, 100)]
  path.write_text(''.join(rows[:20]) + rows[20][:9])
  assert follower.read() and follower.log.last_step == 20 and not follower.log.bad_lines
  path.write_text(''.join(rows[:25]))
  assert follower.read() and follower.log.last_step == 25 and follower.log.rows == 25
  path.write_text(''.join(rows[:10]) + rows[27])  # a resume after step 10
  assert follower.read() and follower.log.rows == 11
  again = [r.replace('"loss": ', '"loss": 1') for r in rows]
  path.write_text(''.join(again))  # cut, and longer than before at the next look
  assert follower.read() and follower.log.rows == 30 and not follower.read()


class Terminal:
  def __init__(self, is_terminal):
    self.text, self._is_terminal = '', is_terminal

  def write(self, text):
    self.text += text

  def flush(self):
    pass

  def isatty(self):
    return self._is_terminal


@pytest.mark.parametrize('is_terminal', [True, False])
def test_watching_stops_at_the_end_of_the_run(tmp_path, is_terminal):
  out, rows = Terminal(is_terminal), [json.dumps(r) + '\n' for r in report_summaries.log_rows(3, 9)]
  (tmp_path / 'manifest.json').write_text('{"steps": 3}')
  seen = []

  def sleep(_):
    seen.append(out.text)
    assert len(seen) < 9
    if len(seen) % 2 == 0:
      with open(tmp_path / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write(rows.pop(0))

  watch.watch(str(tmp_path), out=out, sleep=sleep)
  assert out.text.endswith('All steps are done.\n') and ('\x1b[2J' in out.text) is is_terminal
  frames = out.text.count(': step ')
  assert frames == (7 if is_terminal else 4)


def test_watching_stops_at_ctrl_c(tmp_path):
  def sleep(_):
    raise KeyboardInterrupt

  out = Terminal(False)
  watch.watch(str(tmp_path / 'not_there'), out=out, sleep=sleep)
  assert 'no step has been logged yet' in out.text


def test_the_page_of_a_run_that_was_stopped_or_is_complete(tmp_path):
  for steps, is_running, words in (
    (120, True, 'running, step 120 of 500'),
    (120, False, 'stopped at step 120 of 500'),
    (500, True, '500 steps, complete'),
  ):
    found = run_files.read(workdir(tmp_path / f'{steps}{is_running}', steps=steps), is_running)
    assert found.status() == words


def test_a_misspelt_variable_of_the_template_is_an_error():
  template = page._template()[0]
  assert (
    template.environment.undefined is jinja2.StrictUndefined and template.environment.autoescape
  )
