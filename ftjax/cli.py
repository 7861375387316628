"""Runs an entry: parses flags and config before jax is imported, prints errors in one line, returns
exit codes.

See ftjax/runtime/errors.py for the codes.
"""

import importlib
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType

from absl import app, flags
from tqdm import tqdm

from ftjax.config import algorithms, config_file, keys, section
from ftjax.config import overrides as config_overrides
from ftjax.runtime import host_threads, named_object
from ftjax.runtime.errors import ConfigError, RunError, StoppedEarly
from ftjax.storage import locations

FLAGS = flags.FLAGS


def define_config(is_required: bool = True) -> None:
  """Declares --config=FILE_OR_NAME with --config.KEY=VALUE overrides."""
  flags.DEFINE_string(
    'config', None, 'A config file, or the name of a shipped one; --config.KEY=VALUE changes a key.'
  )
  if is_required:
    flags.mark_flag_as_required('config')


def define_processes() -> None:
  """Declares the flags of a run of several processes; see cluster/distributed.py."""
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0; found automatically on Cloud TPUs and SLURM.'
  )
  flags.DEFINE_integer('num_processes', None, 'Number of processes.', lower_bound=1)
  flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.', lower_bound=0)
  flags.DEFINE_float(
    'init_timeout_s', 1800.0, 'Seconds to wait for the other processes.', lower_bound=0
  )
  flags.DEFINE_integer(
    'heartbeat_s', 100, 'Seconds without a heartbeat after which a process is lost.', lower_bound=1
  )


def define_command() -> None:
  """Declares that the words after -- are a command, which `command` returns."""
  flags.DEFINE_multi_string('command', [], 'The command; written at the end, as -- COMMAND.')


def command() -> tuple[str, ...]:
  """Returns the words of the command after --; () without one."""
  return tuple(FLAGS.command)


def join() -> None:
  """Connects to the other processes of the run, if any; then only process 0 logs and prints.

  Raises:
    ConfigError: contradicting flags, or a TPU that another process holds.
    StoppedEarly: a process did not connect in time.
  """
  import jax

  from ftjax.cluster import distributed, processes, tpu_lock

  launch = distributed.find(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  try:
    if launch is None:
      jax.devices()
      return
    host_threads.reserve(launch.num_processes)
    distributed.initialize(launch, FLAGS.init_timeout_s, FLAGS.heartbeat_s)
  except RuntimeError as error:
    tpu_lock.explain(error)
    raise
  if not processes.is_main():
    logging.getLogger().setLevel(logging.WARNING)


def algorithm(name: str) -> ModuleType:
  """Returns the module that implements an algorithm, with `make_loss` and `build`. Imports jax.

  Raises:
    ConfigError: a module outside of ftjax that cannot be imported, or lacks one of the two.
  """
  module = algorithms.find(name).module
  if named_object.is_named(name):
    for function in ('make_loss', 'build'):
      named_object.load('algorithm', f'{module}:{function}')
  return importlib.import_module(module)


_HELP = ('--help', '-help', '-h', '--h', '-?')
# Flags whose value is a folder or file that an entry reads or writes.
_LOCATIONS = ('workdir', 'model', 'source', 'target', 'prompts', 'replay')


def _parse(argv: list[str], about: str) -> list[str]:
  """Parses flags as absl does, but replaces the value of --config by the config itself.

  Prints the help, which begins with `about`, and exits with 0 for --help; prints the error and
  exits with 2 for everything that a user may have got wrong.
  """
  words, after = argv[1:], []
  if 'command' in FLAGS and '--' in words:
    at = words.index('--')
    words, after = words[:at], words[at + 1 :]
  try:
    words = FLAGS.read_flags_from_files(words)
    if any(w in _HELP for w in words):
      if argv[0].startswith('ftjax '):  # as the console script calls it
        about = about.replace('python -m ftjax.', 'ftjax ')
      print(_help(about))
      sys.exit(0)
    _check_words(words)
    c = None
    if 'config' in FLAGS:
      words, overrides = config_overrides.split(words)
      if path := _config_path(words):
        c = config_file.load(config_file.find(path))
        config_overrides.apply(c, overrides)
      elif overrides:
        raise ConfigError(_without_config(overrides[0].key))
    rest = FLAGS([argv[0], *words])
    if after:
      FLAGS['command'].value = after
    if 'compare' in FLAGS and FLAGS['compare'].value:
      FLAGS['compare'].value = [*FLAGS['compare'].value, *rest[1:]]
      rest = rest[:1]
    if len(rest) > 1:
      raise ConfigError(_unexpected(rest[1]))
    for name in _LOCATIONS:
      if name in FLAGS and FLAGS[name].value is not None:
        FLAGS[name].value = _location(name, FLAGS[name].value)
    if c is not None:
      FLAGS['config'].value = c
  except (ConfigError, flags.Error) as error:
    _leave(ConfigError(_flag_error(error)))
  return rest


def _check_words(words: list[str]) -> None:
  """Raises ConfigError for typos that absl would parse as something else."""
  for word, following in itertools.pairwise([*words, '--']):
    if word == '--':
      return
    if word[:1] in ('\u2010', '\u2011', '\u2012', '\u2013', '\u2014', '\u2212'):
      raise ConfigError(f'{word} begins with a dash; a flag begins with two hyphens, --')
    name = word.lstrip('-')
    if not word.startswith('-') or '=' in word or name not in FLAGS:
      continue
    if following.startswith('='):
      raise ConfigError(f'{word} {following}: write {word}=VALUE, without blanks')
    if not FLAGS[name].boolean and following.startswith('--'):
      raise ConfigError(f'{word} has no value; write {word}=VALUE ({FLAGS[name].help})')


def _config_path(words: list[str]) -> str:
  """Returns the value of --config, '' if it is not given.

  Raises:
    ConfigError: it is empty, or given twice with different values.
  """
  given = [w.partition('=')[2] for w in words if w.startswith(('--config=', '-config='))]
  given += [v for w, v in itertools.pairwise(words) if w in ('--config', '-config')]
  if '' in given:
    raise ConfigError('--config= has no value; give a file, or the name of a shipped config')
  if len(set(given)) > 1:
    raise ConfigError(f'--config is given twice, {given[0]} and {given[1]}; give one of them')
  return given[0] if given else ''


def _without_config(key: str) -> str:
  """Returns the message for --config.KEY without --config."""
  replay = '; a replay (--replay) takes the config of its run unchanged' * ('replay' in FLAGS)
  return f'--config.{key} changes a key of --config, which is missing: give --config=FILE{replay}'


def _location(name: str, value: str) -> str:
  """Returns the value of a flag for a folder or file, with '~' expanded to the user's home."""
  if not value.strip():
    raise ConfigError(f'--{name}= is empty; give a folder')
  locations.check(f'--{name}', value)
  return os.path.expanduser(value)


def _unexpected(word: str) -> str:
  """Returns the message for an argument that is not a flag."""
  name, equals, value = word.removeprefix('config.').partition('=')
  if 'command' in FLAGS:
    return f'unexpected argument {word!r}; write -- before the command, and flags before --'
  if equals and name in FLAGS:
    return f'unexpected argument {word!r}; did you mean --{word}?'
  if equals and 'config' in FLAGS and (key := _config_key(name)):
    return f'unexpected argument {word!r}; did you mean --config.{key}={value}?'
  return f'unexpected argument {word!r}; flags are written --name=value'


def _config_key(name: str) -> str:
  """Returns the config key that a name probably means, '' if none is near."""
  usual = keys.default()
  found = section.hint(name, usual).removeprefix('; did you mean ').partition('?')[0]
  return next((k for k in (name, found) if k in section.flat(usual)), '')


def _flag_error(error: Exception) -> str:
  """Returns the message of an error, with the flags as the user wrote them."""
  text = ' '.join(str(error).split())
  if isinstance(error, flags.UnrecognizedFlagError) and 'config' in FLAGS:
    name = error.flagname.lstrip('-')
    if name in section.flat(keys.default()):
      value = str(error.flagvalue).partition('=')[2] or 'VALUE'
      return f'--{name} is a key of the config: write --config.{name}={value}'
    if 'Did you mean' not in text:
      return f'{text}{_hint_with_flag(name)}'
  for name in FLAGS:
    if text.startswith(f'flag --{name}=None: '):
      return f'--{name} is missing: {FLAGS[name].help} See --help'
  return text


def _hint_with_flag(name: str) -> str:
  """Returns the hint for an unknown name, with the flag that sets the key."""
  found = section.hint(name, keys.default())
  return found.replace('did you mean ', 'did you mean --config.')


def _help(about: str) -> str:
  """Returns the text of --help: what the entry does, and its flags."""
  lines = [about.strip(), '', 'Flags:']
  for name in sorted(FLAGS):
    flag = FLAGS[name]
    if (FLAGS.find_module_defining_flag(name) or '').startswith('absl'):
      continue
    usual = '' if flag.default in (None, '', []) else f' (default: {flag.default})'
    lines.append(f'  --{flag.name}  {flag.help}{usual}')
  if 'config' in FLAGS:
    lines += ['', f'Shipped configs: {", ".join(config_file.shipped())}']
    lines.append('Keys of a config: docs/config_keys.md')
  return '\n'.join(lines)


def _leave(error: RunError) -> None:
  """Prints the message of an error and exits with its code. An early stop is no error."""
  sys.stdout.flush()
  print(_message(error), file=sys.stderr)
  sys.exit(error.exit_code)


def _message(error: RunError) -> str:
  return str(error) if isinstance(error, StoppedEarly) else f'error: {error}'


class _AboveBar(logging.Handler):
  """Log lines on stderr, written so that a progress bar stays below them."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.write(self.format(record), file=sys.stderr)


def _configure_logging() -> None:
  root = logging.getLogger()
  handler = _AboveBar()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  root.handlers = [handler]
  root.setLevel(logging.INFO)
  for noisy in ('absl', 'orbax', 'jax', 'tensorboardX'):
    logging.getLogger(noisy).setLevel(logging.WARNING)


def _end_processes(error: RunError) -> None:
  """Ends all processes of a run of several with the error's exit code, so that none waits."""
  if 'ftjax.cluster.processes' in sys.modules:
    from ftjax.cluster import processes

    if not processes.is_alone():
      print(_message(error), file=sys.stderr)
      processes.end(error.exit_code, str(error))


def _stop(number, frame):
  del number, frame
  raise StoppedEarly('SIGTERM: stopped; run the same command again to resume')


def run(main: Callable[[], None], *, has_flags: bool = True) -> None:
  """Runs the `main` of an entry after parsing; a RunError becomes its message and exit code.

  Args:
    main: of the entry.
    has_flags: False for an entry that reads its arguments from sys.argv itself.
  """
  about = sys.modules[main.__module__].__doc__ or ''

  def guarded(argv):
    del argv
    _configure_logging()
    # The training loop installs its own handler, which saves first.
    signal.signal(signal.SIGTERM, _stop)
    host_threads.reserve()
    try:
      main()
    except RunError as error:
      sys.stdout.flush()
      _end_processes(error)
      _leave(error)
    except KeyboardInterrupt:
      stopped = StoppedEarly('interrupted; run the same command again to resume')
      _end_processes(stopped)
      _leave(stopped)

  def parse(argv):
    return _parse(argv, about) if has_flags else FLAGS(argv[:1])

  app.run(guarded, flags_parser=parse)
