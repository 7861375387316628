"""A process reward model as the reward of rollouts: the score of a completion is that of its steps
as ftjax.generate --steps gives it; other models are refused."""

import json

import jax
import numpy as np
import pytest
import tiny_rollouts

from ftjax.experiment.model import open_model
from ftjax.generation.completion import Completion, Rollout
from ftjax.hf import export
from ftjax.hf.label_files import REWARD, Labels
from ftjax.models import kinds
from ftjax.runtime.errors import ConfigError
from ftjax.serving.step_scorer import StepScorer

SIZES = dict(
  hidden_size=32,
  num_hidden_layers=1,
  num_attention_heads=4,
  intermediate_size=64,
  tie_word_embeddings=True,
  max_position_embeddings=96,
)
STEPS = Labels('token', ('incorrect', 'correct'))
TEXTS = ('one;two;', 'one', ' ; ;', 'a;;b')


def write(folder, head):
  model = open_model('', SIZES, 0, head)
  export.export(
    kinds.init(model.arch, jax.random.key(5)),
    model.arch,
    folder,
    source_config=model.config,
    tokenizer_files=model.files,
    dtype=np.dtype(np.float32),
    stop_ids=model.stop_ids,
  )
  return str(folder)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp('a model') / 'export', STEPS)


def settings(folder, **more):
  own = {'rollout.rewards': 'model', 'rollout.reward_model': folder}
  return own | {'rollout.step_reward': 'min', 'rollout.step_separator': ';'} | more


@pytest.mark.parametrize('how', ['min', 'product', 'last'])
def test_a_completion_has_the_score_of_its_steps(folder, tmp_path, how):
  """Blank steps do not count, and a completion without any has 0."""
  s = tiny_rollouts.Steps(tmp_path / 'run', **settings(folder, **{'rollout.step_reward': how}))
  tokenizer = s.run.model.tokenizer
  prompt = s.run.data.prompt(0)
  done = [Completion(tokenizer.encode(t), np.zeros(8, np.float32), False) for t in TEXTS]
  found = s.source._score_steps([prompt], Rollout([done], {}), 0)
  rows = [('', {'prompt': prompt.text, 'completion': t}) for t in TEXTS if t.strip(' ;')]
  mesh = jax.sharding.get_mesh()
  try:
    expected = [row['score'] for row in StepScorer(folder, ';').score_rows(rows, how)]
  finally:
    jax.set_mesh(mesh)
  assert found[2] == 0 and found.dtype == np.float32
  np.testing.assert_allclose(found[[0, 1, 3]], expected, atol=1e-6)
  assert len(set(np.round(expected, 6))) >= 2


def test_a_rollout_is_rewarded_by_it(folder, tmp_path):
  s = tiny_rollouts.Steps(tmp_path, **settings(folder))
  s.batch()
  values = s.rows[0][1]
  assert 0 < values['reward/model'] < 1 and values['reward_std'] > 0
  samples = (tmp_path / 'rollouts' / '0.jsonl').read_text().splitlines()
  assert all(0 <= json.loads(x)['reward'] <= 1 for x in samples)


def test_other_models_and_idle_keys_are_refused(folder, tmp_path):
  score = write(tmp_path / 'score', REWARD)
  usual = {'rollout.step_reward': '', 'rollout.step_separator': '\n'}
  idle = {'rollout.rewards': tiny_rollouts.VOCAB_REWARDS}
  for changes, told in (
    (settings(score), 'is no process reward model'),
    (settings(folder) | usual, 'set rollout.step_reward to min, product or last'),
    (settings(''), 'does nothing with rollout.reward_model'),
    (idle | {'rollout.step_separator': ';'}, 'does nothing with rollout.step_reward'),
    (settings(folder) | {'rollout.step_reward': 'mean'}, 'expected one of'),
  ):
    with pytest.raises(ConfigError, match=told):
      tiny_rollouts.Steps(tmp_path / 'run', **changes)
