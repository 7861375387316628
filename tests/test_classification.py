"""Classification of texts and of words: losses by hand, packing that changes nothing, scores of the
evaluation rows, runs from the shipped configs, and what is refused.
"""

import dataclasses
import json
import math

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_words
from scipy import special

from ftjax.algorithms import classification, token_classification
from ftjax.config import algorithms, keys, validation
from ftjax.losses import classification as losses
from ftjax.models import kinds
from ftjax.models.architecture import Architecture, ScoreHead
from ftjax.models.forward import Forward
from ftjax.runtime.errors import ConfigError

RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=(6, 4)).astype(np.float32) * 3
LABELS = np.array([0, 3, 1, 1, 2, 0])
WEIGHTS = np.array([1, 2, 1, 0, 1, 0.5], np.float32)
LOGP = np.log(special.softmax(LOGITS.astype(np.float64), -1))


def single(**settings):
  total, weight = losses.single_label(LOGITS, jnp.array(LABELS), jnp.array(WEIGHTS), **settings)
  return float(total), float(weight)


# Losses


def test_cross_entropy_of_one_label():
  own = -LOGP[np.arange(6), LABELS]
  assert single() == pytest.approx(((WEIGHTS * own).sum(), WEIGHTS.sum()), rel=1e-5)


def test_class_weights_divide_by_their_sum_as_torch_does():
  factors = (1.0, 2.0, 0.5, 4.0)
  w = np.array(factors)[LABELS] * WEIGHTS
  wanted = (-LOGP[np.arange(6), LABELS] * w).sum(), w.sum()
  assert single(class_weights=factors) == pytest.approx(wanted, rel=1e-5)


def test_label_smoothing_spreads_a_share_over_all_labels():
  factors, e = np.array([1.0, 2.0, 0.5, 4.0]), 0.2
  target = (1 - e) * np.eye(4)[LABELS] + e / 4
  own = -(target * LOGP * factors).sum(-1)
  found = single(label_smoothing=e, class_weights=tuple(factors))
  assert found[0] == pytest.approx((own * WEIGHTS).sum(), rel=1e-5)
  assert found[1] == pytest.approx((factors[LABELS] * WEIGHTS).sum(), rel=1e-5)


def test_focal_loss():
  p = np.exp(LOGP[np.arange(6), LABELS])
  wanted = ((1 - p) ** 2 * -np.log(p) * WEIGHTS).sum()
  assert single(focal_gamma=2.0)[0] == pytest.approx(wanted, rel=1e-5)
  sure = jnp.array([[100.0, 0.0]])
  total, grad = jax.value_and_grad(
    lambda x: losses.single_label(x, jnp.array([0]), jnp.ones(1), focal_gamma=0.5)[0]
  )(sure)
  assert float(total) == 0 and np.isfinite(np.asarray(grad)).all()


@pytest.mark.parametrize('gamma', [0.0, 1.5])
def test_several_labels_are_independent(gamma):
  targets = (RNG.random((6, 4)) < 0.4).astype(np.float32)
  factors = (1.0, 3.0, 1.0, 0.5)
  p = special.expit(LOGITS.astype(np.float64))
  right = np.where(targets > 0, p, 1 - p)
  own = (-np.log(right) * (1 - right) ** gamma * np.array(factors)).mean(-1)
  total, weight = losses.multi_label(
    LOGITS, jnp.array(targets), jnp.array(WEIGHTS), class_weights=factors, focal_gamma=gamma
  )
  assert float(total) == pytest.approx((own * WEIGHTS).sum(), rel=1e-5)
  assert float(weight) == pytest.approx(WEIGHTS.sum())


def test_padding_reaches_no_sum_and_no_gradient():
  bad = jnp.array(LOGITS).at[3].set(jnp.nan)

  def total(x):
    return losses.single_label(x, jnp.array(LABELS), jnp.array(WEIGHTS), focal_gamma=1.0)[0]

  value, grad = jax.value_and_grad(total)(bad)
  assert np.isfinite(float(value)) and np.isfinite(np.asarray(grad)).all()


# Packing


def architecture(**changes) -> Architecture:
  from ftjax.experiment.model import open_model
  from ftjax.hf.label_files import Labels

  sizes = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
  )
  return open_model('', sizes, 0, Labels(**changes)).arch


TEXTS = [RNG.integers(3, 250, n) for n in (7, 3, 9, 4)]


def packed_and_padded(of_tokens: bool) -> tuple[dict, dict]:
  """The same four texts in one row, and in a row each."""
  names = ('tokens', 'segments', 'positions', 'labels')
  one = {n: np.zeros((1, 24), np.int32) for n in names}
  each = {n: np.zeros((4, 24), np.int32) for n in names}
  start = 0
  for i, text in enumerate(TEXTS):
    n = len(text)
    labels = (np.arange(n) + i) % 3
    for batch, row, at, segment in ((one, 0, start, i + 1), (each, i, 0, 1)):
      batch['tokens'][row, at : at + n] = text
      batch['segments'][row, at : at + n] = segment
      batch['positions'][row, at : at + n] = np.arange(n)
      batch['labels'][row, at : at + n] = labels
    start += n
  for batch in (one, each):
    batch['weights'] = (batch['segments'] > 0).astype(np.float32)
  if not of_tokens:
    targets = np.array([0, 2, 1, 1], np.float32)
    one |= {'targets': targets.reshape(1, 4, 1), 'document_weights': np.ones((1, 4), np.float32)}
    each |= {'targets': targets.reshape(4, 1, 1), 'document_weights': np.ones((4, 1), np.float32)}
  return jax.tree.map(jnp.asarray, (one, each))


@pytest.mark.parametrize('pool', ['first', 'last', 'mean', 'each'])
def test_packing_changes_no_loss_and_no_gradient(pool):
  of_tokens = pool == 'each'
  arch = architecture(task='token' if of_tokens else 'sequence', names=('a', 'b', 'c'))
  arch = dataclasses.replace(arch, score_head=ScoreHead(pool=pool, bias=of_tokens))
  c = keys.default()
  c.algorithm = 'token_classification' if of_tokens else 'classification'
  forward, params = Forward(arch, jnp.float32), kinds.init(arch, jax.random.key(1), jnp.float32)
  module = token_classification if of_tokens else classification
  loss = module.make_loss(forward, c)
  found = []
  for batch in packed_and_padded(of_tokens):
    rows = jax.random.split(jax.random.key(0), len(batch['tokens']))

    def mean(params, batch=batch, rows=rows):
      total, weight, metrics = loss(params, batch, rows)
      return total / weight, metrics['accuracy'][0]

    found.append(jax.value_and_grad(mean, has_aux=True)(params))
  ((a, right_a), grad_a), ((b, right_b), grad_b) = found
  assert float(a) == pytest.approx(float(b), rel=1e-6) and float(right_a) == float(right_b)
  for x, y in zip(jax.tree.leaves(grad_a), jax.tree.leaves(grad_b), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-6)


# Scores


def test_entities_are_scored_as_whole():
  names = ('O', 'B-LOC', 'I-LOC', 'B-PER')
  texts = [([0, 1, 2, 0], [0, 1, 2, 0]), ([3, 0, 1], [3, 1, 0]), ([1, 2, 2], [1, 2, 0])]
  found = token_classification.scores(texts, names)
  # There are 4 entities, guessed are 4, right are 2.
  assert found == {'precision': 2 / 4, 'recall': 2 / 4, 'f1': 2 / 4}
  nothing = token_classification.scores([([0, 0], [0, 0])], names)
  assert math.isnan(nothing['f1'])


def test_other_tags_are_scored_by_label():
  found = token_classification.scores([([0, 1, 1, 0], [0, 1, 0, 0])], ('NOUN', 'VERB', 'ADJ'))
  assert found == {'f1': pytest.approx((4 / 5 + 2 / 3) / 2)}
  assert not token_classification.is_bio(('B-', 'O')) and token_classification.is_bio(('B-X', 'O'))


def test_the_area_under_the_curve_counts_ordered_pairs():
  scores, targets = np.array([0.1, 0.4, 0.4, 0.9, -2]), np.array([0, 1, 0, 1, 0.0])
  pairs = [(a > b) + (a == b) / 2 for a in scores[targets > 0.5] for b in scores[targets < 0.5]]
  found = classification._roc_auc(scores[:, None], targets[:, None])
  assert found == pytest.approx(np.mean(pairs))
  assert math.isnan(classification._roc_auc(scores[:, None], np.ones((5, 1))))


# Configs


def wrong(**changes):
  c = keys.default()
  c.algorithm, c.steps, c.data.train, c.model.path = 'classification', 1, 'x.jsonl', 'm'
  for key, value in changes.items():
    c.update_from_flattened_dict({key.replace('__', '.'): value})
  return c


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'classification__labels': ('a',)}, 'at least two labels'),
    ({'classification__labels': ('a', 'a')}, 'different texts'),
    ({'classification__class_weights': (1.0,)}, 'one for each label'),
    (
      {'classification__labels': ('a', 'b'), 'classification__class_weights': (1.0, 0.0)},
      'positive numbers',
    ),
    ({'classification__focal_gamma': -1.0}, 'at least 0'),
    ({'classification__objective': 'many'}, 'classification.objective'),
    (
      {'classification__objective': 'regression', 'classification__labels': ('a', 'b')},
      'classification.labels',
    ),
    ({'classification__objective': 'multi', 'classification__label_smoothing': 0.1}, 'smoothing'),
    ({'eval__prompts': ('x',)}, 'cannot write'),
    ({'algorithm': 'token_classification', 'token_classification__labels': ('O',)}, 'at least two'),
  ],
)
def test_settings_that_do_not_go_together(changes, message):
  with pytest.raises(ConfigError, match=message):
    validation.validate(wrong(**changes))


def test_a_row_has_arrays_for_a_text_of_every_eight_tokens():
  c = wrong(seq_len=512)
  assert algorithms.documents_per_row(c) == 64
  assert algorithms.of(c).documents(c) == {'targets': (64, 1), 'document_weights': (64,)}
  c.data.packing = False
  assert algorithms.documents_per_row(c) == 1
  c.classification.objective, c.classification.labels = 'multi', ('a', 'b', 'c')
  assert algorithms.of(c).documents(c)['targets'] == (1, 3)


# Runs


@pytest.mark.full
@pytest.mark.parametrize('case', ['bert_sequence', 'llama_token'])
def test_an_adapter_gives_the_labels_of_its_checkpoint_and_of_its_export(tmp_path, case):
  """Names included, which PEFT does not keep; from a base that has another head."""
  base, run = tmp_path / 'base', tmp_path / 'run'
  family_models.write_folder(case.partition('_')[0], base)
  for name, content in tiny_words.files().items():
    (base / name).write_bytes(content)
  rows = [{'text': 'a good film', 'label': 'odd'}, {'text': 'a bad play', 'label': 'even'}]
  if case == 'llama_token':
    rows = [{'text': 'in new york', 'tags': ['O', 'B-X', 'I-X']}]
  (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows * 8))
  algorithm = {'bert_sequence': 'classification', 'llama_token': 'token_classification'}[case]
  (tmp_path / 'c.py').write_text(
    'from ftjax import config\n\ndef get_config():\n  c = config.default()\n'
    f"  c.algorithm, c.model.path = '{algorithm}', '{base}'\n"
    f"  c.data.train, c.lora.rank = '{tmp_path / 'rows.jsonl'}', 2\n"
    '  c.steps, c.seq_len, c.batch_size = 3, 16, 2\n  return c\n'
  )
  words = [f'--config={tmp_path / "c.py"}', f'--workdir={run}']
  code, printed = tiny_run.run('train', words)
  assert code == 0, printed
  found = []
  for model in (run, f'{run}@last', run / 'export'):
    code, printed = tiny_run.run('generate', [f'--model={model}', '--classify', '--prompt=a film'])
    assert code == 0, printed
    found.append(printed.strip().splitlines()[-1])
  assert found[0] == found[1] == found[2]
  names = {'bert_sequence': '"odd"', 'llama_token': 'tags'}
  assert names[case] in found[0] and 'LABEL_' not in found[0]


@pytest.mark.parametrize(
  ('name', 'metric'),
  [
    ('classification', 'accuracy'),
    pytest.param('token_classification', 'f1', marks=pytest.mark.full),
  ],
)
def test_a_shipped_config_learns_and_labels(tmp_path, name, metric):
  run = tmp_path / 'run'
  code, printed = tiny_run.run('train', [f'--config=tiny_{name}', f'--workdir={run}'])
  assert code == 0, printed
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  shown = [r for r in rows if r['split'] == 'eval']
  assert shown[-1]['loss'] < shown[0]['loss'] and 0 <= shown[-1][metric] <= 1
  assert '--classify' in printed
  config = json.loads((run / 'export' / 'config.json').read_text())
  wanted = {'classification': ['even', 'odd'], 'token_classification': ['B-EVEN', 'B-ODD', 'O']}
  assert list(config['id2label'].values()) == wanted[name]
  found = []
  for model in (run, f'{run}@last'):
    words = [f'--model={model}', '--classify', '--prompt=4 + 7 =']
    code, printed = tiny_run.run('generate', words, devices=2)
    assert code == 0, printed
    found.append(json.loads(printed.strip().splitlines()[-1]))
  assert found[0] == found[1]
  if name == 'classification':
    scores = found[0]['scores']
    assert found[0]['label'] == max(scores, key=scores.get)
    assert sum(scores.values()) == pytest.approx(1)
  else:
    assert len(found[0]['tags']) == 4
