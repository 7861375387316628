"""Best-of-n: what is kept, what is trained on it, and what lands in the workdir."""

import json
import pathlib

import numpy as np
import pytest
import tiny_rollouts

from ftjax.algorithms import best_of_n
from ftjax.generation.completion import Completion
from ftjax.rl import rollout_batch, rollout_files
from ftjax.runtime.errors import ConfigError


def completions(*texts):
  return [Completion(list(t), np.zeros(len(t)), False) for t in texts]


def of(rewards, texts, group):
  return rollout_batch.RolloutBatch(
    {}, np.float32(rewards), np.int32([1] * len(texts)), group, (), texts
  )


def test_the_best_are_kept_once_each_and_ties_go_to_the_earlier():
  texts = completions((1, 2), (1, 2), (3,), (4,), (5,), (6,), (7,), (8,))
  s = of([1, 1, 0, 0.5, 0, 0, 0, 0], texts, 4)
  assert best_of_n.choose(s, 2, -1e9) == [[0, 3], [4, 5]]
  assert best_of_n.choose(s, 4, -1e9) == [[0, 3, 2], [4, 5, 6, 7]]
  assert best_of_n.choose(s, 4, 0.5) == [[0, 3], []], "STaR's filter"
  assert best_of_n.choose(s, 4, 2.0) == [[], []]


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  s = tiny_rollouts.Steps(tmp_path_factory.mktemp('bon'), 'best_of_n', **{'best_of_n.keep': 2})
  return s, tiny_rollouts.host(s.batch())


def test_a_batch_holds_the_kept_rows_and_the_loss_is_their_likelihood(kept):
  s, batch = kept
  assert batch['tokens'].shape == (1, 8, 48)
  _, metrics = s.step(s.trainer.fresh(), s.batch())
  arrays = {k: v[0] for k, v in batch.items()}
  logp = s.source.measure(arrays, {'logp': ('logp', s.state.params)})['logp']
  counts = batch['weights'][0] > 0
  assert float(metrics['loss']) == pytest.approx(-logp[counts].mean(), rel=1e-5)
  assert float(metrics['supervised_tokens']) == counts.sum()


def test_what_was_kept_lands_as_rows_of_supervised_tuning(kept):
  s, batch = kept
  path = pathlib.Path(s.run.workdir) / 'rollouts' / 'kept-0.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  filled = (batch['segments'][0] > 0).any(-1)
  assert len(rows) == filled.sum() and s.rows[0][1]['kept'] == len(rows) / 16
  tokenizer = s.run.model.tokenizer
  labels, weights = (batch[k][0][filled] for k in ('labels', 'weights'))
  for row, tokens, counts in zip(rows, labels, weights, strict=True):
    said = row['messages'][-1]['content'] if 'messages' in row else row['completion']
    assert said == tokenizer.decode(tokens[counts > 0].tolist())
    assert row['reward'] <= 0 and 'sums' in row['place']
  first = [r['reward'] for r in rows[::2]]
  assert all(a >= b['reward'] for a, b in zip(first, rows[1::2], strict=False))


def test_nothing_kept_moves_nothing(tmp_path):
  s = tiny_rollouts.Steps(tmp_path, 'best_of_n', **{'best_of_n.min_reward': 5.0})
  before = tiny_rollouts.host(s.state.params)
  state, metrics = s.step(s.state, s.batch())
  assert float(metrics['loss']) == float(metrics['grad_norm']) == 0 and bool(metrics['ok'])
  after = tiny_rollouts.host(state.params)
  assert all((before[k] == after[k]).all() for k in before)
  assert s.rows[0][1]['kept'] == 0


def test_blank_and_cut_answers_are_no_rows_to_keep(kept):
  s, _ = kept
  batch_builder = s.source._batch_builder
  done = Completion([5], np.zeros(1), False)
  stop = Completion(list(s.run.model.stop_ids[:1]), np.zeros(1), False)
  cut = Completion([6, 7], np.zeros(2), True)
  prompts = [s.run.data.prompt(0)] * 4
  arrays = {'weights': np.ones((4, 48), np.float32)}
  rewards = np.float32([1, 0.9, 0.8, 0])
  found = rollout_batch.RolloutBatch(
    arrays, rewards, np.int32([1] * 4), 4, prompts, [done, stop, cut, cut]
  )
  for keep, rows in ((2, 1), (3, 1)):
    batch_builder._keep = keep
    assert len(batch_builder.build(found).kept) == rows
  batch_builder._keep = 2


def test_rows_of_rollouts_to_be_made_again_are_removed(tmp_path):
  rows = rollout_files.RolloutFiles(str(tmp_path), 2)
  rows.cut(-1)
  for name in ('0', '1', '2', 'kept-1', 'kept-2'):
    rows.write_rows(name, [{'a': 1}])
  rows.cut(3)  # within rollout 1, which stays
  left = {p.name for p in (tmp_path / 'rollouts').iterdir()}
  assert left == {'0.jsonl', '1.jsonl', 'kept-1.jsonl'}


def test_more_cannot_be_kept_than_sampled():
  with pytest.raises(ConfigError, match='expected at least 5'):
    tiny_rollouts.tiny('best_of_n', **{'best_of_n.keep': 5})
