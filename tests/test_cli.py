"""The command line of an entry: overrides of every type, and one clear line for every slip."""

import contextlib

import pytest
from absl import flags

from ftjax import cli
from ftjax.config import keys, section
from ftjax.config import overrides as config_overrides
from ftjax.runtime.errors import ConfigError, StoppedEarly

HEALTHY = ('--config=tiny_sft',)


@pytest.fixture
def parse(capsys, monkeypatch):
  """`parse(*arguments)` as train does: (the config or None, what is printed)."""
  if 'config' not in flags.FLAGS:
    cli.define_config()
  own = flags.FlagValues()
  own['config'] = flags.FLAGS['config']
  flags.DEFINE_string('workdir', 'somewhere', 'The folder of the run.', flag_values=own)
  flags.DEFINE_bool('raw', False, 'A flag without a value.', flag_values=own)
  flags.DEFINE_integer('rows', 1, 'A number.', flag_values=own)
  monkeypatch.setattr(cli, 'FLAGS', own)
  # Another module of the process may have declared it as optional.
  monkeypatch.setattr(own['config'], 'validators', [])
  flags.mark_flag_as_required('config', own)

  def run(*arguments):
    own['config'].unparse()
    c = None
    with contextlib.suppress(SystemExit):
      cli._parse(['program', *arguments], 'What it does.')
      c = own['config'].value
    output = capsys.readouterr()
    assert output.err.count('\n') <= 1
    return c, (output.err or output.out).strip()

  yield run
  flags.FLAGS['config'].unparse()


GOOD = [
  ('steps', '7', 7),
  ('steps', '1e3', 1000),
  ('batch_size', '8.0', 8),
  ('steps', '1_000', 1000),
  ('seed', '-3', -3),
  ('mesh.fsdp', '-1', -1),
  ('optim.lr', '1e-4', 1e-4),
  ('optim.lr', '3', 3.0),
  ('optim.end_fraction', '.5', 0.5),
  *(('data.packing', text, False) for text in ('no', 'off', '0', 'false', 'False', 'n')),
  *(('data.packing', text, True) for text in ('yes', 'on', '1', 'true', 'True', 'Y')),
  ('model.path', '', ''),
  ('model.path', 'org/name', 'org/name'),
  ('model.path', '123', '123'),
  ('data.train', 'a.jsonl,b.jsonl@0.5', 'a.jsonl,b.jsonl@0.5'),
  ('data.train', "('a.jsonl', 'b.jsonl@0.5')", ('a.jsonl', 'b.jsonl@0.5')),
  ('data.train', '5', '5'),
  ('data.train', '', ''),
  ('rollout.rewards', 'math@1', 'math@1'),
  ('rollout.rewards', "[('math', 1.0)]", [('math', 1.0)]),
  ('eval.prompts', "('a', 'b')", ('a', 'b')),
  ('eval.prompts', "['a']", ('a',)),
  ('eval.prompts', 'Hello, how are you?', ('Hello, how are you?',)),
  ('eval.prompts', '7 + 5 =', ('7 + 5 =',)),
  ('eval.prompts', '42', ('42',)),
  ('eval.prompts', "'a, b'", ('a, b',)),
  ('eval.prompts', "'tis", ("'tis",)),
  ('eval.prompts', '', ()),
  ('eval.prompts', '()', ()),
  ('log.sinks', 'wandb,mlflow', ('wandb', 'mlflow')),
  ('eval.tasks', 'a=match:x.jsonl', ('a=match:x.jsonl',)),
  ('optim.freeze', "(('embed/w', True), ('.*', False))", (('embed/w', True), ('.*', False))),
]


@pytest.mark.parametrize(('key', 'text', 'value'), GOOD)
def test_a_value_is_read_by_the_type_of_its_key(key, text, value):
  c = keys.default()
  rest, overrides = config_overrides.split(['--config=x', f'--config.{key}={text}'])
  config_overrides.apply(c, overrides)
  assert rest == ['--config=x']
  got = section.flat(c)[key]
  assert got == value and type(got) is type(value)


BAD = [
  ('steps', '8.5', '--config.steps=8.5; expected an integer such as '),
  ('steps', '', '--config.steps= has no value; write --config.steps=VALUE'),
  ('steps', 'None', '--config.steps=None; expected an integer'),
  ('batch_size', '"8"', '--config.batch_size="8"; expected an integer'),
  ('optim.lr', '1e', '--config.optim.lr=1e; expected a number such as 0.003'),
  ('optim.lr', '1,5', '--config.optim.lr=1,5; expected a number'),
  ('data.packing', 'maybe', '--config.data.packing=maybe; expected true or false'),
  ('data.packing', '2', '--config.data.packing=2; expected true or false'),
  (
    'eval.prompts',
    "('a'",
    "--config.eval.prompts=('a'; expected a tuple, with its texts in quotes",
  ),
  ('eval.tasks', '(a=match:x)', '--config.eval.tasks=(a=match:x); expected a tuple'),
  ('data.train', '(a.jsonl, b.jsonl)', 'expected a tuple, with its texts in quotes'),
  ('data.train', "('a.jsonl', None)", '--config.data.train: data.train[1]=<a NoneType>; expected'),
  ('model.path', 'None', 'an empty one, --config.model.path=, means none'),
  ('data.eval', 'None', 'an empty one, --config.data.eval=, means none'),
  ('optim', '3', 'optim is a section; set one of its keys, such as --config.optim.b1=0.9'),
  ('optim', 'adamw', 'optim is a section; .*did you mean optim.name?'),
  ('optim.lr.x', '3', '--config.optim.lr.x: there is no such key'),
  ('.lr', '3', '--config..lr: there is no such key'),
  ('', '3', '--config.: there is no such key'),
  ('model.random.hiden_size', '3', 'did you mean model.random.hidden_size?'),
  ('model.random', '3', 'model.random=3; expected'),
  ('optim.learning_rate', '3', 'there is no such key; did you mean optim.lr?'),
  ('max_steps', '3', 'there is no such key; did you mean steps?'),
  ('lora.r', '8', 'there is no such key; did you mean lora.rank?'),
]


@pytest.mark.parametrize(('key', 'text', 'message'), BAD)
def test_a_value_that_cannot_be_meant(parse, key, text, message):
  c, output = parse(*HEALTHY, f'--config.{key}={text}')
  assert c is None and output.startswith(f'error: --config.{key}')
  assert all(part in output for part in message.split('.*'))


@pytest.mark.parametrize(
  ('arguments', 'key', 'value'),
  [
    (('--config.steps', '5'), 'steps', 5),
    (('-config.steps=5',), 'steps', 5),
    (('--config.seed', '-1'), 'seed', -1),
    (('--config.data.packing',), 'data.packing', True),
    (('--noconfig.data.packing',), 'data.packing', False),
    (('--config.data.packing', 'off'), 'data.packing', False),
    (('--config.data.packing', '--config.steps=5'), 'data.packing', True),
    (('--config.steps=4', '--config.steps=5'), 'steps', 5),
    (('--config.eval.prompts=a', '--config.eval.prompts=b'), 'eval.prompts', ('a', 'b')),
    (("--config.model.random={'hidden_size': 8}",), 'model.random', {'hidden_size': 8}),
  ],
)
def test_how_an_override_may_be_written(parse, arguments, key, value):
  for order in ((*HEALTHY, *arguments), (*arguments, *HEALTHY)):
    c, output = parse(*order)
    assert output == ''
    got = section.flat(c)[key]
    assert (got.to_dict() if key == 'model.random' else got) == value


def test_single_keys_of_a_random_model(parse):
  c, _ = parse(*HEALTHY, '--config.model.random.hidden_size=32')
  assert c.model.random.hidden_size == 32 and c.model.random.num_hidden_layers == 2
  c, _ = parse(*HEALTHY, '--config.model.random.rope_theta=5e3')
  assert c.model.random.rope_theta == 5000.0 and c.is_locked


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), '--config is missing: A config file, or the name of a shipped one'),
    (('--config',), '--config has no value; write --config=VALUE'),
    (('--config='), '--config= has no value; give a file, or the name of a shipped config'),
    (('--config', '--workdir=x'), '--config has no value'),
    ((*HEALTHY, '--config=tiny_dpo'), '--config is given twice, tiny_sft and tiny_dpo'),
    (
      (*HEALTHY, '--workdir'),
      '--workdir has no value; write --workdir=VALUE (The folder of the run',
    ),
    ((*HEALTHY, '--workdir='), '--workdir= is empty; give a folder'),
    ((*HEALTHY, '--workdir', '--raw'), '--workdir has no value'),
    ((*HEALTHY, '--rows=many'), 'flag --rows=many: invalid literal'),
    ((*HEALTHY, '--wrkdir=x'), "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    (
      (*HEALTHY, '--batch_size=8'),
      '--batch_size is a key of the config: write --config.batch_size=8',
    ),
    (
      (*HEALTHY, '--batch_size', '8'),
      '--batch_size is a key of the config: write --config.batch_size',
    ),
    ((*HEALTHY, '--optim.lr=1'), '--optim.lr is a key of the config: write --config.optim.lr=1'),
    ((*HEALTHY, '--lr=1'), "Unknown command line flag 'lr'; did you mean --config.optim.lr?"),
    (
      (*HEALTHY, '--max_steps=1'),
      "Unknown command line flag 'max_steps'; did you mean --config.steps",
    ),
    ((*HEALTHY, '--lora_r=8'), "Unknown command line flag 'lora_r'; did you mean"),
    ((*HEALTHY, 'steps=5'), "unexpected argument 'steps=5'; did you mean --config.steps=5?"),
    (
      (*HEALTHY, 'config.steps=5'),
      "unexpected argument 'config.steps=5'; did you mean --config.steps",
    ),
    ((*HEALTHY, 'learning_rate=5'), "'learning_rate=5'; did you mean --config.optim.lr=5?"),
    ((*HEALTHY, 'workdir=x'), "unexpected argument 'workdir=x'; did you mean --workdir=x?"),
    ((*HEALTHY, 'sft'), "unexpected argument 'sft'; flags are written --name=value"),
    ((*HEALTHY, '--config.steps', '=', '5'), 'write --config.steps=5, without blanks'),
    ((*HEALTHY, '--config.steps', '=5'), 'write --config.steps=5, without blanks'),
    ((*HEALTHY, '--config.steps=', '5'), 'write --config.steps=5, without blanks'),
    ((*HEALTHY, '--config.steps'), '--config.steps has no value; write --config.steps=VALUE'),
    ((*HEALTHY, '--config.steps', '--raw'), '--config.steps has no value'),
    ((*HEALTHY, '--workdir', '=', 'x'), '--workdir =: write --workdir=VALUE, without blanks'),
    ((*HEALTHY, '--noconfig.steps'), '--noconfig.steps: expected --noconfig.KEY, of a key that is'),
    ((*HEALTHY, '\u2014workdir=x'), 'begins with a dash; a flag begins with two hyphens'),
    ((*HEALTHY, '\u2013config.steps=x'), 'begins with a dash; a flag begins with two hyphens'),
    ((*HEALTHY, '--workdir=gs:/bucket/run'), '--workdir=gs:/bucket/run: write gs://bucket/run'),
    ((*HEALTHY, '--workdir=s3://bucket/run'), '--workdir=s3://bucket/run: s3:// cannot be read'),
  ],
)
def test_a_slip_on_the_command_line(parse, arguments, message):
  arguments = (arguments,) if isinstance(arguments, str) else arguments
  c, output = parse(*arguments)
  assert c is None and output.startswith('error: ') and message in output


def test_a_file_with_a_mistake_is_blamed_before_a_missing_flag(parse, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('from ftjax import config\ndef get_config():\n  c = config.default()\n')
  _, output = parse(f'--config={path}', '--workdir=x', '--config.steps=3')
  assert output == f'error: {path}:2: get_config() returns None; end it with `return c`'


def test_the_home_folder_is_expanded_in_flags(parse, monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  assert parse(*HEALTHY, '--workdir=~/runs/1')[1] == ''
  assert cli.FLAGS['workdir'].value == '/home/somebody/runs/1'


@pytest.mark.parametrize('word', ['--help', '-h', '-help', '-?'])
def test_help_is_no_error(parse, word):
  with pytest.raises(SystemExit) as left:
    cli._parse(['program', *HEALTHY, word], '')
  assert left.value.code == 0


def test_help_names_flags_configs_and_keys(parse):
  _, output = parse('--help')
  assert output.startswith('What it does.')
  assert (
    '--config  A config file' in output and 'tiny_sft' in output and 'docs/config_keys.md' in output
  )


def test_an_error_in_an_override_is_a_config_error():
  with pytest.raises(ConfigError, match='stepz'):
    config_overrides.apply(keys.default(), [config_overrides.Override('stepz', '3')])


@pytest.mark.parametrize(
  ('error', 'printed'),
  [
    (ConfigError('steps=0'), 'error: steps=0\n'),
    (StoppedEarly('stopped after step 3'), 'stopped after step 3\n'),
  ],
)
def test_a_stop_is_not_printed_as_an_error(error, printed, capsys):
  with pytest.raises(SystemExit) as left:
    cli._leave(error)
  assert left.value.code == error.exit_code and capsys.readouterr().err == printed
