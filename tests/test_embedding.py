"""Sentence embeddings: losses by hand, negatives of the whole step however it is cut, packing that
changes nothing, scores of retrieval, files that sentence-transformers reads, runs.
"""

import json
import math
import shutil

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_words
from jax.sharding import NamedSharding
from scipy import stats
from tiny_model import TINY

from ftjax.algorithms import embedding
from ftjax.config import keys, validation
from ftjax.data import embedding_examples
from ftjax.evaluation.metrics import retrieval
from ftjax.hf import sentence_files
from ftjax.losses import embedding as losses
from ftjax.losses.embedding import Groups
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.training import step

RNG = np.random.default_rng(11)

# Anchor, positive and two negatives of six groups, by name; '' is no text. 'a' has two positives,
# 'q' is a positive of two anchors, one negative is another group's anchor, one is a's positive.
TEXTS = (
  (('a', 'p', 'n', ''), ('b', 'q', '', ''), ('a', 'r', 'b', 'n')),
  (('c', 'q', 'p', ''), ('d', 's', 'a', 'c'), ('', '', '', '')),
)
NAMES = sorted({t for row in TEXTS for g in row for t in g if t})
VECTORS = {t: x / np.linalg.norm(x) for t, x in zip(NAMES, RNG.normal(size=(9, 5)), strict=False)}
WEIGHTS = np.array([[1, 2, 0.5], [1, 1, 0]], np.float32)


def groups():
  def of(text):
    return VECTORS[text] if text else np.zeros(5)

  vectors = np.array([[[of(t) for t in g] for g in row] for row in TEXTS], np.float32)
  ids = [
    [[embedding_examples.text_id(np.array([*t.encode()])) for t in g] for g in r] for r in TEXTS
  ]
  there = np.array([[[bool(t) for t in g] for g in row] for row in TEXTS])
  return Groups(*map(jnp.asarray, (vectors, np.array(ids, np.float32), there, WEIGHTS)))


def negatives(anchor, positive, own, in_batch=True):
  """Names of the texts that are negatives of an anchor, as often as they occur."""
  every = [g for row in TEXTS for g in row if g[0]]
  taken = every if in_batch else [own]
  out = []
  for g in taken:
    out += [g[1]] if g is not own and g[0] != anchor and g[1] not in (anchor, positive) else []
    out += [t for t in g[2:] if t and t not in (anchor, positive)]
  return out


def cosine(a, b):
  return float(VECTORS[a] @ VECTORS[b])


def by_hand(loss, in_batch=True, weights=WEIGHTS):
  total = weight = 0.0
  for row, own in zip(TEXTS, weights, strict=True):
    for group, w in zip(row, own, strict=True):
      if group[0]:
        others = [cosine(group[0], t) for t in negatives(group[0], group[1], group, in_batch)]
        total, weight = total + w * loss(cosine(group[0], group[1]), others, group), weight + w
  return total / weight


def config(**changes):
  c = keys.default()
  c.algorithm, c.steps, c.data.train, c.model.path = 'embedding', 1, 'x.jsonl', 'm'
  c.embedding.negatives = 2
  for key, value in changes.items():
    c.update_from_flattened_dict({key.replace('__', '.'): value})
  return c


def found(**changes):
  values, _ = jax.jit(lambda g: embedding._losses(config(**changes), g))(groups())
  return float((values * WEIGHTS).sum() / WEIGHTS.sum())


# Losses


@pytest.mark.parametrize('in_batch', [True, False])
@pytest.mark.parametrize('temperature', [0.05, 0.7])
def test_the_contrastive_loss_is_the_cross_entropy_among_all_negatives(temperature, in_batch):
  def loss(own, others, group):
    del group
    logits = np.array([own, *others]) / temperature
    return math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[0]

  changes = dict(embedding__temperature=temperature, embedding__in_batch=in_batch)
  assert found(**changes) == pytest.approx(by_hand(loss, in_batch), rel=2e-5)


def test_the_symmetric_form_also_finds_the_anchor():
  def cross_entropy(own, others):
    logits = np.array([own, *others]) / 0.05
    return math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[0]

  def loss(own, others, group):
    anchors = [
      g[0] for row in TEXTS for g in row if g[0] and g[0] not in group[:2] and g[1] != group[1]
    ]
    back = cross_entropy(own, [cosine(group[1], a) for a in anchors])
    return (cross_entropy(own, others) + back) / 2

  assert found(embedding__symmetric=True) == pytest.approx(by_hand(loss), rel=2e-5)


@pytest.mark.parametrize('in_batch', [True, False])
def test_the_margin_is_to_the_nearest_negative(in_batch):
  def loss(own, others, group):
    del group
    return max(0.0, 0.3 - own + max(others)) if others else 0.0

  changes = dict(embedding__objective='margin', embedding__margin=0.3)
  value = found(**changes, embedding__in_batch=in_batch)
  assert value == pytest.approx(by_hand(loss, in_batch), rel=2e-5)


def test_scores_are_cosines_by_squared_error():
  vectors = groups().vectors[:, :, :2]
  scores = np.array([[0.5, -1, 0.2], [1, 0, 9]], np.float32)
  (total, weight), cosines = losses.cosine_error(vectors, jnp.array(scores), jnp.array(WEIGHTS))
  exact = (np.asarray(vectors[:, :, 0], np.float64) * np.asarray(vectors[:, :, 1])).sum(-1)
  np.testing.assert_allclose(cosines, exact, atol=1e-6)
  assert float(total) == pytest.approx((WEIGHTS * (exact - scores) ** 2).sum(), rel=1e-5)
  assert float(weight) == WEIGHTS.sum()


def test_the_accuracy_counts_anchors_whose_positive_is_nearest():
  whole = groups()
  compared = losses.negatives_of_anchors(whole, whole, True)
  stat = {k: float(t / w) for k, (t, w) in losses.statistics(compared, whole.weights).items()}
  own, right, others = [], [], []
  for group in (g for row in TEXTS for g in row if g[0]):
    far = [cosine(group[0], t) for t in negatives(group[0], group[1], group)]
    own.append(cosine(*group[:2]))
    right.append(own[-1] > max(far))
    others.append(np.mean(far))
  assert stat['accuracy'] == pytest.approx(np.average(right))
  assert stat['similarity/positive'] == pytest.approx(np.mean(own), rel=1e-5)
  assert stat['similarity/negative'] == pytest.approx(np.mean(others), rel=1e-5)


def test_texts_that_are_not_there_reach_no_gradient():
  def total(vectors):
    whole = groups()
    whole = Groups(losses.unit(vectors), whole.ids, whole.there, whole.weights)
    return (embedding._losses(config(embedding__symmetric=True), whole)[0] * whole.weights).sum()

  grad = np.asarray(jax.jit(jax.grad(total))(groups().vectors))
  assert np.isfinite(grad).all() and not grad[~np.asarray(groups().there)].any()


# Steps and packing


def batch(rows, length=24):
  """Rows of groups of texts, given as lists of token ids, as data/batches.py makes them."""
  most = max(map(len, rows))
  out = {n: np.zeros((len(rows), length), np.int32) for n in ('tokens', 'segments', 'positions')}
  out |= {'text_ids': np.zeros((len(rows), most, 8), np.float32)}
  out |= {'document_weights': np.zeros((len(rows), most), np.float32)}
  out |= {'row_numbers': np.arange(len(rows), dtype=np.float32)}
  for r, row in enumerate(rows):
    start = 0
    for g, texts in enumerate(row):
      out['document_weights'][r, g] = 1.0
      for k, text in enumerate(texts):
        end = start + len(text)
        out['tokens'][r, start:end], out['segments'][r, start:end] = text, g * 4 + k + 1
        out['positions'][r, start:end] = np.arange(len(text))
        out['text_ids'][r, g, 2 * k : 2 * k + 2] = embedding_examples.text_id(np.array(text))
        start = end
  out['weights'] = np.zeros_like(out['tokens'], np.float32)
  return out


def texts(*sizes):
  return [RNG.integers(3, 250, n).tolist() for n in sizes]


GROUPS = [texts(3, 4), texts(2, 3, 4), texts(5, 2, 2, 3), texts(4, 4)]
GROUPS.append([GROUPS[0][0], *texts(3)])  # an anchor with another positive
GROUPS += [texts(2, 2, 3), texts(6, 3), texts(3, 3)]


def gradient(c, host, accum):
  """(loss, gradient) of a step on the current mesh."""
  forward = Forward(TINY, jnp.float32)
  mesh = jax.sharding.get_mesh()
  places = sharding.shardings(mesh, kinds.axes(TINY))
  params = jax.device_put(kinds.init(TINY, jax.random.key(3), jnp.float32), places)
  with c.unlocked():
    c.grad_accum, c.batch_size = accum, len(host['tokens'])
  loss = embedding.make_loss(forward, c)
  cut = {k: v.reshape(accum, -1, *v.shape[1:]) for k, v in host.items()}
  of_tokens = ('tokens', 'segments', 'positions', 'weights')
  axes = {k: (None, 'batch', 'seq')[: 3 if k in of_tokens else 2] for k in cut}
  where = {k: NamedSharding(mesh, sharding.spec(*a)) for k, a in axes.items()}
  rows = {k: jax.device_put(v, where[k]) for k, v in cut.items()}

  @jax.jit
  def run(params, rows):
    found, total, weight, metrics = step._gradient(loss, params, {}, rows, jax.random.key(0))
    out = jax.tree.map(lambda g: g / weight, found)
    return out, total / weight, {k: t / w for k, (t, w) in metrics.items()}

  return jax.device_get(run(params, rows))


def assert_same(a, b):
  assert a[1] == pytest.approx(b[1], rel=1e-5)
  for name, value in b[2].items():
    assert float(a[2][name]) == pytest.approx(float(value), abs=1e-6)
  for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
    np.testing.assert_allclose(x, y, atol=5e-6 * max(1.0, np.abs(y).max()))


@pytest.mark.full
def test_a_step_has_the_same_negatives_however_it_is_cut_packed_and_sharded():
  c = config(embedding__symmetric=True, embedding__temperature=0.5)
  padded = batch([[g] for g in GROUPS])
  whole = gradient(c, padded, 1)
  assert_same(gradient(c, padded, 4), whole)
  packed = batch([GROUPS[:2], GROUPS[2:4], GROUPS[4:6], GROUPS[6:]], 32)
  assert_same(gradient(c, packed, 1), whole)
  mesh = sharding.make_mesh(
    dict.fromkeys(sharding.AXES, 1) | {'data': 2, 'fsdp': 2}, jax.devices()[:4]
  )
  with jax.set_mesh(mesh):
    assert_same(gradient(c, padded, 2), whole)


# Scores


def test_retrieval_by_hand():
  angle = np.deg2rad([0, 5, 90, 80, 10, 60, 84])
  at = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
  # a: 0 degrees; b: 90. Positives of a at 5 and 60, of b at 80; negatives at 10 and 84.
  vectors = at[[[0, 1, 4], [2, 3, 6], [0, 5, 0]]]
  ids = np.zeros((3, 3, 2), np.float32)
  ids[..., 1] = [[0, 1, 4], [2, 3, 6], [0, 5, 0]]
  there = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
  out = retrieval.of_groups(vectors, ids, there)
  # The anchor a finds a positive first, b after the negative at 84.
  assert (out['recall_at_1'], out['mrr'], out['recall_at_10']) == (0.5, 0.75, 1.0)
  assert (out['queries'], out['candidates']) == (2, 5)
  assert out['recall_at_1_low'] < 0.5 < out['recall_at_1_high']


def test_equal_vectors_find_nothing():
  vectors = np.ones((12, 2, 1), np.float32)
  ids = np.zeros((12, 2, 2), np.float32)
  ids[..., 1] = np.arange(24).reshape(12, 2)
  out = retrieval.of_groups(vectors, ids, np.ones((12, 2), bool))
  assert (out['recall_at_1'], out['recall_at_10'], out['mrr']) == (0, 0, pytest.approx(1 / 12))


def test_correlations_of_scores():
  x, y = RNG.normal(size=(2, 9))
  out = retrieval.correlations(x, y)
  assert out['spearman'] == pytest.approx(stats.spearmanr(x, y).statistic)
  assert out['pearson'] == pytest.approx(np.corrcoef(x, y)[0, 1])
  assert math.isnan(retrieval.correlations(x, np.ones(9))['spearman'])


# Files


@pytest.mark.parametrize('pool', ['mean', 'first', 'last'])
def test_the_pool_is_read_as_it_is_written(tmp_path, pool):
  write(tmp_path, sentence_files.files(pool, 32, 64))
  assert sentence_files.find_pool(tmp_path) == pool


def write(folder, files):
  for name, content in ({'config.json': b'{}'} | files).items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  (folder / 'model.safetensors').write_bytes(b'')


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('1_Pooling/config.json', {'pooling_mode_max_tokens': True}, 'pooling_mode_max_tokens'),
    (
      '1_Pooling/config.json',
      {'pooling_mode_cls_token': True, 'pooling_mode_mean_tokens': True},
      'embedding.pool',
    ),
    ('1_Pooling/config.json', {'pooling_mode': ['mean', 'max']}, 'embedding.pool'),
    ('modules.json', [{'type': 'a.Pooling', 'path': '1_Pooling'}, {'type': 'a.Dense'}], 'Dense'),
    ('modules.json', [{'type': 'a.Pooling', 'path': 'elsewhere'}], 'elsewhere'),
    ('modules.json', {}, 'list of modules'),
  ],
)
def test_other_vectors_are_refused(tmp_path, name, content, message):
  write(tmp_path, sentence_files.files('mean', 32, 64) | {name: json.dumps(content).encode()})
  with pytest.raises((ConfigError, DataError), match=message):
    sentence_files.find_pool(tmp_path)


def test_newer_names_of_pools(tmp_path):
  newer = {'1_Pooling/config.json': b'{"embedding_dimension": 32, "pooling_mode": "lasttoken"}'}
  write(tmp_path, sentence_files.files('mean', 32, 64) | newer)
  assert sentence_files.find_pool(tmp_path) == 'last'
  (tmp_path / 'modules.json').unlink()
  assert sentence_files.find_pool(tmp_path) == ''


# Configs


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'embedding__objective': 'triplet'}, 'embedding.objective'),
    ({'embedding__pool': 'max'}, 'embedding.pool'),
    ({'embedding__temperature': 0.0}, 'positive numbers'),
    ({'embedding__negatives': -1}, 'at least 0'),
    ({'embedding__negatives': 0, 'embedding__in_batch': False}, 'no negatives'),
    ({'embedding__symmetric': True, 'embedding__in_batch': False}, 'symmetric'),
    ({'embedding__objective': 'cosine', 'embedding__temperature': 0.1}, 'temperature'),
    ({'embedding__objective': 'margin', 'embedding__symmetric': True}, 'symmetric'),
    ({'batch_size': 1, 'data__packing': False}, 'batch_size=1'),
    ({'eval__prompts': ('x',)}, 'cannot write'),
  ],
)
def test_settings_that_do_not_go_together(changes, message):
  with pytest.raises(ConfigError, match=message):
    validation.validate(config(**{'embedding__negatives': 1} | changes))


# Runs


def embed(model, *rest):
  words = [f'--model={model}', '--embed', *rest]
  code, printed = tiny_run.run('generate', words, devices=2)
  assert code == 0, printed
  return [json.loads(line) for line in printed.strip().splitlines() if line.startswith('{')]


def test_the_shipped_config_learns_and_gives_vectors(tmp_path):
  run = tmp_path / 'run'
  code, printed = tiny_run.run('train', ['--config=tiny_embedding', f'--workdir={run}'])
  assert code == 0, printed
  assert '--embed' in printed
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  shown = [r for r in rows if r['split'] == 'eval']
  assert shown[-1]['loss'] < shown[0]['loss'] and shown[-1]['recall_at_1'] > 0.5
  assert json.loads((run / 'export' / '1_Pooling' / 'config.json').read_text())[
    'pooling_mode_lasttoken'
  ]
  texts = tmp_path / 'some texts.txt'
  texts.write_text('4 + 7 =\nadd 4 to 7\nadd 90 to 11\n')
  found = embed(run, f'--prompts={texts}')
  assert [r['text'] for r in found] == texts.read_text().splitlines()
  question, right, wrong = (np.array(r['embedding']) for r in found)
  assert question @ question == pytest.approx(1) and question @ right > question @ wrong


def embed_bare(base, tmp_path):
  """The vector of the base, whose labels do not count."""
  bare = tmp_path / 'bare'
  shutil.copytree(base, bare)
  config = json.loads((bare / 'config.json').read_text())
  (bare / 'config.json').write_text(json.dumps(config | {'architectures': ['BertModel']}))
  return embed(bare, '--prompt=a film')


@pytest.mark.full
@pytest.mark.parametrize('with_adapter', [False, True])
def test_an_encoder_is_exported_without_a_head(tmp_path, with_adapter):
  """As transformers' BertModel: its labels go, and the vectors are those of the checkpoint."""
  base, run = tmp_path / 'base', tmp_path / 'run'
  family_models.write_folder('bert_sequence', base)
  for name, content in tiny_words.files().items():
    (base / name).write_bytes(content)
  rows = [{'sentence1': 'a good film', 'sentence2': 'good film', 'score': 0.9}]
  rows += [{'sentence1': 'a bad play', 'sentence2': 'in new york', 'score': -0.5, 'weight': 2}]
  (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows * 8))
  settings = ['steps=3', 'seq_len=32', 'batch_size=2', 'embedding.objective=cosine']
  settings += [f'model.path={base}', f'data.train={tmp_path / "rows.jsonl"}', 'algorithm=embedding']
  settings += ['lora.rank=2', 'lora.base=float32', 'optim.lr=0.1'] if with_adapter else []
  (tmp_path / 'c.py').write_text(
    'from ftjax import config\n\ndef get_config():\n  return config.default()\n'
  )
  words = [f'--config={tmp_path / "c.py"}', f'--workdir={run}']
  code, printed = tiny_run.run('train', [*words, *(f'--config.{s}' for s in settings)])
  assert code == 0, printed
  whole = run / ('merged' if with_adapter else 'export')
  exported = json.loads((whole / 'config.json').read_text())
  assert exported['architectures'] == ['BertModel'] and 'id2label' not in exported
  pooling = json.loads((run / 'export' / '1_Pooling' / 'config.json').read_text())
  assert pooling['pooling_mode_mean_tokens'] and not pooling['pooling_mode_lasttoken']
  found = [embed(model, '--prompt=a film') for model in (run, f'{run}@last', run / 'export')]
  assert found[0] == found[1] == found[2]
  (merged,), (before,) = embed(whole, '--prompt=a film'), embed_bare(base, tmp_path)
  np.testing.assert_allclose(merged['embedding'], found[0][0]['embedding'], atol=1e-5)
  assert np.abs(np.subtract(before['embedding'], merged['embedding'])).max() > 1e-4
  if with_adapter:
    adapter = json.loads((run / 'export' / 'adapter_config.json').read_text())
    assert adapter['task_type'] == 'FEATURE_EXTRACTION'
    assert all(m.startswith('encoder.layer.') for m in adapter['target_modules'])
  assert "SentenceTransformer('PATH')" in (run / 'export' / 'README.md').read_text()
  code, printed = tiny_run.run('generate', [f'--model={base}', '--embed', '--prompt=x'])
  assert code == 2 and 'gives labels' in printed
