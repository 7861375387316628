"""Formats the lines that a run prints. The loop and fit.py log them.

`Headline` names the main metrics of an algorithm: they are shown in the progress bar, in the line
of every evaluation and at the end."""

import dataclasses
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_RISING = 3  # evaluations in a row worse than the best after which a warning is logged
_ZEROS = 5  # steps in a row with a loss of exactly 0 after which a warning is logged
_WINDOW = 32  # number of steps that a loss is compared with
_LABEL = 10  # width of the labels of a block


@dataclasses.dataclass(frozen=True)
class Headline:
  """The main metrics of an algorithm.

  bar: metrics of a step (or of a rollout) in the progress bar, in order. evaluation: metrics at the
  start of an evaluation's line, the main one first. larger: whether a larger value of the main one
  is better. from_rollouts: whether the metrics of the bar are those of rollouts.
  """

  bar: tuple[str, ...] = ('loss',)
  evaluation: tuple[str, ...] = ('loss', 'perplexity')
  larger: bool = False
  from_rollouts: bool = False


def count(n: int | float) -> str:
  """Returns a count with thousands separators: 11,397."""
  return f'{round(n):,}'


def figure(name: str, value: float) -> str:
  """Returns a metric for display: an accuracy in per cent, else four significant digits."""
  if name.endswith('accuracy') and math.isfinite(value):
    return f'{100 * value:.1f} %'
  return f'{value:.4g}' if abs(value) < 1e-2 or abs(value) >= 1e4 else f'{value:.4f}'


def change(name: str, value: float, before: float) -> str:
  """Returns a difference with its sign; of accuracies in percentage points."""
  if name.endswith('accuracy'):
    return f'{100 * (value - before):+.1f}'
  return f'{value - before:+.4f}' if abs(value - before) < 1e4 else f'{value - before:+.4g}'


def size(num_bytes: float) -> str:
  """Returns bytes in a suitable unit: 1.2 GiB."""
  for unit in ('B', 'KiB', 'MiB'):
    if num_bytes < 1000:
      return f'{num_bytes:.3g} {unit}'
    num_bytes /= 1024
  return f'{num_bytes:.3g} GiB'


def duration(seconds: float) -> str:
  """Returns a duration: 12.3 s, 3 min 05 s, 2 h 05 min."""
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  return f'{minutes // 60} h {minutes % 60:02d} min'


def parameters(n: int) -> str:
  """Returns a number of parameters: 94,144 or 1.24 B."""
  for unit, scale in (('B', 1e9), ('M', 1e6)):
    if n >= scale:
      return f'{n / scale:.2f} {unit}'
  return count(n)


def visible(text: str, limit: int = 0) -> str:
  """Returns text on one line: line ends as ⏎, other control characters as spaces, more than `limit`
  characters (0: any number) cut off with '...'.
  """
  shown = text.replace('\r\n', '\n').replace('\n', '⏎')
  shown = ''.join(c if c.isprintable() else ' ' for c in shown)
  return shown[: limit - 3] + '...' if limit and len(shown) > limit else shown


def sample(step: int, prompt: str, completion: str) -> str:
  """Returns the log line of a completion of one of eval.prompts."""
  shown = visible(completion, 120).rstrip() or '(empty)'
  return f'sample  step {step}  {visible(prompt, 60)} -> {shown}'


def block(title: str, rows: Sequence[tuple[str, str]]) -> str:
  """Returns labeled lines below a title; rows without text are left out, and a label is not
  repeated on consecutive lines.
  """
  lines, last = [title], ''
  for label, text in rows:
    if text:
      lines.append(f'  {"" if label == last else label:<{_LABEL}} {text}')
      last = label
  return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Model:
  """source: path or name. family: of the architecture. trained, frozen: numbers of parameters, of
  all models in the train state. auxiliary: names of the models other than the policy.
  """

  source: str
  family: str
  layers: int
  trained: int
  frozen: int
  param_dtype: str
  compute_dtype: str
  auxiliary: tuple[str, ...] = ()

  def text(self) -> str:
    """Returns one line."""
    frozen = f', {parameters(self.frozen)} frozen' if self.frozen else ' (all)'
    auxiliary = f'; with {", ".join(self.auxiliary)}' if self.auxiliary else ''
    return (
      f'{self.source}: {self.family}, {self.layers} layers; {parameters(self.trained)} parameters '
      f'trained{frozen}; {self.param_dtype} parameters, {self.compute_dtype} compute{auxiliary}'
    )


def devices(kind: str, number: int, processes: int, mesh: Mapping[str, int]) -> str:
  """Returns devices and the axes of the mesh that are larger than 1."""
  axes = ' x '.join(f'{a}={n}' for a, n in mesh.items() if n > 1) or 'one device'
  several = f' in {processes} processes' if processes > 1 else ''
  return f'{number} x {kind}{several}; mesh: {axes}'


@dataclasses.dataclass(frozen=True)
class Data:
  """Sizes of training and evaluation data. unit: of `per_epoch` and of a batch: 'packed sequences',
  'pairs', 'examples', 'prompts'. supervised: tokens, None if unknown. utilization: share of
  non-padding tokens in packed sequences, None without packing. left_out: number of examples.
  """

  examples: int
  tokens: int
  supervised: int | None
  per_epoch: int
  unit: str
  utilization: float | None
  seq_len: int
  eval_examples: int
  eval_tokens: int
  left_out: int

  def rows(self) -> list[tuple[str, str]]:
    """Returns the lines of a block."""
    what = 'prompts' if self.unit == 'prompts' else 'examples'
    train = f'train: {count(self.examples)} {what}, {count(self.tokens)} tokens'
    if self.supervised is not None:
      train += f' ({self.supervised / max(self.tokens, 1):.1%} supervised)'
    if self.left_out:
      train += f'; {count(self.left_out)} left out'
    packed = ''
    if self.utilization is not None:
      packed = (
        f'{count(self.per_epoch)} packed sequences of {count(self.seq_len)} tokens per epoch, '
        f'{self.utilization:.1%} token utilization'
      )
    held = f'eval: {count(self.eval_examples)} {what}, {count(self.eval_tokens)} tokens'
    return [
      ('data', train),
      ('data', packed),
      ('data', held if self.eval_examples else 'eval: none'),
    ]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Length and batch size of a run. batch: in Data.unit, per optimizer step or rollout. row_tokens:
  tokens of a step's arrays, padding included. updates: optimizer steps per batch. completions: per
  prompt, 0 without rollouts.
  """

  algorithm: str
  steps: int
  start: int
  per_epoch: int
  batch: int
  unit: str
  grad_accum: int
  row_tokens: int
  updates: int = 1
  completions: int = 0

  def rows(self) -> list[tuple[str, str]]:
    """Returns the lines of a block."""
    epoch = self.per_epoch / self.batch * self.updates
    length = (
      f'{self.algorithm}: {count(self.steps)} steps = {self.steps / epoch:.2f} epochs of '
      f'{epoch:.4g} steps'
    )
    if self.start:
      length += f'; {count(self.start)} of them are done'
    batch = f'batch: {count(self.batch)} {self.unit}'
    if self.completions:
      batch += f' x {self.completions} completions per rollout, {self.updates} step'
      batch += 's on each' if self.updates > 1 else ' on each'
    else:
      batch += f' per step over all devices, at most {count(self.row_tokens)} tokens'
    if self.grad_accum > 1:
      batch += f', in {self.grad_accum} micro-batches'
    return [('steps', length), ('steps', batch)]


def compiled(seconds: float, cache: str, peak_bytes: float | None, capacity: float | None) -> str:
  """Returns the line of the compiled step; peak_bytes and capacity are of one device, None where
  they are unknown.
  """
  memory = ''
  if peak_bytes:
    memory = f'; expected peak memory of a step: {size(peak_bytes)} per device'
    memory += f' of {size(capacity)}' if capacity else ''
  return f'step compiled in {duration(seconds)}; compile cache: {cache}{memory}'


class Console:
  """Formats lines and warnings of one run from its metrics.

  `state` is JSON that is saved with the run's progress, so that a resumed run compares with earlier
  values; the console updates it in place.
  """

  def __init__(self, headline: Headline, metric: str = '', mode: str = 'min'):
    """Creates a console; metric, mode: checkpoint.best_metric and best_mode, '' if not set."""
    self.headline = headline
    self._metric = metric
    self._watched = metric.removeprefix('eval/') if metric.startswith('eval/') else ''
    self.watched = self._watched or headline.evaluation[0]
    self._larger = mode == 'max' if self._watched else headline.larger
    self._losses: list[float] = []
    self._quiet_until = 0  # no second warning of a spike before this step
    self.state: dict[str, Any] = {}

  def restore(self, state: dict[str, Any]) -> None:
    """Restores the saved state."""
    self.state = state

  # The bar.

  def bar(self, values: Mapping[str, float]) -> dict[str, str]:
    """Returns the metrics of a step for the progress bar, by short name."""
    found = self.state.get('rollout', {}) if self.headline.from_rollouts else values
    names = [name for name in self.headline.bar if name in found]
    return {n.rpartition('/')[2]: figure(n, found[n]).replace(' ', '') for n in names}

  # Steps and rollouts.

  def step(self, done: int, values: Mapping[str, float]) -> list[str]:
    """Takes the metrics of every finite step; returns warnings."""
    self.state['tokens'] = self.state.get('tokens', 0) + int(values['tokens'])
    self.state['final'] = {n: values[n] for n in ('loss', *self.headline.bar) if n in values}
    self.state |= {k: int(values[k]) for k in ('no_signal', 'skipped')}
    if not values['has_signal']:
      return self._without_signal(done, values)
    loss = values['loss']
    if self.headline.from_rollouts:  # their loss is not comparable from batch to batch
      return []
    zeros = self.state['zeros'] = self.state.get('zeros', 0) + 1 if loss == 0 else 0
    if zeros == _ZEROS:
      return [
        f'step {done}: the loss has been exactly 0 for {zeros} steps: there is no gradient signal '
        'left. Look at the examples with python -m ftjax.preview, or end the run'
      ]
    window, out = self._losses, []
    if len(window) == _WINDOW and done >= self._quiet_until:
      usual, std = statistics.median(window), statistics.pstdev(window)
      if loss > usual + 8 * std and loss > 2 * abs(usual) and loss > 0.1:
        self._quiet_until = done + _WINDOW
        out.append(
          f'step {done}: loss {figure("loss", loss)}, usually {figure("loss", usual)} over the '
          f'last {_WINDOW} steps: a spike. If it does not come back, lower optim.lr or lengthen '
          'optim.warmup_steps'
        )
    self._losses = [*window[-_WINDOW + 1 :], loss]
    return out

  def _without_signal(self, done: int, values: Mapping[str, float]) -> list[str]:
    if values['no_signal'] not in (1, 10, 100, 1000):
      return []
    if self.headline.from_rollouts:
      why = 'no completion is better than another (rollout.rewards)'
    else:
      why = 'nothing in the batch is supervised; look at it with python -m ftjax.preview'
    return [
      f'step {done}: no signal, the weights are not updated (steps without signal so far: '
      f'{values["no_signal"]}): {why}'
    ]

  def not_finite(self, done: int, values: Mapping[str, float], limit: int) -> str:
    """Takes the metrics of a step that was not finite; returns the warning."""
    self.state['skipped'] = int(values['skipped'])
    return (
      f'step {done}: loss {values["loss"]:.4g}, gradient norm {values["grad_norm"]:.4g}: not '
      f'finite, the update is skipped ({values["bad_streak"]} in a row; max_bad_steps={limit} end '
      'the run)'
    )

  def rollout(self, values: Mapping[str, float]) -> None:
    """Takes the metrics of every rollout."""
    self.state['rollout'] = {k: v for k, v in values.items() if k in self.headline.bar}
    if 'reward' in values:
      self.state.setdefault('first_reward', values['reward'])

  # Evaluations.

  def evaluation(self, step: int, values: Mapping[str, float]) -> tuple[str, list[str]]:
    """Returns (the line of an evaluation or '' without metrics, warnings)."""
    names = [n for n in self.headline.evaluation if n in values]
    if self.watched in values and self.watched not in names:
      names.insert(0, self.watched)
    if not names:
      return '', []
    before, parts = self.state.get('last', {}), []
    for name in names:
      text = f'{name} {figure(name, values[name])}'
      if name == 'accuracy' and 'accuracy_low' in values:
        text += f' [{100 * values["accuracy_low"]:.1f}, {100 * values["accuracy_high"]:.1f}]'
      parts.append(
        text + (f' ({change(name, values[name], before[name])})' if name in before else '')
      )
    self.state['last'] = {n: values[n] for n in names}
    mark, warnings = self._compared(step, values)
    return f'eval  step {step}  {", ".join(parts)}{mark}', warnings

  def _compared(self, step: int, values: Mapping[str, float]) -> tuple[str, list[str]]:
    """Returns (how the watched metric compares with the best so far, warnings)."""
    if self.watched not in values:
      return '', []
    value, best = values[self.watched], self.state.get('best')
    better = best is None or (value > best if self._larger else value < best)
    if better and math.isfinite(value):
      self.state |= {'best': value, 'best_step': step, 'worse': 0}
      return ('' if best is None else '; best so far'), []
    if best is None:
      return '', [f'step {step}: eval {self.watched} is {value}']
    if value == best:
      self.state['worse'] = 0
      return f'; equal to the best, of step {self.state["best_step"]}', []
    worse = self.state['worse'] = self.state.get('worse', 0) + 1
    mark = f'; best {figure(self.watched, best)} at step {self.state["best_step"]}'
    if worse != _RISING:
      return mark, []
    remedy = (
      'the best checkpoint is kept and will be exported'
      if self._metric
      else f'to keep and export the best set {self._keys()}, to stop then also checkpoint.patience'
    )
    return mark, [
      f'step {step}: eval {self.watched} has been worse than its best for {worse} evaluations in a '
      f'row; the model may be overfitting: {remedy}'
    ]

  # The end.

  def best(self, exported: int, steps: int) -> str:
    """Returns which step is exported and why. exported: its number; steps: number of the last
    one."""
    state = self.state
    if self._metric and exported != steps:
      value = (
        f' ({figure(self.watched, state["best"])})' if self._watched and 'best' in state else ''
      )
      return f'step {exported}, of the best {self._metric}{value}'
    text = f'step {exported}, the last one'
    if self._metric and state.get('best_step') == exported:
      return f'{text}, and the best by {self._metric}'
    last = state.get('last', {}).get(self.watched)
    if state.get('best_step', exported) == exported or last == state['best']:
      return text
    return (
      f'{text}; the best eval {self.watched} was {figure(self.watched, state["best"])} at step '
      f'{state["best_step"]} ({self._keys()} would export that)'
    )

  def _keys(self) -> str:
    """Returns the overrides that select the best checkpoint by the watched metric."""
    mode = ' with checkpoint.best_mode=max' if self._larger else ''
    return f'checkpoint.best_metric=eval/{self.watched}{mode}'

  def final(self) -> str:
    """Returns the last metrics of training or rollouts, and of evaluation."""
    state, out = self.state, []
    train = state.get('final', {})
    if self.headline.from_rollouts:
      if 'reward' in state.get('rollout', {}):
        first = figure('reward', state['first_reward'])
        out.append(f'reward {figure("reward", state["rollout"]["reward"])} (first {first})')
    elif train:
      out.append(
        'train ' + ', '.join(f'{n.rpartition("/")[2]} {figure(n, v)}' for n, v in train.items())
      )
    if last := state.get('last'):
      out.append('eval ' + ', '.join(f'{n} {figure(n, v)}' for n, v in last.items()))
    return '; '.join(x for x in out if x)


def not_updated(no_signal: int, skipped: int) -> str:
  """Returns the numbers of steps that did not update the weights; '' where there were none."""
  parts = [f'{count(no_signal)} steps without signal'] if no_signal else []
  parts += [f'{count(skipped)} with a loss or gradient that was not finite'] if skipped else []
  return ', '.join(parts)


def next_commands(
  workdir: str,
  reward_model: str,
  prompt: str,
  command_line: Sequence[str],
  has_tasks: bool,
  labels: str = '',
  is_masked: bool = False,
) -> list[tuple[str, str]]:
  """Returns rows of a block: commands to run next. reward_model: folder of the whole reward model
  that the run made, '' for other runs. command_line: flags of this run, quoted. labels: of a model
  with labels or vectors, 'steps' of a solution, 'texts' for vectors, or another shape of rows; ''
  for others. is_masked: whether it predicts masked tokens.
  """
  python = 'python -m ftjax.'
  if reward_model:
    flag = f'--config.rollout.reward_model={shlex.quote(reward_model)}'
    return [('next', f'{flag} with algorithm grpo or ppo')]
  model = f'--model={shlex.quote(workdir)}'
  if is_masked:
    flag = f'--config.model.path={shlex.quote(workdir)}/export'
    return [('next', f'{flag} with algorithm classification or token_classification')]
  if labels == 'steps':
    return [('next', f'{python}generate {model} --steps=min --prompts=FILE')]
  if labels:
    flag = '--embed' if labels == 'texts' else '--classify'
    return [('next', f'{python}generate {model} {flag} --prompt=TEXT')]
  rows = [('next', f'{python}generate {model}' + (f' --prompt={prompt}' if prompt else ''))]
  if has_tasks and command_line:
    rows.append(('next', f'{python}evaluate {" ".join(command_line)}'))
  return rows
