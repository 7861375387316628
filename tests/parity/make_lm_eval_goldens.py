"""What lm-eval's own backend, on torch and transformers, finds for the tasks of lm_eval_cases.py.
Runs in an environment with torch, transformers and lm-eval, from the repository's root:

  PYTHONPATH=tests:. .venv-parity/bin/python tests/parity/make_lm_eval_goldens.py FOLDER [smollm2]

Writes FOLDER/lm_eval: of the tiny models, or with `smollm2` of SmolLM2 alone (`make assets`).
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from parity import lm_eval_cases as cases


def find(model: HFLM, folder: str, tasks: Sequence[str], is_chat: bool = False) -> dict:
  loaded = TaskManager(include_path=folder, include_defaults=False).load(list(tasks))
  for task in loaded['tasks'].values():
    task.set_fewshot_seed(1234)
  return evaluate(
    model,
    loaded,
    bootstrap_iters=0,
    apply_chat_template=is_chat,
    fewshot_as_multiturn=is_chat,
  )


class WithGaps(HFLM):
  """lm-eval's backend, which notes how clearly each token of a completion was the likeliest.

  Attributes:
    gaps: by context, the smallest difference of the two highest logits at one of the tokens.
  """

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.gaps: dict[tuple[int, ...], float] = {}

  def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    found = super()._model_generate(context, *args, **kwargs)
    with torch.inference_mode():
      highest = self.model(found).logits[:, context.shape[1] - 1 : -1].topk(2).values
    self.gaps[tuple(context[0].tolist())] = float((highest[..., 0] - highest[..., 1]).min())
    return found


def write(target: Path, name: str, found: dict, **more: np.ndarray) -> None:
  arrays, texts = cases.numbers(found)
  np.savez_compressed(target / f'{name}.npz', **arrays, **more)
  if texts:
    (target / f'{name}.json').write_text(json.dumps(texts, indent=1) + '\n')


def write_smollm2(target: Path, folder: str) -> None:
  """Writes smollm2, and smollm2_float64, of whole texts.

  torch's float32 log_softmax of 49,152 logits is too high by 8e-6 nats on the CPU, token by token
  (torch 2.13), which adds up to 1e-3 in a text of 130 tokens: whole texts are scored in float64.
  """

  def opened(dtype: str) -> WithGaps:
    length = cases.SMOLLM2_LENGTH
    return WithGaps(str(cases.SMOLLM2), device='cpu', dtype=dtype, batch_size=1, max_length=length)

  model = opened('float32')
  found = find(model, folder, [task for task in cases.TASKS if task != cases.READ])
  wrote = [s for s in found['samples']['ftjax_write'] if s['filter'] == 'strict-match']
  contexts = [s['arguments'][0][0] for s in wrote]
  smallest = [model.gaps[tuple(model.tok_encode(context))] for context in contexts]
  write(target, 'smollm2', found, **{'ftjax_write/gaps': np.array(smallest)})
  write(target, 'smollm2_float64', find(opened('float64'), folder, [cases.READ]))


def main(target: Path, *more: str) -> None:
  torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '2')))
  target.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as temp:
    if 'smollm2' in more:
      write_smollm2(target, cases.write_tasks(Path(temp) / 'real', real=True))
      return
    tasks = cases.write_tasks(Path(temp) / 'tasks')
    for name, case in cases.TINY.items():
      path = cases.write_model(Path(temp) / name, case['adds_bos'])
      model = HFLM(
        path,
        device='cpu',
        dtype='float32',
        batch_size=1,
        max_length=case['max_length'],
        add_bos_token=case['add_bos'],
      )
      write(target, name, find(model, tasks, cases.TASKS))
      if name == 'plain':
        write(target, 'chat', find(model, tasks, cases.TASKS, is_chat=True))


if __name__ == '__main__':
  main(Path(sys.argv[1]) / 'lm_eval', *sys.argv[2:])
