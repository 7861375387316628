"""Distillation from a teacher's likeliest tokens: the divergence over k + 1 outcomes, the chunked
head, and the files that ftjax.teacher writes and training reads."""

import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_model import place

from ftjax import config
from ftjax.algorithms import distill
from ftjax.data import teacher_file
from ftjax.experiment.model import open_model
from ftjax.hf import export
from ftjax.losses import distillation, top_k_distillation
from ftjax.losses.distillation import DIVERGENCES, Distillation
from ftjax.models import kinds, logit_chunks, top_k_head
from ftjax.models.architecture import LogitSpec
from ftjax.runtime.errors import ConfigError, DataError

N, V, K = 7, 12, 4
CASES = [Distillation(name, 0.3, 1.7, 0.6) for name in DIVERGENCES]
names = functools.partial(pytest.mark.parametrize, 'c', CASES, ids=lambda c: c.divergence)


def logits(seed):
  return np.random.default_rng(seed).normal(size=(N, V)).astype(np.float32) * 2


def likeliest(x, k, temperature):
  """The ids of the k largest logits, and the log-probs of the k + 1 outcomes, by NumPy."""
  p = np.asarray(jax.nn.softmax(x / temperature), np.float64)
  ids = np.argsort(-x, -1, kind='stable')[..., :k]
  top = np.take_along_axis(p, ids, -1)
  with np.errstate(divide='ignore'):
    rest = np.log(np.maximum(1 - top.sum(-1), 0 if k == x.shape[-1] else 1e-300))
  if k == x.shape[-1]:
    rest[...] = -np.inf
  return ids.astype(np.int32), np.concatenate([np.log(top), rest[..., None]], -1).astype(np.float32)


def merged(student, ids, teacher, c):
  """The divergence [n] over the k + 1 outcomes, differentiable by JAX."""
  p = jax.nn.softmax(student / c.temperature)
  top = jnp.take_along_axis(p, ids, -1)
  p = jnp.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)
  q = jnp.exp(teacher)

  def kl(a, b):
    return (a * jnp.log(a / b)).sum(-1)

  if c.divergence == 'js':
    m = c.beta * q + (1 - c.beta) * p
    return c.beta * kl(q, m) + (1 - c.beta) * kl(p, m)
  return kl(q, p) if c.divergence == 'forward_kl' else kl(p, q)


def in_parts(student, ids, teacher, c, parts):
  """Value [n] and gradient [n, V + 3] with a padded vocabulary in `parts` parts."""
  padded = np.pad(student, ((0, 0), (0, 3)), constant_values=-np.inf)
  pieces = jnp.moveaxis(padded.reshape(N, parts, -1), 1, 0)
  offsets = jnp.arange(parts) * pieces.shape[-1]

  def one(x, offset):
    axis = 'tensor' if parts > 1 else None
    return top_k_distillation.divergence_and_gradient(x, ids, teacher, c, axis, offset)

  found, g = jax.vmap(one, axis_name='tensor', out_axes=(0, 1))(pieces, offsets)
  return np.asarray(found[0]), np.asarray(g).reshape(N, -1)


@names()
@pytest.mark.parametrize('parts', [1, 3])
def test_value_and_gradient_are_those_of_the_merged_outcomes(c, parts):
  student, (ids, teacher) = logits(0), likeliest(logits(1), K, c.temperature)
  found, g = in_parts(student, ids, teacher, c, parts)
  np.testing.assert_allclose(found, merged(student, ids, teacher, c), rtol=2e-5, atol=1e-6)
  gradient = jax.grad(lambda x: merged(x, ids, teacher, c).sum())(jnp.asarray(student))
  np.testing.assert_allclose(g[:, :V], gradient, atol=2e-6)
  assert (g[:, V:] == 0).all()


@names()
def test_all_tokens_give_the_divergence_of_the_whole_distributions(c):
  student, other = logits(0), logits(1)
  ids, teacher = likeliest(other, V, c.temperature)
  expected, gradient = distillation.divergence_and_gradient(student, other, c, None)
  found, g = in_parts(student, ids, teacher, c, 1)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(g[:, :V], gradient, atol=1e-6)


@names()
def test_fewer_tokens_never_give_more_and_the_teacher_itself_gives_nothing(c):
  student, other = logits(0), logits(1)
  whole = distillation.divergence_and_gradient(student, other, c, None)[0]
  for k in (1, K, V - 1):
    found, _ = in_parts(student, *likeliest(other, k, c.temperature), c, 1)
    assert (found <= np.asarray(whole) + 1e-6).all()
    found, g = in_parts(student, *likeliest(student, k, c.temperature), c, 1)
    np.testing.assert_allclose(found, 0, atol=1e-6)
    np.testing.assert_allclose(g, 0, atol=1e-6)


@pytest.mark.parametrize('sizes', [{}, dict(fsdp=2, tensor=2, context=2)])
def test_the_head_is_that_of_dense_logits(sizes, use_mesh, monkeypatch):
  """320 tokens in chunks of 128, with a soft cap and a padded vocabulary; gradients too."""
  monkeypatch.setattr(logit_chunks, 'CHUNK_BYTES', 1)
  use_mesh(**sizes)
  b, t, d, v, k = 2, 160, 16, 64, 5
  rng, c = np.random.default_rng(0), CASES[2]
  x, w, u = (np.float32(rng.normal(size=s)) for s in ((b, t, d), (v, d), (v, d)))
  labels = rng.integers(0, v - 3, (b, t), np.int32)
  weights = rng.uniform(0.1, 3, (b, t)).astype(np.float32)
  weights[0, 40:] = 0
  spec = LogitSpec(vocab=v - 3, soft_cap=4.0)

  def shaped(w):
    return 4 * jnp.tanh(jnp.einsum('BTD,VD->BTV', x, w)[..., :-3] / 4)

  ids, teacher = likeliest(np.asarray(shaped(u)), k, c.temperature)

  def dense(w):
    logits = shaped(w)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    found = merged(logits, ids, teacher, c)
    loss = (1 - c.share) * nll + c.share * c.temperature**2 * found
    return (loss * weights).sum(), ((nll * weights).sum(), (found * weights).sum())

  expected, gradient = jax.value_and_grad(dense, has_aux=True)(w)
  states, table, tokens = ('batch', 'seq', 'act_embed'), ('vocab', 'embed'), ('batch', 'seq')
  wide = ('batch', 'seq', None)
  placed = place(x, *states), place(w, *table), place(u, *table), place(weights, *tokens)

  @jax.jit
  def find(x, u, weights):
    return top_k_head.top_logprobs((x, u, None), weights, k, c.temperature, spec)

  found_ids, found = find(placed[0], placed[2], placed[3])
  read = weights != 0
  assert np.array_equal(np.asarray(found_ids)[read], ids[read])
  np.testing.assert_allclose(np.asarray(found)[read], teacher[read], atol=2e-5)
  assert (np.asarray(found)[~read] == 0).all()

  @jax.jit
  def chunked(x, w, ids, teacher, labels, weights):
    def loss(w):
      found = top_k_head.distillation_sums((x, w, None), ids, teacher, labels, weights, c, spec)
      return found[0], found[1:]

    return jax.value_and_grad(loss, has_aux=True)(w)

  rest = place(ids, *wide), place(teacher, *wide), place(labels, *tokens)
  sums, g = chunked(placed[0], placed[1], *rest, placed[3])
  np.testing.assert_allclose(jax.tree.leaves(sums), jax.tree.leaves(expected), rtol=2e-5)
  np.testing.assert_allclose(g, gradient, atol=3e-4)


# Files and runs


def metrics_of(workdir):
  rows = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [r for r in rows if r['split'] == 'train']


def keys(**changes):
  base = dict(
    steps=3,
    data__train='sums:300:20',
    optim__warmup_steps=0,
    eval__every=0,
    checkpoint__every=0,
    log__every=1,
  )
  base |= dict(eval__prompts='()', optim__schedule='constant', distill__temperature=1.5)
  return [f'--config.{k.replace("__", ".")}={v}' for k, v in (base | changes).items()]


def run(entry, workdir=None, **changes):
  where = [f'--workdir={workdir}'] if workdir else []
  return tiny_run.run(entry, ['--config=tiny_distill', *where, *keys(**changes)])


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  """A model of another width and depth."""
  folder = tmp_path_factory.mktemp('teacher') / 'export'
  sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
  model = open_model('', sizes | dict(max_position_embeddings=128), 0)
  export.export(
    kinds.init(model.arch, jax.random.key(3)),
    model.arch,
    folder,
    source_config=model.config,
    tokenizer_files=model.files,
    dtype=np.dtype(np.float32),
    stop_ids=model.stop_ids,
  )
  return folder


@pytest.fixture(scope='module')
def written(tmp_path_factory, teacher):
  """A folder with all tokens of the vocabulary, and the settings it was written with."""
  home = tmp_path_factory.mktemp('a folder') / 'tokens of it'
  vocab = json.loads((teacher / 'config.json').read_text())['vocab_size']
  settings = dict(distill__file=str(home), distill__top_k=vocab)
  code, printed = run('teacher', distill__teacher=str(teacher), **settings)
  assert code == 0, printed
  return home, settings


@pytest.mark.full
def test_all_tokens_from_a_file_train_as_the_teacher_in_the_step(tmp_path, teacher, written):
  settings = written[1]
  code, printed = run('train', tmp_path / 'online', distill__teacher=str(teacher))
  assert code == 0, printed
  code, printed = run('train', tmp_path / 'file', **settings)
  assert code == 0, printed
  one, two = metrics_of(tmp_path / 'online'), metrics_of(tmp_path / 'file')
  assert len(one) == len(two) == 3 and one[0]['divergence'] > 1e-3
  for a, b in zip(one, two, strict=True):
    assert a['batch_checksum'] == b['batch_checksum']
    for key in ('loss', 'nll', 'divergence', 'grad_norm'):
      assert a[key] == pytest.approx(b[key], abs=1e-6, rel=1e-6), key
  manifest = json.loads((tmp_path / 'file' / 'manifest.json').read_text())
  assert "teacher's tokens 0" in manifest['fingerprints']


@pytest.mark.full
def test_what_is_there_is_not_computed_again_and_damage_is_mended(written, teacher):
  home, settings = written
  code, printed = run('teacher', distill__teacher=str(teacher), **settings)
  assert code == 0 and ' 0 computed' in printed, printed
  (shard,) = home.glob('tokens-*/000001.bin')
  before = shard.read_bytes()
  shard.write_bytes(before[:-4] + b'\0\1\2\3')
  code, printed = run('train', home.parent / 'damaged', **settings)
  assert code == 3 and '000001.bin is missing or damaged' in printed, printed
  code, printed = run('teacher', distill__teacher=str(teacher), **settings)
  assert code == 0 and shard.read_bytes() == before, printed


@pytest.mark.full
def test_a_killed_pass_is_continued_and_a_resumed_run_refuses_other_files(written, teacher):
  """Killed after its first file; then training resumes exactly, and not with other numbers."""
  home, settings = written
  other = home.parent / 'killed'
  words = ['--config=tiny_distill', *keys(**(settings | dict(distill__file=other)))]
  words += [f'--config.distill.teacher={teacher}']
  log = home.parent / 'log'
  process = tiny_run.launch('teacher', words, log)
  assert tiny_run.kill_when(process, lambda: list(other.glob('tokens-*/000000.bin')))
  assert not list(other.glob('tokens-*/meta.json'))
  code, printed = tiny_run.run('teacher', words)
  assert code == 0, printed
  pairs = [sorted(h.glob('tokens-*/0*.bin')) for h in (home, other)]
  assert [p.read_bytes() for p in pairs[0]] == [p.read_bytes() for p in pairs[1]]
  workdir = home.parent / 'resumed'
  assert run('train', workdir, checkpoint__every=1, stop_at=2, **settings)[0] == 0
  lower = dict(settings, distill__file=str(home.parent / 'fewer'), distill__top_k=7)
  assert run('teacher', distill__teacher=str(teacher), **lower)[0] == 0
  code, printed = run('train', workdir, checkpoint__every=1, **lower)
  assert code == 2 and "teacher's tokens 0" in printed, printed
  assert run('train', workdir, checkpoint__every=1, **settings)[0] == 0
  assert run('train', home.parent / 'whole', **settings)[0] == 0
  assert metrics_of(workdir)[-1]['loss'] == metrics_of(home.parent / 'whole')[-1]['loss']


class Examples:
  """What teacher_file reads of a corpus: 300 examples, every third without a predicted token."""

  name, fingerprint = 'rows.jsonl', 'a' * 64

  def __len__(self):
    return 300

  def example(self, i):
    return np.arange(5, dtype=np.int32), np.arange(5) > (3 if i % 3 else 4)


FACTS = teacher_file.Facts('a' * 64, 'b' * 64, '/teacher', 'c' * 64, 1.5, 2, 260, 'float32')


def write_all(home, facts=FACTS):
  """Writes the files of `Examples`; (ids, log-probs) of all predicted tokens."""
  writer, rng = teacher_file.Writer(str(home), Examples(), facts), np.random.default_rng(0)
  writer.begin()
  parts = []
  for start in writer.starts:
    n = writer.tokens(start)
    ids = rng.integers(0, 260, (n, 2)).astype(np.int32)
    parts.append((ids, rng.normal(size=(n, 3)).astype(np.float32)))
    assert not writer.is_whole(start)
    writer.write(start, *parts[-1])
    assert writer.is_whole(start)
  writer.finish()
  return [np.concatenate(p) for p in zip(*parts, strict=True)]


def test_files_give_back_what_was_written(tmp_path):
  ids, logp = write_all(tmp_path)
  found, at = teacher_file.TopTokens(str(tmp_path), Examples()), 0
  assert len(list(tmp_path.glob('tokens-*/0*.bin'))) == 2
  for i in range(300):
    rows, n = found.read(i), int(i % 3 > 0)
    assert np.array_equal(rows['teacher_ids'], ids[at : at + n])
    assert np.array_equal(rows['teacher_logp'], logp[at : at + n])
    at += n
  assert at == len(ids)


def test_missing_unfinished_moved_and_damaged_files_are_refused(tmp_path):
  def refused(words):
    with pytest.raises(DataError, match=words):
      teacher_file.TopTokens(str(tmp_path), Examples())

  refused('is not there')
  write_all(tmp_path)
  (folder,) = tmp_path.glob('tokens-*')
  first, second, meta = (folder / n for n in ('000000.bin', '000001.bin', 'meta.json'))
  content, marked = first.read_bytes(), meta.read_text()
  for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b''):
    first.write_bytes(wrong)
    refused('000000.bin is missing or damaged')
  first.unlink()
  refused('000000.bin is missing or damaged')
  first.write_bytes(content)
  meta.write_text(marked.replace('"top_k": 2', '"top_k": 1'))
  refused('damaged')
  meta.write_text('{')
  refused('meta.json')
  meta.unlink()
  refused('is not finished')
  meta.write_text(marked)
  second.write_bytes(content)
  refused('000001.bin is missing or damaged')


def test_a_folder_of_another_teacher_is_not_continued(tmp_path):
  write_all(tmp_path)
  writer = teacher_file.Writer(
    str(tmp_path), Examples(), dataclasses.replace(FACTS, weights='d' * 64)
  )
  with pytest.raises(ConfigError, match=r'begun with other settings \(weights'):
    writer.begin()


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (dict(), None),
    (dict(tokenizer='e' * 64), 'tokenizer'),
    (dict(temperature=1.0), 'temperature: 1.0, here 1.5'),
    (dict(top_k=1), 'top_k: 1, here 2'),
    (dict(vocab=300), 'vocab: 300, here 260'),
    (dict(teacher='/other'), "teacher: '/other', here '/teacher'"),
  ],
)
def test_training_refuses_files_of_other_settings(changes, words, tmp_path):
  c = config.default()
  with c.unlocked():
    values = dict(file=str(tmp_path), temperature=1.5, top_k=2, teacher='/teacher')
    c.distill.update(values)
  own = types.SimpleNamespace(
    config=c,
    arch=types.SimpleNamespace(vocab_size=260),
    model=types.SimpleNamespace(tokenizer=types.SimpleNamespace(fingerprint='b' * 64)),
    data=types.SimpleNamespace(corpora=[Examples()]),
  )
  facts = dataclasses.replace(FACTS, **changes)
  writer = teacher_file.Writer(str(tmp_path), Examples(), facts)
  writer.begin()
  for start in writer.starts:
    n, k = writer.tokens(start), facts.top_k
    writer.write(start, np.zeros((n, k), np.int32), np.zeros((n, k + 1), np.float32))
  writer.finish()
  if words is None:
    distill.read_tokens(own)
    assert own.data.corpora[0].top_tokens.facts == facts
  else:
    with pytest.raises(ConfigError, match=re.escape(words)):
      distill.read_tokens(own)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (dict(distill__file='/nowhere'), 'distill.teacher is empty'),
    (dict(distill__top_k=8), 'does nothing with distill.file'),
    (dict(algorithm='sft'), 'algorithm'),
  ],
)
def test_wrong_settings_of_the_entry(changes, words):
  code, printed = run('teacher', **changes)
  assert code == 2 and words in printed, printed
