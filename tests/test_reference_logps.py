"""DPO with its reference on disk: the same training with one model, computed once, kept by what it
depends on, and mended where it is damaged."""

import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
import tiny_run

from ftjax.algorithms import dpo, reference_logps
from ftjax.config import algorithms
from ftjax.data import batches
from ftjax.experiment import auxiliary, fit
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError, NonFiniteError

T = 80
KEYS = ('loss', 'grad_norm', 'rewards/margin', 'logps/chosen')
RUN = (
  'steps=12',
  'batch_size=8',
  'grad_accum=2',
  'data.train=pairs:64',
  'data.eval_fraction=0.2',
  'eval.every=6',
)
RUN += ('eval.prompts=()', 'checkpoint.every=0', 'optim.warmup_steps=0')


def settings(**changes):
  """Of a config for eight devices."""
  mesh = {f'mesh__{a}': 1 for a in sharding.AXES} | {'mesh__fsdp': 8}
  return tiny_pairs.settings(
    **({'dpo__reference': 'cache', 'seq_len': T, 'eval__batch_size': 8} | mesh | changes)
  )


@pytest.fixture
def filled(tmp_path, monkeypatch):
  """filled(**changes) fills a run's corpora; (run, float32[pairs, 2], micro-batches computed)."""
  monkeypatch.setattr(reference_logps, 'SHARD', 16)

  def fill(**changes):
    computed = []
    place = reference_logps.place
    monkeypatch.setattr(reference_logps, 'place', lambda *a: computed.append(1) or place(*a))
    c = settings(data__cache=str(tmp_path / 'cache'), **changes)
    run = experiment.start(c, str(tmp_path))
    load = lambda: run.load_params('', c.model.param_dtype)  # noqa: E731
    try:
      reference_logps.fill(run, load)
    finally:
      monkeypatch.setattr(reference_logps, 'place', place)
    (corpus,) = run.data.corpora
    found = np.stack([corpus.columns[k] for k in algorithms.REFERENCE_FIELDS], 1)
    return run, found, len(computed)

  return fill


def shards(tmp_path):
  return sorted((tmp_path / 'cache').glob('reference-*/*.bin'))


def logged(workdir, split='train'):
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [r for r in rows if r['split'] == split]


@pytest.mark.full
def test_training_is_that_with_the_reference_in_the_step(tmp_path):
  for name in ('step', 'cache'):
    changes = [f'--config.{x}' for x in (*RUN, f'dpo.reference={name}')]
    entry = ['--config=tiny_dpo', f'--workdir={tmp_path / name}']
    code, told = tiny_run.run('train', [*entry, *changes])
    assert code == 0, told
  assert 'rounding alone gives a reward of' in told and ' computed, in ' in told
  one, two = (logged(tmp_path / name) for name in ('step', 'cache'))
  assert len(one) == len(two) == 12
  assert two[0]['loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert abs(two[0]['rewards/margin']) < 1e-6
  for a, b in zip(one, two, strict=True):
    assert a['batch_checksum'] == b['batch_checksum']
    np.testing.assert_allclose([a[k] for k in KEYS], [b[k] for k in KEYS], rtol=2e-5, atol=2e-6)
  ends = [logged(tmp_path / name, 'eval')[-1] for name in ('step', 'cache')]
  assert ends[0]['accuracy'] == ends[1]['accuracy']
  assert ends[0]['loss'] == pytest.approx(ends[1]['loss'], rel=1e-5)


def test_pairs_get_the_log_probs_of_the_model(filled, use_mesh):
  """On eight devices as on one, by row, whatever the order of training."""
  run, found, computed = filled(mesh__fsdp=2, mesh__tensor=2, mesh__data=2)
  assert computed == 8 and found.shape == (64, 2)
  _, other, computed = filled(mesh__fsdp=8, batch_size=16)
  assert computed == 0 and np.array_equal(found, other)
  mesh = use_mesh()
  with jax.set_mesh(mesh):
    one = tiny_pairs.shapes_only(tiny_pairs.settings(seq_len=T))
    params = one.load_params('', 'float32')
    (corpus,) = run.data.corpora
    corpus.columns = {}
    for i, batch in enumerate(batches.eval_batches(corpus, 8, T, packed=False)):
      placed = tiny_pairs.flat_on_devices(batch)
      sides = run.forward.side_logprobs(params, placed, (1, 2))
      np.testing.assert_allclose(np.stack(sides, 1), found[8 * i : 8 * i + 8], rtol=2e-6, atol=2e-5)


def test_batches_carry_them_by_row(filled):
  run, found, _ = filled()
  batch = run.data.stream.batch(9)  # of the second epoch
  for i in range(run.config.batch_size):
    (example,) = run.data.mixture.row(9 * run.config.batch_size + i).examples
    assert [batch[k][i] for k in algorithms.REFERENCE_FIELDS] == found[example].tolist()
  wanted = {k: v.dtype for k, v in run.abstract_batch().items()}
  assert wanted == {k: v.dtype for k, v in batch.items()}


def test_a_pass_that_was_stopped_resumes(filled, tmp_path, monkeypatch):
  measured = reference_logps._Measure.__call__
  seen = []

  def dies(self, corpus, start, *rest):
    seen.append(start)
    if start == 32:
      raise KeyboardInterrupt
    return measured(self, corpus, start, *rest)

  monkeypatch.setattr(reference_logps._Measure, '__call__', dies)
  with pytest.raises(KeyboardInterrupt):
    filled()
  assert seen == [0, 16, 32] and len(shards(tmp_path)) == 2
  monkeypatch.setattr(reference_logps._Measure, '__call__', measured)
  _, found, computed = filled()
  assert computed == 4
  for path in shards(tmp_path):
    path.unlink()
  _, again, computed = filled()
  assert computed == 8 and np.array_equal(found, again)


def test_a_damaged_file_is_made_anew(filled, tmp_path, caplog):
  _, found, _ = filled()
  flipped, short = shards(tmp_path)[1:3]
  content = bytearray(flipped.read_bytes())
  content[50] ^= 1
  flipped.write_bytes(content)
  short.write_bytes(short.read_bytes()[:-8])
  last = shards(tmp_path)[3]
  last.write_bytes(shards(tmp_path)[0].read_bytes())  # whole, but of other pairs
  with caplog.at_level(logging.WARNING):
    _, again, computed = filled()
  assert computed == 6 and np.array_equal(found, again)
  told = ' '.join(r.getMessage() for r in caplog.records)
  assert f'{flipped} is damaged' in told and f'{short} is damaged' in told


def test_it_is_kept_by_what_it_depends_on(filled):
  filled()
  assert filled(dpo__loss='ipo', optim__lr=1.0, dpo__beta=0.5)[2] == 0
  for change in (
    dict(seed=1),  # other random weights
    dict(seq_len=96),
    dict(model__compute_dtype='bfloat16'),
    dict(data__train='pairs:63'),
  ):
    assert filled(**change)[2] > 0, change
  assert filled()[2] == 0


def test_bad_log_probs_name_the_pair(filled, monkeypatch):
  def broken(*_):
    return jnp.full(8, jnp.nan, out_sharding=jax.P(None)), jnp.zeros(8)

  monkeypatch.setattr(Forward, 'side_logprobs', broken)
  with pytest.raises(NonFiniteError, match=r'pairs.*:1: the reference gives log-probs \[nan'):
    filled()


def test_it_is_computed_before_there_is_a_state(tmp_path, monkeypatch):
  """Then one copy of the weights is in memory, and nothing of the optimizer."""
  order = []

  class Enough(Exception):
    pass

  def fresh(self):
    order.append('state')
    raise Enough

  monkeypatch.setattr(reference_logps, 'fill', lambda *_: order.append('reference'))
  monkeypatch.setattr(Trainer, 'fresh', fresh)
  with pytest.raises(Enough):
    fit.fit(settings(data__cache=str(tmp_path / 'cache')), str(tmp_path / 'run'), dpo.build)
  assert order == ['reference', 'state']


def test_one_model_is_held_and_planned():
  def prepared(reference):
    c = tiny_pairs.settings(dpo__reference=reference)
    run = tiny_pairs.shapes_only(c)
    return c, run, Trainer(run, dpo.make_loss(run.forward, c))

  (_, run, trainer), (also, _, two) = prepared('cache'), prepared('step')
  assert 'reference' not in trainer.abstract.frozen and 'reference' in two.abstract.frozen
  assert [n for _, n in run.auxiliary.passes(run.arch)] == [3]
  assert [n for _, n in auxiliary.find(also, run.arch).passes(run.arch)] == [3, 1]
  assert run.auxiliary.find('reference').is_cached
  assert trainer.compile().memory_analysis().argument_size_in_bytes < (
    two.compile().memory_analysis().argument_size_in_bytes
  )


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    (dict(dpo__loss='simpo'), 'dpo.reference=cache does nothing with dpo.loss=simpo'),
    (dict(dpo__loss='kto'), 'dpo.reference=cache does nothing with dpo.loss=kto'),
    (dict(algorithm='online_dpo', rollout__rewards='exact'), 'dpo.reference=cache: online_dpo'),
    (dict(dpo__reference='disk'), "dpo.reference='disk'"),
    (dict(algorithm='sft'), 'dpo.reference=cache does nothing with algorithm=sft'),
  ],
  ids=str,
)
def test_what_cannot_be_cached_is_refused(changes, told):
  with pytest.raises(ConfigError) as e:
    tiny_pairs.settings(**(dict(dpo__reference='cache') | changes))
  assert told in str(e.value)
