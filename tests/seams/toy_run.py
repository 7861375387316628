"""Runs of entries in this folder, where the toy modules are found as a user's are."""

import json
import pathlib
import shutil

import tiny_run

FOLDER = pathlib.Path(__file__).resolve().parent


def arguments(config, workdir, *settings):
  return [f'--config={config}', f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]


def train(config, workdir, *settings):
  """Runs a training to its end and returns what it printed."""
  code, printed = tiny_run.run('train', arguments(config, workdir, *settings), folder=FOLDER)
  assert code == 0, printed
  return printed


def resumed(whole, workdir, last, config, *settings):
  """Runs a finished training again without its last checkpoint; returns what differs."""
  shutil.copytree(whole, workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(last))
  printed = train(config, workdir, *settings)
  assert 'resuming after step' in printed
  return tiny_run.differences(workdir, whole)


def rows(workdir, split):
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if row['split'] == split]
