"""A reward model as the reward of rollouts: what it pays is its score, whatever the batch; what it
cannot score is refused."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_rollouts

from ftjax.data.batches import ARRAYS
from ftjax.experiment import resume
from ftjax.experiment.model import open_model
from ftjax.hf import export, label_files
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime.errors import ConfigError

# Another size than the policy's.
SIZES = dict(
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=64,
  tie_word_embeddings=True,
  max_position_embeddings=96,
)


def write(folder, labels=1, key=5, **sizes):
  """(architecture, parameters) of a model in `folder`."""
  model = open_model('', SIZES | sizes, 0, label_files.REWARD if labels else None)
  params = kinds.init(model.arch, jax.random.key(key))
  export.export(
    params,
    model.arch,
    folder,
    source_config=model.config,
    tokenizer_files=model.files,
    dtype=np.dtype(np.float32),
    stop_ids=model.stop_ids,
  )
  return model.arch, params


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
  """(folder, architecture, parameters) of a reward model."""
  folder = tmp_path_factory.mktemp('judge') / 'export'
  return (str(folder), *write(folder))


def settings(folder, rewards='model'):
  return {'rollout.rewards': rewards, 'rollout.reward_model': folder}


def test_a_completion_earns_the_score_at_its_last_token(judge, tmp_path):
  folder, arch, params = judge
  s = tiny_rollouts.Steps(tmp_path, **settings(folder))
  batch = {k: v[0] for k, v in s.batch().items()}
  [wanted] = Forward(arch, jnp.float32).sequence_rewards(params, {k: batch[k] for k in ARRAYS}, 1)
  (_, values), *_ = s.rows
  wanted = np.asarray(wanted, np.float64)
  assert len(set(wanted.tolist())) > 8
  assert values['reward/model'] == pytest.approx(wanted.mean(), abs=1e-5)
  assert values['reward_std'] == pytest.approx(wanted.std(), abs=1e-5)


def test_the_score_depends_on_prompt_and_completion_alone(judge, tmp_path):
  """Not on the batch, nor on a mesh of 8, nor on weights and part names beside it."""
  folder = judge[0]
  found = []
  for i, more in enumerate(({}, {'eval.batch_size': 8}, {'rollout.rewards': 'model@0.5,exact@0'})):
    s = tiny_rollouts.Steps(tmp_path / str(i), **settings(folder) | more)
    s.batch()
    found.append(s.rows[0][1])
  assert found[1]['reward/model'] == pytest.approx(found[0]['reward/model'], abs=1e-6)
  assert found[2]['reward/model'] == pytest.approx(found[0]['reward/model'], abs=1e-6)
  assert found[2]['reward_std'] == pytest.approx(found[0]['reward_std'] / 2, abs=1e-6)


def test_a_resume_knows_the_reward_model_again(judge, tmp_path):
  folder = judge[0]
  run = tiny_rollouts.start(tmp_path, **settings(folder))
  known = resume.fingerprints(run)['reward model']
  other = tmp_path / 'other'
  write(other)
  run.config.rollout.reward_model = str(other)
  assert resume.fingerprints(run)['reward model'] == known, 'the same content'
  shutil.rmtree(other)
  write(other, key=6)
  assert resume.fingerprints(run)['reward model'] != known


def test_a_model_that_cannot_score_is_refused(judge, tmp_path):
  folder = judge[0]
  write(tmp_path / 'lm', labels=0)
  write(tmp_path / 'short', max_position_embeddings=40)
  for rewards, name, told in (
    ('model', '', 'name its folder in rollout.reward_model'),
    (tiny_rollouts.VOCAB_REWARDS, folder, "has no part 'model'"),
    ('model', str(tmp_path / 'lm'), 'is no reward model: it has no score'),
    ('model', str(tmp_path / 'short'), 'was made for 40 positions'),
  ):
    with pytest.raises(ConfigError, match=told):
      tiny_rollouts.Steps(tmp_path / 'run', **settings(name, rewards))


def test_another_tokenizer_is_refused(judge, tmp_path):
  folder = judge[0]
  other = tmp_path / 'other'
  shutil.copytree(folder, other)
  file = other / 'tokenizer.json'
  text = file.read_text()
  assert '"a"' in text
  file.write_text(text.replace('"a"', '"?"').replace('"b"', '"a"').replace('"?"', '"b"'))
  with pytest.raises(ConfigError, match='another tokenizer than the policy'):
    tiny_rollouts.Steps(tmp_path / 'run', **settings(str(other)))
