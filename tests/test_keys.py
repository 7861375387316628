"""The config: every key told when it is misspelt, every wrong value refused by name, every shipped
file resolves.
"""

import contextlib
import importlib
import json
import pathlib
import runpy
import sys

import pytest
from absl import flags

from ftjax import cli
from ftjax.config import algorithms, config_file, section, validation
from ftjax.config import keys as config
from ftjax.families import table as families
from ftjax.runtime.errors import ConfigError

HERE = pathlib.Path(__file__).resolve().parent
SHIPPED = sorted((HERE.parent / 'configs').glob('*.py'))
GOLDEN = HERE / 'golden' / 'default_config.json'
KEYS = [k for k in section.flat(config.default()) if k != 'model.random']


def load(path):
  return runpy.run_path(str(path))['get_config']()


def valid():
  c = config.default()
  c.model.path, c.data.train, c.steps = 'somewhere', 'rows.jsonl', 10
  return c


# Names


def misspelt(key):
  """The key with one letter of its last part doubled, dropped or exchanged with its neighbour."""
  head, dot, last = key.rpartition('.')
  i = len(last) // 2
  out = [last[: i + 1] + last[i:], last[: i + 1] + last[i + 2 :]]
  out += [last[: i - 1] + last[i] + last[i - 1] + last[i + 1 :]]
  return [head + dot + x for x in out if head + dot + x not in KEYS]


@pytest.mark.parametrize('key', KEYS)
def test_the_nearest_name_of_a_misspelt_key(key):
  for wrong in misspelt(key):
    told = section.nearest(wrong, config.default())
    if key in ('optim.b1', 'optim.b2'):  # one letter from each other
      assert told in ('; did you mean optim.b1?', '; did you mean optim.b2?')
    else:
      assert told == f'; did you mean {key}?', wrong


def test_the_nearest_name_without_its_section():
  assert section.nearest('warmup_steps', config.default()) == '; did you mean optim.warmup_steps?'
  assert section.nearest('opitm', config.default()) == '; did you mean optim?'
  assert section.nearest('zzzzzzzz', config.default()) == ''


@pytest.fixture
def parse(capsys, monkeypatch):
  """`parse('--config=...', ...)` as an entry does: what it says, '' where it is content."""
  if 'config' not in flags.FLAGS:
    cli.define_config()

  def run(*arguments):
    known = set(flags.FLAGS)
    monkeypatch.setattr(sys, 'argv', ['program', *arguments])  # where overrides are looked for
    try:
      with contextlib.suppress(SystemExit):
        cli._parse(['program', *arguments], '')
        return ''
      return capsys.readouterr().err.strip()
    finally:
      for name in set(flags.FLAGS) - known:  # each override is a flag of its own
        delattr(flags.FLAGS, name)
      flags.FLAGS.unparse_flags()

  return run


def test_a_misspelt_override(parse):
  for key in KEYS[:: len(KEYS) // 8]:
    told = parse('--config=tiny_sft', f'--config.{misspelt(key)[0]}=1')
    assert told == f'error: --config.{misspelt(key)[0]}: there is no such key; did you mean {key}?'


def test_a_good_override_is_not_blamed_for_a_misspelt_one(parse):
  told = parse('--config=tiny_sft', '--config.model.random.hidden_size=32', '--config.stepz=3')
  assert told == 'error: --config.stepz: there is no such key; did you mean steps?'


def test_a_good_override_is_not_blamed_for_the_file(parse, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from ftjax import config\n'
    'def get_config():\n'
    '  c = config.default()\n'
    '  c.stepz = 3\n'
    '  return c\n'
  )
  told = parse(f'--config={path}', '--config.steps=3')
  assert told == f'error: {path}:4: stepz: there is no such key; did you mean steps?'
  path.write_text('from ftjax import config\ndef get_config()\n')
  assert 'SyntaxError' in parse(f'--config={path}', '--config.steps=3')


@pytest.mark.parametrize(
  ('override', 'told'),
  [
    ('--config.steps=many', '--config.steps=many; expected an integer such as '),
    ('--config.optim.lr=fast', '--config.optim.lr=fast; expected a number such as 0.003'),
    ('--config.data.packing=maybe', '--config.data.packing=maybe'),
    ('--config.model.random.hiden_size=3', 'did you mean model.random.hidden_size?'),
    ('--config.optim=3', '--config.optim=3'),
    ('--confg=tiny_sft', "Unknown command line flag 'confg'. Did you mean: config ?"),
    ('sft', "unexpected argument 'sft'; flags are written --name=value"),
  ],
)
def test_a_wrong_value_or_flag(parse, override, told):
  assert told in parse('--config=tiny_sft', override)


def test_a_missing_config(parse):
  assert 'no such file, and no shipped config of this name; shipped: ' in parse('--config=nothing')
  assert 'tiny_sft' in parse('--config=nothing') and 'tiny_sft' in parse('--config', 'nothing')
  near = parse('--config=sft_smollm')
  assert 'did you mean sft_smollm2_135m or ' in near and 'tiny_' not in near


def test_a_config_by_name_or_path_in_one_word_or_two(parse):
  path = str(HERE.parent / 'configs' / 'tiny_sft.py')
  for words in (
    ['--config=tiny_sft'],
    ['--config', 'tiny_sft'],
    [f'--config={path}'],
    ['--config=tiny_sft.py'],
  ):
    assert parse(*words, '--config.steps=7') == ''


def test_a_path_wins_over_a_shipped_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_file.find('tiny_sft').endswith('configs/tiny_sft.py')
  (tmp_path / 'tiny_sft').write_text('')
  assert config_file.find('tiny_sft') == 'tiny_sft'
  with pytest.raises(ConfigError):
    config_file.find('elsewhere/tiny_sft')


# Values


def test_a_plain_config_is_valid():
  validation.validate(valid())


@pytest.mark.parametrize(
  ('key', 'value', 'told'),
  [
    ('algorithm', 'dpo2', r"algorithm='dpo2'; expected one of"),
    ('remat', 'half', r"remat='half'"),
    ('optim.name', 'adam', r"optim.name='adam'; expected one of \('adamw'"),
    ('optim.schedule', 'step', r"optim.schedule='step'"),
    ('optim.name', 'adamW', r'expected one of .*; did you mean adamw\?'),
    ('data.on_overlength', 'truncate-left', r'did you mean truncate_left\?'),
    ('data.on_overlength', 'cut', r"data.on_overlength='cut'"),
    ('data.loss_on', 'prompt', r"data.loss_on='prompt'"),
    ('data.on_unrendered', 'drop', r"data.on_unrendered='drop'"),
    ('model.param_dtype', 'float16', r"model.param_dtype='float16'"),
    ('checkpoint.best_mode', 'low', r"checkpoint.best_mode='low'"),
    ('batch_size', 0, r'batch_size=0; expected at least 1'),
    ('seq_len', -1, r'seq_len=-1'),
    ('checkpoint.keep', 0, r'checkpoint.keep=0'),
    ('log.every', 0, r'log.every=0'),
    ('max_bad_steps', 0, r'max_bad_steps=0'),
    ('checkpoint.every', -1, r'checkpoint.every=-1; expected at least 0'),
    ('eval.every', -5, r'eval.every=-5'),
    ('eval.every', 5, r'eval.every=5 finds nothing to evaluate'),
    ('optim.weight_decay', -0.1, r'optim.weight_decay=-0.1'),
    ('optim.sam_radius', -0.1, r'optim.sam_radius=-0.1; expected at least 0'),
    ('steps', -1, r'steps=-1'),
    ('grad_accum', 3, r'grad_accum=3 must divide batch_size=16'),
    ('model.path', '', r"model.path=''"),
    ('data.train', '', r'data.train is empty'),
    ('data.train', 5, r'data.train: 5; expected a text'),
    ('data.eval', ('a', 5), r'data.eval: 5; expected a text'),
    ('checkpoint.patience', 2, r'checkpoint.patience needs checkpoint.best_metric'),
    ('checkpoint.best_metric', 'loss', r"checkpoint.best_metric='loss'; .*eval/loss"),
    ('checkpoint.best_metric', 'eval/loss', r'needs data.eval or data.eval_fraction'),
    ('optim.ema_decay', 1.0, r'optim.ema_decay'),
    ('data.eval_fraction', 1.5, r'data.eval_fraction'),
    ('loss.label_smoothing', -0.1, r'loss.label_smoothing'),
    ('profile.start', 5, r'profile.stop=0 lies before profile.start=5'),
    ('optim.decay', ('abc',), r"optim.decay: 'abc' is not a row"),
    ('optim.freeze', (('(', True),), r"optim.freeze: '\(' is not a regular expression"),
    ('optim.multipliers', (('.*', 'slow'),), r'optim.multipliers: .*expected a number'),
  ],
)
def test_what_cannot_be_is_refused_by_name(key, value, told):
  c = valid()
  with c.unlocked():
    c.update_from_flattened_dict({key: value})
  with pytest.raises(ConfigError, match=told):
    validation.validate(c)


def test_steps_or_epochs():
  c = valid()
  c.steps, c.epochs = 0, 0.0
  with pytest.raises(ConfigError, match='steps=0, epochs=0'):
    validation.validate(c)
  c.epochs = 0.5
  validation.validate(c)


@pytest.mark.parametrize(
  ('random', 'told'),
  [
    (dict(hidden_size=8), 'lacks num_hidden_layers, num_attention_heads, intermediate_size'),
    (dict(hiden_size=8), 'model.random.hiden_size: .* mean model.random.hidden_size'),
  ],
)
def test_a_random_model_is_checked_before_it_is_made(random, told):
  c = valid()
  with pytest.raises(ConfigError, match=told):
    c.model.path, c.model.random = '', random
    validation.validate(c)


def test_a_path_and_a_random_model_exclude_each_other():
  c = valid()
  c.model.random = dict(hidden_size=8)
  with pytest.raises(ConfigError, match='model'):
    validation.validate(c)


def test_sources_as_a_text_or_a_tuple(parse):
  c = valid()
  for value in ('a.jsonl,b.jsonl@0.5', ('a.jsonl', 'b.jsonl@0.5'), ['a.jsonl']):
    c.data.train = value
    validation.validate(c)
    assert section.plain(c)['data.train'] == (value if isinstance(value, str) else list(value))
  assert parse('--config=tiny_sft', '--config.data.train=a.jsonl,b.jsonl') == ''
  assert parse('--config=tiny_sft', "--config.data.train=('a.jsonl', 'b.jsonl')") == ''


# Numbers that do not go together


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    (
      {'optim.warmup_steps': 10},
      'optim.warmup_steps=10 with steps=10: the learning rate would not',
    ),
    ({'optim.warmup_steps': 100}, 'optim.warmup_steps=100 with steps=10'),
    (
      {'optim.schedule': 'wsd', 'optim.decay_steps': 8, 'optim.warmup_steps': 3},
      'optim.decay_steps=8 and optim.warmup_steps=3 are more than steps=10',
    ),
    (
      {'checkpoint.best_metric': 'eval/loss', 'data.eval': 'a', 'eval.every': 11},
      'eval.every=11 with steps=10: checkpoint.best_metric=eval/loss would be measured once',
    ),
    (
      {
        'checkpoint.best_metric': 'eval/loss',
        'data.eval': 'a',
        'eval.every': 3,
        'checkpoint.patience': 4,
      },
      'checkpoint.patience=4 can never stop a run of 4 evaluations',
    ),
  ],
)
def test_lengths_that_do_not_go_together(settings, told):
  c = valid()
  c.update_from_flattened_dict(settings)
  with pytest.raises(ConfigError, match=told):
    validation.validate(c)


@pytest.mark.parametrize(
  'settings',
  [
    {'optim.warmup_steps': 9},
    {'optim.warmup_steps': 100, 'steps': 0},
    {'checkpoint.every': 1000},
    {'epochs': 3.0},
    {'eval.every': 100, 'data.eval': 'a'},
    {
      'checkpoint.best_metric': 'eval/loss',
      'data.eval': 'a',
      'eval.every': 10,
    },
    {
      'checkpoint.best_metric': 'eval/loss',
      'data.eval': 'a',
      'eval.every': 3,
      'checkpoint.patience': 3,
    },
  ],
)
def test_lengths_that_go_together(settings):
  c = valid()
  c.update_from_flattened_dict(settings)
  validation.validate(c)


@pytest.mark.parametrize(
  ('train', 'evaluation', 'count'),
  [
    ('a.jsonl', 'a.jsonl', 1),
    ('a.jsonl@0.5,b.jsonl@2', 'b.jsonl', 1),
    (('a.jsonl', 'b.jsonl'), ('c.jsonl', 'a.jsonl'), 1),
    ('a.jsonl', 'b.jsonl', 0),
    ('a.jsonl', '', 0),
  ],
)
def test_evaluation_on_training_data_is_warned_of(train, evaluation, count):
  c = valid()
  c.data.train, c.data.eval = train, evaluation
  lines = validation.warnings(c)
  assert len(lines) == count
  assert all('is also in data.train: its loss measures what was memorized' in x for x in lines)


# Files


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_config_resolves(path):
  c = load(path)
  validation.validate(c)
  json.dumps(section.plain(c))
  assert len(path.read_text().splitlines()) <= 60
  assert c.is_locked
  if len(c.model.random):
    families.architecture({'model_type': 'llama', 'vocab_size': 300} | c.model.random.to_dict())


def test_every_algorithm_has_a_tiny_config():
  for name in algorithms.ALGORITHMS:
    assert load(config_file.find(f'tiny_{name}')).algorithm == name
    importlib.import_module(f'ftjax.algorithms.{name}')


def test_the_defaults_are_the_golden_ones():
  """A changed default changes everybody's runs: change the golden file too, and tell.

  To write it: python -c "import json; from ftjax.config import keys, section as s;
  print(json.dumps(s.plain(keys.default()), indent=1))" > tests/golden/default_config.json
  """
  assert section.plain(config.default()) == json.loads(GOLDEN.read_text())


def test_the_keys_that_scripts_rely_on():
  """DESIGN section 2; those of later algorithms come with them."""
  promised = {
    '': ('algorithm', 'seed', 'steps', 'epochs', 'batch_size', 'seq_len', 'grad_accum', 'remat'),
    'model.': ('path', 'param_dtype', 'compute_dtype'),
    'data.': ('train', 'eval', 'packing', 'on_overlength'),
    'optim.': ('name', 'lr', 'schedule', 'warmup_steps', 'weight_decay', 'b1', 'b2', 'eps'),
    'mesh.': ('data', 'fsdp', 'context', 'tensor', 'expert'),
    'checkpoint.': ('every', 'keep', 'best_metric'),
    'eval.': ('every', 'tasks', 'batch_size', 'prompts'),
    'log.': ('every',),
    'rollout.': ('group', 'max_tokens', 'temperature'),
    'profile.': ('start', 'stop'),
  }
  names = [section + key for section, keys in promised.items() for key in keys]
  assert {*names, 'init_from', 'optim.clip_norm'} <= set(KEYS)


def test_every_key_is_explained_and_read():
  package = HERE.parent / 'ftjax'
  sources = sorted((package / 'config').glob('*keys.py'))
  text = '\n'.join(p.read_text() for p in sources)
  code = '\n'.join(p.read_text() for p in package.rglob('*.py') if p not in sources)
  for key in KEYS:
    assert f'  c.{key} = ' in text, key
    last = key.rsplit('.', 1)[-1]
    reads = (f'c.{key}', f"'{last}'", 'c.mesh[') if '.' in key else (f'c.{key}',)
    reads += (f"phase('{last}')",) if key.startswith('watchdog.') else ()
    assert any(r in code for r in reads), f'{key} is read by nobody'
