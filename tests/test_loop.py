"""What the loop does when: with a fake step, writer and checkpoints."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.cluster.step_sync import StepSync
from ftjax.cluster.watchdog import Watchdog
from ftjax.runtime.errors import NonFiniteError, StoppedEarly
from ftjax.telemetry.console import Console, Headline
from ftjax.training.loop import Cadence, Hooks, Loop, Outputs, Progress, StopFlag

QUIET = Cadence(
  steps=10,
  log_every=1,
  eval_every=0,
  save_every=0,
  patience=0,
  metric='',
  mode='min',
  max_bad_steps=3,
  profile_start=0,
  profile_stop=0,
)


class Record:
  """The writer, the checkpoints and the throughput of a loop, which note what is asked of them."""

  trained_s = 0.0

  def __init__(self):
    self.events, self.rows, self.saved = [], [], {}

  def sync(self): ...

  def write(self, step, split, values):
    self.events.append(f'{split} {step}')
    self.rows.append(dict(values, step=step, split=split))

  def save(self, step, state, meta, metric):
    self.events.append(f'save {step}')
    self.saved[step] = (state, meta, metric)

  def wait(self):
    self.events.append('wait')

  def start(self):
    pass

  def waiting(self):
    return self

  paused = waiting

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def step_done(self, *, tokens, supervised, attended):
    self.counted = (tokens, supervised, attended)

  def read(self):
    return {}

  def of(self, split, key='step'):
    return [r[key] for r in self.rows if r['split'] == split]


def run(
  cadence,
  *,
  start=0,
  bad=(),
  losses=None,
  evals=None,
  progress=None,
  at_step=None,
  at_eval=None,
  watching=False,
  added=0.0,
):
  """(record, final state); the state counts steps. evals: {step: loss}. bad: steps that fail.
  added: term of the losses that no evaluation measures.
  """
  record = Record()
  streak = skipped = 0

  def feed(state, step):
    assert state == step  # what is fed may depend on the state: rollouts do
    return step

  def step(state, batch):
    nonlocal streak, skipped
    assert batch == state
    done = state + 1
    record.events.append(f'step {done}')
    if at_step:
      at_step(done)
    streak = streak + 1 if done in bad else 0
    skipped += done in bad
    metrics = dict(loss=jnp.float32(1.0 / done if losses is None else losses[done]))
    metrics |= {'loss/alone': metrics['loss'] - added} if added else {}
    metrics |= dict(grad_norm=jnp.float32(1), ok=jnp.bool_(done not in bad))
    metrics |= dict(supervised_tokens=jnp.float32(4), bad_streak=jnp.int32(streak))
    metrics |= dict(has_signal=jnp.bool_(True), no_signal=jnp.int32(0))
    metrics |= dict(skipped=jnp.int32(skipped), tokens=jnp.int32(5), attended=jnp.float32(7))
    return done, metrics

  def evaluate(state, done, is_cancelled):
    assert state == done
    record.events.append(f'evaluate {done}')
    if at_eval:
      at_eval(done)
    if is_cancelled():
      return None
    return {'loss': evals[done]} if evals else {}

  hooks = Hooks(
    evaluate=evaluate,
    meta=lambda done: {'step': done},
    saved=lambda state: state,
    watch=lambda done, values: record.events.append(f'watch {done}') if watching else None,
  )
  loop = Loop(
    step,
    cadence,
    hooks,
    Outputs(record, record, record, Console(Headline()), 'unused'),
    signals=StepSync(jax.sharding.get_mesh()),
    watchdog=Watchdog(dict.fromkeys(('step', 'evaluate', 'save'), 0.0)),
  )
  state = record.error = None
  try:
    state = loop.run(start, start, feed, progress or Progress())
  except (StoppedEarly, NonFiniteError) as error:
    record.error = error
  return record, state


def with_(**changes):
  return dataclasses.replace(QUIET, **changes)


def test_every_step_is_run_and_logged_once():
  record, state = run(QUIET)
  assert state == 10 and record.of('train') == list(range(1, 11))
  assert record.of('train', 'loss') == [float(np.float32(1 / k)) for k in range(1, 11)]
  assert list(record.saved) == [10] and record.events[-1] == 'wait'
  assert record.counted == (5, 4, 7)


def test_log_every_and_the_last_step():
  record, _ = run(with_(log_every=4))
  assert record.of('train') == [4, 8, 10]


def test_evaluations_and_saves_when_due_and_at_the_end():
  record, _ = run(with_(eval_every=4, save_every=3))
  assert [e for e in record.events if e.startswith('evaluate')] == [
    'evaluate 4',
    'evaluate 8',
    'evaluate 10',
  ]
  assert list(record.saved) == [3, 6, 9, 10]
  assert {step: state for step, (state, _, _) in record.saved.items()} == {
    s: s for s in (3, 6, 9, 10)
  }


def test_every_step_is_watched_once():
  record, _ = run(with_(log_every=5, save_every=3), watching=True)
  assert [e for e in record.events if 'watch' in e] == [f'watch {k}' for k in range(1, 11)]


def test_a_resumed_loop_keeps_the_cadence():
  record, _ = run(with_(log_every=4, eval_every=4, save_every=3), start=5)
  assert record.events[0] == 'step 6' and record.of('train') == [8, 10]
  assert list(record.saved) == [6, 9, 10]


def test_metrics_are_read_one_step_late_unless_something_is_due():
  record, _ = run(with_(steps=4, save_every=3))
  order = [e for e in record.events if not e.startswith('eval')]
  assert order == [
    *('step 1', 'step 2', 'train 1', 'step 3', 'train 2', 'train 3', 'save 3'),
    *('step 4', 'train 4', 'save 4', 'wait', 'wait'),
  ]


def test_at_the_end_of_a_step_read_evaluate_save():
  record, _ = run(with_(steps=2, eval_every=2, save_every=2), evals={2: 0.5})
  assert record.events[-6:] == ['train 2', 'evaluate 2', 'eval 2', 'save 2', 'wait', 'wait']


# The best metric


def test_a_better_metric_forces_a_save():
  evals = {2: 1.0, 4: 2.0, 6: 0.5, 8: 0.7, 10: 0.9}
  record, _ = run(with_(eval_every=2, metric='eval/loss'), evals=evals)
  assert {s: m for s, (_, _, m) in record.saved.items()} == {2: 1.0, 6: 0.5, 10: 0.9}
  told = record.saved[10][1]['progress']
  assert (told['value'], told['step'], told['evals_since']) == (0.5, 6, 2)


def test_max_is_the_other_way():
  evals = {5: 1.0, 10: 2.0}
  record, _ = run(with_(eval_every=5, metric='eval/loss', mode='max'), evals=evals)
  assert list(record.saved) == [5, 10]


def test_training_ends_when_the_metric_stays():
  evals = {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5, 5: 1.0}
  record, state = run(with_(eval_every=1, metric='eval/loss', patience=2), evals=evals)
  assert state == 4 and record.error is None and list(record.saved) == [1, 2, 4]
  assert record.saved[4][1]['ended'] and not record.saved[2][1]['ended']


def test_patience_continues_after_a_resume():
  settings = with_(eval_every=1, metric='eval/loss', patience=2)
  evals = {k: 2.0 for k in range(1, 11)}
  _, state = run(
    settings, start=3, evals=evals, progress=Progress(value=1.0, step=2, evals_since=1)
  )
  assert state == 4


def test_nan_is_never_the_best():
  evals = {5: float('nan'), 10: 1.0}
  record, _ = run(with_(eval_every=5, metric='eval/loss', patience=5), evals=evals)
  assert record.saved[10][1]['progress']['value'] == 1.0 and list(record.saved) == [10]


def test_a_metric_that_was_not_measured_costs_nothing():
  record, state = run(with_(eval_every=5, metric='eval/accuracy'), evals={5: 1.0, 10: 1.0})
  assert state == 10 and record.error is None and list(record.saved) == [10]


def test_a_metric_of_training_can_be_watched():
  losses = {k: float(k) for k in range(1, 11)}
  settings = with_(eval_every=2, metric='train/loss', patience=1)
  record, state = run(settings, losses=losses, evals=dict.fromkeys(range(2, 11, 2), 1.0))
  assert state == 4 and list(record.saved) == [2, 4]


def test_the_gap_is_to_the_losses_since_the_last_evaluation_also_over_a_resume():
  losses = {k: float(k) for k in range(1, 11)}
  settings = with_(eval_every=5, save_every=3)
  record, _ = run(settings, losses=losses, evals={5: 4.0, 10: 10.0})
  assert record.of('eval', 'gap') == [4.0 - 3.0, 10.0 - 8.0]
  progress = Progress(**record.saved[6][1]['progress'])
  again, _ = run(settings, start=6, losses=losses, evals={10: 10.0}, progress=progress)
  assert again.of('eval', 'gap') == [2.0]


def test_the_gap_is_without_what_evaluation_does_not_measure():
  losses = {k: float(k) for k in range(1, 11)}
  record, _ = run(with_(eval_every=5), losses=losses, evals={5: 4.0, 10: 10.0}, added=0.5)
  assert record.of('eval', 'gap') == [4.0 - 2.5, 10.0 - 7.5]


# Endings


class Signalling(dict):
  """Evaluation losses; looking up that of step `at` raises SIGTERM."""

  def __init__(self, values, at):
    super().__init__(values)
    self.at = at

  def __getitem__(self, step):
    if step == self.at:
      signal.raise_signal(signal.SIGTERM)
    return super().__getitem__(step)


def test_a_finished_run_can_be_made_longer():
  record, _ = run(QUIET)
  assert not record.saved[10][1]['ended']  # `ended` is for early stopping; steps tell the rest


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number):
  before = signal.getsignal(number)
  record, _ = run(with_(save_every=4), at_step=lambda s: s == 5 and signal.raise_signal(number))
  assert isinstance(record.error, StoppedEarly) and 'after step 5 of 10' in str(record.error)
  assert record.error.exit_code == 75
  assert record.events[-3:] == ['train 5', 'save 5', 'wait'] and list(record.saved) == [4, 5]
  assert 'step 6' not in record.events
  assert signal.getsignal(number) == before  # handlers are put back


def test_a_signal_at_the_last_step_stops_before_what_comes_after_training():
  record, _ = run(QUIET, at_step=lambda s: s == 10 and signal.raise_signal(signal.SIGTERM))
  assert isinstance(record.error, StoppedEarly) and list(record.saved) == [10]


@pytest.mark.parametrize('last', [5, 10])
def test_a_stop_saves_first_and_leaves_the_evaluation_pending(last):
  settings, evals = with_(eval_every=5), {5: 1.0, 10: 2.0}
  record, _ = run(
    settings, evals=evals, at_step=lambda s: s == last and signal.raise_signal(signal.SIGTERM)
  )
  assert isinstance(record.error, StoppedEarly) and f'evaluate {last}' not in record.events
  told = record.saved[last][1]['progress']
  assert told['eval_pending']
  again, state = run(settings, start=last, evals=evals, progress=Progress(**told))
  assert state == 10 and again.events[:2] == [f'evaluate {last}', f'eval {last}']
  whole, _ = run(settings, evals=evals)
  assert record.of('eval', 'gap') + again.of('eval', 'gap') == whole.of('eval', 'gap')


def test_a_stop_cancels_an_evaluation_and_a_pending_one_again():
  settings, evals = with_(eval_every=5), {5: 1.0, 10: 2.0}

  def stop(step):
    if step == 5:
      signal.raise_signal(signal.SIGTERM)

  record, _ = run(settings, evals=evals, at_eval=stop)
  assert isinstance(record.error, StoppedEarly) and 'step 6' not in record.events
  assert record.of('eval') == [] and list(record.saved) == [5]
  owing = Progress(**record.saved[5][1]['progress'])
  again, _ = run(settings, start=5, evals=evals, progress=owing, at_eval=stop)
  assert isinstance(again.error, StoppedEarly) and again.events == ['evaluate 5']
  assert again.saved == {}  # the checkpoint of step 5 still owes it


def test_a_stop_waits_for_the_evaluation_that_the_best_checkpoint_needs():
  settings = with_(eval_every=5, metric='eval/loss')
  evals = {5: 1.0, 10: 2.0}
  record, _ = run(
    settings, evals=evals, at_step=lambda s: s == 5 and signal.raise_signal(signal.SIGTERM)
  )
  assert record.of('eval') == [5] and record.saved[5][2] == 1.0
  assert not record.saved[5][1]['progress']['eval_pending']


def test_a_second_interrupt_ends_at_once():
  with pytest.raises(KeyboardInterrupt), StopFlag() as flag:
    signal.raise_signal(signal.SIGINT)
    assert flag.wanted
    signal.raise_signal(signal.SIGINT)


def test_bad_steps_in_a_row_end_the_run():
  record, _ = run(QUIET, bad={4, 5, 6}, losses={k: 1.0 for k in range(1, 11)})
  assert isinstance(record.error, NonFiniteError) and 'step 6' in str(record.error)
  assert record.error.exit_code == 4 and 'optim.lr' in str(record.error)
  # Read one step late, so step 7 was begun; nothing was saved after the bad ones.
  assert 'step 8' not in record.events and record.saved == {}
  assert record.of('train')[-1] == 6


def test_a_run_without_one_finite_step_fails():
  steps = with_(steps=2)
  record, _ = run(steps, bad={1, 2}, losses={1: 1.0, 2: 1.0})
  assert isinstance(record.error, NonFiniteError) and 'all 2 updates' in str(record.error)


def test_a_signal_during_the_last_evaluation_stops_before_what_comes_after():
  evals = Signalling({k: 1.0 for k in range(1, 11)}, at=10)
  record, _ = run(with_(eval_every=5), evals=evals)
  assert isinstance(record.error, StoppedEarly) and 10 in record.saved


def test_bad_steps_that_recover_are_counted_and_passed():
  bad = {2, 3, 5, 6, 9}
  record, state = run(QUIET, bad=bad, evals={10: 1.0})
  assert state == 10 and record.error is None
  assert {r['step'] for r in record.rows if not r.get('ok', True)} == bad


def test_a_bad_loss_does_not_enter_the_gap():
  losses = dict.fromkeys(range(1, 11), 2.0) | {4: float('nan')}
  record, _ = run(QUIET, bad={4}, losses=losses, evals={10: 5.0})
  assert record.of('eval', 'gap') == [3.0]


# Profiles


@pytest.mark.parametrize(
  ('start', 'begin', 'end', 'traced'),
  [
    (0, 3, 6, [4, 5, 6]),
    (0, 0, 0, []),
    (0, 5, 5, []),
    (0, 0, 2, [1, 2]),
    (4, 3, 6, [5, 6]),  # resumed inside
    (7, 3, 6, []),  # resumed after
    (0, 8, 20, [9, 10]),  # longer than the run
    (0, 12, 20, []),
  ],
)
def test_the_profiler_runs_between_two_steps(monkeypatch, start, begin, end, traced):
  running, seen = [False], []

  def begin_trace(folder):
    assert folder == 'unused' and not running[0]
    running[0] = True

  def end_trace():
    assert running[0], 'no trace was begun'
    running[0] = False

  monkeypatch.setattr('jax.profiler.start_trace', begin_trace)
  monkeypatch.setattr('jax.profiler.stop_trace', end_trace)
  run(
    with_(profile_start=begin, profile_stop=end),
    start=start,
    at_step=lambda s: seen.append(s) if running[0] else None,
  )
  assert seen == traced and not running[0]


def test_a_stop_inside_the_profile_still_writes_it(monkeypatch):
  calls = []
  monkeypatch.setattr('jax.profiler.start_trace', lambda folder: calls.append('start'))
  monkeypatch.setattr('jax.profiler.stop_trace', lambda: calls.append('stop'))
  record, _ = run(
    with_(profile_start=2, profile_stop=9),
    at_step=lambda s: s == 5 and signal.raise_signal(signal.SIGTERM),
  )
  assert isinstance(record.error, StoppedEarly) and calls == ['start', 'stop']
