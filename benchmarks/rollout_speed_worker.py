"""One contestant of rollout_speed.py, kept alive: `python rollout_speed_worker.py KIND JOB.json`
under its own Python.

KIND is ftjax or hf. The job names the model, the prompts and the length of each one's completion. A
round, asked for on stdin, makes all of them; a line of JSON on stdout tells how long it took.
"""

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ftjax.experiment.model import open_model


class Out:
  """Lines of JSON on the real stdout; whatever libraries print goes to stderr."""

  def __init__(self):
    self._out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)

  def say(self, **line) -> None:
    print(json.dumps(line), file=self._out, flush=True)


def serve(out: Out, packages: tuple[str, ...], play: Callable[[int], int], tokens: int) -> None:
  """Runs `play(round number)`, which returns the decoding steps it took, whenever asked."""
  out.say(versions={p: importlib.metadata.version(p) for p in packages})
  for number, _ in enumerate(sys.stdin):
    begin, cpu = time.perf_counter(), time.process_time()
    steps = play(number)
    out.say(
      seconds=time.perf_counter() - begin,
      cpu_seconds=time.process_time() - cpu,
      tokens=tokens,
      steps=steps,
      peak_rss_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    )


def run_ftjax(job: dict, out: Out) -> None:
  """The engine, from weights already in the compute dtype."""
  import jax
  import jax.numpy as jnp

  from ftjax.generation.engine import Engine
  from ftjax.generation.sampling import Sampling
  from ftjax.hf import load
  from ftjax.models import kinds
  from ftjax.runtime import sharding

  dtype = jnp.dtype(job['dtype'])
  mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
  jax.set_mesh(mesh)
  arch = open_model(job['model'], {}, 0).arch
  where = sharding.shardings(mesh, kinds.axes(arch))
  params = load.load_params(job['model'], arch, where, dtype)
  engine = Engine(arch, dtype, (), 0, slots=job['slots'])

  def play(number: int) -> int:
    rollout = engine.generate(
      params,
      job['prompts'],
      group=1,
      max_tokens=job['lengths'],
      sampling=Sampling(1.0),
      seed=number,
    )
    got = [len(c.tokens) for (c,) in rollout.completions]
    assert got == job['lengths'], 'every completion has the length asked for'
    print(rollout.metrics, file=sys.stderr)
    return rollout.metrics['steps']

  serve(out, ('jax', 'jaxlib', 'flax'), play, sum(job['lengths']))


def run_hf(job: dict, out: Out) -> None:
  """generate in static batches, prompts padded on the left."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    job['model'], dtype=getattr(torch, job['dtype'])
  ).eval()
  model.generation_config.eos_token_id = None  # as for ftjax: lengths are given
  size, prompts, lengths = job['slots'], job['prompts'], job['lengths']

  def play(number: int) -> int:
    torch.manual_seed(number)
    steps = 0
    for first in range(0, len(prompts), size):
      batch = prompts[first : first + size]
      width, most = max(map(len, batch)), max(lengths[first : first + size])
      ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
      mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
      with torch.inference_mode():
        got = model.generate(
          ids,
          attention_mask=mask,
          max_new_tokens=most,
          do_sample=True,
          temperature=1.0,
          top_k=0,
          top_p=1.0,
          pad_token_id=0,
        )
      assert got.shape[1] == width + most, 'nothing ends before the longest'
      steps += most
    return steps

  serve(out, ('torch', 'transformers'), play, sum(lengths))


def main() -> None:
  out = Out()
  job = json.loads(Path(sys.argv[2]).read_text())
  {'ftjax': run_ftjax, 'hf': run_hf}[sys.argv[1]](job, out)


if __name__ == '__main__':
  main()
