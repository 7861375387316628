"""A trainer without a model, as `study.launch` may name one: the same flags and files as
ftjax.train, in milliseconds.

python study_trainer.py --config=FILE [--config.stop_at=STEP] --workdir=DIR

A step adds a line to DIR/trained, so that a step that is trained twice is seen. The score of a
config has its best optim.lr at 1e-3, and grows with steps and rows. STUDY_TRAINER_FAULT names what
goes wrong: 'exit:CODE:KEY=VALUE' for the runs whose config has that value. STUDY_TRAINER_SLEEP:
seconds that a step takes.
"""

import json
import math
import os
import pathlib
import sys
import time

flags = dict(word.removeprefix('--').split('=', 1) for word in sys.argv[1:])
config = json.loads(pathlib.Path(flags['config']).read_text())
workdir = pathlib.Path(flags['workdir'])
steps = config['steps']
stop_at = int(flags.get('config.stop_at', 0)) or steps
workdir.mkdir(parents=True, exist_ok=True)


def rows_of(entries):
  """The rows of data.train or data.eval."""
  entries = entries.split(',') if isinstance(entries, str) else entries
  lines = [pathlib.Path(e.partition('::')[0]).read_text().splitlines() for e in entries if e]
  return [json.loads(line) for own in lines for line in own]


fault = os.environ.get('STUDY_TRAINER_FAULT', '')
if fault:
  _, code, test = fault.split(':', 2)
  key, _, value = test.partition('=')
  if json.dumps(config[key]) == value:
    print('error: the trainer was told to fail', file=sys.stderr)
    sys.exit(int(code))

train = rows_of(config['data.train']) if ':' not in str(config['data.train']) else [None] * 100
off = abs(math.log10(config['optim.lr'] / 1e-3))
log = workdir / 'trained'
done = len(log.read_text().splitlines()) if log.exists() else 0
for step in range(done + 1, stop_at + 1):
  time.sleep(float(os.environ.get('STUDY_TRAINER_SLEEP', 0)))
  with open(log, 'a') as file:
    file.write(f'{step}\n')


def loss(step):
  """Falls with steps; never equal for two seeds."""
  noise = 0.01 * math.sin(config['seed'] * 12.9898 + off)
  return 1 / (1 + step) + 0.3 * off + noise + config['batch_size'] / 1000


def is_right(row_id, share):
  """Whether a row is answered right: a share of them, nearly the same ones for every config."""
  place = math.sin(int(row_id) * 78.233 + 0.1 * config['seed']) * 43758.5453
  return place - math.floor(place) < share


with open(workdir / 'metrics.jsonl', 'a') as file:
  row = {'step': stop_at, 'split': 'eval', 'loss': loss(stop_at)}
  file.write(json.dumps(row) + '\n')
if stop_at < steps:
  sys.exit(0)
(workdir / 'eval').mkdir(exist_ok=True)
summary = {'tasks': {}}
tuned_share = 0.95 - 0.8 * max(len(train), 1) ** -0.4 - 0.05 * off
for text in config['eval.tasks']:
  name, _, path = text.partition('=choice:')
  lines, scores = [], {}
  for model, share in (('base', 0.5), ('tuned', tuned_share)):
    rights = []
    for i, row in enumerate(rows_of([path])):
      right = is_right(row.get('id', i), share)
      others = [c for c in row['choices'] if c != row['label']]
      prediction = row['label'] if right else others[0]
      n = len(row['choices'])
      values = {'right': (float(right),), 'right_by_length': (float(right),)}
      found = {'id': str(row.get('id', i)), 'label': row['label'], 'prediction': prediction}
      lines.append({'model': model, **found, 'values': values, 'scores': [0.0] * n})
      rights.append(right)
    scores[model] = {'accuracy': {'value': sum(rights) / len(rights)}}
  (workdir / 'eval' / f'{name}.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
  summary['tasks'][name] = {'scores': scores}
(workdir / 'eval' / 'summary.json').write_text(json.dumps(summary))
