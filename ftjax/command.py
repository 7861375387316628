"""How an entry is run: flags and config parsed before jax is imported, errors told in one line,
exit codes kept.

See ftjax/runtime/errors.py for the codes.
"""

import importlib
import logging
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from ftjax import config as config_lib
from ftjax.runtime.errors import ConfigError, RunError, StoppedEarly

FLAGS = flags.FLAGS


def define_config() -> None:
  """Declares --config=FILE_OR_NAME with --config.KEY=VALUE overrides."""
  config_flags.DEFINE_config_file(
    'config', None, 'A config file, or the name of a shipped one.', lock_config=True
  )
  flags.mark_flag_as_required('config')


def define_processes() -> None:
  """Declares the flags of a run of several processes; see runtime/distributed.py."""
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0; Cloud TPUs and SLURM tell it without.'
  )
  flags.DEFINE_integer('num_processes', None, 'Processes in all.', lower_bound=1)
  flags.DEFINE_integer('process_id', None, 'Number of this one, from 0.', lower_bound=0)
  flags.DEFINE_float(
    'init_timeout_s', 1800.0, 'Seconds to wait for the other processes.', lower_bound=0
  )
  flags.DEFINE_integer(
    'heartbeat_s', 100, 'Seconds of silence after which a process is lost.', lower_bound=1
  )


def join() -> None:
  """Meets the other processes of the run, if there are any; then only process 0 logs and prints.

  Raises:
    ConfigError: flags that cannot be meant, or a TPU that another process holds.
    StoppedEarly: somebody did not come.
  """
  import jax

  from ftjax.runtime import distributed, peers, tpu_lock

  launch = distributed.find(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  try:
    if launch is None:
      jax.devices()
      return
    distributed.initialize(launch, FLAGS.init_timeout_s, FLAGS.heartbeat_s)
  except RuntimeError as error:
    tpu_lock.explain(error)
    raise
  if not peers.is_main():
    logging.getLogger().setLevel(logging.WARNING)


def algorithm(name: str) -> ModuleType:
  """The file of an algorithm, one of algorithm_config.ALGORITHMS: it has `make_loss` and `run`.
  Imports jax.
  """
  return importlib.import_module(f'ftjax.{name}')


def _resolve(argv: list[str]) -> list[str]:
  """The arguments with the path of the config in place of its name."""
  out, names = [], iter(argv)
  for argument in names:
    flag, equals, name = argument.partition('=')
    if flag in ('--config', '-config'):
      name = name if equals else next(names, '')
      argument = f'--config={config_lib.find(name)}'
    out.append(argument)
  return out


def _told(error: Exception) -> str:
  """An error's text, without the listing of all keys that ml_collections puts in the middle."""
  text = str(error.args[0] if error.args else error)
  head, _, listed = text.partition(' Other fields present')
  hint = listed[at:] if (at := listed.rfind('Did you mean')) >= 0 else ''
  return f'{head} {hint}'.strip(' \'"')


def _file_error(path: str) -> str:
  """What is wrong with a config file on its own, with its line; '' where it can be read."""
  try:
    runpy.run_path(path)['get_config']()
  except _MISTAKES as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == path]
    place = f'{path}:{lines[-1]}' if lines else path
    return f'{place}: {type(error).__name__}: {_told(error)}'
  return ''


def _override_error(argument: str, error: Exception) -> str:
  """What is wrong with one --config.KEY=VALUE."""
  key, _, value = argument.lstrip('-').removeprefix('config.').partition('=')
  known = config_lib.flat(config_lib.default())
  if key in known:
    return (
      f'--config.{key}={value}: expected a value like the default, {known[key]!r} ({_told(error)})'
    )
  if key in config_lib.RANDOM_KEYS:
    return f'--config.{key}: the config does not set this key ({_told(error)})'
  return f'--config.{key}: there is no such key{config_lib.nearest(key, config_lib.default())}'


# What Python and ml_collections raise for a mistake in a config file or an override.
_MISTAKES = (
  AttributeError,
  KeyError,
  TypeError,
  ValueError,
  OSError,
  SyntaxError,
  NameError,
  ImportError,
  IndexError,
  ArithmeticError,
  AssertionError,
)


def _parse(argv: list[str]) -> list[str]:
  """absl's parser, with exit code 2 for everything that a user may have got wrong."""
  try:
    argv = [argv[0], *_resolve(argv[1:])]
    rest = FLAGS(argv)
    if len(rest) > 1:
      raise ConfigError(f'unexpected argument {rest[1]!r}; flags are written --name=value')
  except (ConfigError, flags.Error) as error:
    _leave(str(error), ConfigError.exit_code)
  except _MISTAKES as error:
    paths = [a.removeprefix('--config=') for a in argv if a.startswith('--config=')]
    if wrong_file := next(filter(None, map(_file_error, paths)), ''):
      _leave(wrong_file, ConfigError.exit_code)
    overrides = [a for a in argv if a.lstrip('-').startswith('config.')]
    known = {*config_lib.flat(config_lib.default()), *config_lib.RANDOM_KEYS}
    wrong = [
      a for a in overrides if a.lstrip('-').removeprefix('config.').partition('=')[0] not in known
    ]
    if wrong or len(overrides) == 1:
      _leave(_override_error((wrong or overrides)[0], error), ConfigError.exit_code)
    _leave(f'--config: {type(error).__name__}: {_told(error)}', ConfigError.exit_code)
  return rest


def _leave(message: str, code: int) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


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


def _tell_peers(error: RunError) -> None:
  """In a run of several processes nobody waits for one that has ended: all end with its code."""
  if 'ftjax.runtime.peers' in sys.modules:
    from ftjax.runtime import peers

    if not peers.is_alone():
      print(f'error: {error}', file=sys.stderr)
      peers.end(error.exit_code, str(error))


def _stop(number, frame):
  del number, frame
  raise StoppedEarly('SIGTERM: stopped; run the same command again to go on')


def run(main: Callable[[], None]) -> None:
  """Runs `main` after parsing; a RunError becomes its message and exit code."""

  def guarded(argv):
    del argv
    _configure_logging()
    # The training loop has a gentler handler of its own, which saves first.
    signal.signal(signal.SIGTERM, _stop)
    try:
      main()
    except RunError as error:
      sys.stdout.flush()
      _tell_peers(error)
      _leave(str(error), error.exit_code)
    except KeyboardInterrupt:
      _tell_peers(StoppedEarly('interrupted'))
      _leave('interrupted; run the same command again to go on', StoppedEarly.exit_code)

  app.run(guarded, flags_parser=_parse)
