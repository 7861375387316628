"""What lm-eval's own backend, on torch and transformers, finds for the tasks of lm_eval_cases.py.
Runs in an environment with torch, transformers and lm-eval, from the repository's root:

  PYTHONPATH=tests:. .venv-parity/bin/python tests/parity/make_lm_eval_goldens.py FOLDER [smollm2]

Writes FOLDER/lm_eval.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from parity import lm_eval_cases as cases


def find(model: HFLM, folder: str, is_chat: bool = False) -> tuple[dict, dict]:
  loaded = TaskManager(include_path=folder, include_defaults=False).load(list(cases.TASKS))
  for task in loaded['tasks'].values():
    task.set_fewshot_seed(1234)
  found = evaluate(
    model,
    loaded,
    bootstrap_iters=0,
    apply_chat_template=is_chat,
    fewshot_as_multiturn=is_chat,
  )
  return cases.numbers(found)


def write(target: Path, name: str, found: tuple[dict, dict]) -> None:
  arrays, texts = found
  np.savez_compressed(target / f'{name}.npz', **arrays)
  (target / f'{name}.json').write_text(json.dumps(texts, indent=1) + '\n')


def main(target: Path, *more: str) -> None:
  torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '2')))
  target.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as temp:
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
      write(target, name, find(model, tasks))
      if name == 'plain':
        write(target, 'chat', find(model, tasks, is_chat=True))
    if 'smollm2' in more:
      real = cases.write_tasks(Path(temp) / 'real', real=True)
      model = HFLM(
        str(cases.SMOLLM2),
        device='cpu',
        dtype='float32',
        batch_size=1,
        max_length=cases.SMOLLM2_LENGTH * 4,
      )
      write(target, 'smollm2', find(model, real))


if __name__ == '__main__':
  main(Path(sys.argv[1]) / 'lm_eval', *sys.argv[2:])
