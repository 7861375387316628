"""SFT, LoRA and QLoRA steps: tokens/s, MFU and peak memory, beside the plan for the same config.

The step is the one that `ftjax.train` compiles, on random weights and rows of packed documents of
random tokens, all supervised. Its time is the median of single steps, each until its state is
ready. The first of the given rematerializations whose planned memory fits the device is run.
"""

import dataclasses
import statistics
import time

import jax
import ml_collections
import numpy as np

from accelerator import measuring, packed_base
from accelerator.record import Record, check
from ftjax.algorithms import sft
from ftjax.config import keys, validation
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.models import attention, counts
from ftjax.models.architecture import AttentionSpec
from ftjax.planning import cost, memory, topology
from ftjax.telemetry import throughput
from ftjax.training.prefetch import place

COLUMNS = (
  ('rows', 'rows of 4,096', 'd'),
  ('remat', 'remat', ''),
  ('kernel', 'attention', ''),
  ('tokens_per_s', 'tokens/s', ',.0f'),
  ('mfu', 'MFU, %', '.1f'),
  ('step_s', 'step, s', '.4f'),
  ('planned_s', 'planned at least, s', '.4f'),
  ('peak_gib', 'peak, GiB', '.2f'),
  ('planned_gib', 'planned peak, GiB', '.2f'),
  ('peak_before_gib', 'peak before the first step, GiB', '.2f'),
  ('compile_s', 'compile, s', '.1f'),
)
SEQ_LEN, WARMUP, STEPS = 4096, 2, 7
# The planned peak leaves out what the allocator loses between buffers.
USABLE = 0.97
# A peak that the step has made may be above the plan by this share.
OVER_PLAN = 1.05
_ADAPTERS = {
  'sft': {},
  'lora': {'lora.rank': 16, 'optim.lr': 1e-4},
  'qlora': {'lora.rank': 16, 'lora.base': 'nf4', 'optim.lr': 1e-4},
}
# device_kind begins with: kind of planning/topology.py
_KINDS = (
  ('NVIDIA H200', 'h200'),
  ('NVIDIA H100', 'h100'),
  ('TPU v4', 'v4'),
  ('TPU v5 lite', 'v5e'),
  ('TPU v5e', 'v5e'),
  ('TPU v5', 'v5p'),
  ('TPU v6', 'v6e'),
  ('TPU7x', 'tpu7x'),
)


def config(
  method: str, rows: int, remat: str, tiny: bool, **more: int | float | str
) -> ml_collections.ConfigDict:
  """Returns the config of a method; without files, as weights and tokens are random."""
  c = keys.default()
  c.model.path, c.data.train = 'random', 'sums:20'  # read by nothing here
  c.model.compute_dtype, c.seq_len = 'bfloat16', 128 if tiny else SEQ_LEN
  c.batch_size = c.eval.batch_size = rows
  c.remat, c.steps, c.compile_cache = remat, 1000, False
  c.optim.schedule, c.optim.lr, c.optim.b2 = 'constant', 1e-5, 0.95
  c.update_from_flattened_dict({**_ADAPTERS[method], **more})
  validation.validate(c)
  return c


def trainer(c: ml_collections.ConfigDict, arch) -> Trainer:
  """Returns the trainer of a config on the current mesh."""
  run = experiment.without_data(c, jax.sharding.get_mesh(), arch)
  return Trainer(run, sft.make_loss(run.forward, c))


def device_batch(own: Trainer, one_document: bool = False) -> tuple[dict, int]:
  """Returns (a step's batch on the device, its (query, key) pairs within documents)."""
  c, run = own.run.config, own.run
  vocab = run.arch.vocab_size
  host, pairs = measuring.packed_batch(c.batch_size, c.seq_len, vocab, one_document=one_document)
  micro = {k: v.reshape(c.grad_accum, -1, *v.shape[1:]) for k, v in host.items()}
  return place(micro, run.batch_shardings(micro=True)), pairs


def kernel(own: Trainer) -> str:
  """Returns the attention kernel that `auto` chooses for the step."""
  c, mixers = own.run.config, [spec.mixer for spec in own.run.arch.layers()]
  sizes = [m.head_dim for m in mixers if isinstance(m, AttentionSpec)]
  length = c.seq_len
  problem = attention.Problem(
    measuring.platform(), 1, length, length, max(sizes), c.model.compute_dtype
  )
  return attention.kernel(problem)


def peak_flops() -> throughput.Peak | None:
  """Returns the peak of the one device that is used, however many are attached."""
  kind = jax.devices()[0].device_kind
  return throughput.find_peak() if measuring.platform() == 'cpu' else throughput.table_peak(kind, 1)


def chip_name(device_kind: str) -> str | None:
  """Returns the name of a device in planning/topology.py; None for one that it does not know."""
  return next((name for start, name in _KINDS if device_kind.startswith(start)), None)


def planned_seconds(own: Trainer, held: memory.Memory) -> float | None:
  """Returns the plan's time of a step, a lower bound from peak rates; None for unknown devices."""
  name = chip_name(own.run.mesh.devices.flat[0].device_kind)
  if name is None:
    return None
  where = topology.Topology(f'{name}, one device', name, (1,))
  c, run = own.run.config, own.run
  found = cost.estimate(
    *(run.auxiliary.passes(run.arch), where, held, ()),
    rows=c.batch_size,
    length=c.seq_len,
    remat=c.remat,
    micro_batches=c.grad_accum,
  )
  # Per device: a TPU7x chip is two.
  return max(found.compute * where.num_devices, found.traffic)


@dataclasses.dataclass(frozen=True)
class Fitting:
  """A compiled step that fits the device."""

  own: Trainer
  compiled: jax.stages.Compiled
  held: memory.Memory
  seconds: float


def fitting(method: str, rows: int, remats: list[str], arch, tiny: bool) -> Fitting:
  """Compiles the step with each rematerialization until one fits the memory of the device.

  Raises:
    MemoryError: none fits.
  """
  tried, limit = [], measuring.memory()['limit']
  for remat in remats:
    own = trainer(config(method, rows, remat, tiny), arch)
    begin = time.perf_counter()
    compiled = own.compile()
    seconds = time.perf_counter() - begin
    held = memory.memory(compiled, own.abstract)
    if limit is None or held.peak <= USABLE * limit:
      return Fitting(own, compiled, held, seconds)
    tried.append(f'{remat}: {held.peak / 2**30:.1f} GiB')
  raise MemoryError(f'planned peak of a step, {", ".join(tried)}; limit {limit / 2**30:.1f} GiB')


def timed(compiled, state, batch, steps: int) -> tuple[object, list[float], list[float]]:
  """Runs warm-up and `steps` steps; returns (state, seconds of each, losses in nats)."""
  seconds, losses = [], []
  for step in range(WARMUP + steps):
    begin = time.perf_counter()
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    if step >= WARMUP:
      seconds.append(time.perf_counter() - begin)
    losses.append(float(np.asarray(metrics['loss'])))
  return state, seconds, losses


def _measure(row: dict, model: str, method: str, rows: int, remats: list[str], tiny: bool) -> None:
  arch, rows = measuring.architecture(model, tiny), 2 if tiny else rows
  found = fitting(method, rows, remats, arch, tiny)
  own, c = found.own, found.own.run.config
  row |= {
    'rows': rows,
    'remat': c.remat,
    'kernel': kernel(own),
    'compile_s': found.seconds,
    'planned_gib': found.held.peak / 2**30,
    'planned_s': planned_seconds(own, found.held),
    'seq_len': c.seq_len,
    'parameters': counts.num_params(own.run.arch),
    'trained': counts.num_trained(own.run.arch),
  }
  if method == 'qlora':  # in place of a base that is drawn in float32 and packed
    params = packed_base.make(own.run.arch, c.model.param_dtype)
    own.run.load_first = lambda: params
  state = own.fresh()
  batch, pairs = device_batch(own)
  jax.block_until_ready((state, batch))
  row['peak_before_gib'] = measuring.gib(measuring.memory()['peak'])
  _, seconds, losses = timed(found.compiled, state, batch, STEPS)
  step_s, tokens = statistics.median(seconds), rows * c.seq_len
  row |= {'step_s': step_s, 'steps_s': seconds, 'tokens_per_s': tokens / step_s}
  row |= {'first_loss': losses[0], 'last_loss': losses[-1]}
  peak = peak_flops()
  if peak is not None:
    flops = counts.train_flops(own.run.arch)
    row['mfu'] = 100 * flops(tokens, pairs) / step_s / peak.flops_per_s
    row['mfu_formula'] = f'(4 P + 2 P_trained + attention within documents); {peak.source}'
  row['peak_gib'] = measuring.gib(measuring.memory()['peak'])
  # The same batch every time: the loss must fall, and a random model begins near uniform.
  check(row, 'loss after the steps minus the first', losses[-1] - losses[0], 0.0)
  above = losses[0] - np.log(arch.vocab_size)
  check(row, 'first loss minus that of the uniform distribution, nats', above, 2.0)
  if row['peak_gib'] and row['peak_gib'] > row['peak_before_gib']:
    over = row['peak_gib'] / row['planned_gib']
    check(row, 'peak memory / planned', over, OVER_PLAN)


def run(
  record: Record, tiny: bool, *, model: str, method: str, rows: int, remats: list[str]
) -> None:
  """Measures one model and method.

  model: of planning/known_models.py. method: sft, lora or qlora. rows: of 4,096 tokens a step.
  """
  measuring.one_device()
  with record.row(f'{method} {model}') as row:
    _measure(row, model, method, rows, remats, tiny)
