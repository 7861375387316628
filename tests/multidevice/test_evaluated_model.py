"""experiment/local_model.py in float32: what a model responds to a row does not depend on batch
sizes, the order of rows, or the number of devices.
"""

import numpy as np
import pytest
import tiny_rollouts

from ftjax.evaluation.model import Draw
from ftjax.experiment.local_model import LocalModel, Programs

PROMPTS = [
  '1 =',
  'abc',
  '7 + 5 =',
  'zebra!',
  'a longer prompt, of a bucket of its own',
  'Q',
  '9 9 9',
]
CHOICES = [('1', '2', 'y', 'z') if i % 3 else ('no', 'not at all') for i in range(len(PROMPTS))]
PLACES = [f'f:{i}' for i in range(len(PROMPTS))]
TEXTS = [*PROMPTS, 'a text beyond the context of 64 tokens. ' * 4]
GREEDY, DRAWN = Draw(8), Draw(8, samples=4, temperature=0.7, seed=3)


def nothing(number):
  del number


class Answers:
  """All responses of a tiny model; `order` is that of the rows that it is asked."""

  def __init__(self, folder, batch_size, order=None):
    order = list(range(len(PROMPTS))) if order is None else order
    run = tiny_rollouts.start(
      folder, **{'eval.batch_size': batch_size, 'data.cache': f'{folder}/cache'}
    )
    model = LocalModel(Programs(run), run.load_params('', 'float32'))
    places, back = [PLACES[i] for i in order], np.argsort(order)
    prompts, choices = ([each[i] for i in order] for each in (PROMPTS, CHOICES))
    counted = []
    completed = model.complete(prompts, places, GREEDY, counted.append)
    assert sum(counted) == len(prompts), 'rows that the progress bar has seen'
    scored = model.score(prompts, choices, places, nothing)
    self.completions = [completed[i][0] for i in back]
    self.likelihoods = [scored[i] for i in back]
    self.texts = model.score_texts(TEXTS, ['f'] * len(TEXTS), nothing)
    self.drawn = model.complete(PROMPTS, PLACES, DRAWN, nothing) if order == sorted(order) else None

  def check(self, other):
    """Completions are equal; log-probabilities within 1e-4, and so are choices but in a tie."""
    assert self.completions == other.completions
    for ours, theirs in zip(self.likelihoods, other.likelihoods, strict=True):
      ours, theirs = (np.array([x.logp for x in own]) for own in (ours, theirs))
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
      second, first = np.sort(theirs)[-2:]
      assert ours.argmax() == theirs.argmax() or first - second < 1e-4
    for ours, theirs in zip(self.texts, other.texts, strict=True):
      assert ours.tokens == theirs.tokens and abs(ours.logp - theirs.logp) < 1e-4
    if self.drawn is not None:
      assert self.drawn == other.drawn


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """One row at a time, on one device."""
  return Answers(tmp_path_factory.mktemp('alone'), 1)


@pytest.mark.full
def test_the_model_responds_to_rows_in_several_ways(alone):
  assert len({c.text for c in alone.completions}) > 1
  assert len({int(np.argmax([x.logp for x in own])) for own in alone.likelihoods}) > 1
  assert any(len({c.text for c in own}) > 1 for own in alone.drawn)
  assert alone.texts[-1].tokens > 128, 'three windows'


@pytest.mark.full
@pytest.mark.parametrize('batch_size', [4, 16])
def test_batch_size(alone, tmp_path, batch_size):
  Answers(tmp_path, batch_size).check(alone)


@pytest.mark.full
def test_order(alone, tmp_path):
  order = np.random.default_rng(0).permutation(len(PROMPTS)).tolist()
  Answers(tmp_path, 4, order).check(alone)


@pytest.mark.full
@pytest.mark.parametrize('sizes', [{'data': 8}, {'fsdp': 4, 'data': 2}], ids=str)
def test_eight_devices(alone, tmp_path, use_mesh, sizes):
  use_mesh(**sizes)
  Answers(tmp_path, 16).check(alone)
