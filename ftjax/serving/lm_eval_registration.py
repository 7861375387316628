"""The model `ftjax` for lm-eval's own command line; lm_eval.py is the entry.

lm-eval 0.4.13 finds models in a table that is filled when their files are imported (its
api/registry.py); it has no entry points for packages. Imports lm_eval.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from lm_eval.api.registry import model_registry
from lm_eval.utils import simple_parse_args_string

from ftjax.experiment.lm_eval_model import LmEvalModel
from ftjax.generation.engine import Engine
from ftjax.generation.scorer import Scorer
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError
from ftjax.serving import loaded_model

_BATCH = 8  # where lm-eval is to choose
_DTYPES = ('float32', 'bfloat16')
# Of --model_args, with the type of each.
_TYPES: Mapping[str, type] = {
  'path': str,
  'dtype': str,
  'base': str,
  'family': str,
  'max_length': int,
  'add_bos_token': bool,
  'enable_thinking': bool,
  'seed': int,
}


def register() -> None:
  """Makes `--model ftjax` known to lm-eval."""
  import lm_eval.models  # noqa: F401 - fills the table

  if 'ftjax' not in model_registry:
    model_registry.register('ftjax', target=FtjaxModel)


class FtjaxModel(LmEvalModel):
  """A model by its path, as lm-eval makes it from --model_args."""

  @classmethod
  def create_from_arg_string(
    cls, arg_string: str, additional_config: dict[str, Any] | None = None
  ) -> LmEvalModel:
    """Returns the model of 'path=DIR,dtype=float32'; see `create_from_arg_obj`."""
    return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

  @classmethod
  def create_from_arg_obj(
    cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
  ) -> LmEvalModel:
    """Returns the model of --model_args on all devices.

    Args:
      arg_dict: --model_args.
      additional_config: batch_size of the command line, and what is torch's.

    Raises:
      ConfigError: an unknown argument, or no path.
      DataError: there is no model.
    """
    # --device is 'cuda:0' where none is given (lm_eval 0.4.13): it is torch's and is not read.
    return load(dict(arg_dict), _batch_size((additional_config or {}).get('batch_size')))


def load(args: dict[str, Any], batch_size: int) -> LmEvalModel:
  """Returns the model of --model_args; see `FtjaxModel.create_from_arg_obj`."""
  for name, value in args.items():
    kind = _TYPES.get(name)
    if kind is None or not isinstance(value, kind):
      known = ', '.join(f'{n} ({t.__name__})' for n, t in _TYPES.items())
      raise ConfigError(f'--model_args {name}={value!r}: expected one of {known}')
  if not args.get('path'):
    raise ConfigError('--model_args: path=DIR_OR_WORKDIR is missing')
  name = args.get('dtype', 'float32')
  if name not in _DTYPES:
    raise ConfigError(f'--model_args dtype={name}: expected one of {_DTYPES}')
  dtype = jnp.dtype(name)
  jax.config.update('jax_default_matmul_precision', 'highest' if name == 'float32' else 'default')
  mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | {'fsdp': -1})
  jax.set_mesh(mesh)
  where = (args.get('family', ''), args.get('base', ''))
  model, params = loaded_model.load(args['path'], mesh, dtype, *where)
  tokenizer = model.tokenizer
  if model.arch.is_encoder_decoder:
    raise ConfigError(
      f'--model_args path={args["path"]}: an encoder-decoder (family {model.arch.family!r}); '
      'expected a decoder for lm-eval'
    )
  engine = Engine(
    *(model.arch, dtype, model.stop_ids, tokenizer.pad_id),
    slots=batch_size,
    vocab_size=tokenizer.vocab_size,
  )
  thinking = args.get('enable_thinking')
  return LmEvalModel(
    *(params, tokenizer, engine, Scorer(model.arch, dtype, mesh)),
    batch_size=batch_size,
    seed=args.get('seed', 0),
    max_length=args.get('max_length', 0),
    add_bos=args.get('add_bos_token'),
    template_kwargs=None if thinking is None else {'enable_thinking': thinking},
  )


def _batch_size(given: Any) -> int:
  """Returns the number of --batch_size; lm-eval's 'auto' is 8."""
  if given is None or str(given).startswith('auto'):
    return _BATCH
  if not str(given).isdigit() or int(given) < 1:
    raise ConfigError(f'--batch_size={given}: expected a whole number above 0, or auto')
  return int(given)
