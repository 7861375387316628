"""Distillation: its divergences, the chunked head against dense logits, and training steps.

Parity with TRL's generalized JSD: parity/test_trl_losses.py."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_model import place

from ftjax import config
from ftjax.losses.distillation import DIVERGENCES, Distillation, divergence_and_gradient
from ftjax.models import head, logit_chunks
from ftjax.models.architecture import LogitSpec

B, T, D, V = 2, 160, 32, 256


def plain(student, teacher, c):
  """The divergence [n], from whole distributions."""
  p, q = (jax.nn.softmax(x / c.temperature) for x in (student, teacher))

  def kl(a, b):
    return (a * jnp.log(a / b)).sum(-1)

  if c.divergence == 'js':
    m = c.beta * q + (1 - c.beta) * p
    return c.beta * kl(q, m) + (1 - c.beta) * kl(p, m)
  return kl(q, p) if c.divergence == 'forward_kl' else kl(p, q)


CASES = [Distillation(name, 0.3, 1.7, 0.6) for name in DIVERGENCES]


def logits(seed, n=7, vocab=12):
  return np.random.default_rng(seed).normal(size=(n, vocab)).astype(np.float32) * 2


@pytest.mark.parametrize('c', CASES, ids=lambda c: c.divergence)
@pytest.mark.parametrize('parts', [1, 3])
def test_value_and_gradient_are_those_of_whole_distributions(c, parts):
  """Also with the vocabulary in parts and padded."""
  student, teacher = logits(0), logits(1)
  expected, gradient = plain(student, teacher, c), jax.grad(lambda x: plain(x, teacher, c).sum())
  padded = [np.pad(x, ((0, 0), (0, 3)), constant_values=-np.inf) for x in (student, teacher)]
  pieces = [jnp.moveaxis(x.reshape(7, parts, -1), 1, 0) for x in padded]
  one = functools.partial(jax.vmap, axis_name='tensor', out_axes=(None, 1))
  found, g = one(lambda a, b: divergence_and_gradient(a, b, c, 'tensor'))(*pieces)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
  g = np.asarray(g).reshape(7, -1)
  np.testing.assert_allclose(g[:, :12], gradient(jnp.asarray(student)), atol=2e-6)
  assert (g[:, 12:] == 0).all()


def test_by_hand():
  """p = (1/2, 1/2), q = (3/4, 1/4)."""
  student, teacher = jnp.zeros((1, 2)), jnp.array([[math.log(3), 0.0]])
  kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
  found, g = divergence_and_gradient(student, teacher, Distillation('forward_kl'), None)
  assert float(found[0]) == pytest.approx(kl, rel=1e-6)
  np.testing.assert_allclose(g, [[-0.25, 0.25]], atol=1e-7)
  found, g = divergence_and_gradient(student, teacher, Distillation('reverse_kl'), None)
  assert float(found[0]) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)
  m = (0.625, 0.375)
  js = 0.5 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1]))
  js += 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
  found, _ = divergence_and_gradient(student, teacher, Distillation('js'), None)
  assert float(found[0]) == pytest.approx(js, rel=1e-6)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_equal_models_have_no_divergence_and_no_gradient(name):
  x = jnp.asarray(logits(2)).at[0, 3].set(200.0)  # a token that is certain
  found, g = divergence_and_gradient(x, x, Distillation(name), None)
  np.testing.assert_allclose(found, 0, atol=1e-6)
  np.testing.assert_allclose(g, 0, atol=1e-6)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_extremes_stay_finite(name):
  far = jnp.array([[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]])
  found, g = divergence_and_gradient(far, far[:, ::-1], Distillation(name), None)
  assert np.isfinite(found).all() and np.isfinite(g).all()


@pytest.mark.parametrize('sizes', [{}, dict(fsdp=2, tensor=2, context=2)])
def test_the_head_is_that_of_dense_logits(sizes, use_mesh, monkeypatch):
  """With a teacher of another width, soft cap and scale; 320 tokens in chunks of 128."""
  monkeypatch.setattr(logit_chunks, 'CHUNK_BYTES', 1)
  use_mesh(**sizes)
  rng, c = np.random.default_rng(0), CASES[2]
  x, w = np.float32(rng.normal(size=(B, T, D))), np.float32(rng.normal(size=(V, D)) * 0.3)
  y, u = np.float32(rng.normal(size=(B, T, 16))), np.float32(rng.normal(size=(V, 16)) * 0.3)
  labels = rng.integers(0, V - 3, (B, T), np.int32)
  weights = rng.uniform(0.1, 3, (B, T)).astype(np.float32)
  weights[0, 40:] = 0
  ours, theirs = LogitSpec(vocab=V - 3), LogitSpec(vocab=V - 3, scale=0.5, soft_cap=4.0)

  def dense(x, w):
    a = jnp.einsum('BTD,VD->BTV', x, w)[..., :-3]
    b = 4 * jnp.tanh(jnp.einsum('BTD,VD->BTV', y, u)[..., :-3] * 0.5 / 4)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(a), labels[..., None], -1)[..., 0]
    found = plain(a, b, c)
    loss = (1 - c.share) * nll + c.share * c.temperature**2 * found
    return (loss * weights).sum(), ((nll * weights).sum(), (found * weights).sum())

  expected, gradients = jax.value_and_grad(dense, (0, 1), has_aux=True)(x, w)

  @jax.jit
  def chunked(x, w, y, u, labels, weights):
    def loss(x, w):
      found = head.distillation_sums((x, w, None), (y, u, None), labels, weights, c, ours, theirs)
      return found[0], found[1:]

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)

  states, table, tokens = ('batch', 'seq', 'act_embed'), ('vocab', 'embed'), ('batch', 'seq')
  arguments = (place(x, *states), place(w, *table), place(y, *states), place(u, *table))
  found, g = chunked(*arguments, place(labels, *tokens), place(weights, *tokens))
  np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=2e-5)
  for got, wanted in zip(g, gradients, strict=True):
    np.testing.assert_allclose(got, wanted, atol=2e-4)


# Runs


def metrics_of(workdir):
  rows = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [r for r in rows if r['split'] == 'train']


def keys(**changes):
  base = dict(steps=2, optim__warmup_steps=0, eval__every=0, checkpoint__every=0, log__every=1)
  base |= dict(eval__prompts='()', optim__schedule='constant')
  return [f'--config.{k.replace("__", ".")}={v}' for k, v in (base | changes).items()]


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  """The export of a model of another width and depth, one step old."""
  workdir = tmp_path_factory.mktemp('teacher')
  sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
  words = [f'--config.model.random.{k}={v}' for k, v in sizes.items()]
  code, printed = tiny_run.run(
    'train', ['--config=tiny_sft', f'--workdir={workdir}', *keys(steps=1, seed=3), *words]
  )
  assert code == 0, printed
  return workdir / 'export'


def test_a_teacher_that_is_the_student_gives_no_gradient(tmp_path):
  words = keys(distill__share=1.0, distill__divergence='forward_kl')
  code, printed = tiny_run.run('train', ['--config=tiny_distill', f'--workdir={tmp_path}', *words])
  assert code == 0, printed
  for row in metrics_of(tmp_path):
    assert abs(row['divergence']) < 1e-5 and row['grad_norm'] < 1e-5


def test_a_teacher_of_another_architecture(tmp_path, teacher):
  words = keys(steps=4, distill__share=1.0, distill__teacher=str(teacher), checkpoint__every=2)
  command = ['--config=tiny_distill', f'--workdir={tmp_path}', *words]
  code, printed = tiny_run.run('train', command)
  assert code == 0, printed
  rows = metrics_of(tmp_path)
  assert rows[0]['divergence'] > 1e-3 and rows[-1]['divergence'] < rows[0]['divergence']
  assert rows[0]['loss'] == pytest.approx(rows[0]['divergence'], rel=1e-5)
  assert not [p for p in (tmp_path / 'export').iterdir() if 'teacher' in p.name]
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  assert 'teacher' in json.dumps(manifest['fingerprints'])


@pytest.mark.full
def test_a_resumed_run_reads_its_teacher_again_and_refuses_another(tmp_path, teacher):
  words = keys(distill__teacher=str(teacher), checkpoint__every=1)
  command = ['--config=tiny_distill', f'--workdir={tmp_path}', *words]
  assert tiny_run.run('train', command)[0] == 0
  before = metrics_of(tmp_path)
  code, printed = tiny_run.run('train', [*command, '--config.steps=3', '--config.distill.teacher='])
  assert code == 2 and 'teacher' in printed, printed
  assert tiny_run.run('train', [*command, '--config.steps=3'])[0] == 0
  rows = metrics_of(tmp_path)
  assert rows[:2] == before and 1e-3 < rows[2]['divergence'] < rows[0]['divergence'] * 1.5


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    (dict(distill__share=0.0), 'distill.share'),
    (dict(distill__beta=1.0), 'distill.beta'),
    (dict(distill__divergence='kl'), 'distill.divergence'),
    (dict(distill__teacher='/nowhere'), '/nowhere'),
  ],
)
def test_wrong_settings(changes, words, tmp_path):
  command = ['--config=tiny_distill', f'--workdir={tmp_path}', *keys(**changes)]
  code, printed = tiny_run.run('train', command)
  assert code in (2, 3) and words in printed, printed


def test_the_terms_are_the_keys_of_the_config():
  names = {f.name for f in dataclasses.fields(Distillation)}
  assert names | {'teacher', 'file', 'top_k', 'on_policy'} == set(config.default().distill)
