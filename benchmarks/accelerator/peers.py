"""ftjax beside torch on the same card: plain transformers, Liger's kernels and TRL's SFTTrainer,
where they are installed.

Contestants are processes that stay alive and take turns (contest.py). All hold the card at once, so
jax must not reserve its memory beforehand; the runner sees to that. Ratios are medians of the
quotients within a round.
"""

import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
from pathlib import Path

import contest

from accelerator import peer_worker
from accelerator.record import Record

COLUMNS = (
  ('tokens_per_s', 'tokens/s', ',.0f'),
  ('ratio', 'ftjax / this', '.2f'),
  ('peak_gib', 'peak, GiB', '.2f'),
  ('versions', 'versions', ''),
  ('missing', 'not installed', ''),
)
ROUNDS, WARMUP = 5, 1
_MODEL = 'Qwen3-0.6B'


def job(tiny: bool) -> dict:
  """Returns what a contestant trains."""
  from accelerator import measuring
  from ftjax.planning import known_models

  small = {**measuring.TINY, 'max_position_embeddings': 512} if tiny else {}
  sizes = (
    {'rows': 2, 'seq_len': 64, 'updates': 2} if tiny else {'rows': 4, 'seq_len': 4096, 'updates': 5}
  )
  config = known_models.SHAPES[_MODEL] | small
  return {'config': config, 'remat': 'dots', 'checkpointing': False, **sizes}


def missing(kind: str) -> list[str]:
  """Returns the packages of a contestant that are not installed."""
  return [p for p in peer_worker.NEEDS[kind] if importlib.util.find_spec(p) is None]


def _worker(kind: str, what: dict, folder: Path) -> contest.Worker:
  script = Path(peer_worker.__file__).resolve()
  contestant = contest.Contestant(kind, kind, sys.executable, 'bfloat16')
  root = str(script.parents[1])
  paths = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH', '')]))
  return contest.Worker(contestant, script, what, folder, {'PYTHONPATH': paths})


def run(record: Record, tiny: bool) -> None:
  """Measures ftjax beside each peer, one pair at a time: a card may not hold all of them."""
  what = job(tiny)
  for kind in peer_worker.NEEDS:
    with record.row(kind) as row:
      if absent := missing(kind):
        row['missing'] = ', '.join(absent)
        continue
      _measure(row, record, kind, what)


def _measure(row: dict, record: Record, kind: str, what: dict) -> None:
  with tempfile.TemporaryDirectory() as name:
    workers: list[contest.Worker] = []
    try:
      for contestant in ('ftjax', kind):
        workers.append(_worker(contestant, what, Path(name)))
      contest.play(kind, workers, WARMUP, ROUNDS)
    except SystemExit as error:  # the process of one has ended, which its log explains
      raise RuntimeError(str(error).strip().splitlines()[-1]) from error
    finally:
      for worker in workers:
        with contextlib.suppress(BrokenPipeError):
          worker.close()
    ours, theirs = workers
    row |= _summary(theirs) | {'ratio': ours.ratio(theirs, 'seconds')}
    with record.row(f'ftjax beside {kind}') as own:
      own |= _summary(ours)


def _summary(worker: contest.Worker) -> dict:
  peak = worker.rounds[-1]['peak_bytes']
  return {
    'tokens_per_s': statistics.median(worker.speeds('seconds')),
    'peak_gib': None if peak is None else peak / 2**30,
    'versions': ', '.join(f'{k} {v}' for k, v in worker.versions.items()),
  }
