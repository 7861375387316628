"""The entries as processes: exit codes, what they say and write, one tiny run from end to end."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

from ftjax.families import table as families
from ftjax.hf import load

pytestmark = pytest.mark.usefixtures('users_programs')

# Shorter than the shipped config, which trains until its sums are right.
SHORT = ('steps=30', 'data.train=sums:400', 'eval.every=10', 'checkpoint.every=10')
HEAVY = ('jax', 'flax', 'orbax', 'tokenizers', 'torch', 'transformers', 'datasets', 'pyarrow')
TRAIN = ['--config=tiny_sft', *(f'--config.{s}' for s in SHORT)]


def quick(entry, *arguments):
  """(exit code, what it printed)."""
  code, told = tiny_run.run(entry, list(arguments))
  return code, told.strip()


# Exit code 2, before jax


@pytest.mark.parametrize('entry', ['train', 'evaluate', 'preview', 'plan', 'generate', 'convert'])
def test_a_mistake_ends_with_2_before_a_heavy_import(entry, tmp_path):
  with_config = entry not in ('generate', 'convert')
  workdir = [] if entry == 'plan' else [f'--workdir={tmp_path / "run"}']
  wrong = [*TRAIN, *workdir, '--config.optim.warmup_step=3'] if with_config else ['--nonsense=1']
  script = (
    f'import sys, runpy; sys.argv = ["ftjax.{entry}", *{wrong!r}]\n'
    'try:\n'
    f'  runpy.run_module("ftjax.{entry}", run_name="__main__")\n'
    'except SystemExit as error:\n'
    f'  print("code", error.code, "heavy", sorted({{*{HEAVY!r}}} & set(sys.modules)))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=tiny_run.ROOT, capture_output=True, text=True, check=False
  )
  assert done.stdout.strip() == 'code 2 heavy []', done.stderr
  if with_config:
    wanted = '--config.optim.warmup_step: there is no such key; did you mean optim.warmup_steps?'
  else:  # convert has a config too, of which it names a key
    wanted = "Unknown command line flag 'nonsense'"
  assert done.stderr.startswith(f'error: {wanted}') and done.stderr.count('\n') == 1
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    (['--config=tiny_sft', '--config.steps=many', '--workdir=X'], '--config.steps=many'),
    (['--config=tiny_sft', '--config.grad_accum=3', '--workdir=X'], 'grad_accum=3 must divide'),
    (['--config=no_such', '--workdir=X'], '--config=no_such: no such file'),
    (['--workdir=X'], '--config'),
    (['--config=tiny_sft'], '--workdir'),
  ],
)
def test_bad_flags_end_with_2(arguments, told, tmp_path):
  arguments = [a.replace('=X', f'={tmp_path / "run"}') for a in arguments]
  code, said = quick('train', *arguments)
  assert code == 2
  assert said.startswith('error: ') and told in said and 'Traceback' not in said
  assert not (tmp_path / 'run').exists()


def test_a_mistake_in_a_config_file_ends_with_2(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from configs import tiny_sft\n'
    'def get_config():\n'
    '  c = tiny_sft.get_config()\n'
    '  c.batch_size = "8"\n'
    '  return c\n'
  )
  code, said = quick('train', f'--config={path}', f'--workdir={tmp_path / "run"}')
  assert code == 2 and not (tmp_path / 'run').exists()
  assert said == f"error: {path}:4: batch_size='8'; expected an integer, without quotes: 8"


def test_a_mangled_bucket_as_workdir_ends_with_2():
  code, said = quick('train', *TRAIN, '--workdir=gs:/bucket/run1')
  assert code == 2 and said.startswith('error: --workdir=gs:/bucket/run1: write gs://bucket/run1')
  assert not (tiny_run.ROOT / 'gs:').exists()


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  code, told = quick('train', *TRAIN, f'--workdir={tmp_path / "file"}')
  assert code == 2 and 'cannot create the folder' in told


# Exit code 3


def test_bad_rows_end_with_3_and_nothing_is_written(tmp_path):
  rows = tmp_path / 'rows.jsonl'
  good = {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}
  rows.write_text('\n'.join([json.dumps(good), '{"messages": [', json.dumps({'other': 1})]) + '\n')
  workdir = tmp_path / 'run'
  code, told = quick('train', *TRAIN, f'--workdir={workdir}', f'--config.data.train={rows}')
  assert code == 3 and 'Traceback' not in told
  assert f'{rows}:2' in told and f'{rows}:3' in told
  files = [p for p in workdir.rglob('*') if p.is_file()] if workdir.exists() else []
  assert files == []


def test_a_missing_data_file_ends_with_3(tmp_path):
  code, told = quick('preview', *TRAIN, f'--config.data.train={tmp_path / "none.jsonl"}')
  assert code == 3 and 'none.jsonl' in told and 'Traceback' not in told


# A run from end to end


@pytest.fixture(scope='module')
def task(tmp_path_factory):
  path = tmp_path_factory.mktemp('task') / 'sum.jsonl'
  rows = [
    {'prompt': f'{a} + {b} =', 'choices': [str(a + b), str(a + b + 1)], 'label': str(a + b)}
    for a, b in ((1, 2), (3, 4), (10, 20), (7, 8), (5, 5), (30, 12))
  ]
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return path


@pytest.fixture(scope='module')
def finished(task, tmp_path_factory):
  """(workdir, what was said) of the shipped tiny config with a task, run to its end."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  code, told = tiny_run.run(
    'train',
    [*TRAIN, f'--workdir={workdir}', f"--config.eval.tasks=('sum=choice:{task}',)"],
  )
  assert code == 0, told
  return workdir, told


def test_the_workdir_holds_the_documented_files(finished):
  workdir, _ = finished
  there = {p.name for p in workdir.iterdir()}
  assert {'config.json', 'manifest.json', 'metrics.jsonl', 'checkpoints', 'export', 'eval'} <= there
  assert {'tensorboard', 'samples.jsonl'} <= there
  assert (workdir / 'eval' / 'sum.jsonl').exists()
  assert not [p for p in workdir.rglob('*') if p.suffix in ('.pkl', '.pickle', '.pt')]
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == [20, 30]


def test_metrics_of_every_step(finished):
  rows = [json.loads(line) for line in (finished[0] / 'metrics.jsonl').read_text().splitlines()]
  train = [r for r in rows if r['split'] == 'train']
  assert [r['step'] for r in train] == list(range(1, 31))
  for name in ('loss', 'grad_norm', 'lr', 'supervised_tokens', 'batch_checksum', 'skipped'):
    assert all(name in r for r in train), name
  assert all('tokens_per_s' in r and 'mfu' in r for r in train[2:9])
  assert train[0]['lr'] == 0 and max(r['lr'] for r in train) == pytest.approx(3e-3)
  assert np.mean([r['loss'] for r in train[-5:]]) < 0.6 * train[0]['loss']
  evals = [r for r in rows if r['split'] == 'eval']
  assert [r['step'] for r in evals] == [10, 20, 30]
  assert evals[-1]['perplexity'] == pytest.approx(np.exp(evals[-1]['loss']))


def test_config_and_manifest(finished):
  config, manifest = (
    json.loads((finished[0] / f'{n}.json').read_text()) for n in ('config', 'manifest')
  )
  assert config['steps'] == 30 and config['optim.lr'] == 3e-3 and config['algorithm'] == 'sft'
  assert len(manifest['executable']) == len(manifest['config']) == 64
  assert {'model', 'tokenizer', 'data order'} <= manifest['fingerprints'].keys()
  assert manifest['packages'].keys() >= {'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint'}
  assert manifest['host_cores'] == len(os.sched_getaffinity(0))
  assert manifest['devices']['count'] == 1


def test_the_export_loads_and_is_trained(finished):
  """The tensors are those of the last checkpoint, not the base's."""
  import jax
  import jax.numpy as jnp

  from ftjax.models import kinds
  from ftjax.runtime import sharding, trees

  export = str(finished[0] / 'export')
  arch = families.architecture(load.read_config(export))
  mesh = jax.sharding.get_mesh()
  where = sharding.shardings(mesh, kinds.axes(arch))
  params = trees.flatten(load.load_params(export, arch, where, jnp.float32))
  base = trees.flatten(jax.jit(lambda key: kinds.init(arch, key, jnp.float32))(jax.random.key(0)))
  assert params.keys() == base.keys()
  for name in params:
    assert params[name].shape == base[name].shape
    assert np.isfinite(params[name]).all() and not np.array_equal(params[name], base[name]), name
  generation = json.loads((finished[0] / 'export' / 'generation_config.json').read_text())
  assert generation['eos_token_id'] == 2  # <|im_end|>, which was trained


def test_the_run_prints_the_comparison(finished):
  told = finished[1]
  assert 'sum (choice): 6 examples' in told and 'Answers before and after' in told
  for part in (
    'sft: 30 steps = ',
    '90,624 parameters trained (all)',
    'expected peak memory of a step',
    'eval  step 10  loss',
    'eval  step 20  loss',
    'exported   step 30, the last one',
    f'generate --model={finished[0]} --prompt=',
    'evaluate --config=tiny_sft --config.steps=30',
  ):
    assert part in told, part
  rows = [json.loads(x) for x in (finished[0] / 'samples.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows] == [0, 10, 20, 30]
  assert all(r['prompt'] == '7 + 5 =' for r in rows)


def test_no_torch_and_no_network_libraries_in_a_run():
  """What train imports; transformers in particular would cost seconds and bring torch."""
  script = (
    'import sys, ftjax.algorithms.sft, ftjax.train\n'
    'print(sorted({"torch", "transformers", "datasets", "requests", "pickle5", "tensorflow"}'
    ' & set(sys.modules)))'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=tiny_run.ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'


def test_evaluate_scores_the_export_again(finished, task):
  workdir, _ = finished
  before = (workdir / 'eval' / 'sum.jsonl').read_bytes()
  arguments = [*TRAIN, f'--workdir={workdir}']
  code, told = tiny_run.run('evaluate', [*arguments, f"--config.eval.tasks=('sum=choice:{task}',)"])
  assert code == 0 and 'sum (choice): 6 examples' in told
  assert (workdir / 'eval' / 'sum.jsonl').read_bytes() == before  # exported == trained, bit by bit
  code, told = tiny_run.run('evaluate', arguments)
  assert code == 2 and 'eval.tasks is empty' in told


def test_evaluate_without_an_export(tmp_path, task):
  settings = [*TRAIN, f'--workdir={tmp_path}', f"--config.eval.tasks=('sum=choice:{task}',)"]
  code, told = tiny_run.run('evaluate', settings)
  assert code == 2 and 'it has no export/, which is written' in told


def test_generate_from_a_workdir(finished, tmp_path):
  workdir, _ = finished
  prompts = tmp_path / 'prompts.jsonl'
  chat = {'messages': [{'role': 'user', 'content': '7 + 5 ='}], 'id': 'b'}
  prompts.write_text(json.dumps({'prompt': '7 + 5 ='}) + '\n\n' + json.dumps(chat) + '\n')
  code, told = tiny_run.run(
    'generate', [f'--model={workdir}', f'--prompts={prompts}', '--max_tokens=8']
  )
  assert code == 0, told
  rows = [json.loads(line) for line in told.splitlines() if line.startswith('{')]
  assert len(rows) == 2 and rows[0]['completion'] == rows[1]['completion']
  assert rows[1]['id'] == 'b'
  samples = (workdir / 'samples.jsonl').read_text().splitlines()
  assert rows[0]['completion'].strip() == json.loads(samples[-1])['answer']


def test_generate_reports_a_bad_prompt_file(finished, tmp_path):
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text('good\n{"prompt": \n')
  code, told = tiny_run.run('generate', [f'--model={finished[0]}', f'--prompts={prompts}'])
  assert code == 3 and f'{prompts}:2: not JSON' in told


def test_preview_shows_the_first_rows_and_writes_nothing():
  before = set(tiny_run.ROOT.iterdir())
  code, told = tiny_run.run('preview', [*TRAIN, '--rows=2'])
  assert code == 0, told
  assert 'supervised' in told and 'segment' in told and 'sums' in told
  new = {p.name for p in set(tiny_run.ROOT.iterdir()) - before}
  assert not {
    name for name in new if not name.startswith(('.', 'core'))
  }  # of tests beside this one


# Endings


def test_training_that_is_not_finite_ends_with_4(finished, tmp_path):
  workdir = tmp_path / 'run'
  settings = ['optim.lr=1e30', 'optim.warmup_steps=0', 'optim.clip_norm=0.0', 'eval.prompts=()']
  code, told = tiny_run.run(
    'train', [*TRAIN, f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]
  )
  assert code == 4 and 'Traceback' not in told
  assert 'not finite 3 times in a row' in told and 'optim.lr' in told
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [r['bad_streak'] for r in rows if not r['ok']] == [1, 2, 3]
  assert not (workdir / 'export').exists()


def test_sigterm_saves_ends_with_75_and_the_next_run_completes(finished, tmp_path):
  workdir = tmp_path / 'run'
  log = tmp_path / 'log'
  settings = ['steps=400', 'optim.schedule=constant', 'eval.prompts=()']
  arguments = [*TRAIN, f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]
  process = tiny_run.launch('train', arguments, log)
  assert tiny_run.kill_when(process, lambda: tiny_run.logged(workdir) >= 12, number=signal.SIGTERM)
  told = log.read_text(errors='replace')
  assert process.returncode == 75, told
  assert 'SIGTERM: stopping after this step' in told and 'run the same command again' in told
  assert 'error:' not in told
  stopped = tiny_run.logged(workdir)
  assert 12 <= stopped < 400
  assert max(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == stopped
  assert not (workdir / 'export').exists()
  arguments.append(f'--config.steps={stopped + 2}')
  code, told = tiny_run.run('train', arguments)
  assert code == 0 and f'resuming after step {stopped} of {stopped + 2}' in told
  assert 'changed since the checkpoint: steps=' in told
  assert (workdir / 'export').exists() and tiny_run.logged(workdir) == stopped + 2


@pytest.mark.full
def test_init_from_starts_with_other_weights_and_a_fresh_optimizer(finished, tmp_path):
  base, workdir = finished[0], tmp_path / 'run'
  settings = [f'init_from={base}', 'steps=2', 'eval.prompts=()', 'data.train=sums:100']
  code, told = tiny_run.run(
    'train', [*TRAIN, f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]
  )
  assert code == 2 and 'warmup_steps=5' in told  # longer than the run
  settings += ['optim.warmup_steps=1']
  code, told = tiny_run.run(
    'train', [*TRAIN, f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]
  )
  assert code == 0, told
  first = json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[0])
  last = tiny_run.metrics(base)['train', 30]
  assert first['step'] == 1 and first['lr'] == 0
  assert first['loss'] < last['loss'] + 0.5  # not that of random weights, 5.5


ENDS_AS_IT_SAVES = """
import runpy, sys, time
from ftjax.storage import files
from ftjax.telemetry import metrics_writer as metrics
sync, write = files.sync_tree, metrics.MetricsWriter.write
def slow(folder):
  time.sleep(3)
  sync(folder)
def full(self, step, split, values):
  if step > 2:
    raise OSError(28, 'the disk of the metrics is full')
  write(self, step, split, values)
files.sync_tree, metrics.MetricsWriter.write = slow, full
sys.argv = ['ftjax.train', *sys.argv[1:]]
runpy.run_module('ftjax.train', run_name='__main__')
"""


@pytest.mark.full
def test_an_error_waits_for_the_save_that_is_under_way(tmp_path):
  """The end of the interpreter would tear it."""
  settings = ['checkpoint.every=2', 'eval.every=0', 'eval.prompts=()']
  command = [*TRAIN, f'--workdir={tmp_path}', *(f'--config.{s}' for s in settings)]
  done = subprocess.run(
    [sys.executable, '-c', ENDS_AS_IT_SAVES, *command],
    cwd=tiny_run.ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1 and 'the disk of the metrics is full' in done.stderr
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['2']
