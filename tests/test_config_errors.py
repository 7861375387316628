"""Mistakes in a config file: one line with file, line, key and remedy, as on a command line."""

import pathlib
import sys

import pytest

from ftjax.config import config_file, keys, section, validation
from ftjax.runtime.errors import ConfigError

HEAD = 'from ftjax import config\ndef get_config():\n  c = config.default()\n'


def load(tmp_path, text, name='mine.py'):
  """(the config, '') of a file with this text, or (None, the error without the folder)."""
  path = tmp_path / name
  path.write_bytes(text.encode() if isinstance(text, str) else text)
  try:
    c = config_file.load(str(path))
    return c, ''
  except ConfigError as error:
    message = str(error)
    assert '\n' not in message and len(message) < 500
    return None, message.replace(f'{tmp_path}/', '')


def body(*lines, end='  return c\n'):
  """A config file that does `lines`, from line 4 on."""
  return HEAD + ''.join(f'  {line}\n' for line in lines) + end


VALUES = [
  ('c.batch_size = "8"', "batch_size='8'; expected an integer, without quotes: 8"),
  ('c.batch_size = 8.0', 'batch_size=8.0; expected an integer: write 8'),
  ('c.batch_size = 8.5', 'batch_size=8.5; expected an integer like the default, 16'),
  ('c.batch_size = True', 'batch_size=True; expected an integer'),
  ('c.batch_size = 8,', 'batch_size=(8,); expected an integer: a comma at the end of the line'),
  ('c.batch_size = None', 'batch_size=None; expected a value like the default, 16'),
  ('c.steps = "many"', "steps='many'; expected an integer like the default, 0"),
  ('c.optim.lr = "1e-4"', "optim.lr='1e-4'; expected a number, without quotes: 0.0001"),
  ('c.optim.lr = False', 'optim.lr=False; expected a number'),
  ('c.optim.lr = max', 'optim.lr=max (a builtin_function_or_method); expected a number'),
  ('c.data.packing = "no"', "data.packing='no'; expected True or False, without quotes: False"),
  ('c.data.packing = 1', 'data.packing=1; expected True or False: write True'),
  ('c.data.packing = __import__("numpy").zeros(2)', 'data.packing=<a ndarray>; expected True or'),
  ('c.steps = __import__("numpy").zeros(2)', 'steps=<a ndarray>; expected an integer'),
  ('c.optim.lr = 1j', 'optim.lr=<a complex>; expected a number'),
  ('c.model.path = b"x"', 'model.path=<a bytes>; expected a text'),
  ('c.model.path = 5', 'model.path=5; expected a text'),
  ('c.model.path = ("a", "b")', "model.path=('a', 'b'); expected a text"),
  ('c.model.path = "a",', "model.path=('a',); expected a text: a comma at the end of the line"),
  ('c.eval.prompts = "hello"', "eval.prompts='hello'; expected a tuple: write ('hello',)"),
  ('c.eval.prompts = {"a"}', 'eval.prompts=<a set>; expected a tuple'),
  ('c.eval.prompts = (None,)', 'eval.prompts[0]=<a NoneType>; expected texts, numbers'),
  ('c.data.train = None', "data.train=None; expected a value like the default, ''"),
  ('c.data.train = len', 'data.train=len (a builtin_function_or_method); expected texts'),
  ('c.rollout.rewards = ((len, 1.0),)', 'rollout.rewards[0][0]=len (a builtin_function_or_method)'),
  ('c.rollout.rewards = (lambda x: 1,)', "name a function as the text 'module:function'"),
  ('c.optim.freeze = __import__("numpy").zeros(2)', 'optim.freeze=<a ndarray>; expected a tuple'),
  ('c.data.eval = __import__("numpy").zeros(2)', 'data.eval=<a ndarray>; expected texts'),
  ('c.optim = "adamw"', 'optim is a section: assign its keys one by one'),
  ('c.optim = dict(lr=1e-4)', 'optim is a section: assign its keys one by one'),
  ('c.model.random = dict(hiden_size=8)', 'did you mean model.random.hidden_size?'),
  ('c.model.random.hiden_size = 8', 'did you mean model.random.hidden_size?'),
  ('c.model.random = dict(hidden_size=len)', 'model.random.hidden_size=len'),
]


@pytest.mark.parametrize(('line', 'message'), VALUES, ids=[line for line, _ in VALUES])
def test_a_wrong_value_in_a_file(tmp_path, line, message):
  _, output = load(tmp_path, body('', line))
  assert output.startswith('mine.py:5: ') and message in output


KEYS = [
  ('c.stepz = 3', 'stepz: there is no such key; did you mean steps?'),
  (
    'c.optim.learning_rate = 1',
    'optim.learning_rate: there is no such key; did you mean optim.lr?',
  ),
  ('c.optim.lrr = 1.0', 'optim.lrr: there is no such key; did you mean optim.lr?'),
  ('c["stepz"] = 3', 'stepz: there is no such key; did you mean steps?'),
  ('c.optimizer.lr = 1.0', 'optimizer.lr: there is no such key; did you mean optim.lr?'),
  (
    'c.training.batch_size = 4',
    'training.batch_size: there is no such key; did you mean batch_siz',
  ),
  ('c.lora.r = 8', 'lora.r: there is no such key; did you mean lora.rank?'),
  ('c.max_grad_norm = 8', 'max_grad_norm: there is no such key; did you mean optim.clip_norm?'),
  ('c.update(dict(optim=dict(lrr=1)))', 'optim.lrr: there is no such key; did you mean optim.lr?'),
  ('print(c.max_steps)', 'max_steps: there is no such key; did you mean steps?'),
  ('o = c.optim; o.warmup_step = 3', 'optim.warmup_step: there is no such key; did you mean opt'),
]


@pytest.mark.parametrize(('line', 'message'), KEYS, ids=[line for line, _ in KEYS])
def test_a_misspelt_key_in_a_file(tmp_path, line, message):
  _, output = load(tmp_path, body('', line))
  assert output.startswith(f'mine.py:5: {message}')


FILES = [
  (
    'from ftjax import config\ndef get_config()\n  return 1\n',
    "mine.py:2: SyntaxError: expected ':'",
  ),
  ('x = (1,\n\n', "mine.py:1: SyntaxError: '(' was never closed"),
  (HEAD + '   return c\n', 'mine.py:4: IndentationError'),
  ('x = 1\n', 'mine.py:1: there is no get_config() in this file; define it'),
  ('', 'mine.py:1: there is no get_config() in this file; define it'),
  (
    '\n\ndef get_confg():\n  return 1\n',
    'mine.py:3: there is no get_config() in this file; rename get',
  ),
  (
    'def config():\n  return 1\n',
    'mine.py:1: there is no get_config() in this file; rename config()',
  ),
  ('get_config = 3\n', 'mine.py:1: get_config is of the type int; expected a function'),
  (body('c.steps = 3', end=''), 'mine.py:2: get_config() returns None; end it with `return c`'),
  ('\n' + body('if c.steps:', '  return c', end=''), 'mine.py:3: get_config() returns None'),
  (body(end='  return dict(steps=3)\n'), 'mine.py:2: get_config() returns a dict; expected what'),
  (body(end='  return c.optim\n'), 'mine.py:2: get_config() returns a section of the config'),
  (body(end='  yield c\n'), 'mine.py:2: get_config() returns a generator'),
  (
    'def get_config(size, *, name):\n  return 1\n',
    'mine.py:1: get_config(size, name) is called without',
  ),
  (body('c.steps = 1 // 0'), 'mine.py:4: ZeroDivisionError: integer division or modulo by zero'),
  (body('c.steps = undefined'), "mine.py:4: NameError: name 'undefined' is not defined"),
  (body('raise RuntimeError("two\\nlines")'), 'mine.py:4: RuntimeError: two lines'),
  (body('raise KeyError("what")'), 'mine.py:4: KeyError: what'),
  (body('assert c.steps'), 'mine.py:4: AssertionError'),
  (
    body('open("/no/such/file")'),
    'mine.py:4: FileNotFoundError: [Errno 2] No such file or director',
  ),
  ('import numpie\n', "mine.py:1: ModuleNotFoundError: No module named 'numpie'"),
  (
    '\nfrom ftjax import confg\n',
    "mine.py:2: ImportError: cannot import name 'confg' from 'ftjax'",
  ),
  ('import sys\nsys.exit(3)\n', 'mine.py:2: it calls sys.exit(3)'),
  (body('import sys', 'sys.exit()'), 'mine.py:5: it calls sys.exit(None)'),
  (body('with c.unlocked():', '  c.foo = 3'), 'mine.py:5: foo: there is no such key'),
  (body('with c.unlocked():', '  del c.steps'), 'mine.py:2: steps was deleted'),
  (body('with c.ignore_type():', '  c.steps = "a"'), "mine.py:5: steps='a'; expected an integer"),
  ('def f(n):\n  return f(n)\nf(1)\n', 'mine.py:2: RecursionError'),
  ('import json\njson.loads("{")\n', 'mine.py:2: JSONDecodeError'),
  (b'\x00\x01\xff\x00', 'mine.py:1: '),
  (b'x = "\xff"\n', 'mine.py:'),
]


@pytest.mark.parametrize(('text', 'message'), FILES, ids=[t for _, t in FILES])
def test_a_file_that_makes_no_config(tmp_path, text, message):
  _, output = load(tmp_path, text)
  assert output.startswith(message)


BASE = 'from mine_base import get_config as base\ndef get_config():\n  c = base()\n'


@pytest.mark.parametrize(
  ('base', 'mine', 'message'),
  [
    (body('c.optim.lrr = 1.0'), BASE + '  return c\n', 'mine_base.py:4: optim.lrr: '),
    (body('c.steps = "3"'), BASE + '  return c\n', "mine_base.py:4: steps='3'; "),
    (body(), BASE + '  c.steps = "3"\n  return c\n', "mine.py:4: steps='3'; "),
    (body(), BASE + '  c.optim.lrr = 1.0\n  return c\n', 'mine.py:4: optim.lrr: '),
    ('def get_config(:\n', BASE + '  return c\n', 'mine_base.py:1: SyntaxError'),
    (body(end=''), BASE + '  c.steps = 3\n', "mine.py:4: AttributeError: 'NoneType' object has no"),
  ],
)
def test_the_file_with_the_mistake_is_named_where_there_are_several(tmp_path, base, mine, message):
  (tmp_path / 'mine_base.py').write_text(base)
  try:
    _, output = load(tmp_path, mine)
  finally:
    sys.modules.pop('mine_base', None)
  assert output.startswith(message)
  assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    (['c.optim.name = "adam"'], "mine.py:6: optim.name='adam'; expected one of"),
    (['c.batch_size = 6', 'c.grad_accum = 4'], 'mine.py:7: grad_accum=4 must divide batch_size=6'),
    (['c.checkpoint.patience = 2'], 'mine.py:6: checkpoint.patience needs checkpoint.best_metric'),
    (['c.log.every = 0'], 'mine.py:6: log.every=0; expected at least 1'),
    (['for _ in range(2):', '  c.eval.every = 5'], 'mine.py:7: eval.every=5 finds nothing to eval'),
    (
      ['c.data.train = "gs:/bucket/rows.jsonl"'],
      'mine.py:6: data.train=gs:/bucket/rows.jsonl: writ',
    ),
  ],
)
def test_a_value_that_the_checks_refuse_has_its_line(tmp_path, lines, message):
  c, _ = load(tmp_path, body('c.model.path = "x"', 'c.data.train = "rows.jsonl"', *lines))
  with pytest.raises(ConfigError) as caught:
    validation.validate(c)
  assert str(caught.value).replace(f'{tmp_path}/', '').startswith(message)


def test_a_value_that_no_file_set_has_no_line(tmp_path):
  c, _ = load(tmp_path, body('c.data.train = "rows.jsonl"'))
  with pytest.raises(ConfigError, match=r"^model.path=''"):
    validation.validate(c)


GOOD = [
  (body('c.eval.prompts = ["a", "b"]'), 'eval.prompts', ('a', 'b')),
  (body('c.optim.lr = 1'), 'optim.lr', 1.0),
  (body('import numpy as np', 'c.optim.lr = np.float32(0.5)'), 'optim.lr', 0.5),
  (body('import numpy as np', 'c.steps = np.int64(7)'), 'steps', 7),
  (body('import pathlib', 'c.model.path = pathlib.Path("a/b")'), 'model.path', 'a/b'),
  (body('c.update(dict(optim=dict(lr=0.25)))'), 'optim.lr', 0.25),
  (body('c.eval.every = c.get_ref("steps")', 'c.steps = 9'), 'eval.every', 9),
  (body('c.optim = config.default().optim', 'c.optim.lr = 3.0'), 'optim.lr', 3.0),
  (body('c.model.random = dict(rope_scaling=None)'), 'model.random', {'rope_scaling': None}),
  (body('c.model.random.hidden_size = 8'), 'model.random', {'hidden_size': 8}),
  (body(end='  return c.copy_and_resolve_references()\n'), 'steps', 0),
  (
    'import ml_collections as m\ndef get_config():\n  return m.ConfigDict(dict(seed=4))\n',
    'seed',
    4,
  ),
]


@pytest.mark.parametrize(('text', 'key', 'value'), GOOD, ids=[t for t, _, _ in GOOD])
def test_what_a_file_may_write(tmp_path, text, key, value):
  c, output = load(tmp_path, text)
  assert output == ''
  assert section.plain(c)[key] == (list(value) if isinstance(value, tuple) else value)
  assert c.is_locked and section.plain(c).keys() == section.plain(keys.default()).keys()


def test_a_config_that_is_no_python_file(tmp_path):
  (tmp_path / 'a.yaml').write_text('steps: 3')
  with pytest.raises(ConfigError, match=r'a config is a Python file .*; got a .yaml file'):
    config_file.find(str(tmp_path / 'a.yaml'))
  with pytest.raises(ConfigError, match='is a folder; give a Python file with get_config'):
    config_file.find(str(tmp_path))
  (tmp_path / 'mine.py').write_text('')
  with pytest.raises(ConfigError, match=r'is a folder; .*such as .*/mine.py'):
    config_file.find(str(tmp_path))
  # The names of all shipped configs do not stand before the one that is meant.
  with pytest.raises(ConfigError, match=r'no such file, .{0,70}did you mean .*/mine.py\?$'):
    config_file.find(str(tmp_path / 'mien.py'))
  with pytest.raises(ConfigError, match=r'no such file, .*did you mean tiny_sft or '):
    config_file.find('tiny_stf')


def test_a_file_without_a_suffix_is_read(tmp_path):
  c, output = load(tmp_path, body('c.steps = 3'), name='mine')
  assert output == '' and c.steps == 3
  assert not (pathlib.Path(tmp_path) / '__pycache__').exists()
