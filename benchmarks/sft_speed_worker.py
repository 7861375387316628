"""One contestant of sft_speed.py, kept alive: `python sft_speed_worker.py KIND JOB.json` under its
own Python.

KIND is ftjax, trl or tunix. Each drives its project's own trainer and stops between two updates
until sft_speed.py, on stdin, asks for a round: one pass over the job's rows. The answer, a line of
JSON on stdout, tells the round's seconds and tokens; everything else that libraries print goes to
stderr. Nothing is timed but whole updates: no import, no compilation, no tokenizing.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class Rounds:
  """The worker's end of the two pipes.

  Attributes: tokens, supervised, padded: of a round; real tokens, those with a loss, and places.
  """

  def __init__(self, versions: tuple[str, ...]):
    self._out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    self._versions, self._begin, self._cpu = versions, 0.0, 0.0
    self.tokens = self.supervised = self.padded = 0

  def say(self, **values) -> None:
    print(json.dumps(values), file=self._out, flush=True)

  def ready(self) -> None:
    found = {name: importlib.metadata.version(name) for name in self._versions}
    self.say(ready=True, versions={'python': platform.python_version()} | found)

  def begin(self) -> None:
    """Waits for a round to be asked for; ends the process when there are no more."""
    if not sys.stdin.readline():
      raise SystemExit
    self.tokens = self.supervised = self.padded = 0
    self._begin, self._cpu = time.perf_counter(), time.process_time()

  def end(self, updates: int) -> None:
    """Tells how the round went; what it computed must be finished."""
    self.say(
      seconds=time.perf_counter() - self._begin,
      cpu_seconds=time.process_time() - self._cpu,
      updates=updates,
      tokens=self.tokens,
      supervised_tokens=self.supervised,
      padded_tokens=self.padded,
      peak_rss_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    )


def _ftjax_batches(job: dict, run) -> tuple[Callable, int]:
  """Returns ((step, rows) -> host batch [B, T], updates of a round): of the run's stream, or of
  given tokens."""
  import numpy as np

  from ftjax.data import batches

  batch_size, seq_len = run.config.batch_size, run.config.seq_len
  if run.data:
    return run.data.stream.batch, -(-run.data.mixture.rows_per_epoch // batch_size)
  rows = json.loads(Path(job['tokens']).read_text())
  updates = len(rows) // batch_size

  def make(step: int, rows_read) -> dict:
    del rows_read
    batch, first = batches.empty(batch_size, seq_len), step % updates * batch_size
    for i, row in enumerate(rows[first : first + batch_size]):
      tokens, supervised = (np.asarray(row[k]) for k in ('input_ids', 'completion_mask'))
      batches.fill_row(batch, i, [(tokens, supervised.astype(bool))])
    return batch

  return make, updates


def run_ftjax(job: dict, workdir: str) -> None:
  """The run, trainer and feed of ftjax.train, with packed rows where the job has rows to pack."""
  import jax

  from ftjax.algorithms import sft
  from ftjax.config import keys, validation
  from ftjax.experiment import run as experiment
  from ftjax.experiment.trainer import Trainer
  from ftjax.training.prefetch import Prefetch

  rounds = Rounds(('jax', 'jaxlib', 'flax', 'optax'))
  c = keys.default()
  c.model.path, c.model.compute_dtype = job['model'], job['dtype']
  c.data.train, c.data.on_overlength = job['rows'], 'truncate_right'
  c.seq_len, c.batch_size = job['seq_len'], job['packed_batch_size']
  c.steps, c.compile_cache = 10**6, False
  c.optim.lr, c.optim.schedule, c.optim.weight_decay = 1e-5, 'constant', 0.01
  validation.validate(c)
  run = experiment.start(c, workdir, with_data=job['case'] == 'chat')
  trainer = Trainer(run, sft.make_loss(run.forward, c))
  compiled, state = trainer.compile(), trainer.fresh()
  make, updates = _ftjax_batches(job, run)
  counts = {}

  class Counted:
    """The batches, counted on their way."""

    def batch(self, step: int, rows) -> dict:
      host = make(step, rows)
      real, supervised = int((host['segments'] > 0).sum()), int(host['weights'].sum())
      counts[step] = real, supervised, host['tokens'].size
      return host

  feed = Prefetch(Counted(), run.abstract_batch(), 0, c.steps)
  jax.block_until_ready(state)
  rounds.ready()
  for first in itertools.count(0, updates):
    rounds.begin()
    for step in range(first, first + updates):
      state, _ = compiled(state, feed.take(step))
      tokens, supervised, padded = counts.pop(step)
      rounds.tokens += tokens
      rounds.supervised += supervised
      rounds.padded += padded
    jax.block_until_ready(state)
    rounds.end(updates)


def run_trl(job: dict, workdir: str) -> None:
  """SFTTrainer.train over the rows in random order, padded to the longest of a batch, which is what
  it does on a CPU: without flash attention its packing lets documents see each other."""
  import torch
  import transformers
  import trl
  from datasets import Dataset

  rounds = Rounds(('torch', 'transformers', 'trl', 'accelerate'))
  rows = json.loads(Path(job['tokens']).read_text())
  updates = -(-len(rows) // job['batch_size'])

  class Gate(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
      rounds.ready()

    def on_step_begin(self, args, state, control, **kwargs):
      if state.global_step % updates == 0:
        rounds.begin()

    def on_step_end(self, args, state, control, **kwargs):
      if state.global_step % updates == 0:
        rounds.end(updates)

  class Counted(trl.SFTTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
      rounds.tokens += int(inputs['attention_mask'].sum())
      rounds.supervised += int((inputs['labels'][:, 1:] != -100).sum())
      rounds.padded += inputs['input_ids'].numel()
      return super().training_step(model, inputs, *args, **kwargs)

  settings = trl.SFTConfig(
    output_dir=workdir,
    use_cpu=True,
    bf16=job['dtype'] == 'bfloat16',
    gradient_checkpointing=job['checkpointing'],
    num_train_epochs=10**4,
    per_device_train_batch_size=job['batch_size'],
    completion_only_loss=True,
    max_length=job['seq_len'],
    learning_rate=1e-5,
    lr_scheduler_type='constant',
    weight_decay=0.01,
    save_strategy='no',
    report_to=[],
    disable_tqdm=True,
  )
  Counted(
    model=transformers.AutoModelForCausalLM.from_pretrained(job['model'], dtype=torch.float32),
    args=settings,
    train_dataset=Dataset.from_list(rows),
    processing_class=transformers.AutoTokenizer.from_pretrained(job['model']),
    callbacks=[Gate()],
  ).train()


def run_tunix(job: dict, workdir: str) -> None:
  """PeftTrainer.train on Tunix's own Llama with its own loss; every row padded to one length."""
  import jax
  import numpy as np
  import optax
  from flax import nnx
  from tunix.models.llama3 import model as llama
  from tunix.models.llama3 import params
  from tunix.sft import peft_trainer, utils

  rounds = Rounds(('google-tunix', 'jax', 'jaxlib', 'flax', 'optax'))
  hf = json.loads((Path(job['model']) / 'config.json').read_text())
  sizes = llama.ModelConfig(
    num_layers=hf['num_hidden_layers'],
    vocab_size=hf['vocab_size'],
    embed_dim=hf['hidden_size'],
    hidden_dim=hf['intermediate_size'],
    num_heads=hf['num_attention_heads'],
    head_dim=hf['head_dim'],
    num_kv_heads=hf['num_key_value_heads'],
    rope_theta=int(hf['rope_theta']),
    norm_eps=hf['rms_norm_eps'],
    weight_tying=hf['tie_word_embeddings'],
  )
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with mesh:
    model = params.create_model_from_safe_tensors(job['model'], sizes, mesh, jax.numpy.float32)
  rows = json.loads(Path(job['tokens']).read_text())
  shape = (job['batch_size'], job['seq_len'])
  updates = len(rows) // job['batch_size']

  def batches() -> Iterator[peft_trainer.TrainingInput]:
    rounds.ready()
    while True:
      rounds.begin()
      for u in range(updates):
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, row in enumerate(rows[u * shape[0] : (u + 1) * shape[0]]):
          tokens[i, : len(row['input_ids'])] = row['input_ids']
          mask[i, : len(row['input_ids'])] = row['completion_mask']
          rounds.tokens += len(row['input_ids'])
          rounds.supervised += sum(row['completion_mask'][1:])
        rounds.padded += tokens.size
        yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=mask)
      jax.block_until_ready(nnx.state(model))
      rounds.end(updates)

  def model_inputs(batch: peft_trainer.TrainingInput) -> dict:
    seen = batch.input_tokens != 0  # of padding; random tokens and chat hold no 0
    return {
      'input_tokens': batch.input_tokens,
      'input_mask': batch.input_mask,
      'positions': utils.build_positions_from_mask(seen),
      'attention_mask': utils.make_causal_attn_mask(seen),
    }

  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.01, b2=0.999)
  )
  settings = peft_trainer.TrainingConfig(eval_every_n_steps=10**6)
  trainer = peft_trainer.PeftTrainer(model, optimizer, settings)
  with mesh:
    trainer.with_gen_model_input_fn(model_inputs).train(batches())


def main() -> None:
  kind, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
  with tempfile.TemporaryDirectory() as workdir:
    {'ftjax': run_ftjax, 'trl': run_trl, 'tunix': run_tunix}[kind](job, workdir)


if __name__ == '__main__':
  main()
