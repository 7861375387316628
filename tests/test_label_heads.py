"""Label heads of encoders and decoders against transformers, on the small models of
parity/family_cases.py, and from one head to another: what is kept, what is drawn, what is refused.
"""

import functools
import json
import logging

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_adapters
import tiny_model
from parity import family_cases as cases
from safetensors.numpy import load_file

from ftjax.experiment import weights
from ftjax.families import table, tensor_map
from ftjax.hf import export, label_files, layout, load
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError, DataError

EVERY = pytest.mark.parametrize('name', cases.LABELED)
EVERY_DAY = ('bert_sequence', 'modernbert_sequence', 'llama_token')
SOME = family_models.parametrize(EVERY_DAY, tuple(cases.LABELED))
ROWS = cases.ROWS


def model(name):
  """(architecture, parameters) of a case."""
  arch = family_models.architecture(name)
  return arch, family_models.params(name, arch)


def logits(arch, params, batch):
  """float32[B, R] of the first segment of a row, or float32[B, T, R]."""
  forward = Forward(arch, jnp.float32)
  if arch.task == 'sequence':
    return forward.sequence_logits(params, batch, 1)[0]
  return forward.label_logits(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(arch, params, batch, factors):
  def total(params):
    found = logits(arch, params, batch)
    return (found * factors).sum(), found

  return jax.value_and_grad(total, has_aux=True)(params)


@SOME
def test_logits_and_gradients_are_those_of_transformers(name):
  arch, stored = family_models.architecture(name), family_models.golden(name)
  batch = family_models.of_case(name, cases.ids(cases.LABELED[name]))
  np.testing.assert_array_equal(batch['tokens'], stored['ids'])
  expected = stored['logits']
  factors = tiny_model.place(
    cases.factors(expected.shape), *('batch', 'seq')[: expected.ndim - 1], None
  )
  (loss, found), gradient = loss_and_gradient(arch, model(name)[1], batch, factors)
  assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()
  assert float(loss) == pytest.approx(float(stored['loss']), rel=1e-4, abs=1e-4)
  leaves = {n: np.asarray(g) for n, g in trees.flatten(gradient).items()}
  for hf, parts in layout.by_tensor(arch).items():
    got = tensor_map.whole_tensor([(b, leaves[b.leaf][b.at]) for b in parts])
    wanted = stored[f'gradient/{hf}']
    limit = (
      1e-4 if {b.leaf for b in parts} <= family_models.idle(arch) else 2e-5 * np.abs(wanted).max()
    )
    assert np.abs(got - wanted).max() <= limit, hf


@EVERY
def test_the_bindings_name_every_tensor_of_the_file(name):
  arch = family_models.architecture(name)
  assert {b.hf: b.hf_shape for b in layout.bindings(arch)} == family_models.shapes(name)
  assert table.architecture(json.loads(json.dumps(table.config(arch)))) == arch
  case = cases.LABELED[name]
  assert arch.task == case.head and arch.num_labels == (2 if case.head == 'span' else 3)
  assert arch.labels == (() if case.head == 'span' else ('neutral', 'up', 'down'))


@pytest.mark.parametrize('name', ['bert_sequence', 'modernbert_sequence', 'llama_sequence'])
def test_sequences_of_a_packed_row_have_the_logits_of_each_alone(name):
  """Three in one row and padding, in the other row one; no leak, bit for bit."""
  arch, params = model(name)
  tokens, segments, lengths = packed(name)
  run = jax.jit(lambda batch: Forward(arch, jnp.float32).sequence_logits(params, batch, 3))
  together = [np.asarray(x) for x in run(family_models.batch(tokens, segments))]
  for d, length in enumerate(lengths):
    start = sum(lengths[:d])
    alone, inside = np.zeros_like(tokens), np.zeros_like(tokens)
    inside[1, -length:], alone[1, -length:] = 1, tokens[0, start : start + length]
    got = np.asarray(run(family_models.batch(alone, inside))[0])
    np.testing.assert_allclose(together[d][0], got[1], atol=1e-5)
    assert not got[0].any()  # a row without the segment
    changed = np.where(segments == d + 1, (tokens + 1) % 67, tokens)
    changed[1] = tokens[1]
    after = [np.asarray(x) for x in run(family_models.batch(changed, segments))]
    for other in range(3):
      same = np.array_equal(after[other][0], together[other][0])
      assert same == (other != d), (d, other)
  assert not together[1][1].any() and not together[2][1].any()


def packed(name):
  tokens = tiny_model.ids(ROWS, 48, 1, 67)
  lengths = (25, 5, 12)
  segments = np.ones_like(tokens)
  segments[0] = np.repeat([1, 2, 3, 0], [*lengths, 6])
  return tokens, segments, lengths


@SOME
def test_export_after_import_is_the_identity(name, tmp_path):
  written = write(name, tmp_path / 'source')
  config = load.read_config(tmp_path / 'source')
  arch = table.architecture(config)
  params = weights.load(str(tmp_path / 'source'), arch, jax.sharding.get_mesh(), 'float32', 0, '')
  export_to(tmp_path / 'target', params, arch, config)
  found = load_file(tmp_path / 'target' / 'model.safetensors')
  assert {n: x.tobytes() for n, x in found.items()} == written
  kept = json.loads((tmp_path / 'target' / 'config.json').read_text())
  assert kept.get('id2label') == config.get('id2label')
  assert kept['architectures'] == config['architectures']


def write(name, folder):
  return family_models.write_folder(name, folder)


def export_to(folder, params, arch, config):
  how = dict(tokenizer_files={}, dtype=np.float32, stop_ids=())
  export.export(params, arch, folder, source_config=config, **how)


# From one head to another.


def relabeled(config, task, names):
  family = table.find(config)
  labels = label_files.Labels(task, names)
  return label_files.describe(family, {}, config, None, (), labels)[1]


def test_a_base_gets_a_new_head_from_the_seed_and_keeps_its_pooler(tmp_path, caplog):
  """From a masked language model, as BertForPreTraining holds its tensors, with old names of
  norms, and from a folder of BertModel, whose names have no prefix.
  """
  config = family_models.config('bert_sequence')
  held = {
    n: family_models.tensor('bert_sequence', n, s)
    for n, s in family_models.shapes('bert_sequence').items()
  }
  arch = table.architecture(config)
  base = {n: x for n, x in held.items() if not n.startswith('classifier')}
  old = {
    n.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): x
    for n, x in base.items()
  }
  more = {
    'cls.predictions.bias': np.zeros(67, np.float32),
    'cls.seq_relationship.bias': np.zeros(2, np.float32),
  }
  bare = {n.removeprefix('bert.'): x for n, x in base.items()}
  forms = {'BertForPreTraining': old | more, 'BertModel': bare}
  caplog.set_level(logging.INFO)
  for kind, tensors in forms.items():
    folder = tmp_path / kind
    raw_folder(folder, config | {'architectures': [kind], 'id2label': None}, tensors)
    found, again, other = (load_leaves(folder, arch, seed) for seed in (5, 5, 6))
    for n, x in leaves_of('bert_sequence').items():
      if n not in ('score/w', 'score/b'):
        np.testing.assert_array_equal(found[n], x, err_msg=n)
    np.testing.assert_array_equal(found['score/w'], again['score/w'])
    assert (found['score/w'] != other['score/w']).all() and not found['score/b'].any()
    assert 0.01 < found['score/w'].std() < 0.03
    assert f'{folder} has no head of this task: classifier.weight, classifier.bias' in caplog.text


def raw_folder(folder, config, tensors):
  from safetensors.numpy import save_file

  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  save_file(tensors, folder / 'model.safetensors')


def load_leaves(folder, arch, seed):
  found = weights.load(str(folder), arch, jax.sharding.get_mesh(), 'float32', seed, '')
  return tiny_model.host(found)


def leaves_of(name):
  return family_models.host_params(name, family_models.architecture(name))


@pytest.mark.parametrize('name', ['bert_sequence', 'llama_sequence'])
def test_other_labels_are_drawn_and_the_same_are_kept(name, tmp_path):
  write(name, tmp_path / 'source')
  config = load.read_config(tmp_path / 'source')
  stored = leaves_of(name)
  same = load_leaves(tmp_path / 'source', table.architecture(config), 0)
  np.testing.assert_array_equal(same['score/w'], stored['score/w'])
  other = config | {'id2label': {'0': 'a', '1': 'b', '2': 'c'}}
  drawn = load_leaves(tmp_path / 'source', table.architecture(other), 0)
  assert (drawn['score/w'] != stored['score/w']).all()
  fewer = config | {'id2label': {'0': 'a', '1': 'b'}}
  drawn = load_leaves(tmp_path / 'source', table.architecture(fewer), 0)
  assert drawn['score/w'].shape == (2, 24)
  np.testing.assert_array_equal(drawn['embed/w'], stored['embed/w'])


def test_a_head_that_the_config_promises_and_the_file_lacks_is_an_error(tmp_path):
  config = family_models.config('bert_token')
  held = {
    n: family_models.tensor('bert_token', n, s)
    for n, s in family_models.shapes('bert_token').items()
  }
  raw_folder(tmp_path / 'cut', config, {n: x for n, x in held.items() if n != 'classifier.bias'})
  with pytest.raises(DataError, match=r'missing classifier\.bias'):
    load_leaves(tmp_path / 'cut', table.architecture(config), 0)


REFUSED = {
  'gap': ({'id2label': {'0': 'a', '2': 'b'}}, 'id2label'),
  'no numbers': ({'id2label': {'x': 'a'}}, 'id2label'),
  'another count': ({'id2label': {'0': 'a'}, 'num_labels': 2}, 'num_labels=2 and id2label has 1'),
  'decoder': ({'is_decoder': True}, 'is_decoder=True'),
  'positions': ({'position_embedding_type': 'relative_key'}, 'position_embedding_type'),
  'heads': ({'num_attention_heads': 5}, 'hidden_size=24 is no multiple of num_attention_heads=5'),
  'activation': ({'hidden_act': 'mish'}, "hidden_act='mish'"),
  'key': ({'embedding_size': 12}, 'embedding_size=12'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_refused(case):
  changes, message = REFUSED[case]
  with pytest.raises(DataError, match=message):
    table.architecture(family_models.config('bert_token') | changes)


def test_a_family_without_the_class_is_refused():
  config = family_models.config('gemma3')
  with pytest.raises(ConfigError, match='takes no labels of a token'):
    relabeled(config, 'token', ('a', 'b'))


def test_new_labels_are_in_the_config():
  config = family_models.config('modernbert')
  found = relabeled(config, 'token', ('O', 'B-PER', 'I-PER'))
  assert found['architectures'] == ['ModernBertForTokenClassification']
  assert found['label2id'] == {'O': 0, 'B-PER': 1, 'I-PER': 2}
  arch = table.architecture(found)
  assert arch.task == 'token' and arch.labels == ('O', 'B-PER', 'I-PER')
  assert arch.without_head() == table.architecture(config).without_head()


def test_no_text_is_generated_by_an_encoder():
  arch = family_models.architecture('bert')
  with pytest.raises(ConfigError, match='generates no text: its tokens attend to later ones'):
    kinds.decode(arch, {}, None, None, None, None, dtype=jnp.float32)


def test_dropout_of_the_head_is_of_training_alone():
  """Another one for each row and each key; the mean of many is the logits without it."""
  name = 'bert_sequence'
  arch, params = model(name)
  batch = family_models.of_case(name, cases.ids(cases.LABELED[name]))
  forward = Forward(arch, jnp.float32, label_dropout=0.4)

  def run(forward):
    return np.asarray(forward.sequence_logits(params, batch, 1)[0])

  plain = run(forward)
  keys = jax.random.split(jax.random.key(0), ROWS)
  keys = jax.sharding.reshard(keys, sharding.spec('batch'))
  first = run(forward.with_dropout(keys))
  np.testing.assert_array_equal(first, run(forward.with_dropout(keys)))
  assert (first != plain).all()
  assert forward.untrained().label_keys is None


@pytest.mark.parametrize('name', ['llama_token', 'bert_sequence'])
def test_under_an_adapter_the_head_is_trained_whole_and_merges(name, tmp_path):
  """All leaves of the head are the adapter's; five steps, merged, exported and read again."""
  arch = tiny_adapters.adapted(family_models.architecture(name))
  begun = tiny_adapters.begin(arch, family_models.params(name, arch.plain()))
  declared = kinds.declared(arch)
  own = {n for n in declared if n.startswith('score/')}
  assert own and all(declared[n].origin == 'adapter' for n in own)
  assert not any(m.name.startswith('score') for m in arch.adapter.maps)
  batch = family_models.of_case(name, cases.ids(cases.LABELED[name]))
  trained = [n for n in kinds.names(arch, 'adapter') if not declared[n].is_fixed]

  @jax.jit
  def step(flat, rest):
    def loss(flat):
      return jnp.square(logits(arch, trees.unflatten(rest | flat), batch) - 1).mean()

    value, found = jax.value_and_grad(loss)(flat)
    return value, {n: x - 0.1 * found[n] for n, x in flat.items()}

  flat, rest, losses = {n: begun[n] for n in trained}, begun, []
  for _ in range(5):
    loss, flat = step(flat, rest)
    losses.append(float(loss))
  assert losses[-1] < losses[0]
  params = trees.unflatten(rest | flat)
  expected = np.asarray(jax.jit(logits, static_argnums=0)(arch, params, batch))
  config = family_models.config(name)
  export_to(tmp_path / 'merged', params, kinds.with_merged(arch, 'float32'), config)
  plain = table.architecture(load.read_config(tmp_path / 'merged'))
  read = weights.load(str(tmp_path / 'merged'), plain, jax.sharding.get_mesh(), 'float32', 0, '')
  got = np.asarray(jax.jit(logits, static_argnums=0)(plain, read, batch))
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
