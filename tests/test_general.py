"""What a tuning cost outside of its task: the shipped texts, their figures, and the divergence."""

import jax
import numpy as np
import pytest

from ftjax.config import config_file
from ftjax.evaluation import general, run
from ftjax.evaluation.kind import Answer
from ftjax.evaluation.model import Completion, Draw, Likelihood
from ftjax.evaluation.result import Result
from ftjax.experiment import divergence
from ftjax.experiment import run as experiment
from ftjax.models import kinds
from ftjax.runtime.errors import DataError


class Parrot:
  """A model that answers the same to everything and finds every byte as likely."""

  def __init__(self, answer):
    self.answer, self.asked = answer, []

  def complete(self, prompts, places, draw, done):
    self.asked += prompts
    return [[Completion(self.answer, 'prompt', 3, False)] for _ in prompts]

  def score(self, prompts, responses, places, done):
    self.asked += prompts
    return [tuple(Likelihood(-float(len(r.encode())), 2) for r in own) for own in responses]

  def score_texts(self, texts, places, done):
    return [Likelihood(-float(len(t.encode())), 2) for t in texts]


def figures(task, results):
  weights = np.ones((1, len(results)))
  return {m.name: float(m.value(weights, m.columns(results, ()))[0]) for m in task.metrics}


def test_the_shipped_rows():
  loaded = general.load(True)
  assert [t.name for t in loaded] == ['general_texts', 'general_replies', 'general_answers']
  assert {t.group for t in loaded} == {'general'}
  texts, replies, questions = loaded
  assert (len(texts.rows), len(replies.rows), len(questions.rows)) == (24, 16, 20)
  everything = [*general.texts(texts), *(r.choices[0] for r in replies.rows)]
  assert len(set(everything)) == 40 and all(t.isascii() for t in everything)
  size = sum(p.stat().st_size for p in general._FOLDER.iterdir())
  assert size < 30_000
  plain = general.load(False)
  assert [len(t.rows) for t in plain] == [24, 16, 20]
  assert plain[1].rows[0].asked.startswith('Question: ') and isinstance(plain[2].rows[0].asked, str)
  assert plain[1].rows[0].choices[0].startswith(' ')
  assert plain[1].digest != replies.digest and general.load(True)[1].digest == replies.digest


@pytest.mark.parametrize('has_template', [True, False])
def test_one_word_whatever_is_asked_shows(has_template):
  *_, task = general.load(has_template)
  found = figures(task, run.evaluate(task, Parrot('positive'), draw=Draw(64), title='tuned'))
  assert found == {'one_word': 1, 'words': 1}
  empty = figures(task, run.evaluate(task, Parrot(''), draw=Draw(64), title='tuned'))
  assert empty == {'one_word': 1, 'words': 0}
  talks = run.evaluate(task, Parrot('It stays upright.'), draw=Draw(64), title='base')
  assert figures(task, talks) == {'one_word': 0, 'words': 3}
  assert general.ANSWERS.score(None, Answer('a\u00a0b')) == {'words': 2, 'one_word': 0}


def test_perplexity_and_a_divergence_that_was_not_measured():
  texts, replies, _ = general.load(True)
  results = run.evaluate(texts, Parrot(''), draw=Draw(64), title='base')
  found = figures(texts, results)
  assert np.isclose(found['bits_per_byte'], 1 / np.log(2)) and np.isnan(found['divergence'])
  base = figures(texts, general.add_divergences(results, None))
  assert base['divergence'] == 0
  sums = [(2.0 * r.tokens, r.tokens) for r in results]
  assert figures(texts, general.add_divergences(results, sums))['divergence'] == 2
  with pytest.raises(ValueError):
    general.add_divergences(results, sums[:-1])
  answered = run.evaluate(replies, Parrot(''), draw=Draw(1), title='base')
  assert np.isfinite(figures(replies, answered)['perplexity'])


def test_files_of_results_are_enough():
  """The divergence is among the values that eval/<task>.jsonl keeps."""
  result = Result('1', '', '', {'likelihood': (1.0, 2.0, 3.0)}, tokens=2)
  (found,) = general.add_divergences([result], [(0.5, 2)])
  assert found.values == {'likelihood': (1.0, 2.0, 3.0), 'divergence': (0.5, 2.0)}


def dense(run, params, ids):
  """float64[n - 1, V]: log-probabilities of the next token after each but the last."""
  batch = {
    'tokens': np.asarray([ids] * 8, np.int32),  # a row for each device
    'segments': np.ones((8, len(ids)), np.int32),
    'positions': np.tile(np.arange(len(ids), dtype=np.int32), (8, 1)),
  }
  placed = {k: divergence.sharding.put(run.mesh, v, 'batch', 'seq') for k, v in batch.items()}
  forward = run.forward.without_remat()
  x = jax.jit(forward.hidden_states)(params, placed)
  w = np.asarray(kinds.head_weights(run.arch, params), np.float64)
  logits = np.asarray(x, np.float64)[0, :-1] @ w[: run.arch.logit_spec.vocab].T
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope='module')
def started(tmp_path_factory):
  c = config_file.load(config_file.find('tiny_sft'))
  c.model.random['tie_word_embeddings'] = False
  c.compile_cache = False
  c.mesh.fsdp, c.mesh.data = 1, -1
  return experiment.start(c, str(tmp_path_factory.mktemp('run')), with_data=False)


def test_the_divergence_is_that_of_the_whole_vocabulary(started):
  # The last one is longer than the model and is cut.
  run, texts = started, ['A river begins where water gathers.', 'no', 'x' * 5000]
  base = run.load_first()
  noise = jax.random.key(1)
  tuned = jax.tree.map(lambda w: w + 0.05 * jax.random.normal(noise, w.shape, w.dtype), base)
  found = divergence.of_texts(run, base, tuned, texts)
  for text, (kl, tokens) in zip(texts, found, strict=True):
    ids = divergence._encode(run, text)
    p, q = dense(run, base, ids), dense(run, tuned, ids)
    assert tokens == len(ids) - 1 and kl > 0.01
    np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(), rtol=1e-4)
  same = divergence.of_texts(run, base, base, texts)
  assert all(0 <= kl < 1e-4 for kl, _ in same)
  assert divergence.of_texts(run, base, base, []) == []
  assert found[-1][1] == run.arch.max_len - 1


def test_a_text_without_tokens_is_named(started):
  with pytest.raises(DataError, match="''"):
    divergence.of_texts(started, {}, {}, [''])
