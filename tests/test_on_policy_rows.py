"""On-policy distillation: which steps are sampled, what their batches hold, and exact resumes."""

import json

import numpy as np
import pytest
import tiny_run

from ftjax import config
from ftjax.config import distill_settings, section_checks
from ftjax.data.prompts import Prompt
from ftjax.generation.completion import Completion
from ftjax.rl import on_policy_rows
from ftjax.runtime.errors import ConfigError, DataError

SETTINGS = dict(distill__on_policy=0.5, distill__share=1.0, data__packing=False)
SETTINGS |= dict(rollout__max_tokens=12, rollout__slots=8)


@pytest.mark.parametrize('share', [0.1, 0.3, 0.5, 0.75, 1.0])
def test_the_share_of_sampled_steps_is_exact_and_even(share):
  chosen = [on_policy_rows.is_on_policy(step, share) for step in range(400)]
  assert abs(sum(chosen) - 400 * share) < 1
  for start in range(0, 360, 40):
    assert abs(sum(chosen[start : start + 40]) - 40 * share) <= 1


@pytest.mark.parametrize(
  ('mask', 'length'), [('0011', 2), ('001100', 2), ('00110010', 6), ('0110', 1), ('1100', 0)]
)
def test_a_prompt_ends_where_the_last_answer_begins(mask, length):
  assert on_policy_rows.prompt_length(np.array([c == '1' for c in mask])) == length


class Weighted:
  weights = np.array([1.0, 0.5], np.float32)


def test_rows_hold_prompt_and_completion_and_are_cut_at_their_end():
  prompts = [Prompt([5, 6, 7], {}, ''), Prompt([8, 9], {}, '')]
  done = [Completion([1, 2], np.zeros(2), False), Completion([3] * 9, np.zeros(9), True)]
  corpus = Weighted()
  found = on_policy_rows.rows([(corpus, 0), (corpus, 1)], prompts, done, 6)
  assert found['tokens'].tolist() == [[5, 6, 7, 1, 2, 0], [8, 9, 3, 3, 3, 3]]
  assert found['labels'].tolist() == [[0, 0, 1, 2, 0, 0], [0, 3, 3, 3, 3, 0]]
  assert found['weights'].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0.5, 0.5, 0.5, 0.5, 0]]
  assert found['segments'].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]


def given(**changes):
  c = config.default()
  c.algorithm = 'distill'
  for key, value in (SETTINGS | changes).items():
    c.update_from_flattened_dict({key.replace('__', '.'): value})
  return c


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (dict(distill__on_policy=1.5), r'in \[0, 1\]'),
    (dict(distill__on_policy=-0.1), r'in \[0, 1\]'),
    (dict(distill__share=0.5), 'set distill.share=1'),
    (dict(data__packing=True), 'data.packing=False'),
    (dict(distill__file='/nowhere'), 'leave distill.file out'),
    (dict(rollout__max_tokens=1024), 'leaves no room'),
    (dict(rollout__temperature=0.0), 'expected a positive'),
    (dict(rollout__stop=('',)), 'expected a tuple of texts'),
  ],
)
def test_settings_that_do_not_go_together(changes, words):
  with pytest.raises(ConfigError, match=words):
    distill_settings.check(given(**changes))
  distill_settings.check(given())


def test_sampling_keys_do_nothing_without_it():
  with pytest.raises(ConfigError, match=r'rollout.max_tokens=12 does nothing with distill.on_pol'):
    section_checks.check(given(distill__on_policy=0.0))


# Runs


def rows_of(workdir, split):
  rows = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [r for r in rows if r['split'] == split]


def run(workdir, **changes):
  base = dict(steps=6, optim__warmup_steps=0, eval__every=0, checkpoint__every=2, log__every=1)
  base |= dict(eval__prompts='()', optim__schedule='constant', data__train='sums:64:20')
  base |= SETTINGS | changes
  words = [f'--config.{k.replace("__", ".")}={v}' for k, v in base.items()]
  return tiny_run.run('train', ['--config=tiny_distill', f'--workdir={workdir}', *words])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('on policy')
  code, printed = run(workdir)
  assert code == 0, printed
  return workdir


def test_a_share_of_the_steps_is_sampled_and_scored_by_the_teacher(finished):
  sampled = rows_of(finished, 'rollout')
  assert [r['step'] for r in sampled] == [2, 4, 6]
  assert all(0 < r['length'] <= 12 for r in sampled)
  train = rows_of(finished, 'train')
  # The teacher is the student at the start, and another model after the first update.
  assert abs(train[0]['divergence']) < 1e-5 and all(np.isfinite(r['loss']) for r in train)
  assert train[0]['loss'] == pytest.approx(train[0]['divergence'], abs=1e-6)
  lengths = [r['supervised_tokens'] for r in train]
  assert lengths[1] == pytest.approx(8 * sampled[0]['length'])
  samples = [json.loads(x) for x in (finished / 'rollouts' / '1.jsonl').read_text().splitlines()]
  assert len(samples) == 8 and all({'prompt', 'completion', 'place'} == set(s) for s in samples)


@pytest.mark.full
def test_a_resumed_run_is_the_uninterrupted_one(finished, tmp_path):
  """Stopped before a sampled step."""
  assert run(tmp_path, stop_at=3)[0] == 0
  assert [r['step'] for r in rows_of(tmp_path, 'rollout')] == [2]
  code, printed = run(tmp_path)
  assert code == 0, printed
  ours, theirs = (rows_of(w, 'train') for w in (tmp_path, finished))
  for a, b in zip(ours, theirs, strict=True):
    assert {k: a[k] for k in tiny_run.TRAIN_KEYS} == {k: b[k] for k in tiny_run.TRAIN_KEYS}
    assert a['batch_checksum'] == b['batch_checksum']
  assert tiny_run.results(tmp_path) == tiny_run.results(finished)
  files = [(w / 'rollouts' / '5.jsonl').read_text() for w in (tmp_path, finished)]
  assert files[0] == files[1]


def test_rows_without_a_prompt_are_refused():
  class Corpus:
    def example(self, i):
      return np.arange(4), np.ones(4, bool)

    def where(self, i):
      return 'rows.jsonl:7'

  with pytest.raises(DataError, match=r'rows.jsonl:7: nothing stands before the answer'):
    on_policy_rows.prompt(Corpus(), 0)
