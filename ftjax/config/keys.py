"""Every config key once, with its default, unit and meaning.

A config file is Python: `from ftjax import config; def get_config(): c = config.default(); c.steps
= 100; return c`. Keys are locked, so a misspelt one is an error. Code reads `c.key`; there is no
second default anywhere. Only layers 5 and 6 see this object."""

import difflib
import importlib.util
import math
import os
import pathlib
import re
from typing import Any

from ml_collections import config_dict

from ftjax.config import algorithm_keys
from ftjax.config.section import RANDOM_REQUIRED, Section, flat, place_of
from ftjax.config.section import nearest as nearest
from ftjax.config.section import plain as plain
from ftjax.runtime.errors import ConfigError
from ftjax.storage import locations

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def default() -> Section:
  """The config that every experiment starts from."""
  c = Section()
  c.algorithm = 'sft'  # what is trained, and on what kind of rows
  c.seed = 0  # seed of data order, noise and random initialization
  c.steps = 0  # optimizer updates; 0: follow epochs. Where both are set, steps counts
  c.epochs = 1.0  # passes over the training data, when steps is 0
  # Global, per optimizer update over all devices and micro-batches: packed sequences for sft, pairs
  # for preferences, prompts for rollouts.
  c.batch_size = 16
  c.seq_len = 1024  # tokens of a packed sequence; the two sides of a pair share one
  # Micro-batches that batch_size is divided into: less memory, the same loss. It does not multiply
  # batch_size.
  c.grad_accum = 1
  c.init_from = ''  # a workdir: start from its weights, with fresh optimizer and data
  # What the backward pass recomputes to save memory: nothing, all but matrix products, everything.
  c.remat = 'dots'

  c.model = Section()
  c.model.path = ''  # Hugging Face folder, or GGUF file
  c.model.param_dtype = 'float32'  # dtype of master parameters; optimizer moments are float32
  c.model.compute_dtype = 'float32'  # dtype of activations and matrix products
  # Instead of a path, a small model with random weights and a byte tokenizer: a dict in the keys of
  # a Hugging Face config.json.
  c.model.random = Section()

  c.data = Section()
  # Training data, path[::format][@weight], comma-separated or a tuple; a weight is a share of rows.
  c.data.train = config_dict.FieldReference('', field_type=object)
  # Evaluation data in the same form, without weights; '' with eval_fraction > 0: split off the
  # training data.
  c.data.eval = config_dict.FieldReference('', field_type=object)
  c.data.eval_fraction = 0.0  # share of training rows, chosen by hash, held out for evaluation
  # Several examples in one sequence, without influence on each other; False: one each, padded.
  c.data.packing = True
  # What happens to examples of more than seq_len tokens; truncate_left keeps BOS, and the system
  # turn where it takes at most half of seq_len.
  c.data.on_overlength = 'error'
  # Content of a row that the chat template does not render: an error, or a warning with its count.
  c.data.on_unrendered = 'error'
  # Rows that cannot be read or encoded: an error, or left out (drop), counted and listed.
  c.data.on_bad_row = 'error'
  # Tokens that are supervised: every turn of the assistant, its last turn (completion), all tokens.
  c.data.loss_on = 'assistant'
  c.data.cache = ''  # folder for tokenized data; '': data_cache in the workdir
  c.data.workers = 0  # processes that tokenize, on each host; 0: one for each core

  # decay, multipliers and freeze are tables of (regex, value) over per-layer names: embed/w,
  # final_norm/scale, head/w, layer0/attn/q/w, ... The first row that matches a whole name counts;
  # every name must be matched, and every row must match a name that no earlier row does.
  c.optim = Section()
  c.optim.name = 'adamw'  # the optimizer
  c.optim.lr = 2e-5  # peak learning rate
  c.optim.schedule = 'cosine'  # course of the learning rate after the warmup
  c.optim.warmup_steps = 0  # updates in which the learning rate rises linearly from 0
  c.optim.end_fraction = 0.0  # last learning rate of linear, cosine and wsd, as a share of lr
  c.optim.decay_steps = 0  # updates of the final decay of wsd
  c.optim.weight_decay = 0.0  # decoupled; multiplied by the learning rate
  c.optim.b1 = 0.9  # decay of the first moment; momentum of sgd and muon
  c.optim.b2 = 0.999  # decay of the second moment
  c.optim.eps = 1e-8  # added to the root of the second moment
  c.optim.clip_norm = 1.0  # largest global L2 norm of the gradient; 0: no clipping
  # Decay of a moving average of the parameters, which is evaluated and exported in place of them;
  # 0: none.
  c.optim.ema_decay = 0.0
  # Factors of weight_decay; norm scales and biases have none.
  c.optim.decay = (('.*(norm/scale|/b)', 0.0), ('.*', 1.0))
  c.optim.multipliers = (('.*', 1.0),)  # factors of the learning rate
  c.optim.freeze = (('.*', False),)  # True: not trained

  c.loss = Section()
  c.loss.label_smoothing = 0.0  # share of the target that is spread over the vocabulary
  c.loss.z_loss = 0.0  # weight of logsumexp squared
  # Alpha of uniform noise on embeddings, alpha / sqrt(tokens * dim); 0: none, 5 is usual.
  c.loss.neftune = 0.0

  algorithm_keys.add(c)

  # Devices along each axis; one may be -1, for all devices that the others leave.
  c.mesh = Section()
  c.mesh.data = 1  # copies of the parameters, each with its share of the batch
  c.mesh.fsdp = -1  # parameters, optimizer and batch sharded
  c.mesh.context = 1  # each sequence split
  c.mesh.tensor = 1  # each matrix split
  c.mesh.expert = 1  # experts of a mixture spread

  c.checkpoint = Section()
  c.checkpoint.every = 100  # steps between checkpoints; the last step is always saved; 0: only that
  c.checkpoint.keep = 2  # number of latest checkpoints that are kept, beside the best one
  c.checkpoint.best_metric = ''  # such as eval/loss: its best checkpoint is kept and exported
  c.checkpoint.best_mode = 'min'  # whether a smaller or a larger best_metric is better
  c.checkpoint.patience = 0  # evaluations without a better best_metric that end training; 0: never

  c.eval = Section()
  c.eval.every = 0  # steps between evaluations of the loss; the last step is always evaluated
  c.eval.batch_size = 16  # sequences of an evaluation batch, over all devices
  # 'name=kind:path', kind choice, match, math or math_strict: base and tuned are compared on these
  # at the end.
  c.eval.tasks = ()
  c.eval.prompts = ()  # texts that are completed greedily at every evaluation
  c.eval.max_tokens = 64  # most tokens of such a completion

  c.log = Section()
  c.log.every = 1  # steps between logged metrics
  c.log.sinks = ()  # wandb, mlflow; metrics.jsonl and TensorBoard are always written

  # A jax profiler trace; start = stop: none.
  c.profile = Section()
  c.profile.start = 0  # first step of the trace
  c.profile.stop = 0  # the step after its last one

  # Seconds without progress after which all processes end with exit code 75, to be started again;
  # 0: never.
  c.watchdog = Section()
  c.watchdog.tokenize = 24 * 3600.0  # one data source
  c.watchdog.restore = 3600.0  # reading weights or a checkpoint, and phases without a limit
  c.watchdog.compile = 3600.0  # compiling the step
  c.watchdog.step = 600.0  # one update; ten times the median update, where that is longer
  c.watchdog.rollout = 3600.0  # the next tokens of a rollout, or its rewards
  c.watchdog.evaluate = 3600.0  # one evaluation batch
  c.watchdog.save = 1200.0  # saving a checkpoint
  c.watchdog.export = 7200.0  # writing the exported model

  c.max_bad_steps = 3  # non-finite steps in a row that end the run with exit code 4
  # Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or else in the workdir.
  c.compile_cache = True
  # (name, value) pairs added to the table of runtime/compiler_options.py; '' removes one.
  c.compiler_options = ()
  return c.lock()


_CHOICES = algorithm_keys.CHOICES | {
  'algorithm': algorithm_keys.ALGORITHMS,
  'remat': ('none', 'dots', 'full'),
  'model.param_dtype': ('float32', 'bfloat16'),
  'model.compute_dtype': ('float32', 'bfloat16'),
  'checkpoint.best_mode': ('min', 'max'),
  'data.on_overlength': ('error', 'drop', 'truncate_left', 'truncate_right'),
  'data.on_unrendered': ('error', 'warn'),
  'data.on_bad_row': ('error', 'drop'),
  'data.loss_on': ('assistant', 'completion', 'all'),
  'optim.name': ('adamw', 'adafactor', 'lion', 'muon', 'sgd'),
  'optim.schedule': ('constant', 'linear', 'cosine', 'wsd', 'inverse_sqrt'),
}
_POSITIVE = (
  *algorithm_keys.POSITIVE,
  'batch_size',
  'seq_len',
  'grad_accum',
  'checkpoint.keep',
  'eval.batch_size',
  'log.every',
  'eval.max_tokens',
  'max_bad_steps',
)
_NOT_NEGATIVE = (
  *algorithm_keys.NOT_NEGATIVE,
  'steps',
  'data.workers',
  'optim.warmup_steps',
  'optim.decay_steps',
  'optim.weight_decay',
  'optim.clip_norm',
  'loss.z_loss',
  'loss.neftune',
  'checkpoint.every',
  'checkpoint.patience',
  'eval.every',
  'profile.start',
)
_LOCATIONS = ('init_from', 'data.cache', 'ppo.value_from', 'rollout.reward_model')
_TABLES = ('optim.decay', 'optim.multipliers', 'optim.freeze')


def validate(c: Section) -> None:
  """Checks what can be checked without devices or data.

  Raises:
    ConfigError: naming the key, what was got, and what was expected; begins with FILE:LINE where
      the key was set by a config file.
  """
  try:
    _validate(c)
  except ConfigError as error:
    if place := place_of(str(error), c):
      raise ConfigError(f'{place}: {error}') from error
    raise


def _validate(c: Section) -> None:
  values, usual = flat(c), flat(default())
  for key, value in values.items():
    if value is None:
      raise ConfigError(f'{key}=None; expected a value like the default, {usual[key]!r}')
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(f'{key}={value}; expected a finite number')
  for key, allowed in _CHOICES.items():
    if values[key] not in allowed:
      near = difflib.get_close_matches(values[key], allowed, n=1)
      hint = f'; did you mean {near[0]}?' if near else ''
      raise ConfigError(f'{key}={values[key]!r}; expected one of {allowed}{hint}')
  for key in _POSITIVE:
    if values[key] < 1:
      raise ConfigError(f'{key}={values[key]}; expected at least 1')
  for key in (*_NOT_NEGATIVE, *(k for k in values if k.startswith('watchdog.'))):
    if values[key] < 0:
      raise ConfigError(f'{key}={values[key]}; expected at least 0')
  for key in _TABLES:
    _check_table(key, values[key])
  for key in ('data.train', 'data.eval'):
    _check_sources(key, values[key])
  _check_locations(c)
  if c.eval.every and not (c.data.eval or c.data.eval_fraction or c.eval.prompts):
    raise ConfigError(
      f'eval.every={c.eval.every} finds nothing to evaluate: give data.eval, data.eval_fraction or '
      'eval.prompts'
    )
  _check_options(c.compiler_options)
  _check_random(c)
  algorithm_keys.check(c)
  if not c.steps and c.epochs <= 0:
    raise ConfigError(f'steps={c.steps}, epochs={c.epochs}: one of them must be positive')
  if bool(c.model.path) == bool(len(c.model.random)):
    raise ConfigError(
      f'model.path={c.model.path!r}: give the folder of a model (or model.random, not both)'
    )
  if not c.data.train:
    raise ConfigError('data.train is empty: give the training data, path[::format][@weight]')
  if c.checkpoint.patience and not c.checkpoint.best_metric:
    raise ConfigError('checkpoint.patience needs checkpoint.best_metric, for example eval/loss')
  if c.checkpoint.best_metric.startswith('eval/') and not (c.data.eval or c.data.eval_fraction):
    raise ConfigError(
      f'checkpoint.best_metric={c.checkpoint.best_metric} needs data.eval or data.eval_fraction'
    )
  if c.checkpoint.best_metric and not c.eval.every:
    raise ConfigError(
      f'checkpoint.best_metric={c.checkpoint.best_metric} needs eval.every: it is looked at when '
      'the model is evaluated'
    )
  if not (0 <= c.optim.b1 < 1 and 0 <= c.optim.b2 < 1 and c.optim.eps > 0):
    raise ConfigError(
      f'optim.b1={c.optim.b1}, optim.b2={c.optim.b2}, optim.eps={c.optim.eps}; expected b1 and b2 '
      'in [0, 1) and eps > 0'
    )
  if c.optim.lr <= 0:
    raise ConfigError(f'optim.lr={c.optim.lr}; expected a positive number')
  if c.optim.ema_decay and c.model.param_dtype != 'float32':
    raise ConfigError('optim.ema_decay needs model.param_dtype=float32: its small steps vanish')
  _check_sinks(c.log.sinks)
  if (
    not 0 <= c.optim.ema_decay < 1
    or not 0 <= c.data.eval_fraction < 1
    or not 0 <= c.loss.label_smoothing < 1
  ):
    raise ConfigError(
      'optim.ema_decay, data.eval_fraction and loss.label_smoothing must lie in [0, 1)'
    )
  if c.profile.stop < c.profile.start:
    raise ConfigError(f'profile.stop={c.profile.stop} lies before profile.start={c.profile.start}')
  _check_lengths(c)


def _check_sinks(sinks: Any) -> None:
  for sink in sinks:
    if sink not in ('wandb', 'mlflow'):
      raise ConfigError(f'log.sinks: {sink!r}; expected wandb or mlflow')
    if importlib.util.find_spec(sink) is None:
      raise ConfigError(
        f"log.sinks: {sink} is not installed; pip install '.[{sink}]' in the checkout of ftjax"
      )


def _check_table(key: str, table: Any) -> None:
  for row in table:
    if not isinstance(row, tuple | list) or len(row) != 2:
      raise ConfigError(f'{key}: {row!r} is no row; expected pairs (regex, value)')
    try:
      re.compile(row[0])
    except (re.error, TypeError) as error:
      raise ConfigError(f'{key}: {row[0]!r} is no regular expression: {error}') from error
    if not isinstance(row[1], int | float):
      raise ConfigError(f'{key}: {row!r}; expected a number, or True or False')


def _check_options(options: Any) -> None:
  for row in options:
    if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
      raise ConfigError(
        f'compiler_options: {row!r} is no option; expected pairs such as '
        "('xla_gpu_enable_latency_hiding_scheduler', True)"
      )
    if not isinstance(row[1], bool | int | float | str):
      raise ConfigError(f'compiler_options: {row!r}; expected a number, True, False or a text')


def _check_sources(key: str, sources: Any) -> None:
  entries = sources if isinstance(sources, tuple | list) else [sources]
  if wrong := [e for e in entries if not isinstance(e, str)]:
    raise ConfigError(f'{key}: {wrong[0]!r}; expected a text, or a tuple of texts')


def _check_locations(c: Section) -> None:
  """Every key that names a folder or a file, before anything is read or made."""
  for key in _LOCATIONS:
    locations.check(key, c[key])
    if c[key].startswith('~'):
      raise ConfigError(f'{key}={c[key]}: write the whole path, {os.path.expanduser(c[key])}')
  locations.check('model.path', c.model.path)
  for key in ('data.train', 'data.eval'):
    for source in _entries(c[key]):
      locations.check(key, source)
  for task in c.eval.tasks:
    if isinstance(task, str):
      locations.check('eval.tasks', task.partition('=')[2].partition(':')[2])


def _entries(sources: str | tuple[str, ...] | list[str]) -> list[str]:
  """The entries of data.train or data.eval."""
  return [s.strip() for s in (sources.split(',') if isinstance(sources, str) else sources)]


def _check_lengths(c: Section) -> None:
  """Numbers of steps that do not go together, where `steps` is known before the data."""
  if not c.steps:
    return
  if c.optim.warmup_steps >= c.steps:
    raise ConfigError(
      f'optim.warmup_steps={c.optim.warmup_steps} with steps={c.steps}: the learning rate would '
      'not reach optim.lr before the end; expected fewer warmup steps than steps'
    )
  if c.optim.schedule == 'wsd' and c.optim.warmup_steps + c.optim.decay_steps > c.steps:
    raise ConfigError(
      f'optim.decay_steps={c.optim.decay_steps} and optim.warmup_steps={c.optim.warmup_steps} are '
      f'more than steps={c.steps}'
    )
  if c.checkpoint.best_metric and c.eval.every > c.steps:
    raise ConfigError(
      f'eval.every={c.eval.every} with steps={c.steps}: checkpoint.best_metric='
      f'{c.checkpoint.best_metric} would be measured once, at the end; expected at most {c.steps}'
    )
  evaluations = -(-c.steps // max(1, c.eval.every))
  if c.checkpoint.patience and c.checkpoint.patience >= evaluations:
    raise ConfigError(
      f'checkpoint.patience={c.checkpoint.patience} can never stop a run of {evaluations} '
      f'evaluations (steps={c.steps}, eval.every={c.eval.every}); expected fewer, or 0 for none'
    )


def warnings(c: Section) -> list[str]:
  """What is allowed, and seldom meant, as lines for the start of the log."""
  out = []
  train = {s.rpartition('@')[0] or s for s in _entries(c.data.train)}
  if same := sorted(train & set(_entries(c.data.eval)) - {''}):
    out.append(
      f'data.eval={same[0]} is also in data.train: its loss measures what was memorized; give rows '
      'that are not trained on, or data.eval_fraction'
    )
  return out


def _check_random(c: Section) -> None:
  if not len(c.model.random):
    return
  if missing := [k for k in RANDOM_REQUIRED if k not in c.model.random]:
    raise ConfigError(f'model.random lacks {", ".join(missing)}')


def shipped() -> list[str]:
  """Names of the configs that come with ftjax."""
  return sorted({p.stem for f in _folders() if f.is_dir() for p in f.glob('*.py')})


def _folders() -> list[pathlib.Path]:
  """Where shipped configs lie: inside the installed package, or beside it in a checkout."""
  return [PACKAGE / 'configs', PACKAGE.parent / 'configs']


def find(name: str) -> str:
  """Path of a config: an existing path wins, else the shipped configs/NAME.py.

  Raises:
    ConfigError: neither exists, or it is no Python file; names the nearest shipped configs, or
      all of them where none is near.
  """
  path = pathlib.Path(os.path.expanduser(name))
  if path.is_file():
    if path.suffix not in ('', '.py'):
      raise ConfigError(
        f'--config={name}: a config is a Python file with get_config(); got a {path.suffix} file'
      )
    return str(path)
  for folder in _folders():
    inside = folder / (name if name.endswith('.py') else name + '.py')
    if '/' not in name and inside.is_file():
      return str(inside)
  if path.is_dir():
    inside = sorted(p.name for p in path.glob('*.py'))
    example = f', such as {path}/{inside[0]}' if inside else ''
    raise ConfigError(f'--config={name} is a folder; give a Python file with get_config(){example}')
  near = difflib.get_close_matches(path.stem, shipped(), n=3) if '/' not in name else []
  hint = (
    f'did you mean {" or ".join(near)}? --help lists all of them'
    if near
    else f'shipped: {", ".join(shipped())}{locations.nearest(path)}'
  )
  raise ConfigError(f'--config={name}: no such file, and no shipped config of this name; {hint}')
