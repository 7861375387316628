"""Every config key once, with its default, unit and meaning.

A config file is Python: `from ftjax import config; def get_config(): c = config.default(); c.steps
= 100; return c`. Keys are locked, so a misspelt one is an error. Code reads `c.key`; there is no
second default anywhere. Only layers 5 and 6 see this object."""

import difflib
import importlib.util
import json
import math
import pathlib
import re
from typing import Any

import ml_collections
from ml_collections import config_dict

from ftjax import algorithm_config
from ftjax.runtime.errors import ConfigError

HERE = pathlib.Path(__file__).resolve().parent


def default() -> ml_collections.ConfigDict:
  """The config that every experiment starts from."""
  c = ml_collections.ConfigDict()
  c.algorithm = 'sft'  # one of algorithm_config.ALGORITHMS
  c.seed = 0  # of data order, noise and random initialization
  c.steps = 0  # optimizer updates; 0: follow `epochs`
  c.epochs = 1.0  # passes over the training rows, when steps is 0
  c.batch_size = 16  # rows per optimizer update, over all devices; pairs; prompts
  c.seq_len = 1024  # tokens per row; both sides of a pair share one
  c.grad_accum = 1  # micro-batches an update is cut into: less memory, the same loss
  c.init_from = ''  # a workdir: start from its weights, with fresh optimizer and data
  c.remat = 'dots'  # what the backward pass recomputes: none, dots (all but projections), full

  c.model = ml_collections.ConfigDict()
  c.model.path = ''  # HF folder, or GGUF file
  c.model.param_dtype = 'float32'  # of master parameters; optimizer moments are float32
  c.model.compute_dtype = 'float32'  # of activations and matrix products: float32 or bfloat16
  # Instead of a path: {'vocab_size': ..., ...} in the keys of a HF config.json, random weights, a
  # byte tokenizer made on the spot.
  c.model.random = ml_collections.ConfigDict()

  c.data = ml_collections.ConfigDict()
  # path[::format][@weight], comma-separated or a tuple; a weight is a share of rows
  c.data.train = config_dict.FieldReference('', field_type=object)
  # the same without weights; '' with eval_fraction > 0: split off the training data
  c.data.eval = config_dict.FieldReference('', field_type=object)
  c.data.eval_fraction = 0.0  # share of training rows, chosen by hash, kept for evaluation
  c.data.packing = True  # several examples in a row, kept apart; False: one each, padded
  # error, drop, truncate_left (keeps BOS and a system turn that fits), truncate_right
  c.data.on_overlength = 'error'
  # Content of a row that the chat template does not render: error; warn: train without it, counted.
  c.data.on_unrendered = 'error'
  c.data.loss_on = 'assistant'  # assistant (every turn), completion (the last one), all
  c.data.cache = ''  # folder of tokenized data; '': data_cache in the workdir

  c.optim = ml_collections.ConfigDict()
  c.optim.name = 'adamw'  # adamw, adafactor, lion, muon, sgd
  c.optim.lr = 2e-5  # peak learning rate
  c.optim.schedule = 'cosine'  # constant, linear, cosine, wsd, inverse_sqrt
  c.optim.warmup_steps = 0  # updates of linear rise from 0
  c.optim.end_fraction = 0.0  # end value of linear, cosine and wsd as a share of lr
  c.optim.decay_steps = 0  # updates of the final fall of wsd
  c.optim.weight_decay = 0.0  # decoupled, times the learning rate
  c.optim.b1 = 0.9  # first moment; momentum of sgd and muon
  c.optim.b2 = 0.999  # second moment
  c.optim.eps = 1e-8
  c.optim.clip_norm = 1.0  # global L2 norm of the gradient; 0: no clipping
  c.optim.ema_decay = (
    0.0  # moving average of the parameters, evaluated and exported instead of them; 0: none
  )
  # Tables of (regex, value) over per-layer names: embed/w, final_norm/scale, head/w,
  # layer0/attn/q/w, ... The first row that matches a whole name decides; every name must be
  # matched, and every row must decide something.
  # Times weight_decay; norm scales and biases are left alone.
  c.optim.decay = (('.*(norm/scale|/b)', 0.0), ('.*', 1.0))
  c.optim.multipliers = (('.*', 1.0),)  # times the learning rate
  c.optim.freeze = (('.*', False),)  # not trained

  c.loss = ml_collections.ConfigDict()
  c.loss.label_smoothing = 0.0  # share of the target spread over the vocabulary
  c.loss.z_loss = 0.0  # weight of logsumexp squared
  c.loss.neftune = (
    0.0  # alpha of uniform noise on embeddings, alpha / sqrt(tokens * dim); 5 is usual
  )

  algorithm_config.add(c)

  c.mesh = ml_collections.ConfigDict()  # sizes; one may be -1, for the rest of the devices
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.mesh.context = 1
  c.mesh.tensor = 1
  c.mesh.expert = 1

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 100  # steps; the last step is always saved; 0: only that
  c.checkpoint.keep = 2  # the latest so many stay, and the best one
  c.checkpoint.best_metric = ''  # e.g. eval/loss: its best checkpoint is kept and exported
  c.checkpoint.best_mode = 'min'  # min or max
  c.checkpoint.patience = 0  # evaluations without a better best_metric that end training; 0: never

  c.eval = ml_collections.ConfigDict()
  c.eval.every = 0  # steps between evaluations of the loss; the last step is always evaluated
  c.eval.batch_size = 16  # rows
  # 'name=kind:path', kind choice, match, math or math_strict: base against tuned, at the end
  c.eval.tasks = ()
  c.eval.prompts = ()  # answered greedily at every evaluation
  c.eval.max_tokens = 64  # of an answer

  c.log = ml_collections.ConfigDict()
  c.log.every = 1  # steps
  c.log.sinks = ()  # of wandb, mlflow; metrics.jsonl and TensorBoard are always written

  c.profile = (
    ml_collections.ConfigDict()
  )  # a jax profiler trace from step start to step stop; equal: none
  c.profile.start = 0
  c.profile.stop = 0

  # Seconds without progress that end all processes with code 75, to be started again; 0: never
  c.watchdog = ml_collections.ConfigDict()
  c.watchdog.tokenize = 24 * 3600.0  # one source
  c.watchdog.restore = 3600.0  # weights, a checkpoint, and what has no limit of its own
  c.watchdog.compile = 3600.0
  c.watchdog.step = 600.0  # or ten times the median step, where that is longer
  c.watchdog.rollout = 3600.0  # next tokens of a rollout, or its rewards
  c.watchdog.evaluate = 3600.0  # one batch of rows
  c.watchdog.save = 1200.0  # a checkpoint
  c.watchdog.export = 7200.0

  c.max_bad_steps = 3  # non-finite steps in a row that end the run with exit code 4
  c.compile_cache = True  # keep compiled programs in the workdir
  # (name, value) pairs over the table of runtime/compiler_options.py; '' takes one away
  c.compiler_options = ()
  return c.lock()


_CHOICES = algorithm_config.CHOICES | {
  'algorithm': algorithm_config.ALGORITHMS,
  'remat': ('none', 'dots', 'full'),
  'model.param_dtype': ('float32', 'bfloat16'),
  'model.compute_dtype': ('float32', 'bfloat16'),
  'checkpoint.best_mode': ('min', 'max'),
  'data.on_overlength': ('error', 'drop', 'truncate_left', 'truncate_right'),
  'data.on_unrendered': ('error', 'warn'),
  'data.loss_on': ('assistant', 'completion', 'all'),
  'optim.name': ('adamw', 'adafactor', 'lion', 'muon', 'sgd'),
  'optim.schedule': ('constant', 'linear', 'cosine', 'wsd', 'inverse_sqrt'),
}
_POSITIVE = (
  *algorithm_config.POSITIVE,
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
  *algorithm_config.NOT_NEGATIVE,
  'steps',
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
_TABLES = ('optim.decay', 'optim.multipliers', 'optim.freeze')
# Of model.random, in the keys of a HF config.json.
_RANDOM_REQUIRED = (
  'hidden_size',
  'num_hidden_layers',
  'num_attention_heads',
  'intermediate_size',
)
_RANDOM_OPTIONAL = (
  'model_type',
  'vocab_size',
  'num_key_value_heads',
  'head_dim',
  'rms_norm_eps',
  'rope_theta',
  'rope_scaling',
  'tie_word_embeddings',
  'max_position_embeddings',
)
RANDOM_KEYS = tuple(f'model.random.{k}' for k in (*_RANDOM_REQUIRED, *_RANDOM_OPTIONAL))


def flat(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """{dotted key: value}."""
  out = {}
  for key, value in c.items():
    if isinstance(value, ml_collections.ConfigDict) and key != 'random':
      out |= {f'{key}.{k}': v for k, v in flat(value).items()}
    else:
      out[key] = value
  return out


def nearest(key: str, c: ml_collections.ConfigDict) -> str:
  """The known key that looks most like a misspelt one, for a message; '' when none does."""
  known = [*flat(c), *RANDOM_KEYS]
  known += [k for k, v in c.items() if isinstance(v, ml_collections.ConfigDict)]
  found = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  if not found:
    last = key.rsplit('.', 1)[-1]
    found = [
      k for k in known if difflib.get_close_matches(last, [k.rsplit('.', 1)[-1]], cutoff=0.75)
    ][:1]
  return f'; did you mean {found[0]}?' if found else ''


def validate(c: ml_collections.ConfigDict) -> None:
  """Checks what can be checked without devices or data.

  Raises:
    ConfigError: naming the key, what was got, and what was expected.
  """
  values, usual = flat(c), flat(default())
  for key, value in values.items():
    if value is None:
      raise ConfigError(f'{key}=None; expected a value like the default, {usual[key]!r}')
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(f'{key}={value}; expected a finite number')
  for key, allowed in _CHOICES.items():
    if values[key] not in allowed:
      raise ConfigError(f'{key}={values[key]!r}; expected one of {allowed}')
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
  if c.eval.every and not (c.data.eval or c.data.eval_fraction or c.eval.prompts):
    raise ConfigError(
      f'eval.every={c.eval.every} finds nothing to evaluate: give data.eval, data.eval_fraction or '
      'eval.prompts'
    )
  _check_options(c.compiler_options)
  _check_random(c)
  algorithm_config.check(c)
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


def _check_sinks(sinks: Any) -> None:
  for sink in sinks:
    if sink not in ('wandb', 'mlflow'):
      raise ConfigError(f'log.sinks: {sink!r}; expected wandb or mlflow')
    if importlib.util.find_spec(sink) is None:
      raise ConfigError(f'log.sinks: {sink} is not installed; pip install ftjax[{sink}]')


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


def _check_random(c: ml_collections.ConfigDict) -> None:
  if not len(c.model.random):
    return
  for name in (f'model.random.{k}' for k in c.model.random):
    if name not in RANDOM_KEYS:
      raise ConfigError(f'{name}: there is no such key{nearest(name, default())}')
  if missing := [k for k in _RANDOM_REQUIRED if k not in c.model.random]:
    raise ConfigError(f'model.random lacks {", ".join(missing)}')


def plain(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """`flat` in JSON values, for config.json and for comparing."""
  return json.loads(json.dumps(flat(c), default=lambda v: v.to_dict()))


def find(name: str) -> str:
  """Path of a config: an existing path wins, else the shipped configs/NAME.py.

  Raises:
    ConfigError: neither exists; tells the shipped names.
  """
  if pathlib.Path(name).is_file():
    return name
  folders = [HERE / 'configs', HERE.parent / 'configs']
  for folder in folders:
    path = folder / (name if name.endswith('.py') else name + '.py')
    if '/' not in name and path.is_file():
      return str(path)
  shipped = sorted({p.stem for f in folders if f.is_dir() for p in f.glob('*.py')})
  raise ConfigError(
    f'--config={name}: no such file, and no shipped config of this name; '
    f'shipped: {", ".join(shipped)}'
  )
