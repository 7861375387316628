"""Reward models: the score's place, invariances, cuts and meshes, losses, export and reload."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
from tiny_model import place

from ftjax.algorithms import pair_metrics, reward_model
from ftjax.data import batches
from ftjax.experiment import run as experiment
from ftjax.experiment.model import open_model
from ftjax.experiment.trainer import Trainer
from ftjax.families import table as families
from ftjax.hf import export, label_files, load
from ftjax.losses import reward_model as reward_losses
from ftjax.models import kinds
from ftjax.models.attention import Tokens
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError


@functools.cache
def start():
  """(config, architecture, parameters) on one device."""
  c = tiny_pairs.settings('reward_model')
  arch = tiny_pairs.architecture(c)
  return c, arch, kinds.init(arch, jax.random.key(3))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _scores(arch, params, batch, dtype='float32'):
  return Forward(arch, jnp.dtype(dtype)).sequence_rewards(params, batch, 2)


def scores(batch, dtype='float32'):
  """float32[2, B]: of segments 1 and 2."""
  _, arch, params = start()
  return np.asarray(_scores(arch, params, tiny_pairs.flat_on_devices(batch), dtype))


def texts(batch):
  """The tokens of every segment: [(row, segment, ids)]."""
  found = []
  for row, segments in enumerate(batch['segments']):
    found += [(row, s, batch['tokens'][row][segments == s]) for s in (1, 2)]
  return found


def laid_out(ids, length, left=0, fill=0):
  """Rows of one segment each, behind `left` tokens of padding, which hold the id `fill`."""
  batch = batches.empty(len(ids), length, 'score')
  batch['tokens'][:] = fill
  for row, tokens in enumerate(ids):
    at = slice(left, left + len(tokens))
    batch['tokens'][row, at], batch['segments'][row, at] = tokens, 1
    batch['positions'][row, at] = np.arange(len(tokens))
  return batch


# The score


def test_the_score_is_the_last_states_product():
  """Against each text on its own, unpacked and unpadded."""
  _, arch, params = start()
  batch = tiny_pairs.rows()
  got = scores(batch)
  for row, segment, ids in texts(batch)[:4]:
    where = Tokens(
      *(place(a[None], 'batch', 'seq') for a in (np.ones_like(ids), np.int32(np.arange(len(ids)))))
    )
    x = kinds.apply(arch, params, place(ids[None], 'batch', 'seq'), where, dtype=jnp.float32)
    expected = np.asarray(x)[0, -1] @ np.asarray(params['score']['w'])[0]
    assert got[segment - 1][row] == pytest.approx(float(expected), abs=1e-5)


def test_padding_batch_size_and_ids_of_padding_do_not_matter():
  """Guarantees 6.9 and 6.10: side and length of padding, pad id == last id, rows beside it."""
  batch = tiny_pairs.rows()
  ids = [t for _, _, t in texts(batch)]
  expected = scores(batch).T.reshape(-1)  # row by row, segment by segment
  for ending in {int(t[-1]) for t in ids[:3]} | {0}:
    for settings in (dict(length=24), dict(length=48, left=20), dict(length=64, left=1)):
      got = scores(laid_out(ids, fill=ending, **settings))[0]
      np.testing.assert_allclose(got, expected, atol=1e-5)
  for size in (1, 5):
    got = scores(laid_out(ids[:size], 24))[0]
    np.testing.assert_allclose(got, expected[:size], atol=1e-5)


def test_a_token_in_the_prompt_that_equals_the_last_does_not_move_the_score():
  ids = np.array([7, 9, 7, 9, 11, 9], np.int32)
  whole = scores(laid_out([ids], 24))[0]
  cut = scores(laid_out([ids[:2]], 24))[0]
  assert abs(whole[0] - cut[0]) > 1e-3
  np.testing.assert_allclose(scores(laid_out([ids], 24, left=3, fill=9))[0], whole, atol=1e-5)


def test_the_head_is_float32_whatever_the_rest_is():
  _, arch, _ = start()
  assert scores(tiny_pairs.rows(), 'bfloat16').dtype == np.float32
  assert arch.num_labels == 1 and 'head' not in kinds.abstract(arch)


# The step


@functools.cache
def _compiled(mesh, changes):
  c = tiny_pairs.settings('reward_model', **dict(changes))
  run = tiny_pairs.shapes_only(c)
  trainer = Trainer(run, reward_model.make_loss(run.forward, c))
  return run, trainer, trainer.compile()


def one_step(batch, **changes):
  run, trainer, step = _compiled(jax.sharding.get_mesh(), tuple(sorted(changes.items())))
  state, metrics = step(trainer.fresh(), tiny_pairs.on_devices(batch, run))
  params = trees.flatten(jax.tree.map(np.asarray, state.params))
  return {k: float(v) for k, v in metrics.items()}, params


@pytest.fixture(scope='module')
def whole():
  return one_step(tiny_pairs.rows(), reward_model__centring=0.1)


def test_the_loss_is_bradley_terry_with_margin_and_centring(whole):
  c, arch, _ = start()
  params = kinds.init(arch, jax.random.key(c.seed))
  batch = tiny_pairs.rows()
  chosen, rejected = np.asarray(
    _scores(arch, params, tiny_pairs.flat_on_devices(batch)), np.float64
  )
  gap = chosen - rejected
  loss = np.log1p(np.exp(-(gap - batch['values']))) + 0.1 * (chosen + rejected) ** 2
  assert whole[0]['loss'] == pytest.approx(loss.mean(), rel=1e-5)
  assert whole[0]['rewards/margin'] == pytest.approx(gap.mean(), abs=1e-5)
  assert whole[0]['rewards/accuracy'] == pytest.approx((gap > 0).mean())


@pytest.mark.parametrize('sizes', [{}, dict(fsdp=2, tensor=2), dict(data=2, context=2, fsdp=2)])
def test_cut_and_sharded_as_whole(sizes, whole, use_mesh):
  use_mesh(**sizes)
  changes = {} if sizes else dict(grad_accum=4)
  metrics, params = one_step(tiny_pairs.rows(), reward_model__centring=0.1, **changes)
  for key, value in whole[0].items():
    assert metrics[key] == pytest.approx(value, rel=3e-5, abs=1e-6), key
  assert {'score/w', 'embed/w'} <= params.keys()
  for name, value in whole[1].items():
    # Adam divides by the gradient's own size: where that is all rounding, the update is too.
    assert (np.abs(params[name] - value) <= 1e-4).mean() > 0.999, name


def test_regression_on_scores():
  c = tiny_pairs.settings('reward_model', reward_model__objective='scores')
  _, arch, params = start()
  batch = laid_out([t for _, _, t in texts(tiny_pairs.rows())][:8], 64)
  batch['values'] = np.linspace(-1, 1, 8, dtype=np.float32)
  loss = jax.jit(reward_model.make_loss(Forward(arch, jnp.dtype(c.model.compute_dtype)), c))
  total, weight, metrics = loss(params, tiny_pairs.flat_on_devices(batch), None)
  error = scores(batch)[0] - batch['values']
  assert (float(total), float(weight)) == (pytest.approx((error**2).sum(), rel=1e-5), 8.0)
  assert float(metrics['error/absolute'][0]) == pytest.approx(np.abs(error).sum(), rel=1e-5)


# Evaluation, export, reload


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """(run, its parameters, folder of the exported model)."""
  folder = tmp_path_factory.mktemp('rm')
  c = tiny_pairs.settings(
    'reward_model', data__train='pairs:40', data__eval='pairs:11', seq_len=128
  )
  c.compile_cache, c.mesh.fsdp, c.eval.batch_size = False, 8, 8
  run = experiment.start(c, str(folder))
  params = run.load_params('', 'float32')
  export.export(
    params,
    run.arch,
    folder / 'export',
    source_config=run.model.config,
    tokenizer_files=run.model.files,
    dtype=np.dtype(np.float32),
    stop_ids=run.model.stop_ids,
  )
  measure = reward_model.make_measure(run.forward, c)
  found = reward_model.evaluate(measure, run, params, lambda: False)
  rows = pair_metrics.collect(measure, run, params, lambda: False)
  return run, params, folder / 'export', found, rows


def test_evaluation_is_over_all_rows_once(exported):
  found, rows = exported[3:]
  margins = rows['first'].astype(np.float64) - rows['second']
  assert found['pairs'] == len(margins) == 11
  assert found['margin'] == pytest.approx(margins.mean())
  assert found['loss'] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
  assert found['ece'] == reward_losses.calibration_error(margins)
  assert 0 <= found['accuracy_low'] <= found['accuracy'] == (margins > 0).mean()


def test_the_export_is_read_back_bit_by_bit(exported, use_mesh):
  run, params, folder = exported[:3]
  arch = families.architecture(load.read_config(folder))
  assert arch == run.arch and arch.num_labels == 1
  use_mesh()
  where = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  again = trees.flatten(load.load_params(folder, arch, where, jnp.float32))
  for name, value in trees.flatten(params).items():
    np.testing.assert_array_equal(np.asarray(value), again[name])


def test_the_export_is_a_classifier_of_one_label_with_a_pad_that_ends_nothing(exported):
  run, _, folder = exported[:3]
  config = json.loads((folder / 'config.json').read_text())
  assert config['architectures'] == ['LlamaForSequenceClassification']
  assert len(config['id2label']) == 1
  assert config['pad_token_id'] not in run.model.stop_ids
  tokenizer = open_model(str(folder), {}, 0, label_files.REWARD).tokenizer
  assert tokenizer.pad_id == config['pad_token_id']
  names = load.open_source(folder).tensors
  assert names['score.weight'].shape == (1, 32) and 'lm_head.weight' not in names


def test_a_qwen2_becomes_a_reward_model_of_its_own_class():
  model = open_model('', tiny_pairs.SIZES | {'model_type': 'qwen2'}, 0, label_files.REWARD)
  assert model.config['architectures'] == ['Qwen2ForSequenceClassification']
  assert families.architecture(model.config) == model.arch and model.arch.num_labels == 1
  assert model.arch.layers()[0].mixer.qkv_bias


def test_a_reward_model_starts_from_one_and_writes_no_text(exported, tmp_path):
  run, params, folder = exported[:3]
  with pytest.raises(ConfigError, match='is a reward model'):
    open_model(str(folder), {}, 0)
  again = run.load_params(str(folder), 'float32')
  np.testing.assert_array_equal(again['score']['w'], params['score']['w'])
  other = tmp_path / 'two'
  shutil.copytree(folder, other)
  config = json.loads((folder / 'config.json').read_text())
  (other / 'config.json').write_text(json.dumps(config | {'id2label': {'0': 'a', '1': 'b'}}))
  # A classifier may start one, and this file is none.
  assert open_model(str(other), {}, 0, label_files.REWARD).arch.num_labels == 1
  with pytest.raises(DataError, match=r'score\.weight is \[1, 32\], expected \[2, 32\]'):
    run.load_params(str(other), 'float32')


def test_a_language_model_lends_all_but_its_head(exported, tmp_path, use_mesh):
  """An untied one: the head goes, the score is drawn by the seed."""
  sizes = tiny_pairs.SIZES | {'tie_word_embeddings': False}
  base = open_model('', sizes, 0)
  use_mesh()
  params = kinds.init(base.arch, jax.random.key(7))
  export.export(
    params,
    base.arch,
    tmp_path / 'lm',
    source_config=base.config,
    tokenizer_files=base.files,
    dtype=np.dtype(np.float32),
    stop_ids=base.stop_ids,
  )
  c = tiny_pairs.settings('reward_model')
  with c.unlocked():
    c.model.path, c.model.random = str(tmp_path / 'lm'), {}
  model = open_model(c.model.path, {}, 0, label_files.REWARD)
  run = experiment.without_data(c, jax.sharding.get_mesh(), model.arch)
  run.watchdog = experiment.Watchdog({'restore': 0.0})
  got = trees.flatten(run.load_params(c.model.path, 'float32'))
  expected = trees.flatten(params)
  assert got.keys() == expected.keys() - {'head/w'} | {'score/w'}
  for name in got.keys() & expected.keys():
    np.testing.assert_array_equal(got[name], expected[name])
  assert 0.01 < float(np.std(got['score/w'])) < 1 and math.isfinite(float(got['score/w'].sum()))
