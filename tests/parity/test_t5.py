"""T5, v1.1 and mT5 against transformers, on the small models of t5_cases.py: names and shapes of
the files, logits, gradients, buckets of distances, import and export.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_models
from safetensors.numpy import load_file

from ftjax.families import table, tensor_map
from ftjax.generation.beam_search import Beams, Writer
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.hf import export, layout, load
from ftjax.models import kinds, relative_bias
from ftjax.models.mixer_spec import RelativeBias
from ftjax.runtime import sharding, trees
from parity import t5_cases as cases

EVERY = pytest.mark.parametrize('name', cases.CASES)
# Two of them every day: a tied head with a scale, and an untied one.
ONE = pytest.mark.parametrize(
  'name', ['t5', 't5_v1_1', pytest.param('mt5', marks=pytest.mark.full)]
)


@EVERY
def test_the_bindings_name_every_tensor_of_the_file(name):
  bound = {b.hf: b.hf_shape for b in layout.bindings(t5_models.architecture(name))}
  assert bound == t5_models.shapes(name)


@ONE
def test_logits_loss_and_gradient(name):
  """Of rows with padding on both sides; of every tensor of the file."""
  arch, stored = t5_models.architecture(name), t5_models.golden(name)
  source, source_segments, labels, segments = t5_models.rows()
  np.testing.assert_array_equal(source, stored['source'])
  np.testing.assert_array_equal(labels, stored['labels'])
  batch = t5_models.batch(source, source_segments, labels, segments)
  inside = segments > 0
  got = t5_models.logits(name, batch)[inside]
  expected = stored['logits'][inside]
  assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
  loss, gradient = t5_models.loss_and_gradient(arch, t5_models.params(name), batch)
  count = inside.sum()
  assert float(loss) / count == pytest.approx(float(stored['loss']), rel=1e-6)
  leaves = {n: np.asarray(g) for n, g in trees.flatten(gradient).items()}
  for hf, parts in layout.by_tensor(arch).items():
    own = tensor_map.whole_tensor([(b, leaves[b.leaf][b.at]) for b in parts]) / count
    theirs = stored[f'gradient/{hf}']
    assert np.abs(own - theirs).max() <= 2e-5 * np.abs(theirs).max() and theirs.any(), hf


@pytest.mark.parametrize(('causal', 'array'), [(False, 'buckets_both'), (True, 'buckets_causal')])
def test_buckets_of_distances(causal, array):
  found = relative_bias.buckets(701, RelativeBias('', 32, 128), causal)
  np.testing.assert_array_equal(found, t5_models.golden('t5')[array])


@EVERY
def test_export_after_import_is_the_identity(name, tmp_path):
  """Every tensor's bytes; config.json is written anew and read back as the same architecture."""
  written = t5_models.write_folder(name, tmp_path / 'source')
  arch = table.architecture(load.read_config(tmp_path / 'source'))
  assert arch == t5_models.architecture(name)
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
  assert got == written
  assert table.architecture(load.read_config(tmp_path / 'target')) == arch
  config = json.loads((tmp_path / 'target' / 'config.json').read_text())
  assert table.architecture(config) == arch


def engine(name, beams=Beams(), slots=4):  # noqa: B008 - frozen
  arch = t5_models.architecture(name)
  return Engine(arch, jnp.float32, cases.STOPS, 0, slots=slots, writer=Writer(cases.START, beams))


def completions(name, made):
  """Tokens int32[P, N], -1 behind each completion, and each one's log-probability."""
  found = made.generate_at_once(
    t5_models.params(name), cases.prompts(), max_tokens=cases.NEW_TOKENS, sampling=Sampling()
  )
  out = np.full((cases.PROMPTS, cases.NEW_TOKENS), -1, np.int32)
  for i, c in enumerate(found):
    out[i, : len(c.tokens)] = c.tokens
  return out, found


@ONE
def test_greedy_completions(name):
  """Those of transformers' `generate`; no lead of a token is one that rounding may turn."""
  stored = t5_models.golden(name)
  assert stored['margins'][stored['greedy'] >= 0].min() > 5e-4
  np.testing.assert_array_equal(completions(name, engine(name))[0], stored['greedy'])


SEARCHES = [
  pytest.param(n, i, marks=[] if (n, i) == ('mt5', 4) else [pytest.mark.full])
  for n in cases.CASES
  for i in range(len(cases.BEAMS))
]


@pytest.mark.parametrize(('name', 'setting'), SEARCHES)
def test_beam_search(name, setting):
  """The completions and scores of transformers' `generate` with every setting of cases.BEAMS."""
  stored, (count, penalty, early) = t5_models.golden(name), cases.BEAMS[setting]
  beams = Beams(count, penalty, str(early).lower())
  tokens, found = completions(name, engine(name, beams))
  np.testing.assert_array_equal(tokens, stored[f'beams/{setting}'], err_msg=str(beams))
  scores = [c.logprobs.sum() / len(c.tokens) ** penalty for c in found]
  np.testing.assert_allclose(scores, stored[f'scores/{setting}'], rtol=2e-5)
