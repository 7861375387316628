"""Every family against transformers, on the small models of family_cases.py: names and shapes of
the files, logits, gradients, states in bfloat16, greedy continuations, import and export.
"""

import functools
import json

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file

from ftjax.families import table, tensor_map
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.hf import export, layout, load
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from parity import family_cases as cases

EVERY = pytest.mark.parametrize('name', cases.CASES)
DECODERS = pytest.mark.parametrize('name', cases.DECODERS)
TIE = 1e-4  # a lead that rounding may turn


@EVERY
def test_the_bindings_name_every_tensor_of_the_file(name):
  arch = family_models.architecture(name)
  bound = {b.hf: b.hf_shape for b in layout.bindings(arch)}
  unused = [n for n in family_models.shapes(name) if table.of(arch).unused.fullmatch(n)]
  found = {n: s for n, s in family_models.shapes(name).items() if n in bound or n not in unused}
  assert bound == found


@EVERY
def test_logits(name):
  arch, stored = family_models.architecture(name), family_models.golden(name)
  tokens = cases.ids(cases.CASES[name])
  np.testing.assert_array_equal(tokens, stored['ids'])
  where = tiny_model.tokens_at(np.ones_like(tokens))
  types = cases.token_types(cases.CASES[name])
  got = tiny_model.logits(arch, family_models.params(name, arch), tokens, where, types=types)
  assert np.abs(got - stored['logits']).max() <= 1e-5 * np.abs(stored['logits']).max()


@EVERY
def test_loss_and_gradient(name):
  """Of the mean over the next tokens, of an encoder over the tokens themselves, by every tensor of
  the file.
  """
  arch, stored = family_models.architecture(name), family_models.golden(name)
  batch = family_models.of_case(name, stored['ids'])
  count = float(np.asarray(batch['weights']).sum())
  params = family_models.params(name, arch)
  loss, gradient = family_models.loss_and_gradient(arch, params, batch)
  assert float(loss) / count == pytest.approx(float(stored['loss']), rel=1e-6)
  leaves = {n: np.asarray(g) for n, g in trees.flatten(gradient).items()}
  for hf, parts in layout.by_tensor(arch).items():
    got = tensor_map.whole_tensor([(b, leaves[b.leaf][b.at]) for b in parts]) / count
    expected = stored[f'gradient/{hf}']
    if {b.leaf for b in parts} <= family_models.idle(arch):  # 0 but for rounding
      assert max(np.abs(got).max(), np.abs(expected).max()) <= 1e-6, hf
      continue
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max() and expected.any(), hf


@functools.partial(jax.jit, static_argnums=0)
def states(arch, params, batch):
  return Forward(arch, jnp.bfloat16).hidden_states(params, batch)


@pytest.mark.full
@EVERY
def test_the_states_of_each_layer_in_bfloat16(name):
  """Of the models cut to their first layers: the cosine to torch's float32 states of all tokens. A
  token alone that goes another way of 90 degrees among 48 gives 0.98.
  """
  arch, stored = family_models.architecture(name), family_models.golden(name)
  batch = family_models.of_case(name, stored['ids'][:1])
  assert len(stored['hidden']) == arch.num_layers
  for count, expected in enumerate(stored['hidden'], 1):
    model = family_models.cut(arch, count)
    got = np.float32(states(model, family_models.params(name, model), batch)[0])
    cosine = (got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected)
    print(f'{name}: 1 - cosine after {count} layers: {1 - cosine:.1e}')
    assert cosine >= 0.999, count


@pytest.mark.full
@DECODERS
def test_greedy_continuations(name):
  """Those of transformers' `generate` after 20 prompts, up to a token whose lead is a tie."""
  arch, stored = family_models.architecture(name), family_models.golden(name)
  engine = Engine(arch, jnp.float32, (), 0, slots=cases.PROMPTS)
  found = engine.generate_at_once(
    family_models.params(name, arch),
    cases.prompts(cases.CASES[name]),
    max_tokens=cases.NEW_TOKENS,
    sampling=Sampling(),
  )
  decided = np.minimum.accumulate(stored['margins'] >= TIE, axis=1)
  print(f'{name}: {(~decided).sum()} of {decided.size} tokens at or after a tie')
  assert decided.mean() > 0.9
  got = np.array([c.tokens for c in found])
  np.testing.assert_array_equal(got[decided], stored['continuations'][decided])


@EVERY
def test_export_after_import_is_the_identity(name, tmp_path):
  """Every tensor's bytes; config.json is written anew and read back as the same architecture."""
  written = family_models.write_folder(name, tmp_path / 'source')
  arch = table.architecture(load.read_config(tmp_path / 'source'))
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  params = load.load_params(tmp_path / 'source', arch, places, np.float32)
  export.export(
    params,
    arch,
    tmp_path / 'target',
    source_config=None,
    tokenizer_files={},
    dtype=np.float32,
    stop_ids=(),
  )
  got = {n: x.tobytes() for n, x in load_file(tmp_path / 'target' / 'model.safetensors').items()}
  unused = {n for n in written.keys() - got.keys() if table.of(arch).unused.fullmatch(n)}
  assert got == {n: x for n, x in written.items() if n not in unused}
  config = json.loads((tmp_path / 'target' / 'config.json').read_text())
  assert table.architecture(config) == arch
