"""Compiler options of a training step, by kind of device: transfers that overlap with computing.

They go to the compiler with each step, not through environment variables, so that plan and train
use the same ones, and the manifest can name them."""

from collections.abc import Iterable, Mapping

from ftjax.runtime.errors import ConfigError

# Gathers and sums run beside matrix products, and a scheduler places them early. The names are
# those of the flag sets that MaxText (benchmarks/xla_flags_library.py) and tpu-recipes publish for
# dense models.
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
  """The table's options of a kind of device; none for a kind that it does not know."""
  return dict(next((o for kind, o in _TABLE if device_kind.startswith(kind)), {}))


def resolve(device_kind: str, own: Iterable[tuple[str, Value]]) -> dict[str, Value]:
  """The table's options with one's own over them.

  Args:
    device_kind: `device_kind` of a jax device.
    own: (name, value); an empty text as value takes an option of the table away.

  Returns:
    {name: value}, by name.
  """
  out = known(device_kind)
  for name, value in own:
    # XLA:GPU takes no text for a bool.
    out[name] = value == 'true' if value in ('true', 'false') else value
  return {name: out[name] for name in sorted(out) if out[name] != ''}


def told(options: Mapping[str, Value]) -> str:
  """For a log, written as flags are."""
  return ' '.join(f'{k}={str(v).lower() if isinstance(v, bool) else v}' for k, v in options.items())


def explain(error: Exception, options: Mapping[str, Value]) -> ConfigError | None:
  """The error to raise where the compiler refused an option; None where it failed otherwise."""
  said = str(error)
  wrong = 'No such compile option' in said or 'While setting option' in said
  if not wrong:
    return None
  return ConfigError(
    f'compiler_options: the compiler refuses one of ({told(options)}): {said.splitlines()[0]}; '
    "correct it, or take it away with ('NAME', '')"
  )
