"""One contestant of the section peers, kept alive: `python peer_worker.py KIND JOB.json`.

KIND is ftjax, transformers, liger or trl. All train the same shape from random weights on the same
tokens, one document a row, with AdamW, in bfloat16 on float32 parameters. A round, asked for on
stdin, is a few updates; the answer is a line of JSON on stdout (contest.py). Peers run without
gradient checkpointing, their faster setting, unless the job asks for it.
"""

import gc
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Out:
  """Lines of JSON on the real stdout; what libraries print goes to stderr."""

  def __init__(self):
    self._out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)

  def write(self, **line) -> None:
    print(json.dumps(line), file=self._out, flush=True)

  def ready(self, *packages: str) -> None:
    self.write(versions={p: importlib.metadata.version(p) for p in packages})

  def serve(self, job: dict, round_: Callable[[], float], peak: Callable[[], int | None]) -> None:
    """Runs `round_`, which returns the last loss, for every line of stdin."""
    for _ in sys.stdin:
      begin, cpu = time.perf_counter(), time.process_time()
      loss = round_()
      self.answer(job, begin, cpu, loss, peak())

  def answer(
    self, job: dict, begin: float, cpu: float, loss: float | None, peak: int | None
  ) -> None:
    """Writes what a round took that began at the given clocks."""
    self.write(
      seconds=time.perf_counter() - begin,
      cpu_seconds=time.process_time() - cpu,
      tokens=job['updates'] * job['rows'] * job['seq_len'],
      loss=loss,
      peak_bytes=peak,
      peak_rss_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    )


def tokens(job: dict) -> np.ndarray:
  """Returns int64[rows, seq_len]: the same for all contestants."""
  size = job['rows'], job['seq_len']
  return np.random.default_rng(0).integers(1, job['config']['vocab_size'], size)


def run_ftjax(job: dict, out: Out) -> None:
  """The step of ftjax.train."""
  import jax

  from accelerator import measuring, training
  from ftjax.data import batches
  from ftjax.families import table
  from ftjax.training.prefetch import place

  measuring.one_device()
  arch = table.architecture(job['config'])
  c = training.config('sft', job['rows'], job['remat'], False)
  c.seq_len = job['seq_len']
  own = training.trainer(c, arch)
  compiled, state = own.compile(), own.fresh()
  host = batches.empty(job['rows'], job['seq_len'])
  for i, row in enumerate(tokens(job)):
    batches.fill_row(host, i, [(row, np.ones(len(row), bool))])
  batch = place({k: v[None] for k, v in host.items()}, own.run.batch_shardings(micro=True))
  jax.block_until_ready((state, batch))

  def round_() -> float:
    nonlocal state
    for _ in range(job['updates']):
      state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    return float(np.asarray(metrics['loss']))

  out.ready('jax', 'flax', 'optax')
  out.serve(job, round_, lambda: measuring.memory()['peak'])


def _model(job: dict):
  """Returns (a random model of transformers in float32 on the device, the device)."""
  import torch
  import transformers

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**job['config'])
  config._attn_implementation = 'sdpa'
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  if job['checkpointing']:
    model.gradient_checkpointing_enable()
  return model.to(device), device


def _torch_peak() -> int | None:
  import torch

  return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def run_transformers(job: dict, out: Out, packages: tuple[str, ...] = ()) -> None:
  """A loop of its own: autocast, fused AdamW, clipping; no padding, so no mask."""
  import torch

  model, device = _model(job)
  model.train()
  model.config.use_cache = False
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=device == 'cuda'
  )
  ids = torch.tensor(tokens(job), device=device)

  def round_() -> float:
    for _ in range(job['updates']):
      with torch.autocast(device, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())  # waits for the device

  out.ready('torch', 'transformers', *packages)
  out.serve(job, round_, _torch_peak)


def run_liger(job: dict, out: Out) -> None:
  """The same with Liger's kernels, its fused head among them."""
  from liger_kernel.transformers import apply_liger_kernel_to_qwen3

  apply_liger_kernel_to_qwen3()
  run_transformers(job, out, ('liger-kernel',))


def run_trl(job: dict, out: Out) -> None:
  """TRL's SFTTrainer, gated between updates."""
  import tempfile

  import tokenizers
  import torch
  import transformers
  import trl
  from datasets import Dataset

  model, device = _model(job)
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, 'b': 1}, unk_token='a'))
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, eos_token='b', pad_token='a'
  )
  rows = [{'input_ids': row.tolist()} for row in tokens(job)]
  began: list[float] = []

  class Gate(transformers.TrainerCallback):
    """Waits for a line of stdin before each round."""

    def on_train_begin(self, args, state, control, **named):
      out.ready('torch', 'transformers', 'trl', 'accelerate')

    def on_step_begin(self, args, state, control, **named):
      if state.global_step % job['updates'] == 0:
        if not sys.stdin.readline():
          raise SystemExit
        began[:] = [time.perf_counter(), time.process_time()]

    def on_step_end(self, args, state, control, **named):
      if state.global_step % job['updates'] == 0:
        if device == 'cuda':
          torch.cuda.synchronize()
        out.answer(job, *began, None, _torch_peak())

  with tempfile.TemporaryDirectory() as folder:
    settings = trl.SFTConfig(
      output_dir=folder,
      use_cpu=device == 'cpu',
      bf16=True,
      gradient_checkpointing=job['checkpointing'],
      num_train_epochs=10**4,
      per_device_train_batch_size=job['rows'],
      max_length=job['seq_len'],
      learning_rate=1e-5,
      lr_scheduler_type='constant',
      weight_decay=0.01,
      max_grad_norm=1.0,
      save_strategy='no',
      logging_strategy='no',
      report_to=[],
      disable_tqdm=True,
    )
    trl.SFTTrainer(
      model=model,
      args=settings,
      train_dataset=Dataset.from_list(rows),
      processing_class=tokenizer,
      callbacks=[Gate()],
    ).train()


RUN = {
  'ftjax': run_ftjax,
  'transformers': run_transformers,
  'liger': run_liger,
  'trl': run_trl,
}
NEEDS = {
  'transformers': ('torch', 'transformers'),
  'liger': ('torch', 'transformers', 'liger_kernel'),
  'trl': ('torch', 'transformers', 'trl', 'datasets', 'accelerate'),
}


def main() -> None:
  out = Out()
  job = json.loads(Path(sys.argv[2]).read_text())
  gc.disable()  # a collection inside a round would be timed
  RUN[sys.argv[1]](job, out)


if __name__ == '__main__':
  main()
