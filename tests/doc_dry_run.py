"""Runs commands of the docs up to the moment when they would begin to work.

  python doc_dry_run.py < [{"words": [...], "folder": DIR}, ...]  > [{"reached", "code", "message",
  "checked"}, ...]

Every command runs in a fork of this process, which has imported what all of them need, with the
real flags, config and checks. An entry of ftjax is stopped where it first imports jax, which comes
after all checks of flags and config; supervise, study and evaluate --watch where they would start;
a script and lm-eval where their arguments are parsed.

  reached: 'jax', 'start' or 'arguments' where it was stopped there; '' where it ended by itself
  code: the exit code of one that ended
  message: what it printed to stderr
  checked: whether the config was validated
"""

import argparse
import importlib.abc
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ftjax.config import validation  # noqa: E402
from ftjax.reporting import watch  # noqa: E402
from ftjax.studies import runner  # noqa: E402
from ftjax.supervision import supervisor  # noqa: E402

# What the entries import before jax, and what takes long there.
SHARED = (
  'ftjax.cli', 'ftjax.data.describe', 'ftjax.experiment.compare_runs', 'ftjax.hf.gguf_export',
  'ftjax.hf.model_copy', 'ftjax.storage.hub_push', 'huggingface_hub',
)  # fmt: skip
_SECONDS = 60  # for one command


class Reached(BaseException):
  """The command would begin to work here; no `except Exception` holds it up."""


class NoJax(importlib.abc.MetaPathFinder):
  """Stops whoever imports jax."""

  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in ('jax', 'jaxlib'):
      raise Reached('jax')
    return None


def stop(where):
  """A function that stops its caller."""

  def stopped(*_, **__):
    raise Reached(where)

  return stopped


def then_stop(parse):
  """A method that parses arguments, and then stops its caller."""

  def parse_and_stop(self, *arguments, **named):
    parse(self, *arguments, **named)
    raise Reached('arguments')

  return parse_and_stop


def run(words):
  """Runs one command in this process; raises Reached or SystemExit. Returns when it has ended."""
  if words[:2] == ['python', '-m']:
    sys.argv = words[2:]
    if words[2] == 'ftjax.lm_eval':
      from lm_eval._cli.harness import HarnessCLI

      HarnessCLI().parse_args()
      raise Reached('arguments')
    runpy.run_module(words[2], run_name='__main__', alter_sys=False)
  elif words[0] == 'ftjax':
    sys.argv = words
    runpy.run_module('ftjax', run_name='__main__', alter_sys=False)
  else:
    for name in ('parse_args', 'parse_intermixed_args'):
      setattr(argparse.ArgumentParser, name, then_stop(getattr(argparse.ArgumentParser, name)))
    subprocess.Popen = stop('a process')  # it must not get that far
    file = ROOT / words[1]
    sys.argv = [str(file), *words[2:]]
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name='__main__')


def report(words, folder):
  """What a command came to. For a fork."""
  found = {'reached': '', 'code': 0, 'checked': False}
  os.chdir(folder)
  sys.path.insert(0, folder)
  os.environ.update(HF_HUB_OFFLINE='1', JAX_PLATFORMS='cpu')
  validate = validation.validate

  def validate_and_note(c):
    found['checked'] = True
    validate(c)

  validation.validate = validate_and_note
  supervisor.supervise = stop('start')
  watch.watch = stop('start')  # it waits for a run
  runner.Runner.run = stop('start')  # of a study
  sys.meta_path.insert(0, NoJax())
  with tempfile.TemporaryFile('w+') as errors:
    os.dup2(errors.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 0)
    try:
      run(words)
    except Reached as place:
      found['reached'] = str(place)
    except SystemExit as end:
      found['code'] = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
      traceback.print_exc()
      found['code'] = 1
    sys.stderr.flush()
    errors.seek(0)
    return found | {'message': errors.read()}


def forked(words, folder):
  """`report`, by a fork."""
  reads, writes = os.pipe()
  if not (child := os.fork()):
    signal.alarm(_SECONDS)
    with os.fdopen(writes, 'w') as out:
      json.dump(report(words, folder), out)
    os._exit(0)
  os.close(writes)
  with os.fdopen(reads) as text:
    found = text.read()
  os.waitpid(child, 0)
  return json.loads(found or '{"reached": "", "code": -1, "message": "died", "checked": false}')


if __name__ == '__main__':
  for module in SHARED:
    importlib.import_module(module)
  assert 'jax' not in sys.modules
  print(json.dumps([forked(row['words'], row['folder']) for row in json.load(sys.stdin)]))
