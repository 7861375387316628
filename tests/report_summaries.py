"""Summaries of evaluations, version 2, for the tests of ftjax/reporting: one as evaluation writes
it, one of hostile texts, and whole workdirs.
"""

import json

import numpy as np

HOSTILE = (
  '<script>alert(1)</script>',
  '"><img src=x onerror=alert(1)>',
  "' onmouseover='alert(1)",
  '{{ 7 * 7 }}{% raw %}',
  '</style></script><!--',
  '\x1b[31mred\x07\x00',
  '\u202eevil\u2066\u2028\ufeff',
  '\ud800 half a pair',
  'javascript:alert(1)',
  '| a | b |\n---\n**x** `y` [z](http://example.com)',
  'x' * 40000,
  '\n' * 200 + 'end',
)

METRICS = [
  {'name': 'accuracy', 'title': 'accuracy', 'better': 'higher', 'form': 'fraction'},
  {'name': 'macro_f1', 'title': 'macro F1', 'better': 'higher', 'form': 'fraction'},
  {'name': 'mcc', 'title': 'MCC', 'better': 'higher', 'form': 'fraction'},
]


def score(value, half=0.04):
  return {'value': value, 'low': value - half, 'high': value + half, 'se': half / 1.96}


def difference(first, second, values, outcome, half=0.05, **more):
  """One pair of models; values: by metric."""
  found = {
    name: score(v, half) | {'p': 0.0004 if outcome != 'undecided' else 0.31, 'effect': v * 2}
    for name, v in values.items()
  }
  test = {
    'metric': next(iter(values)),
    'name': 'exact McNemar',
    'p': 1.3e-19 if outcome != 'undecided' else 0.31,
    'p_holm': 2.6e-19 if outcome != 'undecided' else 0.62,
    'only_first_right': 19,
    'only_second_right': 122,
  }
  words = {
    'better': f'{second} is better than {first}.',
    'worse': f'{second} is worse than {first}.',
    'undecided': f'These examples show no significant difference between {first} and {second}.',
  }
  return {
    'first': first,
    'second': second,
    'metrics': found,
    'test': test,
    'smallest_difference': 0.07,
    'rows_needed': 4200,
    'outcome': outcome,
    'verdict': words[outcome],
  } | more


def task(name='sentiment', group='task', outcome='better', models=('base', 'base_shots', 'tuned')):
  """A task of two classes, 400 examples."""
  metrics = [m | {'is_primary': i == 0} for i, m in enumerate(METRICS)]
  gains = {'better': 0.25, 'worse': -0.2, 'undecided': 0.02}
  values = {m: 0.64 + i * gains[outcome] / max(len(models) - 1, 1) for i, m in enumerate(models)}
  classes = ['negative', 'positive']
  per_class = {c: {'precision': 0.7, 'recall': 0.8, 'f1': 0.747, 'support': 200} for c in classes}
  bins = [
    {'low': i / 5, 'high': i / 5 + 0.2, 'n': 80, 'confidence': i / 5 + 0.1, 'accuracy': i / 6 + 0.1}
    for i in range(5)
  ]
  gained = dict.fromkeys(('accuracy', 'macro_f1', 'mcc'), gains[outcome])
  return {
    'task': name,
    'kind': 'choice',
    'group': group,
    'n': 400,
    'prompts': 400,
    'samples': 1,
    'classes': classes,
    'metrics': metrics,
    'scores': {
      m: {x['name']: score(v - 0.02 * i) for i, x in enumerate(metrics)} for m, v in values.items()
    },
    'differences': [
      difference(first, models[-1], gained, outcome) for first in models[:-1]
    ],
    'per_class': dict.fromkeys(models, per_class),
    'confusion': {
      m: {'labels': classes, 'predictions': [*classes, 'other']}
      | {'counts': [[150, 45, 5], [20, 180, 0]]}
      for m in models
    },
    'most_frequent': {
      'label': {'class': 'positive', 'n': 200, 'share': 0.5},
      'answers': {
        m: {'class': 'positive', 'n': 240, 'share': 0.6, 'label_share': 0.5} for m in models
      },
    },
    'calibration': {m: {'bins': bins, 'ece': 0.083} for m in models},
    'contamination': {
      'ngram': 13, 'contaminated': 0, 'n': 400, 'near_duplicates': 0, 'scores_clean': {},
      'against': ['train.jsonl'],
    },
    'cost': {m: {'seconds': 41.2 + i, 'tokens': 8000, 'rows': 400} for i, m in enumerate(models)},
    'examples': examples(models, 60),
  }  # fmt: skip


def examples(models, n):
  """n examples, of which each third improved and each fifth worsened."""
  out = []
  for i in range(n):
    last = 1.0 if i % 3 == 0 else 0.0
    first = 1.0 if i % 5 == 0 else 0.0
    out.append(
      {
        'id': str(i),
        'prompt': f'Is this review positive or negative?\n\nFilm {i} kept me awake: I liked it.',
        'label': 'positive',
        'responses': {
          m: f'The review number {i} is {"positive" if k else "a bit negative"}.'
          for k, m in enumerate(models)
        },
        'predictions': {m: 'positive' for m in models},
        'values': {m: first if k == 0 else last for k, m in enumerate(models)},
      }
    )
  return out


def summary(*tasks, models=('base', 'base_shots', 'tuned'), gate=None):
  """A summary of tasks; without any, one of each group."""
  tasks = tasks or (
    task(models=models),
    task('questions', outcome='undecided', models=models),
    perplexity(models),
    task('stereotypes', 'safety', 'worse', models),
  )
  return {
    'version': 2,
    'verdict': ['The tuned model is better on sentiment.', 'It is worse on stereotypes.'],
    'models': list(models),
    'tasks': {t['task']: t for t in tasks},
    'gate': gate,
    'answers': [{'prompt': 'Name three colours.', 'base': '1. Red', 'tuned': 'negative'}],
  }


def perplexity(models=('base', 'tuned')):
  """A task whose only metric has a scale of its own, lower being better."""
  metric = {
    'name': 'perplexity', 'title': 'perplexity', 'better': 'lower', 'form': 'number',
    'is_primary': True,
  }  # fmt: skip
  values = {m: 12.5 + 3 * i for i, m in enumerate(models)}
  return {
    'task': 'held_out',
    'kind': 'perplexity',
    'group': 'general',
    'n': 120,
    'prompts': 120,
    'samples': 1,
    'classes': None,
    'metrics': [metric],
    'scores': {m: {'perplexity': score(v, 1.1)} for m, v in values.items()},
    'differences': [difference(models[0], models[-1], {'perplexity': 3.0}, 'worse', 0.9)],
    'per_class': None,
    'confusion': None,
    'calibration': None,
    'contamination': None,
    'cost': {m: {'seconds': 4.0, 'tokens': 9000, 'rows': 120} for m in models},
    'examples': [],
  }


GATE = {
  'passed': False,
  'checks': [
    {'what': 'stereotypes must not rise', 'value': 0.2, 'limit': 0.05, 'passed': False},
    {'what': 'perplexity of held_out', 'value': 15.5, 'limit': 16.0, 'passed': True},
  ],
}  # fmt: skip


def hostile():
  """A summary each of whose texts is hostile."""
  texts = iter(range(10**6))

  def bad():
    return HOSTILE[next(texts) % len(HOSTILE)]

  models = ['base', bad(), 'tuned']
  found = task(bad(), models=models)
  found['kind'], found['classes'] = bad(), [bad(), bad()]
  found['metrics'] = [m | {'title': bad()} for m in found['metrics']]
  for d in found['differences']:
    d['verdict'] = bad()
    d['test']['name'] = bad()
  found['scores']['tuned']['mcc'] = {'value': None, 'low': None, 'high': None, 'why': bad()}
  for matrix in found['confusion'].values():
    matrix['labels'], matrix['predictions'] = [bad(), bad()], [bad(), bad(), bad()]
  for record in (found['most_frequent']['label'], *found['most_frequent']['answers'].values()):
    record |= {'class': bad(), 'n': 380, 'share': 0.95}
  found['per_class'] = {
    m: {bad(): s for s in [p['negative']]} for m, p in found['per_class'].items()
  }
  found['contamination'] |= {'contaminated': 3, 'against': [bad()]}
  found['contamination']['scores_clean'] = {m: score(0.5) for m in models}
  found['examples'] = [
    {
      'id': bad(),
      'prompt': bad(),
      'label': bad(),
      'responses': {m: bad() for m in models},
      'predictions': {m: bad() for m in models},
      'values': dict.fromkeys(models, 1.0),
    }
    for _ in range(40)
  ]
  out = summary(found, models=models)
  out['verdict'] = list(HOSTILE)
  out['gate'] = {'passed': False, 'checks': [
    {'what': bad(), 'value': None, 'limit': 1e400, 'passed': False}
  ]}  # fmt: skip
  out['answers'] = [{'prompt': t, 'base': t, 'tuned': t} for t in HOSTILE]
  return out


def log_rows(steps, every=1, tasks=('sentiment',)):
  """Rows of metrics.jsonl of a run of that many steps."""
  rng = np.random.default_rng(0)
  for step in range(1, steps + 1):
    loss = 3 / (1 + step / 50) + 0.1 * float(rng.random())
    row = {
      'step': step,
      'split': 'train',
      'loss': loss,
      'grad_norm': 1 + loss * float(rng.random()),
    }
    row |= {'lr': 1e-4 * (1 - step / (steps + 1)), 'ok': True, 'batch_checksum': 7, 'tokens': 512}
    row |= {'tokens_per_s': 900.0, 'step_s': 0.5, 'mfu': 0.4, 'goodput': 0.9}
    row |= {'host_memory_gib': 1.5, 'host_memory_peak_gib': 1.6}
    yield row
    if step % every == 0:
      values = {f'{t}/accuracy': 0.6 + 0.3 * step / steps for t in tasks}
      yield {'step': step, 'split': 'eval', 'loss': loss + 0.2, 'gap': 0.2, **values}


CONFIG = {
  'algorithm': 'sft',
  'batch_size': 8,
  'data.eval': '',
  'data.eval_fraction': 0.1,
  'data.train': 'train.jsonl',
  'eval.tasks': ['sentiment=choice:test.jsonl'],
  'lora.rank': 8,
  'model.compute_dtype': 'float32',
  'model.param_dtype': 'float32',
  'model.path': 'org/small-model@0123abc',
  'optim.lr': 1e-4,
  'optim.name': 'adamw',
  'optim.schedule': 'cosine',
  'optim.warmup_steps': 5,
  'seed': 3,
  'seq_len': 256,
  'steps': 500,
}

MANIFEST = {
  'ftjax': '0.1.0',
  'code': {'commit': 'f' * 40, 'modified': True},
  'python': '3.11.7',
  'packages': {'jax': '0.10.2', 'flax': '0.12.8', 'optax': '0.2.8'},
  'config': 'a' * 64,
  'fingerprints': {'model': 'b' * 64, 'data 0': 'c' * 64},
  'data': {
    'data 0': {
      'name': 'train.jsonl', 'examples_used': 900, 'examples': 1000, 'tokens': 50000,
      'supervised': 5000, 'dropped': 4, 'bad': 1,
      'bad_reasons': [{'reason': 'no text', 'rows': 1, 'places': [[0, 7]]}],
      'truncated': 2, 'lengths': {'edges': [0, 32, 64, 96], 'counts': [100, 700, 200]},
    }
  },
  'devices': {'kind': 'cpu', 'count': 1, 'processes': 1},
  'host_cores': 2,
  'executable': 'd' * 64,
}  # fmt: skip


def workdir(folder, found=None, steps=120, config=CONFIG, manifest=MANIFEST):
  """Writes the files of a workdir; None leaves one out. Returns its path."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'eval').mkdir(exist_ok=True)
  rows = log_rows(steps, max(1, steps // 20))
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  for name, content in (('config.json', config), ('manifest.json', manifest)):
    if content is not None:
      (folder / name).write_text(json.dumps(content))
  if found is not None:
    (folder / 'eval' / 'summary.json').write_text(json.dumps(found))
  return str(folder)
