"""A whole run in a bucket: data, model and workdir on gs://, killed, resumed, exported; bit by bit
the run on a disk. The bucket is the one of fake_gcs.py.
"""

import json

import jax
import numpy as np
import pytest
import tiny_run
from fake_gcs import BUCKET

from ftjax.data import synthetic
from ftjax.families import table as families
from ftjax.hf import export
from ftjax.models import kinds
from ftjax.storage import files

ROOT = f'gs://{BUCKET}'
RUN = f'{ROOT}/run'
STEPS, SAVE_EVERY = 14, 4


CONFIG = f"""
from ftjax import config


def get_config():
  c = config.default()
  c.steps, c.batch_size, c.grad_accum, c.seq_len = {STEPS}, 8, 2, 64
  c.optim.lr, c.optim.warmup_steps, c.optim.ema_decay = 1e-3, 2, 0.9
  c.checkpoint.every, c.eval.every, c.eval.batch_size = {SAVE_EVERY}, 6, 8
  c.eval.prompts, c.eval.max_tokens = ('1 + 1 =',), 8
  return c
"""


def arguments(workdir, root, config):
  settings = [f'data.train={root}/rows.jsonl', f'data.eval={root}/rows.jsonl']
  settings += [f'model.path={root}/model']
  return [f'--config={config}', f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """(folder with model/, rows.jsonl and config.py, workdir of the run on a disk that uses them)."""
  folder = tmp_path_factory.mktemp('inputs')
  arch = families.architecture(
    {
      'model_type': 'llama',
      'vocab_size': synthetic.VOCAB_SIZE,
      'hidden_size': 64,
      'num_hidden_layers': 2,
      'num_attention_heads': 4,
      'num_key_value_heads': 2,
      'intermediate_size': 128,
      'tie_word_embeddings': True,
      'max_position_embeddings': 256,
      'rms_norm_eps': 1e-5,
    }
  )
  export.export(
    kinds.init(arch, jax.random.key(0), np.float32),
    arch,
    folder / 'model',
    source_config=None,
    tokenizer_files=synthetic.byte_tokenizer(),
    dtype=np.float32,
    stop_ids=(),
  )
  (folder / 'config.py').write_text(CONFIG)
  rows = synthetic.sums(100)
  (folder / 'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  workdir = tmp_path_factory.mktemp('reference')
  code, told = tiny_run.run('train', arguments(workdir, folder, folder / 'config.py'))
  assert code == 0, told
  return folder, workdir


def finished(bucket):
  """Steps whose checkpoint is whole."""
  marks = [k.split('/') for k in bucket.names('run/checkpoints/')]
  return [int(m[2]) for m in marks if m[3:] == ['commit_success.txt']]


@pytest.mark.full
def test_a_killed_run_in_a_bucket_ends_bitwise_like_one_on_a_disk(inputs, bucket, tmp_path):
  folder, reference = inputs
  for part in ('model', 'rows.jsonl'):
    bucket.upload(folder / part, part)
  log = tmp_path / 'log'
  process = tiny_run.launch('train', arguments(RUN, ROOT, folder / 'config.py'), log)
  assert tiny_run.kill_when(process, lambda: SAVE_EVERY in finished(bucket)), log.read_text()
  assert process.returncode == -9
  at = max(finished(bucket))
  assert at < STEPS and not bucket.names('run/export/')
  assert bucket.names('run/.lock')  # nothing freed it; the next run finds its holder dead

  code, told = tiny_run.run('train', arguments(RUN, ROOT, folder / 'config.py'))
  assert code == 0, told
  assert f'resuming after step {at} of {STEPS}' in told and 'took over the lock' in told
  left = bucket.names('run/')
  assert 'run/.lock' not in left and not [k for k in left if '.partial' in k or '.probe' in k]
  for name in ('config.json', 'manifest.json', 'samples.jsonl', 'metrics.jsonl'):
    assert f'run/{name}' in left
  for part in ('tensorboard/events', 'xla_cache/', 'data_cache/', 'eval/', 'export/config.json'):
    assert [k for k in left if k.startswith(f'run/{part}')], part

  copy = tmp_path / 'copy'
  bucket.download('run/', copy)
  assert tiny_run.differences(copy, reference) == []
  assert [s for split, s in tiny_run.metrics(copy) if split == 'train'] == list(range(1, STEPS + 1))
  assert (copy / 'samples.jsonl').read_bytes() == (reference / 'samples.jsonl').read_bytes()

  # The export is read back, by another entry.
  ask = ['--prompt=1 + 1 =', '--max_tokens=8']
  here = tiny_run.run('generate', [f'--model={reference}', *ask])
  there = tiny_run.run('generate', [f'--model={RUN}', *ask])
  assert here[0] == there[0] == 0 and answer(here[1]) == answer(there[1])


def answer(told):
  return told.strip().splitlines()[-1]


def test_a_workdir_that_refuses_is_found_before_the_model_is_read(inputs, bucket):
  folder, _ = inputs
  bucket.deny = {'objects.delete'}
  code, told = tiny_run.run('train', arguments(RUN, ROOT, folder / 'config.py'))
  assert code == 2 and 'lacks storage.objects.delete' in told
  assert bucket.sent('model') == 0 and files.listdir(RUN)[0].startswith('.probe')
