"""Tokens that a run adds to a model: files, ids, and the rows that they start with."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_model import TINY, write_folder
from tiny_tokenizer import tiny_files

from ftjax import cli, convert
from ftjax.config import keys, section, validation
from ftjax.data import encode, new_tokens, synthetic
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import fit, resume, saved_model
from ftjax.experiment import run as experiment
from ftjax.families import table
from ftjax.hf import export, load
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.runtime import sharding, transformers_library, trees
from ftjax.runtime.errors import ConfigError, DataError

PLAIN, SPECIAL = ('<tool>', 'naïve🙂'), ('<|call|>', '<|end of turn|>')
TEXT = 'a <tool> b<|call|><tool><tool> naïve🙂x<|end of turn|>\n<|im_end|>'


def byte_files(**more):
  return synthetic.byte_tokenizer() | {n: json.dumps(x).encode() for n, x in more.items()}


# Files.


@pytest.mark.parametrize('make', [tiny_files, synthetic.byte_tokenizer])
def test_new_tokens_have_the_next_ids_and_are_read_as_they_are_written(make):
  files = make()
  old = Tokenizer(files)
  changed, new = new_tokens.extend(files, PLAIN, SPECIAL, 'x')
  first = old.vocab_size
  assert [new.find(t) for t in (*PLAIN, *SPECIAL)] == [first, first + 1, first + 2, first + 3]
  assert new.vocab_size == first + 4
  ids = new.encode(TEXT)
  assert [i - first for i in ids if i >= first] == [0, 2, 0, 0, 1, 3]
  assert new.decode(ids, skip_special=False) == TEXT
  assert new.decode(ids) == 'a <tool> b<tool><tool> naïve🙂x\n'
  assert new.special_ids == old.special_ids | {first + 2, first + 3}
  for text in ('plain text', 'über <x> 7\n'):
    assert new.encode(text) == old.encode(text)
  assert {n for n in files if files[n] != changed[n]} == {'tokenizer.json', 'tokenizer_config.json'}


def test_the_files_that_list_tokens_list_the_new_ones():
  config = {'eos_token': '<|im_end|>', 'added_tokens_decoder': {'0': {'content': '<|endoftext|>'}}}
  files = byte_files(
    **{
      'tokenizer_config.json': config | {'extra_special_tokens': ['<|im_start|>']},
      'added_tokens.json': {'<|im_end|>': 2},
      'special_tokens_map.json': {'additional_special_tokens': ['<|im_start|>']},
      'generation_config.json': {'eos_token_id': 2},
    }
  )
  changed, _ = new_tokens.extend(files, PLAIN[:1], SPECIAL[:1], 'x')
  read = {n: json.loads(x) for n, x in changed.items()}
  assert read['added_tokens.json'] == {'<|im_end|>': 2, '<tool>': 259, '<|call|>': 260}
  assert read['special_tokens_map.json']['additional_special_tokens'][1:] == ['<|call|>']
  assert read['tokenizer_config.json']['extra_special_tokens'] == ['<|im_start|>', '<|call|>']
  listed = read['tokenizer_config.json']['added_tokens_decoder']
  assert list(listed) == ['0', '259', '260'] and listed['260']['special']
  assert changed['generation_config.json'] == files['generation_config.json']
  # No special token: no list of them is made or changed.
  plain, _ = new_tokens.extend(files, PLAIN[:1], (), 'x')
  assert plain['special_tokens_map.json'] == files['special_tokens_map.json']


def test_transformers_reads_the_same_tokens(tmp_path):
  files, ours = new_tokens.extend(tiny_files(), PLAIN, SPECIAL, 'x')
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  theirs = transformers_library.load('AutoTokenizer').AutoTokenizer.from_pretrained(tmp_path)
  ids = theirs.encode(TEXT, add_special_tokens=False)
  assert ids == ours.encode(TEXT) and len(theirs) == ours.vocab_size
  assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
  assert set(SPECIAL) <= set(theirs.all_special_tokens)


def gaps():
  model = json.loads(synthetic.byte_tokenizer()['tokenizer.json'])
  model['model']['vocab'] = {
    t: i + (5 if i > 100 else 0) for t, i in model['model']['vocab'].items()
  }
  return {'tokenizer.json': json.dumps(model).encode()}


@pytest.mark.parametrize(
  ('files', 'texts', 'error', 'message'),
  [
    ({}, ('<|im_end|>',), ConfigError, r"add_tokens: '<\|im_end\|>' is a token of x already, id 2"),
    ({}, ('a',), ConfigError, "'a' is a token of x already"),
    (None, ('<new>',), DataError, 'x: tokens can only be added to a tokenizer.json'),
    (gaps(), ('<new>',), DataError, "reads the new token '<new>' as ids .*vocabulary has gaps"),
  ],
)
def test_what_cannot_be_added_is_refused(files, texts, error, message):
  files = {'vocab.json': b'{}'} if files is None else synthetic.byte_tokenizer() | files
  with pytest.raises(error, match=message):
    new_tokens.extend(files, texts, (), 'x')


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'add_tokens': ('',)}, "model.add_tokens: '' is no token"),
    ({'add_tokens': (7,)}, 'model.add_tokens: 7 is no token'),
    ({'add_tokens': ('<a>', '<a>')}, "'<a>' is in model.add_tokens already"),
    (
      {'add_tokens': ('<a>',), 'add_special_tokens': ('<a>',)},
      "model.add_special_tokens: '<a>' is in model.add_tokens already",
    ),
    ({'init_tokens': (('<a>', 'x'),)}, "'<a>' is in neither list of new tokens"),
    ({'add_tokens': ('<a>',), 'init_tokens': ('<a>',)}, "'<a>' is not a pair"),
    ({'add_tokens': ('<a>',), 'init_tokens': (('<a>', ''),)}, 'is not a pair'),
    (
      {'add_tokens': ('<a>',), 'init_tokens': (('<a>', 'x'), ('<a>', 'y'))},
      "'<a>' is there twice",
    ),
    ({'vocab_multiple': 0}, 'model.vocab_multiple=0; expected at least 1'),
    ({'add_tokens': ('<a>',), 'rank': 4}, 'model.add_tokens with lora.rank=4: an adapter belongs'),
  ],
)
def test_mistakes_in_the_keys_are_named(values, message):
  c = keys.default()
  c.model.path, c.data.train = 'somewhere', 'sums:20'
  c.lora.rank = values.get('rank', 0)
  c.model.update({k: v for k, v in values.items() if k != 'rank'})
  with pytest.raises(ConfigError, match=message):
    validation.validate(c)


# Rows.

ARCH = dataclasses.replace(TINY, vocab_size=synthetic.VOCAB_SIZE, tied=False, max_len=512)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp('model') / 'base', ARCH)


def tiny(folder, **values):
  c = keys.default()
  c.steps, c.batch_size, c.seq_len, c.compile_cache = 2, 4, 64, False
  c.model.path, c.data.train, c.data.workers = str(folder), 'sums:20', 1
  c.model.add_tokens, c.model.add_special_tokens = PLAIN, SPECIAL[:1]
  c.model.init_tokens = (('<tool>', 'call'),)
  c.mesh.fsdp, c.mesh.data = 1, -1
  c.batch_size = c.eval.batch_size = 8
  c.update_from_flattened_dict(values)
  validation.validate(c)
  return c


def tables(params):
  return {n: np.asarray(params[n]['w']) for n in ('embed', 'head') if n in params}


def test_rows_start_as_the_mean_of_all_or_of_the_named_ones(folder, tmp_path):
  run = experiment.start(tiny(folder), str(tmp_path), with_data=False)
  stored, found = SafetensorsFolder(folder), tables(run.load_first())
  assert run.arch.vocab_size == run.model.config['vocab_size'] == 262
  names = {'embed': 'model.embed_tokens.weight', 'head': 'lm_head.weight'}
  called = Tokenizer(synthetic.byte_tokenizer()).encode('call')
  for name, value in found.items():
    old = stored.read(names[name])
    assert value.shape == (262, 32)
    np.testing.assert_array_equal(value[:259], old)
    mean = old.astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(value[260], mean)
    np.testing.assert_array_equal(value[261], mean)
    named = old[called].astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(value[259], named)


def test_rows_are_the_same_on_a_mesh_with_padding(folder, tmp_path):
  alone = experiment.start(tiny(folder), str(tmp_path / 'a'), with_data=False)
  expected = tables(alone.load_first())
  sizes = {'mesh.tensor': 2, 'mesh.fsdp': 2, 'model.vocab_multiple': 8}
  run = experiment.start(tiny(folder, **sizes), str(tmp_path / 'b'), with_data=False)
  for name, value in tables(run.load_first()).items():
    assert value.shape == (264, 32) and not value[262:].any()
    np.testing.assert_array_equal(value[:262], expected[name])
  assert run.model.fingerprint == alone.model.fingerprint


def test_unused_rows_of_a_file_are_used_first(tmp_path):
  """Qwen2's tables have rows that no token of its tokenizer has: the size stays."""
  path = write_folder(tmp_path / 'base', dataclasses.replace(ARCH, vocab_size=300))
  run = experiment.start(tiny(path), str(tmp_path / 'run'), with_data=False)
  assert run.arch.vocab_size == 300 and run.model.config == load.read_config(path)
  old = SafetensorsFolder(path).read('lm_head.weight')
  new = tables(run.load_first())['head']
  np.testing.assert_array_equal(
    np.delete(new, [259, 260, 261], 0), np.delete(old, [259, 260, 261], 0)
  )
  mean = old[:259].astype(np.float64).mean(0).astype(np.float32)
  np.testing.assert_array_equal(new[260], mean)


def test_without_new_tokens_a_file_keeps_its_unused_rows(tmp_path):
  path = write_folder(tmp_path / 'base', dataclasses.replace(ARCH, vocab_size=300))
  none = {'model.add_tokens': (), 'model.add_special_tokens': (), 'model.init_tokens': ()}
  run = experiment.start(tiny(path, **none), str(tmp_path / 'run'), with_data=False)
  assert run.arch.vocab_size == 300 and run.model.new_rows is None
  assert run.model.files == load.tokenizer_files(path)


@pytest.mark.parametrize('algorithm', ['dpo', 'reward_model'])
def test_other_models_of_a_run_have_the_rows_too(folder, tmp_path, algorithm):
  rows = {'algorithm': algorithm, 'data.train': 'pairs:20'}
  run = experiment.start(tiny(folder, **rows), str(tmp_path), with_data=False)
  first = tables(run.load_first())
  assert first['embed'].shape == (262, 32) and ('head' in first) == (algorithm == 'dpo')
  for other in run.auxiliary:
    found = tables(run.load_auxiliary(other))
    assert found.keys() == first.keys()
    for name, value in found.items():
      np.testing.assert_array_equal(value, first[name])


def write_export(run, workdir, change):
  """The export of a run as if it had trained: every parameter times `change`."""
  export.export(
    jax.tree.map(lambda x: x * change, run.load_first()),
    run.arch,
    Path(workdir) / 'export',
    source_config=run.model.config,
    tokenizer_files=run.model.files,
    dtype=np.float32,
    stop_ids=run.model.stop_ids,
  )


def test_a_run_that_begins_from_another_keeps_its_rows(folder, tmp_path):
  old = experiment.start(tiny(folder), str(tmp_path / 'old'), with_data=False)
  write_export(old, tmp_path / 'old', 2)
  written = load.read_config(tmp_path / 'old' / 'export')
  assert written == load.read_config(folder) | {'vocab_size': 262}

  def begin(name, **values):
    c = tiny(folder, init_from=str(tmp_path / 'old'), **values)
    return experiment.start(c, str(tmp_path / name), with_data=False)

  found, before = tables(begin('new').load_first()), tables(old.load_first())
  for name, value in found.items():
    np.testing.assert_array_equal(value, 2 * before[name])
  none = {'model.add_tokens': (), 'model.add_special_tokens': (), 'model.init_tokens': ()}
  with pytest.raises(ConfigError, match=r'vocabulary of 262, model\.path one of 259: give its'):
    begin('none', **none).load_first()
  fewer = {'model.add_tokens': PLAIN[:1]}
  with pytest.raises(ConfigError, match=r'has 262 tokens, of the new ones .* expected none'):
    begin('fewer', **fewer).load_first()
  # And one that begins from a run without the tokens adds them.
  plain = experiment.start(tiny(folder, **none), str(tmp_path / 'plain'), with_data=False)
  write_export(plain, tmp_path / 'old', 3)
  grown = tables(begin('grown').load_first())['embed']
  np.testing.assert_array_equal(grown[:259], 3 * before['embed'][:259])
  np.testing.assert_allclose(grown[260], 3 * before['embed'][260], rtol=1e-5)


def test_a_resume_with_other_tokens_is_refused(folder, tmp_path):
  run = experiment.start(tiny(folder), str(tmp_path), with_data=False)
  now = section.plain(run.config)
  saved = {'config': dict(now), 'step': 1, 'fingerprints': {}}
  resume.check(saved, run, {})
  for key, value in (
    ('model.add_tokens', ['<tool>']),
    ('model.add_special_tokens', []),
    ('model.init_tokens', []),
    ('model.vocab_multiple', 8),
  ):
    with pytest.raises(ConfigError, match=f'these changed: {key}'):
      resume.check(saved | {'config': now | {key: value}}, run, {})
  # A checkpoint that was written before the keys existed.
  none = {'model.add_tokens': (), 'model.add_special_tokens': (), 'model.init_tokens': ()}
  plain = experiment.start(tiny(folder, **none), str(tmp_path), with_data=False)
  kept = {k: v for k, v in section.plain(plain.config).items() if k not in none}
  resume.check(saved | {'config': kept}, plain, {})


# Chat templates.

TEMPLATE = (
  "{% for m in messages %}<|call|>{{ m['role'] }}: {{ m['content'] }}<|end of turn|>{% endfor %}"
  '{% if add_generation_prompt %}<|call|>assistant:{% endif %}'
)


def test_a_chat_template_of_the_config_is_used_and_exported(folder, tmp_path):
  """With new tokens in it: the one that ends a turn is a stop token of the export."""
  (tmp_path / 'own.jinja').write_text(TEMPLATE)
  values = {'data.chat_template': str(tmp_path / 'own.jinja'), 'model.add_special_tokens': SPECIAL}
  run = experiment.start(tiny(folder, **values), str(tmp_path / 'run'), with_data=False)
  write_export(run, tmp_path / 'run', 1)
  out = tmp_path / 'run' / 'export'
  assert (out / 'chat_template.jinja').read_text() == TEMPLATE
  assert 'chat_template' not in json.loads((out / 'tokenizer_config.json').read_text())
  found = Tokenizer(load.tokenizer_files(out), 'export')
  assert found.template == TEMPLATE and encode.turn_end(found) == found.find('<|end of turn|>')
  stops = json.loads((out / 'generation_config.json').read_text())['eos_token_id']
  assert stops == [2, found.find('<|end of turn|>')]


@pytest.mark.parametrize(
  ('content', 'message'),
  [(None, 'No such file'), (b'\xff', 'not UTF-8 at byte 0'), (b' \n', 'the file is empty')],
)
def test_a_chat_template_that_cannot_be_read_is_named(folder, tmp_path, content, message):
  path = tmp_path / 'own.jinja'
  if content is not None:
    path.write_bytes(content)
  c = tiny(folder, **{'data.chat_template': str(path)})
  with pytest.raises(DataError, match=f'data.chat_template={path}: {message}'):
    experiment.start(c, str(tmp_path / 'run'), with_data=False)


# Whole runs.


@pytest.mark.full
@pytest.mark.parametrize('algorithm', ['sft', 'dpo', 'reward_model', 'grpo'])
def test_a_run_its_checkpoint_and_its_export_have_one_vocabulary(folder, tmp_path, algorithm):
  values = {'algorithm': algorithm, 'checkpoint.every': 1, 'model.vocab_multiple': 16}
  values |= {'mesh.tensor': 2, 'optim.weight_decay': 0.1, 'optim.lr': 1e-3}
  if algorithm in ('dpo', 'reward_model'):
    values |= {'data.train': 'pairs:20', 'seq_len': 128}
  if algorithm == 'grpo':
    values |= {'rollout.max_tokens': 8, 'rollout.group': 2, 'rollout.rewards': 'length:target=4'}
  c = tiny(folder, **values)
  workdir = tmp_path / 'run'
  fit.fit(c, str(workdir), cli.algorithm(algorithm).build)
  jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1]))
  convert.convert(f'{workdir}@2', str(tmp_path / 'converted'), None)
  for file in sorted((workdir / 'export').iterdir()):
    assert file.read_bytes() == (tmp_path / 'converted' / file.name).read_bytes(), file.name
  arch = table.architecture(load.read_config(workdir / 'export'))
  assert arch.vocab_size == 262
  weights = SafetensorsFolder(workdir / 'export')
  assert weights.tensors['model.embed_tokens.weight'].shape == (262, 32)

  def padding(saved):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    flat = trees.flatten(saved.load(lambda name: one, 'float32'))
    assert saved.model.tokenizer.vocab_size == 262
    return np.asarray(flat['embed/w'])[262:]

  rest = saved_model.with_step(str(workdir), '2', padding)
  assert rest.shape == (10, 32) and not rest.any()
  shutil.rmtree(workdir / 'export')
  fit.fit(c, str(workdir), cli.algorithm(algorithm).build)  # a resume: exported again
  for file in sorted((workdir / 'export').iterdir()):
    assert file.read_bytes() == (tmp_path / 'converted' / file.name).read_bytes(), file.name
