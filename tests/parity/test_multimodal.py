"""The text part of models that also read images, against transformers: which tensors are read, the
logits of text, and what is written.
"""

import dataclasses
import json

import family_models
import jax
import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file

from ftjax.config import keys
from ftjax.experiment import adapters
from ftjax.families import multimodal, table
from ftjax.hf import export, load, peft, peft_config, peft_export, peft_weights
from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import DataError
from parity import family_cases as cases

TEXT = {'gemma3': 'gemma3', 'mistral3': 'ministral3', 'qwen3_5': 'qwen3_5'}
EVERY = pytest.mark.parametrize('name', sorted(multimodal.WRAPPERS.keys() & TEXT.keys()))
# transformers writes the first, and of Qwen3.5 the second; its modules are called as in the second.
OLD, NEW = 'language_model.model.', 'model.language_model.'
WRITTEN = {'gemma3': OLD, 'mistral3': OLD, 'qwen3_5': NEW}


def golden(name):
  with np.load(cases.FOLDER.parent / 'multimodal' / f'{name}.npz') as found:
    return dict(found)


def tensors(name):
  """{name in the files: values} of a golden model."""
  found = golden(name)
  return {
    n: cases.draw(cases.CASES[TEXT[name]], n, tuple(map(int, s.split())))
    for n, s in zip(found['names'].tolist(), found['shapes'], strict=True)
  }


def write(folder, config, content):
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'preprocessor_config.json').write_text('{}')
  save_file(content, folder / 'model.safetensors', metadata={'format': 'pt'})
  return folder


def config_of(name):
  return json.loads(str(golden(name)['config']))


def read(folder):
  arch = table.architecture(load.read_config(folder))
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  return arch, load.load_params(folder, arch, places, np.float32)


@EVERY
def test_logits_of_text_and_the_text_model_that_is_written(name, tmp_path):
  stored, content = golden(name), tensors(name)
  folder = write(tmp_path / 'source', config_of(name), content)
  arch, params = read(folder)
  assert arch == family_models.architecture(TEXT[name])
  ids = stored['ids']
  got = tiny_model.logits(arch, params, ids, tiny_model.tokens_at(np.ones_like(ids)))
  assert np.abs(got - stored['logits']).max() <= 1e-5 * np.abs(stored['logits']).max()
  config, files = load.read_config(folder), load.tokenizer_files(folder)
  export.export(
    params,
    arch,
    tmp_path / 'target',
    source_config=config,
    tokenizer_files=files,
    dtype=np.float32,
    stop_ids=(),
  )
  written = load_file(tmp_path / 'target' / 'model.safetensors')
  prefix = WRITTEN[name]
  expected = {n.replace(prefix, 'model.'): x for n, x in content.items() if n.startswith(prefix)}
  assert {n: x.tobytes() for n, x in written.items()} == {
    n: x.tobytes() for n, x in expected.items()
  }
  assert {p.name for p in (tmp_path / 'target').iterdir()} == {'config.json', 'model.safetensors'}
  plain = json.loads((tmp_path / 'target' / 'config.json').read_text())
  assert plain['model_type'] in multimodal.WRAPPERS[name].text_types and 'text_config' not in plain
  assert table.architecture(plain) == arch
  # The weights are the same, under whatever name.
  assert load.fingerprint(tmp_path / 'target') == load.fingerprint(folder)


def moved(content):
  """The names of the modules in transformers, which other programs write."""

  def name(n):
    return n.replace(OLD, NEW) if n.startswith(OLD) else f'model.{n}'

  return {name(n): x for n, x in content.items()}


@pytest.mark.parametrize('name', [n for n, prefix in WRITTEN.items() if prefix == OLD])
def test_the_other_spelling(name, tmp_path):
  one = write(tmp_path / 'one', config_of(name), tensors(name))
  other = write(tmp_path / 'other', config_of(name), moved(tensors(name)))
  assert load.open_source(one).tensors == load.open_source(other).tensors
  load.check_tensors(load.open_source(other), table.architecture(load.read_config(other)))
  assert load.fingerprint(one) == load.fingerprint(other)


def test_the_head_of_further_tokens_is_left_out(tmp_path):
  """Of Qwen3.5's folders, multimodal or not; other heads are an error."""
  more = {'mtp.fc.weight': np.zeros((2, 3), np.float32)}
  whole = write(tmp_path / 'whole', config_of('qwen3_5'), tensors('qwen3_5') | more)
  arch, _ = read(whole)
  text = {n.replace(NEW, 'model.'): x for n, x in tensors('qwen3_5').items() if NEW in n}
  config = family_models.config('qwen3_5')
  assert read(write(tmp_path / 'text', config, text | more))[0] == arch
  folder = write(tmp_path / 'other', config, text | {'mtp2.fc.weight': more['mtp.fc.weight']})
  with pytest.raises(DataError, match=r'no parameter takes mtp2\.fc\.weight'):
    read(folder)


@pytest.mark.parametrize('name', ['audio_tower.layers.0.weight', 'model.projector.weight'])
def test_what_no_list_names_is_an_error(name, tmp_path):
  content = tensors('gemma3') | {name: np.zeros(3, np.float32)}
  folder = write(tmp_path / 'source', config_of('gemma3'), content)
  with pytest.raises(DataError, match=f'no parameter takes {name}'):
    load.check_tensors(load.open_source(folder), family_models.architecture('gemma3'))


def test_a_tensor_under_both_spellings_is_an_error(tmp_path):
  content = tensors('gemma3')
  again = {n.replace(OLD, NEW): x for n, x in content.items() if n.startswith(f'{OLD}norm')}
  folder = write(tmp_path / 'source', config_of('gemma3'), content | again)
  with pytest.raises(DataError, match=r'language_model.* are both model\.norm\.weight'):
    load.open_source(folder)


@pytest.mark.parametrize(
  ('inner', 'outer', 'head', 'tied'),
  [
    (False, True, False, True),  # as transformers 5 writes Mistral 3's, by its classes' defaults
    (False, True, True, False),
    (True, False, True, False),
    (None, None, True, False),  # the first Mistral 3 states neither
    (None, None, False, True),
    (False, False, False, False),
    (True, True, True, True),
  ],
)
def test_whether_the_head_is_the_embedding(inner, outer, head, tied, tmp_path):
  config, content = config_of('mistral3'), tensors('mistral3')
  for place, value in ((config['text_config'], inner), (config, outer)):
    place.pop('tie_word_embeddings', None)
    place.update({} if value is None else {'tie_word_embeddings': value})
  if head:
    content['language_model.lm_head.weight'] = content[f'{OLD}embed_tokens.weight'] + 1
  folder = write(tmp_path / 'source', config, content)
  assert table.architecture(load.read_config(folder)).tied == tied
  assert ('lm_head.weight' in load.open_source(folder).tensors) == head


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'text_config': None}, 'no text_config'),
    ({'text_config': []}, 'text_config=.*expected an object'),
    ({'text_config': {'model_type': 'llama'}}, "model_type='llama'.*supported: gemma3_text"),
    ({'residual_factor': 2.0}, 'residual_factor=2.0'),
    ({'audio_config': {'hidden_size': 3}}, 'audio_config'),
    ({'quantization_config': {'quant_method': 'fp8'}}, 'quantized'),
    ({'tie_word_embeddings': 'no'}, 'tie_word_embeddings'),
  ],
)
def test_a_config_that_is_refused(changes, message, tmp_path):
  folder = write(tmp_path / 'source', config_of('gemma3') | changes, tensors('gemma3'))
  with pytest.raises(DataError, match=message):
    table.architecture(load.read_config(folder))


def test_labels_and_token_ids_beside_the_text_part_count(tmp_path):
  """And those of the text part before them."""
  config = config_of('gemma3') | {
    'architectures': ['Gemma3ForSequenceClassification'],
    'id2label': {'0': 'reward'},
    'eos_token_id': [1, 106],
    'bos_token_id': 5,
  }
  del config['text_config']['eos_token_id']
  folder = write(tmp_path / 'source', config, tensors('gemma3'))
  found = load.read_config(folder)
  assert table.architecture(found).num_labels == 1
  assert found['eos_token_id'] == [1, 106] and found['bos_token_id'] == 1


def adapter(folder, base, targets='all-linear'):
  """Writes a random adapter of a base as a PEFT folder; returns (architecture, its leaves)."""
  arch, params = read(base)
  c = keys.default()
  c.lora.update({'rank': 3, 'alpha': 5.0, 'base': 'float32', 'targets': targets})
  arch, rng = adapters.adapted(arch, c), np.random.default_rng(0)
  new = {
    n: rng.standard_normal(p.shape).astype(np.float32)
    for n, p in kinds.declared(arch).items()
    if p.origin == 'adapter'
  }
  peft_export.export(
    trees.unflatten(trees.flatten(params) | {n: jax.numpy.asarray(x) for n, x in new.items()}),
    arch,
    folder,
    base=str(base),
    sha256='',
    modules=load.module_prefix(base),
    source_config=load.read_config(base),
    tokenizer_files={},
    stop_ids=(),
  )
  return arch, new


def leaves(folder, arch):
  found = peft.read(folder)
  model = found.architecture(arch.plain())
  places = trees.flatten(sharding.shardings(jax.sharding.get_mesh(), kinds.axes(model)))
  return model, {
    n: np.asarray(x) for n, x in peft_weights.load_adapter(found, model, places, {}).items()
  }


@EVERY
def test_an_adapter_has_the_names_of_the_class_of_its_base(name, tmp_path):
  base = write(tmp_path / 'base', config_of(name), tensors(name))
  arch, new = adapter(tmp_path / 'adapter', base)
  config = json.loads((tmp_path / 'adapter' / peft_config.CONFIG_FILE).read_text())
  assert sorted(config['target_modules']) == sorted(golden(name)['linear'].tolist())
  stored = load_file(tmp_path / 'adapter' / peft_config.WEIGHTS_FILE)
  modules = [n.removeprefix('base_model.model.').partition('.lora_')[0] for n in stored]
  assert sorted({*modules}) == sorted(config['target_modules'])
  model, found = leaves(tmp_path / 'adapter', arch)
  assert dataclasses.replace(model, base=arch.base) == arch
  assert found.keys() == new.keys() and all((found[n] == x).all() for n, x in new.items())


@pytest.mark.parametrize(
  ('modules', 'targets'),
  [
    ('language_model.model.', ['q_proj', 'k_proj']),  # of transformers before 4.52
    ('model.language_model.', r'.*language_model.*\.(q_proj|k_proj)'),
    ('model.', ['q_proj', 'k_proj']),
  ],
)
def test_an_adapter_of_other_programs_is_read(modules, targets, tmp_path):
  base = write(tmp_path / 'base', config_of('gemma3'), tensors('gemma3'))
  arch, new = adapter(tmp_path / 'adapter', base, '.*attn/[qk]')
  file, settings = (
    tmp_path / 'adapter' / n for n in (peft_config.WEIGHTS_FILE, 'adapter_config.json')
  )
  stored = {n.replace(NEW, modules): x for n, x in load_file(file).items()}
  save_file(stored, file)
  config = json.loads(settings.read_text()) | {'target_modules': targets}
  settings.write_text(json.dumps(config))
  model, found = leaves(tmp_path / 'adapter', arch)
  assert dataclasses.replace(model, base=arch.base) == arch
  assert all((found[n] == x).all() for n, x in new.items())
  vision = {'base_model.model.model.vision_tower.fc.lora_A.weight': np.zeros((3, 4), np.float32)}
  save_file(stored | vision, file)
  with pytest.raises(DataError, match=r'nothing reads .*vision_tower'):
    leaves(tmp_path / 'adapter', arch)


def test_an_adapter_with_both_spellings_is_an_error(tmp_path):
  base = write(tmp_path / 'base', config_of('gemma3'), tensors('gemma3'))
  adapter(tmp_path / 'adapter', base)
  file = tmp_path / 'adapter' / peft_config.WEIGHTS_FILE
  stored = load_file(file)
  save_file(stored | {n.replace(NEW, 'model.'): x for n, x in stored.items()}, file)
  with pytest.raises(DataError, match='under two names'):
    peft.read(tmp_path / 'adapter')
