"""Process reward models against torch and transformers: golden/prm, by make_prm_goldens.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.algorithms import prm
from ftjax.data import step_rows, synthetic
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment.model import label_head
from ftjax.families import table
from ftjax.hf import load
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from parity import prm_cases as cases

NUMBERS = dict(np.load(cases.GOLDEN / 'numbers.npz'))


def examples():
  tokenizer = Tokenizer(synthetic.byte_tokenizer())
  rows = [step_rows.parse(row) for row in cases.ROWS]
  return [one for (one,) in step_rows.encode(rows, tokenizer, cases.SEPARATOR)]


def test_tokens_and_labels_are_those_of_stepwise_rows():
  for row, example in enumerate(examples()):
    n = len(example.tokens)
    assert np.array_equal(example.tokens, NUMBERS['ids'][row, :n])
    expected = NUMBERS['labels'][row, :n]
    assert np.array_equal(example.labels >= 0, expected >= 0)
    assert np.array_equal(example.supervised, expected >= 0)
    assert np.array_equal(example.labels[expected >= 0] / step_rows.WHOLE, expected[expected >= 0])


def test_logits_loss_and_gradients(use_mesh):
  mesh = use_mesh()
  arch = table.architecture(load.read_config(cases.GOLDEN))
  assert label_head(str(cases.GOLDEN)).names == ('incorrect', 'correct')
  assert arch.task == 'token' and arch.num_labels == 2
  places = sharding.shardings(mesh, kinds.axes(arch))
  params = load.load_params(str(cases.GOLDEN), arch, places, np.dtype(np.float32))
  shape = NUMBERS['ids'].shape
  batch = {k: np.zeros(shape, np.int32) for k in ('tokens', 'segments', 'positions', 'labels')}
  batch['weights'] = np.zeros(shape, np.float32)
  for row, example in enumerate(examples()):
    n = len(example.tokens)
    batch['tokens'][row, :n], batch['segments'][row, :n] = example.tokens, 1
    batch['positions'][row, :n] = np.arange(n)
    batch['labels'][row, :n] = np.maximum(example.labels, 0)
    batch['weights'][row, :n] = example.supervised
  batch = {k: jax.device_put(v, jax.NamedSharding(mesh, sharding.spec('batch', 'seq')))
           for k, v in batch.items()}  # fmt: skip
  forward = Forward(arch, jnp.dtype('float32'))
  logits = jax.jit(forward.label_logits)(params, batch)
  real = np.asarray(batch['segments']) > 0
  np.testing.assert_allclose(np.asarray(logits)[real], NUMBERS['logits'][real], atol=2e-5)

  @jax.jit
  def loss_of(params):
    keys = jax.random.split(jax.random.key(0), shape[0])
    total, weight, _ = prm.make_loss(forward, None)(params, batch, keys)
    return total / weight

  loss, gradient = jax.value_and_grad(loss_of)(params)
  assert float(loss) == pytest.approx(float(NUMBERS['loss']), rel=1e-6)
  flat = trees.flatten(gradient)
  np.testing.assert_allclose(flat['score/w'], NUMBERS['gradient/score.weight'], atol=2e-6)
  np.testing.assert_allclose(flat['score/b'], NUMBERS['gradient/score.bias'], atol=2e-6)
  (name,) = (n for n in flat if n.endswith('attn/q/w'))
  q = np.asarray(flat[name])[0].reshape(cases.SIZES['hidden_size'], -1).T
  expected = NUMBERS['gradient/model.layers.0.self_attn.q_proj.weight']
  np.testing.assert_allclose(q, expected, atol=1e-5)
