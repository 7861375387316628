"""Studies whose runs are those of study_trainer.py: real processes, without a model."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import tiny_run

from ftjax import config
from ftjax.config import validation
from ftjax.studies import kinds

TRAINER = tiny_run.ROOT / 'tests' / 'study_trainer.py'
LAUNCH = (
  shlex.join([sys.executable, '-S', str(TRAINER)]) + ' {config_overrides} --workdir={workdir}'
)


def make_config(**settings):
  """A config of tiny runs; settings like study__trials=3."""
  c = config.default()
  c.model.random = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
  )
  c.steps = 90
  c.data.train = 'sums:90:10'
  c.data.eval_fraction = 0.2
  c.study.launch = LAUNCH
  for name, value in settings.items():
    section, _, key = name.rpartition('__')
    (c[section] if section else c)[key] = value
  return c


def run(c, workdir):
  """Runs a study in this process; returns its study.json."""
  validation.validate(c)
  kinds.run(c, str(workdir))
  return json.loads((pathlib.Path(workdir) / 'study.json').read_text())


def trained(workdir):
  """{run: the steps that it trained, in order}."""
  found = sorted(pathlib.Path(workdir).glob('runs/*/trained'))
  return {p.parent.name: [int(line) for line in p.read_text().split()] for p in found}


def records(workdir):
  """{run: its record, without times}."""
  out = {}
  for path in sorted(pathlib.Path(workdir).glob('records/*.json')):
    record = json.loads(path.read_text())
    for outcome in record['outcomes']:
      del outcome['seconds'], outcome['starts']
    out[path.stem] = record
  return out


def labelled_rows(count, path, *, groups=None):
  """Writes chat rows with the answers yes and no, two thirds of them yes."""
  rows = []
  for i in range(count):
    answer = 'no' if i % 3 == 0 else 'yes'
    messages = [
      {'role': 'user', 'content': f'Is statement {i} true?'},
      {'role': 'assistant', 'content': answer},
    ]
    rows.append({'messages': messages} | ({'group': groups[i]} if groups else {}))
  pathlib.Path(path).write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return rows


def start(arguments, log, **environment):
  """Starts `python -m ftjax.study`; its output goes to the end of a file."""
  variables = os.environ | {'PYTHONPATH': str(tiny_run.ROOT)} | environment
  with open(log, 'ab') as output:
    return subprocess.Popen(
      [sys.executable, '-m', 'ftjax.study', *arguments],
      cwd=tiny_run.ROOT,
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=subprocess.STDOUT,
      env=variables,
    )
