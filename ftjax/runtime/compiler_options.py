"""Chooses compiler options of a training step by kind of device: transfers overlap with computing.

They are passed to the compiler with each step, not through environment variables, so that plan and
train use the same ones and the manifest can list them.
"""

from collections.abc import Iterable, Mapping

from ftjax.runtime.errors import ConfigError

# Gathers and sums run concurrently with matrix products, and a scheduler starts them early. The
# names are those of the flag sets that MaxText (benchmarks/xla_flags_library.py) and tpu-recipes
# publish for dense models.
_ASYNC_TPU = {
  'xla_enable_async_all_gather': True,
  'xla_enable_async_all_reduce': True,
  'xla_tpu_overlap_compute_collective_tc': True,
}
# libtpu 0.0.52 refuses these on v6e when it lowers a large gather: supported on v5e alone.
_FUSED_TPU = {
  'xla_tpu_enable_async_collective_fusion': True,
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
  'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
}
_BETWEEN_SLICES = {
  'xla_tpu_enable_data_parallel_all_reduce_opt': True,
  'xla_tpu_data_parallel_opt_different_sized_ops': True,
}
_GPU = {'xla_gpu_enable_latency_hiding_scheduler': True}

# By the start of device_kind; the first match wins.
_TABLE = (
  ('TPU v4', _ASYNC_TPU | _BETWEEN_SLICES),
  ('TPU v5 lite', _ASYNC_TPU | _FUSED_TPU | _BETWEEN_SLICES),
  ('TPU v5e', _ASYNC_TPU | _FUSED_TPU | _BETWEEN_SLICES),
  ('TPU v5', _ASYNC_TPU | _BETWEEN_SLICES),
  ('TPU v6', _ASYNC_TPU | _BETWEEN_SLICES),
  ('TPU7x', _ASYNC_TPU | _BETWEEN_SLICES),
  ('NVIDIA', _GPU),
)

Value = bool | int | float | str


def known(device_kind: str) -> dict[str, Value]:
  """Returns the table's options of a kind of device; none for an unknown kind."""
  return dict(next((o for kind, o in _TABLE if device_kind.startswith(kind)), {}))


def resolve(device_kind: str, own: Iterable[tuple[str, Value]]) -> dict[str, Value]:
  """Returns the table's options, overridden by the user's own.

  Args:
    device_kind: `device_kind` of a jax device.
    own: (name, value); an empty string as value removes an option of the table.

  Returns:
    {name: value}, sorted by name.
  """
  out = known(device_kind)
  for name, value in own:
    # XLA:GPU accepts no string for a bool.
    out[name] = value == 'true' if value in ('true', 'false') else value
  return {name: out[name] for name in sorted(out) if out[name] != ''}


def format_flags(options: Mapping[str, Value]) -> str:
  """Returns options as one line for a log: name=value, separated by spaces."""
  return ' '.join(f'{k}={str(v).lower() if isinstance(v, bool) else v}' for k, v in options.items())


def explain(error: Exception, options: Mapping[str, Value]) -> ConfigError | None:
  """Returns the error to raise where the compiler refused an option; None for other failures."""
  message = str(error)
  if 'No such compile option' not in message and 'While setting option' not in message:
    return None
  return ConfigError(
    f'compiler_options: the compiler refuses one of ({format_flags(options)}): '
    f"{message.splitlines()[0]}; correct it, or remove it with ('NAME', '')"
  )
