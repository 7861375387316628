"""The invariants of every family, on the models of parity/family_cases.py: causal or seeing the
whole document, deaf across documents, indifferent to where a row or its padding lies; cache, remat,
accumulation, adapters and checkpoints change nothing. In float32 at matmul precision highest.
"""

import dataclasses
import functools

import family_models
import family_training
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_adapters
import tiny_model
from parity import family_cases as cases
from tiny_model import tokens_at

from ftjax.families import table
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.hf import export, layout, load
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models import kinds
from ftjax.models.architecture import AttentionSpec
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from ftjax.storage.checkpoint import Checkpoints, Retention

EVERY = pytest.mark.parametrize('name', cases.CASES)
FULL = pytest.mark.full
DECODERS = pytest.mark.parametrize('name', cases.DECODERS)
ENCODERS = pytest.mark.parametrize('name', cases.ENCODERS)
SOME = family_models.parametrize()
SOME_DECODERS = family_models.parametrize(names=cases.DECODERS)
ONE = family_models.parametrize(('llama', 'modernbert'))
ROWS = cases.ROWS


@functools.cache
def model(name):
  """(architecture, parameters) on one device."""
  arch = family_models.architecture(name)
  return arch, family_models.params(name, arch)


def ids(name, seed):
  case = cases.CASES[name]
  return tiny_model.ids(ROWS, case.tokens, seed, case.vocab)


def logits(name, tokens, segments=None):
  segments = np.ones_like(tokens) if segments is None else segments
  return tiny_model.logits(*model(name), tokens, tokens_at(segments))


def close(got, expected, limit=1e-5):
  """Whether arrays are equal within `limit` of the largest number."""
  np.testing.assert_allclose(got, expected, rtol=0, atol=limit * np.abs(expected).max())


def packed(name):
  """(tokens, segments, lengths): in row 0 three documents and padding, in row 1 one document. The
  first one is longer than half a row.
  """
  tokens = ids(name, 1)
  length = tokens.shape[1]
  lengths = (length // 2 + 1, 5, length // 4)
  segments = np.ones_like(tokens)
  segments[0] = np.repeat([1, 2, 3, 0], [*lengths, length - sum(lengths)])
  return tokens, segments, lengths


@DECODERS
def test_causal_exactly(name):
  tokens = ids(name, 0)
  before = logits(name, tokens)
  for t in (0, 1, 7, tokens.shape[1] - 1):
    changed = tokens.copy()
    changed[:, t:] = (tokens[:, t:] + 1) % cases.CASES[name].vocab
    after = logits(name, changed)
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert (after[:, t] != before[:, t]).any(-1).all()


@ENCODERS
def test_a_token_sees_its_whole_document(name):
  """And in one layer with a window as many tokens on either side."""
  arch, params = model(name)
  tokens = ids(name, 0)
  changed = tokens.copy()
  changed[:, 24] = (tokens[:, 24] + 1) % cases.CASES[name].vocab
  assert (logits(name, changed) != logits(name, tokens)).any(-1).all()
  mixers = [block.mixer for block in arch.layers()]
  windows = [m.window if isinstance(m, AttentionSpec) else None for m in mixers]
  own = next((i for i, window in enumerate(windows) if window), None)
  if own is None:
    return
  window = windows[own]
  alone = dataclasses.replace(arch, stacks=(((arch.layers()[own],), 1),))
  slot = arch.layer_slots()[own]
  weights = params[slot[0].split('/')[0]][slot[0].split('/')[1]]
  layer = jax.tree.map(lambda x: x[slot[1] : slot[1] + 1], weights)
  rest = {n: x for n, x in params.items() if not n.startswith('stack')}
  found = [
    tiny_model.logits(alone, rest | {'stack0': {'block0': layer}}, x, tokens_at(np.ones_like(x)))
    for x in (tokens, changed)
  ]
  seen = np.flatnonzero((found[0] != found[1]).any((0, 2)))
  np.testing.assert_array_equal(seen, np.arange(24 - window + 1, 24 + window))


@EVERY
def test_a_document_changes_no_other_exactly(name):
  """Nor does what stands on padding."""
  tokens, segments, lengths = packed(name)
  before = logits(name, tokens, segments)
  assert np.isfinite(before).all()
  for d in range(len(lengths) + 1):
    inside = segments == d
    inside[1] = False
    after = logits(name, np.where(inside, ids(name, 3), tokens), segments)
    kept = ~inside & (segments > 0)
    np.testing.assert_array_equal(after[kept], before[kept])
    assert not d or (after[inside] != before[inside]).any(-1).mean() > 0.9


@EVERY
def test_packed_is_padded_on_either_side(name):
  """Documents in one row, and each in a row of its own, elsewhere in the batch."""
  tokens, segments, lengths = packed(name)
  together = logits(name, tokens, segments)[0]
  size = tokens.shape[1]
  for d, length in enumerate(lengths):
    start = sum(lengths[:d])
    for side, begin in (('right', 0), ('left', size - length)):
      alone, inside = ids(name, 4), np.ones_like(tokens)
      inside[1] = 0
      inside[1, begin : begin + length] = 1
      alone[1, begin : begin + length] = tokens[0, start : start + length]
      got = logits(name, alone, inside)[1, begin : begin + length]
      assert got.shape == (length, cases.CASES[name].vocab), side
      close(together[start : start + length], got)


@EVERY
def test_rows_do_not_know_their_place_in_the_batch(name):
  tokens = ids(name, 0)
  close(logits(name, tokens[::-1].copy())[::-1], logits(name, tokens))


def gradient(name, tokens, segments, remat='none'):
  """(summed loss, {leaf: gradient}) of the next tokens inside the segments, of an encoder of the
  tokens themselves.
  """
  batch = family_models.of_case(name, tokens, segments)
  batch.pop('token_types', None)
  loss, found = family_models.loss_and_gradient(*model(name), batch, remat)
  return float(loss), {n: np.asarray(g) for n, g in trees.flatten(found).items()}


def same(found, expected, limit=2e-6):
  """Whether (loss, gradient) are equal: the loss within 1e-6, the gradient within `limit` of its L2
  norm, and no leaf of it is zero.
  """
  assert found[0] == pytest.approx(expected[0], rel=1e-6)
  apart = sum(((found[1][n] - g) ** 2).sum() for n, g in expected[1].items())
  size = sum((g**2).sum() for g in expected[1].values())
  assert size > 0 and apart <= limit**2 * size
  assert all(g.any() for g in expected[1].values())


def added(*parts):
  """The sum of (loss, gradient) pairs."""
  return sum(p[0] for p in parts), {n: sum(p[1][n] for p in parts) for n in parts[0][1]}


@SOME
def test_accumulated_is_the_whole_batch_and_packed_is_padded_in_gradients(name):
  tokens, segments, lengths = packed(name)
  whole = gradient(name, tokens, segments)
  rows = [gradient(name, tokens, segments * (np.arange(ROWS) == r)[:, None]) for r in range(ROWS)]
  same(added(*rows), whole)
  apart = []
  for d, length in enumerate(lengths):
    start = sum(lengths[:d])
    alone, inside = ids(name, 4), np.zeros_like(tokens)
    inside[1, :length] = 1
    alone[1, :length] = tokens[0, start : start + length]
    apart.append(gradient(name, alone, inside))
  same(added(*apart), rows[0])


@SOME_DECODERS
def test_the_cache_is_the_full_forward(name):
  """Prompts of 10 and 3 tokens that end at one place, and what follows, token by token."""
  arch, params = model(name)
  case = cases.CASES[name]
  tokens = ids(name, 0)[:, : case.short or case.tokens]
  segments = np.ones_like(tokens)
  segments[1, :7] = 0
  expected = logits(name, tokens, segments)
  states = tiny_model.decoded(arch, params, tokens, segments, 10)
  found = np.asarray(jax.jit(tiny_model.all_logits, static_argnums=0)(arch, params, states))
  close(found[segments > 0], expected[segments > 0])


@ONE
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_changes_no_loss_and_no_gradient(name, remat):
  tokens, segments, _ = packed(name)
  same(gradient(name, tokens, segments, remat), gradient(name, tokens, segments))


@ONE
def test_gradients_cross_no_border_exactly(name):
  """Of one document's loss by the embeddings (through `noise`): zero on all others, on padding, and
  after its last label.
  """
  arch, params = model(name)
  tokens, segments, lengths = packed(name)

  @jax.jit
  def by_embeddings(noise, batch):
    forward = Forward(arch, jnp.float32)
    return jax.grad(lambda x: forward.cross_entropy(params, batch, LossConfig(), x)[0])(noise)

  shape = (*tokens.shape, arch.model_dim)
  noise = tiny_model.place(np.zeros(shape, np.float32), 'batch', 'seq', 'act_embed')
  for d in range(1, len(lengths) + 1):
    inside = segments == d
    inside[1] = False
    if not arch.is_encoder:
      inside[0, sum(lengths[:d]) - 1] = False  # its last token has no label
    found = np.asarray(by_embeddings(noise, family_models.of_case(name, tokens, segments, inside)))
    assert not found[~inside].any()
    assert (np.abs(found[inside]).max(-1) > 0).all()


# Adapters.

METHODS = {
  'lora': {},
  'dora': {'dora': True},
  'pissa': {'init': 'pissa'},
  'int8': {'base': 'int8'},
  'nf4': {'base': 'nf4', 'block': 8},
}
EVERY_METHOD = pytest.mark.parametrize('method', METHODS)


def adapted(name, method):
  return tiny_adapters.adapted(family_models.architecture(name), **METHODS[method])


@EVERY
def test_all_linear_finds_every_linear_map(name):
  """Those that PEFT finds, which are torch's linear modules but for the head; beyond them only
  experts, which torch holds in one array.
  """
  maps = set(kinds.linear_maps(family_models.architecture(name))) - {'head'}
  found = {b.hf: b.leaf for b in layout.bindings(family_models.architecture(name))}
  tensors = family_models.golden(name)['linear'].tolist()
  wanted = {leaf.removesuffix('/w') for hf, leaf in found.items() if hf in tensors}
  assert wanted and wanted <= maps
  others = {hf for hf, leaf in found.items() if leaf.removesuffix('/w') in maps - wanted}
  assert all('experts' in hf for hf in others)
  adapter = adapted(name, 'lora').adapter
  assert {m.name for m in adapter.maps} == maps and all(all(m.ranks) for m in adapter.maps)


@FULL
@EVERY
@EVERY_METHOD
def test_an_adapter_begins_as_its_base_and_merges_to_one_model(name, method, tmp_path):
  """A new adapter has the logits of its base, bitwise but for DoRA and PiSSA. One that was
  trained: those of the merged weights, computed and exported.
  """
  arch, tokens = adapted(name, method), ids(name, 0)
  begun = tiny_adapters.begin(arch, family_models.params(name, arch.plain()))
  base = dataclasses.replace(arch, adapter=None)
  own = trees.unflatten({n: begun[n] for n in kinds.declared(base)})
  where = tokens_at(np.ones_like(tokens))
  expected = tiny_model.logits(base, own, tokens, where)
  got = tiny_model.logits(arch, trees.unflatten(begun), tokens, where)
  # GPT-2 on packed weights is bitwise the same as users' programs are compiled, and not with the
  # flags of conftest.py. Encoders are where XLA fuses nothing (--xla_disable_hlo_passes=fusion):
  # it adds up the mean of a LayerNorm otherwise when the sum before it has one more term, a 0.
  may_round = arch.base in ('int8', 'nf4') and (name == 'gpt2' or arch.is_encoder)
  # DoRA divides by lengths that it multiplies with, PiSSA subtracts what it adds.
  is_exact = not (arch.adapter.dora or arch.adapter.pissa or may_round)
  close(got, expected, 0 if is_exact else 3e-6)
  trained = tiny_adapters.move(arch, begun)
  found = tiny_model.logits(arch, trained, tokens, where)
  assert np.abs(found - expected).max() > 0.1 * np.abs(expected).max(), 'it has no weight'
  merged = kinds.with_merged(arch, 'float32')
  close(tiny_model.logits(merged, trained, tokens, where), found)
  folder = tmp_path / 'merged'
  export.export(
    trained,
    merged,
    folder,
    source_config=family_models.config(name),
    tokenizer_files={},
    dtype=np.float32,
    stop_ids=(),
  )
  plain = table.architecture(load.read_config(folder))
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(plain))
  params = load.load_params(folder, plain, places, np.float32)
  close(tiny_model.logits(plain, params, tokens, where), found)


# Checkpoints.


@FULL
@EVERY
def test_a_restored_state_takes_the_next_step_bitwise(name, tmp_path):
  tokens, segments, _ = packed(name)
  step, state, abstract, batch = family_training.start(*model(name), tokens, segments)
  state, first = step(state, batch)
  checkpoints = Checkpoints(str(tmp_path), Retention(1, '', 'min'))
  checkpoints.save(1, state, {}, None)
  checkpoints.wait()
  expected, metrics = step(state, batch)
  found, again = step(checkpoints.restore(1, abstract), batch)
  checkpoints.close()
  assert float(again['loss']) == float(metrics['loss']) != float(first['loss'])
  for got, x in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert np.asarray(got).tobytes() == np.asarray(x).tobytes()


@FULL
@pytest.mark.parametrize('name', ['gemma2', 'gpt2', 'mixtral', 'phi3', 'qwen3_5'])
def test_log_probs_of_the_sampler_are_the_trainer_s(name):
  """Windows, caps, learned positions, experts, states: prompts of 1 to 40 tokens in slots that are
  refilled, up to the end of GPT-2's table.
  """
  arch, params = model(name)
  rng, vocab = np.random.default_rng(0), cases.CASES[name].vocab
  prompts = [rng.integers(0, vocab, n).tolist() for n in (1, 40, 2, 30, 5, 16, 1, 9)]
  engine = Engine(arch, jnp.float32, tuple(range(0, vocab, 9)), 0, slots=3, tokens_per_dispatch=4)
  found = engine.generate(
    params, prompts, group=2, max_tokens=20, sampling=Sampling(1.0), seed=3
  ).completions
  pairs = [(p, c) for p, row in zip(prompts, found, strict=True) for c in row]
  tokens, labels, weights, segments = np.zeros((4, len(pairs), 60), np.int32)
  for i, (prompt, c) in enumerate(pairs):
    whole = prompt + c.tokens
    tokens[i, : len(whole)], labels[i, : len(whole) - 1] = whole, whole[1:]
    weights[i, len(prompt) - 1 : len(whole) - 1], segments[i, : len(whole)] = 1, 1
  expected = tiny_model.logprobs(arch, params, tokens, labels, weights, tokens_at(segments))
  got = np.concatenate([c.logprobs for _, c in pairs])
  np.testing.assert_allclose(got, expected[weights > 0], atol=5e-5)
