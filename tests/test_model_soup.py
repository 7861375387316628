"""Averages of weights: equal to NumPy's, of models that belong together; greedy soups; checkpoints
along a run."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_run

from ftjax import convert
from ftjax.hf import model_soup
from ftjax.hf.safetensors import SafetensorsFolder, write_file
from ftjax.hf.tensor_source import TensorInfo
from ftjax.runtime.errors import ConfigError, DataError, NonFiniteError

MODEL = Path(__file__).parent / 'parity' / 'golden' / 'llama_tied'


def altered(place, seed, dtype=np.float32):
  """A copy of a small model with other weights; its folder."""
  folder = shutil.copytree(MODEL, place)
  source = SafetensorsFolder(MODEL)
  rng = np.random.default_rng(seed)
  found = {n: rng.normal(size=i.shape).astype(dtype) for n, i in source.tensors.items()}
  infos = {n: TensorInfo(a.shape, a.dtype) for n, a in found.items()}
  write_file(folder / 'model.safetensors', infos, found.__getitem__)
  return folder


def tensors(folder):
  source = SafetensorsFolder(folder)
  return {n: source.read(n) for n in source.tensors}


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_the_average_is_that_of_numpy(tmp_path, dtype):
  folders = [altered(tmp_path / f'model {i}', i, dtype) for i in range(3)]
  convert.average([str(f) for f in folders], str(tmp_path / 'out'), None)
  found, parts = tensors(tmp_path / 'out'), [tensors(f) for f in folders]
  for name, value in found.items():
    expected = np.mean([p[name].astype(np.float64) for p in parts], 0)
    assert value.dtype == dtype and np.array_equal(value, expected.astype(dtype)), name
  report = json.loads((tmp_path / 'out' / 'average.json').read_text())
  assert report == {'models': [str(f) for f in folders]}
  # It is a model folder like another: replaced, read and written again.
  convert.average([str(f) for f in folders[:2]], str(tmp_path / 'out'), 'bfloat16')
  assert {v.dtype for v in tensors(tmp_path / 'out').values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_equal_models_average_to_themselves_and_blocks_change_nothing(tmp_path, monkeypatch):
  folder = altered(tmp_path / 'model', 0)
  source = SafetensorsFolder(folder)
  blocks = model_soup.row_blocks
  monkeypatch.setattr(model_soup, 'row_blocks', lambda info: blocks(info, 100))
  for name in source.tensors:
    assert np.array_equal(model_soup.mean([source] * 3, name), source.read(name))


def test_models_that_do_not_belong_together_are_refused(tmp_path):
  first, other = altered(tmp_path / 'first', 0), altered(tmp_path / 'other', 1)

  def refused(words):
    with pytest.raises(DataError, match=words):
      convert.average([str(first), str(other)], str(tmp_path / 'out'), None)
    assert not (tmp_path / 'out').exists()

  config = json.loads((other / 'config.json').read_text())
  (other / 'config.json').write_text(json.dumps(config | {'rms_norm_eps': 0.5}))
  refused('another config.json than .*rms_norm_eps')
  (other / 'config.json').write_text(json.dumps(config))
  (other / 'tokenizer.json').write_text('{}')
  refused('another tokenizer')
  (other / 'tokenizer.json').unlink()
  source = SafetensorsFolder(other)
  kept = [n for n in source.tensors if 'norm' not in n]
  infos = {n: source.tensors[n] for n in kept}
  write_file(other / 'model.safetensors', infos, {n: source.read(n) for n in kept}.__getitem__)
  refused('norm')


def test_numbers_that_are_not_finite_are_refused(tmp_path):
  first, other = altered(tmp_path / 'first', 0), altered(tmp_path / 'other', 1)
  raw = other / 'model.safetensors'
  before = raw.read_bytes()
  entry = SafetensorsFolder(other)._entries['model.norm.weight']
  raw.write_bytes(
    before[: entry.offset] + np.float32(np.nan).tobytes() + before[entry.offset + 4 :]
  )
  with pytest.raises(NonFiniteError):
    convert.average([str(first), str(other)], str(tmp_path / 'out'), None)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['first', 'other']


def test_one_model_and_the_target_itself_are_refused(tmp_path):
  first, other = altered(tmp_path / 'first', 0), altered(tmp_path / 'other', 1)
  with pytest.raises(ConfigError, match='one model alone'):
    convert.average([str(first)], str(tmp_path / 'out'), None)
  with pytest.raises(ConfigError, match='is the source itself'):
    convert.average([str(first), str(other)], str(other), None)
  with pytest.raises(ConfigError, match='is of GGUF files'):
    convert.average([str(first), str(other)], str(tmp_path / 'out'), 'q8_0')
  with pytest.raises(DataError, match='no such file or folder'):
    convert.average([str(first), str(tmp_path / 'none')], str(tmp_path / 'out'), None)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['first', 'other']


def test_a_greedy_soup_keeps_what_does_not_lower_the_score():
  """Scores by hand: b is best; with d equal; with a worse; with c better."""
  scores = {'a': 3.0, 'b': 5.0, 'c': 2.0, 'd': 4.0, 'bd': 5.0, 'bda': 4.9, 'bdc': 6.0}
  lines = []
  kept, report = model_soup.greedy(
    *(list('abcd'), list('ABCD')), lambda some: scores[''.join(some)], lines.append
  )
  assert kept == [1, 3, 2] and report['score'] == 6.0 and report['models'] == ['B', 'D', 'C']
  assert report['scores'] == dict(A=3.0, B=5.0, C=2.0, D=4.0)
  assert [t['kept'] for t in report['tries']] == [True, False, True]
  assert len(lines) == 7


@pytest.mark.full
@pytest.mark.parametrize(
  ('words', 'told'),
  [
    (['--greedy=x/accuracy'], 'make a greedy soup together'),
    (['--config=tiny_sft'], 'make a greedy soup together'),
    (['--greedy=x/accuracy', '--config=tiny_sft'], 'needs eval.tasks'),
    (['--average='], '--average= is empty'),
    (['--average=gs:/bucket/model'], 'write gs://bucket/model'),
  ],
)
def test_wrong_flags(words, told, tmp_path):
  places = [f'--source={MODEL}', f'--average={MODEL}', f'--target={tmp_path / "out"}']
  code, printed = tiny_run.run('convert', [*places, *words])
  assert code == 2 and told in printed, printed


# Runs


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run of three checkpoints."""
  workdir = tmp_path_factory.mktemp('runs') / 'a run'
  words = ['steps=6', 'checkpoint.every=2', 'checkpoint.keep=3', 'eval.every=0', 'eval.prompts=()']
  words += ['optim.warmup_steps=0', 'optim.schedule=constant', 'data.train=sums:64:20']
  command = ['--config=tiny_sft', f'--workdir={workdir}', *(f'--config.{w}' for w in words)]
  code, printed = tiny_run.run('train', command)
  assert code == 0, printed
  return workdir


@pytest.mark.full
def test_checkpoints_along_a_run(trained, tmp_path):
  code, printed = tiny_run.run(
    'convert', [f'--source={trained}@all', f'--average={trained}@4', f'--target={tmp_path / "out"}']
  )
  assert code == 0, printed
  for step in (2, 4, 6):
    convert.convert(f'{trained}@{step}', str(tmp_path / str(step)), None)
  parts = [tensors(tmp_path / name) for name in ('2', '4', '6', '4')]
  for name, value in tensors(tmp_path / 'out').items():
    expected = np.mean([p[name].astype(np.float64) for p in parts], 0).astype(np.float32)
    assert np.array_equal(value, expected), name


@pytest.mark.full
def test_a_greedy_soup_of_checkpoints_is_scored_by_a_task(trained, tmp_path):
  task = tmp_path / 'task.jsonl'
  rows = [{'prompt': f'{a} + {a} =', 'answer': f' {2 * a}'} for a in range(1, 9)]
  task.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  words = [f"--config.eval.tasks=('sums=answer_perplexity:{task}',)", '--config=tiny_sft']
  places = [f'--source={trained}@all', f'--average={trained}', f'--target={tmp_path / "out"}']
  code, printed = tiny_run.run('convert', [*places, *words, '--greedy=sums/none'])
  assert code == 2 and 'expected sums/METRIC with one of' in printed, printed
  name = printed.split("one of ['")[1].split("'")[0]
  code, printed = tiny_run.run('convert', [*places, *words, f'--greedy=sums/{name}'])
  assert code == 0, printed
  report = json.loads((tmp_path / 'out' / 'average.json').read_text())
  assert report['figure'] == f'sums/{name}' and len(report['scores']) == 4
  best = max(report['scores'].values())
  assert report['score'] >= best and f'{trained}@6' in report['scores']
  assert not list(tmp_path.glob('.average-*'))
