"""A resume removes everything that was written after its step, from every writer by one call."""

import json

import jax
import numpy as np
import tiny_rollouts
from test_metrics_writer import _events

from ftjax.experiment import compare, fit, resume
from ftjax.rl import measurements, rollout_source
from ftjax.rl.rollout_source import RolloutSource
from ftjax.runtime import trees


def steps_in(workdir):
  """{file: steps or rollouts that it has rows of}."""
  found = {}
  for name in ('metrics.jsonl', 'samples.jsonl'):
    lines = (workdir / name).read_text().splitlines()
    found[name] = sorted({json.loads(line)['step'] for line in lines})
  found['rollouts'] = sorted(p.name for p in (workdir / 'rollouts').iterdir())
  return found


def written(workdir):
  """A run that was killed after step 4, with two updates on each rollout; its newest checkpoint is
  of step 3."""
  run = tiny_rollouts.start(
    workdir,
    'best_of_n',
    **{'rollout.minibatches': 2, 'eval.prompts': ('1 + 1 =',), 'eval.max_tokens': 8},
  )
  writer, source = fit._writer(run), tiny_rollouts.parts_of(run).source
  resume.cut((writer, source), resume.Start(0, None, True))
  writer.open()
  samples = []
  for step in range(1, 5):
    writer.write(step, 'train', {'loss': 1.0})
    writer.write(step, 'eval', {'loss': 2.0})
    samples.append({'step': step, 'prompt': '1 + 1 =', 'answer': str(step)})
  writer.close()
  text = ''.join(json.dumps(row) + '\n' for row in samples)
  (workdir / 'samples.jsonl').write_text(text)
  for number in (0, 1, 2):  # of steps 0, 1; 2, 3; 4, 5
    for name in (str(number), f'kept-{number}'):
      source.files.write_rows(name, [{'a': 1}])
    (workdir / 'rollouts' / f'{number}.npz').write_bytes(b'')
  source.close()
  return run


def cut(run, step, eval_pending):
  """What is left after the resume from a checkpoint; (sessions, steps) of TensorBoard's events."""
  writer, source = fit._writer(run), tiny_rollouts.parts_of(run).source
  progress = {'eval_pending': eval_pending}
  saved = {'progress': progress} if step >= 0 else None
  evaluator = compare.Evaluator(run)
  resume.cut((writer, evaluator.samples, source), resume.Start(max(step, 0), saved, True))
  writer.open()
  writer.close()
  source.close()
  return steps_in(run.path)


def test_everything_after_the_restored_step_goes(tmp_path):
  run = written(tmp_path)
  run.path = tmp_path
  assert steps_in(tmp_path)['metrics.jsonl'] == [1, 2, 3, 4]
  # Step 3 is within rollout 1, whose files the resume still needs.
  of = lambda *numbers: sorted(  # noqa: E731
    f'{name}' for n in numbers for name in (f'{n}.jsonl', f'{n}.npz', f'kept-{n}.jsonl')
  )
  assert cut(run, 3, False) == {
    'metrics.jsonl': [1, 2, 3],
    'samples.jsonl': [1, 2, 3],
    'rollouts': of(0, 1),
  }
  assert _events(tmp_path / 'tensorboard')[1] == [0, 4], 'TensorBoard hides events of step 4'
  # An evaluation that was cut short is made again, with its samples.
  assert cut(run, 3, True)['samples.jsonl'] == [1, 2]
  rows = [json.loads(r) for r in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [r['split'] for r in rows if r['step'] == 3] == ['train']
  # At the end of a rollout its files stay, and those of the next one go.
  assert cut(run, 2, False)['rollouts'] == of(0)
  assert cut(run, -1, False) == {'metrics.jsonl': [], 'samples.jsonl': [], 'rollouts': []}


def test_arrays_of_a_rollout_cross_once(tmp_path, monkeypatch):
  """With a reference, old log-probs and values: each array of a rollout is placed once for all
  models, then once for the update; every result is fetched once."""
  settings = {'policy.kl_coef': 0.1, 'rollout.minibatches': 2, 'grad_accum': 2}
  s = tiny_rollouts.Steps(tmp_path, 'ppo', **settings)
  s.source.score(s.state.parameters(), *first_rollout(s))  # the first one also measures rounding
  calls, placed, fetched = [], [], []
  monkeypatch.setattr(measurements, 'place', counting(measurements.place, placed))
  monkeypatch.setattr(rollout_source, 'place', counting(rollout_source.place, placed))
  get = jax.device_get

  def device_get(tree):
    fetched.extend(trees.flatten(tree) if isinstance(tree, dict) else ())
    return get(tree)

  monkeypatch.setattr(measurements.jax, 'device_get', device_get)
  rewards = s.source._rewards._rewards
  score = rewards.score
  monkeypatch.setattr(
    rewards, 'score', lambda batch, *a: calls.append(len(batch.completions)) or score(batch, *a)
  )
  s.batch(0)
  rows, update = 16, 8
  assert calls == [rows], 'reward functions are called once for all completions'
  sizes = {}
  for name, size in placed:
    sizes[name] = sizes.get(name, 0) + size
  assert sizes.pop('tokens') == rows + update
  assert sizes['sampler_logp'] == sizes['advantages'] == sizes['returns'] == update
  micro_batches = rows // 4
  assert sorted(fetched) == sorted(['old_logp', 'old_values', 'ref_logp'] * micro_batches)
  s.source.close()


def first_rollout(s):
  prompts = [s.run.data.prompt(n) for n in range(4)]
  found = s.source.sampler.sample(s.state.parameters(), prompts, range(4), seed=0, group=4)
  return prompts, found, None


def counting(place, placed):
  """`place`, which notes (array, rows) of every call."""

  def count(batch, shardings):
    placed.extend((k, int(np.prod(v.shape[:-1] or v.shape))) for k, v in batch.items())
    return place(batch, shardings)

  return count


def test_a_source_may_be_closed_twice(tmp_path):
  source = tiny_rollouts.parts_of(tiny_rollouts.start(tmp_path)).source
  assert isinstance(source, RolloutSource)
  source.close()
  source.close()
