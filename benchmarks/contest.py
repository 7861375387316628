"""Contestants of a speed benchmark: processes that stay alive, and take turns round by round.

A worker script gets two arguments, the contestant's kind and the path of its job (JSON). It says
{"versions": ..} when it is ready, and for every line on its standard input one round's result:
{"tokens": .., "seconds": .., "cpu_seconds": .., "peak_rss_gb": .., ..}. sft_speed.py and
rollout_speed.py say what a round is.
"""

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Contestant:
  """Who runs: name in the output, kind of worker, command of its Python, dtype."""

  name: str
  kind: str
  command: str
  dtype: str


class Worker:
  """A live contestant, and the results of its rounds that count."""

  def __init__(
    self,
    contestant: Contestant,
    script: Path,
    job: dict,
    folder: Path,
    environment: Mapping[str, str],
  ):
    self.name, self.kind = contestant.name, contestant.kind
    path = folder / f'{contestant.name}.json'
    path.write_text(json.dumps(job | {'dtype': contestant.dtype}))
    self._log = open(folder / f'{contestant.name}.log', 'w+')  # noqa: SIM115
    self._process = subprocess.Popen(
      [*shlex.split(contestant.command), str(script), contestant.kind, str(path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
      env=os.environ | environment,
    )
    self.rounds: list[dict] = []
    self.versions = self._read()['versions']

  def _read(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      raise SystemExit(f'{self.name} has ended:\n{self._log.read()[-4000:]}')
    return json.loads(line)

  def round(self) -> dict:
    self._process.stdin.write('round\n')
    self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    self._process.stdin.close()
    try:
      self._process.wait(timeout=60)
    except subprocess.TimeoutExpired:
      self._process.kill()
    self._log.close()

  def speeds(self, clock: str) -> list[float]:
    """Tokens per second of each round by `clock`: seconds or cpu_seconds."""
    return [r['tokens'] / r[clock] for r in self.rounds]

  def ratio(self, peer: 'Worker', clock: str) -> float:
    """Median of the quotients of speeds within a round."""
    pairs = zip(self.speeds(clock), peer.speeds(clock), strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)

  def summary(self) -> dict:
    """What every benchmark tells of a contestant."""
    return {
      'contestant': self.name,
      'tokens_per_s': round(statistics.median(self.speeds('seconds')), 1),
      'seconds': [round(r['seconds'], 2) for r in self.rounds],
      'cpu_seconds': [round(r['cpu_seconds'], 2) for r in self.rounds],
      'peak_rss_gb': self.rounds[-1]['peak_rss_gb'],
      'versions': self.versions,
    }


def play(case: str, workers: list[Worker], warmup: int, rounds: int) -> None:
  """All rounds of a case; each begins with another contestant. Results go to standard error too."""
  for number in range(warmup + rounds):
    turn = number % len(workers)
    for worker in workers[turn:] + workers[:turn]:
      result = worker.round()
      print(case, number, worker.name, json.dumps(result), file=sys.stderr, flush=True)
      if number >= warmup:
        worker.rounds.append(result)
