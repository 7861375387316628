"""The summaries of a run for the console, from its config, state and files; the texts are in
telemetry/console.py."""

import shlex
import sys
from collections.abc import Sequence

import jax
import ml_collections

from ftjax.config import algorithms
from ftjax.experiment import label_names
from ftjax.experiment.run import Run
from ftjax.experiment.trainer import Trainer
from ftjax.hf.label_files import REWARD
from ftjax.models import counts
from ftjax.storage import files
from ftjax.telemetry import console
from ftjax.training import optimizer


def headline(c: ml_collections.ConfigDict) -> console.Headline:
  """Returns the metrics that a config's algorithm shows first."""
  record = algorithms.of(c)
  bar, evaluation = record.headline(c)
  is_larger_better = record.measured(c).get(evaluation[0]) == 'max'
  return console.Headline(bar, evaluation, is_larger_better, record.on_rollouts)


def make_console(c: ml_collections.ConfigDict) -> console.Console:
  """Returns the console of a run."""
  return console.Console(headline(c), c.checkpoint.best_metric, c.checkpoint.best_mode)


def parameters(trainer: Trainer) -> dict[str, int]:
  """Returns {"trained", "frozen"}: how many parameters the optimizer changes, and how many of the
  trained models it leaves.
  """
  run, c = trainer.run, trainer.run.config
  total = frozen = 0
  shares = optimizer.frozen_shares(c.optim.freeze, trainer.leaves)
  for name, declared in run.trained_leaves().items():
    number = counts.weights(declared)
    share = 1.0 if name in trainer.frozen else shares[name]
    total, frozen = total + number, frozen + round(number * share)
  return {'trained': total - frozen, 'frozen': frozen}


def _model(trainer: Trainer) -> console.Model:
  run, c = trainer.run, trainer.run.config
  return console.Model(
    source=c.init_from or run.model.source or 'model.random (random weights)',
    family=run.model.config.get('model_type', 'a language model'),
    layers=run.arch.num_layers,
    **parameters(trainer),
    param_dtype=c.model.param_dtype,
    compute_dtype=c.model.compute_dtype,
    auxiliary=tuple(m.describe() for m in run.auxiliary),
  )


def _unit(c: ml_collections.ConfigDict) -> str:
  """Returns the unit of batch_size."""
  if algorithms.of(c).on_rollouts:
    return 'prompts'
  if algorithms.is_packed(c):
    return 'packed sequences'
  return 'pairs' if algorithms.of(c).example(c) == 'pair' else 'examples'


def _data(run: Run) -> console.Data:
  c, data = run.config, run.data
  unit, per_epoch = _unit(c), data.mixture.rows_per_epoch
  if unit == 'prompts':
    train, held = ([len(p.ids) for s in x for p in s.rows] for x in (data.sources, data.evaluation))
    left_out = sum(s.dropped for s in data.sources)
    sizes = (len(held), sum(held), left_out)
    return console.Data(len(train), sum(train), None, per_epoch, unit, None, c.seq_len, *sizes)
  fill = None
  if unit == 'packed sequences':
    places = sum(s.rows_per_epoch for s in data.mixture.sources)
    fill = sum(s.fill * s.rows_per_epoch for s in data.mixture.sources) / places
  sides = {'train': data.corpora, 'eval': data.evaluation}
  examples = {k: sum(map(len, x)) for k, x in sides.items()}
  tokens = {k: sum(corpus.tokens for corpus in x) for k, x in sides.items()}
  counts = [corpus.counts for corpus in data.corpora]
  return console.Data(
    examples=examples['train'],
    tokens=tokens['train'],
    supervised=sum(corpus.supervised for corpus in data.corpora),
    per_epoch=per_epoch,
    unit=unit,
    utilization=fill,
    seq_len=c.seq_len,
    eval_examples=examples['eval'],
    eval_tokens=tokens['eval'],
    left_out=sum(n.dropped + n.unsupervised + n.bad + n.identical for n in counts),
  )


def start(trainer: Trainer, begun: int) -> str:
  """Returns the block at the start of training. begun: steps done."""
  run, c = trainer.run, trainer.run.config
  mesh = run.mesh
  kind = mesh.devices.flat[0].device_kind
  is_sampled = algorithms.of(c).on_rollouts
  plan = console.Plan(
    algorithm=c.algorithm,
    steps=run.steps,
    start=begun,
    per_epoch=run.data.mixture.rows_per_epoch,
    batch=algorithms.prompts_per_rollout(c),
    unit=_unit(c),
    grad_accum=c.grad_accum,
    row_tokens=algorithms.rows_per_step(c) * c.seq_len,
    updates=algorithms.steps_per_batch(c),
    completions=c.rollout.group if is_sampled else 0,
  )
  rows = [
    ('model', _model(trainer).text()),
    *[('unfreezing', text) for text in [_unfreezing(trainer)] if text],
    *[('dropout', text) for text in [run.dropout.summary()] if text],
    ('devices', console.devices(kind, mesh.size, jax.process_count(), mesh.shape)),
    *_data(run).rows(),
    *plan.rows(),
    ('workdir', run.workdir),
  ]
  return console.block('training', rows)


def _unfreezing(trainer: Trainer) -> str:
  """Returns the schedule of gradual unfreezing in words; '' without."""
  found = trainer.unfreezing
  if found is None:
    return ''
  return (
    f'{found.count} groups of layers from the head down, one every {found.every} updates; all from '
    f'update {found.last_start + 1} on'
  )


def resumed(run: Run, step: int, cursor: int, order: str) -> str:
  """Returns the line of a run that resumes.

  cursor: batch rows consumed; order: fingerprint of their order.
  """
  mixture, unit = run.data.mixture, _unit(run.config)
  text = (
    f'resuming after step {step} of {run.steps}: epoch {cursor / mixture.rows_per_epoch:.2f}, '
    f'{console.count(cursor)} {unit} consumed, data order {order[:12]}'
  )
  if step == run.steps:
    return text
  row = mixture.row(cursor)
  if unit == 'prompts':
    where = run.data.prompt(cursor).place
  else:
    where = run.data.corpora[row.source].where(row.examples[0])
  return f'{text}; the next example is {where}'


def paused(run: Run) -> str:
  """Returns the line of a start that stop_at ended."""
  return (
    f'stop_at={run.config.stop_at}: this start ends after step {run.last_step} of {run.steps}, '
    'evaluated and saved; a start with a later stop_at, or with 0, resumes there'
  )


def _command_line() -> list[str]:
  """Returns the flags of this process, quoted for a shell; none without --config."""
  flags = sys.argv[1:]
  return [shlex.quote(f) for f in flags] if any(f.startswith('--config') for f in flags) else []


def typed_prompt(prompts: Sequence[str]) -> str:
  """Returns one of eval.prompts, quoted for a shell, that is one line; '' where there are none."""
  return shlex.quote(next((p for p in prompts if p.isprintable()), 'Hello')) if prompts else ''


def end(run: Run, printer: console.Console, exported: int, steps: int, seconds: float) -> str:
  """Returns the block at the end.

  exported: step whose weights are exported; steps: done in all; seconds: since this start.
  """
  c, state = run.config, printer.state
  text = f'{console.count(steps)} steps, {console.count(state.get("tokens", 0))} tokens'
  idle = console.not_updated(state.get('no_signal', 0), state.get('skipped', 0))
  report = files.join(run.workdir, 'report.html')
  prompt = typed_prompt(c.eval.prompts)
  head = label_names.head(c)
  reward_model = files.join(run.workdir, 'export') if head == REWARD else ''
  rows = [
    ('trained', f'{text}; this start took {console.duration(seconds)}'),
    ('no update', idle),
    ('final', printer.final()),
    ('exported', printer.best(exported, steps)),
    ('export', files.join(run.workdir, 'export')),
    ('report', report if files.exists(report) else ''),
    ('metrics', f'{files.join(run.workdir, "metrics.jsonl")}, tensorboard/'),
    *console.next_commands(
      *(run.workdir, reward_model, prompt, _command_line(), bool(c.eval.tasks)),
      labels='' if head is None else algorithms.of(c).example(c),
      is_masked=algorithms.of(c).predicts_masked,
    ),
  ]
  return console.block('done', rows)
