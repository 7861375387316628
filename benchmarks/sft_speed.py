"""Training speed of ftjax against TRL and Tunix on this machine, side by side in one run.

  make assets
  python3 -m venv /tmp/trl && /tmp/trl/bin/pip install torch transformers==5.23.0 trl==1.16.0
  python3.11 -m venv /tmp/tunix && /tmp/tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2
  .venv/bin/python benchmarks/sft_speed.py --ours ftjax=.venv/bin/python \
    --trl-python /tmp/trl/bin/python --tunix-python /tmp/tunix/bin/python --chat-data FILE

Full fine-tuning with AdamW and clipping, in two cases:
  full: 4 rows of 256 random tokens an update, all of them supervised.
  chat: conversations of ragged length out of FILE (meant are the demo files of LLaMA-Factory, such
    as alpaca_en_demo.json), loss on the answers. TRL takes 4 at a time in random order and pads
    them to the longest; ftjax packs the same conversations into rows. Speed counts real tokens.

Every contestant is a process of sft_speed_worker.py that stays alive and runs a round (one pass
over the case's rows) when asked. Contestants take turns, each round beginning with another one, so
that a busy neighbour hits all alike; figures are medians over rounds, ratios are medians of the
quotients within a round. On a machine that others use, cpu_seconds (of all threads) say more than
seconds. TRL runs without gradient checkpointing unless --trl-checkpointing is given: its default is
to checkpoint, which is slower. A contestant needs 5 to 8 GB; --contestants picks some.

One line of JSON per contestant and case: median tokens_per_s with padding left out, supervised
tokens alone, seconds of each round, peak memory of the process. Then lines of ratios to the others.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from contest import Contestant, Worker, play

ROOT = Path(__file__).resolve().parent.parent


def summary(worker: Worker, case: str) -> dict:
  """The line of a contestant; `tokens` are no padding."""

  def median(key):
    return round(statistics.median(r[key] / r['seconds'] for r in worker.rounds), 1)

  return {
    'case': case,
    'supervised_tokens_per_s': median('supervised_tokens'),
    'padded_tokens_per_s': median('padded_tokens'),
    'updates': worker.rounds[0]['updates'],
    'tokens': statistics.mean(r['tokens'] for r in worker.rounds),
  } | worker.summary()


def make_full(args: argparse.Namespace, folder: Path) -> dict:
  """Random tokens, the same for all."""
  vocab = json.loads((Path(args.model) / 'config.json').read_text())['vocab_size']
  chance, length = random.Random(0), 256
  rows = [
    {
      'input_ids': [chance.randrange(1, vocab) for _ in range(length)],
      'completion_mask': [1] * length,
    }
    for _ in range(args.batch_size * args.full_updates)
  ]
  tokens = folder / 'full.json'
  tokens.write_text(json.dumps(rows))
  return {'rows': 'none', 'tokens': str(tokens), 'seq_len': length, 'packed_batch_size': 4}


def make_chat(args: argparse.Namespace, folder: Path) -> dict:
  """Conversations spread evenly over the file: as rows for ftjax, as its tokens for the peers."""
  from ftjax.data import sources, token_cache
  from ftjax.data.tokenizer import Tokenizer
  from ftjax.hf import load

  found = [row for _, row in sources.rows(sources.parse_spec(args.chat_data))]
  picked = [found[i * len(found) // args.chat_rows] for i in range(args.chat_rows)]
  rows, tokens = folder / 'chat.jsonl', folder / 'chat.json'
  rows.write_text(''.join(json.dumps(row) + '\n' for row in picked))
  corpus = token_cache.build_or_open(
    sources.Spec(str(rows)),
    Tokenizer(load.tokenizer_files(args.model)),
    cache_dir=folder / 'data_cache',
    seq_len=args.chat_len,
    loss_on='assistant',
    on_overlength='truncate_right',
    progress=False,
  )
  examples = [corpus.example(i) for i in range(len(corpus))]
  told = [{'input_ids': t.tolist(), 'completion_mask': s.astype(int).tolist()} for t, s in examples]
  tokens.write_text(json.dumps(told))
  return {
    'rows': str(rows),
    'tokens': str(tokens),
    'seq_len': args.chat_len,
    'packed_batch_size': args.chat_packed_rows,
  }


def run_case(case: str, contestants: list[Contestant], args, folder: Path) -> None:
  """Plays all rounds of a case and prints its lines."""
  job = {'full': make_full, 'chat': make_chat}[case](args, folder)
  job |= {'case': case, 'model': args.model, 'batch_size': args.batch_size}
  job['checkpointing'] = args.trl_checkpointing
  workers: list[Worker] = []
  script = Path(__file__).with_name('sft_speed_worker.py')
  place = folder / case
  place.mkdir()
  try:
    for contestant in contestants:
      environment = {'PYTHONPATH': str(ROOT)} if contestant.kind == 'ftjax' else {}
      workers.append(Worker(contestant, script, job, place, environment))
    play(case, workers, args.warmup, args.rounds)
  finally:
    for worker in workers:
      worker.close()
  for worker in workers:
    print(json.dumps(summary(worker, case)), flush=True)
  ours = {c.name for c in contestants if c.kind == 'ftjax'}
  for worker in (w for w in workers if w.name in ours):
    for clock in ('seconds', 'cpu_seconds'):
      ratios = {p.name: worker.ratio(p, clock) for p in workers if p is not worker}
      line = {'case': case, 'contestant': worker.name, 'by': clock, 'speed_over': ratios}
      print(json.dumps(line), flush=True)


def _contestants(args: argparse.Namespace) -> list[Contestant]:
  """All that the flags name; a line says who is missing."""
  out = []
  for text in args.ours:
    name, _, command = text.partition('=')
    command, _, dtype = command.partition('@')
    out.append(Contestant(name, 'ftjax', command, dtype or 'float32'))
  for flag, kind, dtypes in (
    ('--trl-python', 'trl', {'trl-fp32': 'float32', 'trl-bf16': 'bfloat16'}),
    ('--tunix-python', 'tunix', {'tunix-fp32': 'float32'}),
  ):
    command = {'trl': args.trl_python, 'tunix': args.tunix_python}[kind]
    if not command:
      print(json.dumps({'skipped': kind, 'why': f'{flag} was not given'}), flush=True)
    else:
      out += [Contestant(name, kind, command, dtype) for name, dtype in dtypes.items()]
  unknown = set(args.contestants or ()) - {c.name for c in out}
  if unknown:
    raise SystemExit(f'--contestants: {sorted(unknown)} not among {[c.name for c in out]}')
  return [c for c in out if not args.contestants or c.name in args.contestants]


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--ours', action='append', default=[], help='NAME=COMMAND[@bfloat16], as often as wanted')
  add('--trl-python', default='', help='Python of an environment with TRL')
  add('--tunix-python', default='', help='Python of an environment with Tunix')
  add(
    '--contestants', nargs='*', help='only these: names of --ours, trl-fp32, trl-bf16, tunix-fp32'
  )
  add('--cases', nargs='*', default=['full', 'chat'], choices=('full', 'chat'))
  add('--model', default=str(ROOT / '.cache/smollm2'), help='HF folder')
  add('--rounds', type=int, default=5)
  add('--warmup', type=int, default=1, help='rounds that do not count')
  add('--batch-size', type=int, default=4, help='rows of an update, but for packed ones')
  add('--full-updates', type=int, default=2, help='updates of a round of case full')
  add('--chat-data', help='conversations in any format that data.train takes')
  add('--chat-rows', type=int, default=24, help='conversations of a round')
  add('--chat-len', type=int, default=512, help='longest conversation, and length of a packed row')
  add('--chat-packed-rows', type=int, default=2, help='packed rows of an update of ftjax')
  add('--trl-checkpointing', action='store_true', help="TRL's default")
  args = parser.parse_args()
  if 'chat' in args.cases and not args.chat_data:
    print(json.dumps({'skipped': 'chat', 'why': '--chat-data was not given'}), flush=True)
    args.cases = [case for case in args.cases if case != 'chat']
  if args.chat_rows % args.batch_size:
    parser.error('--chat-rows must be a multiple of --batch-size')
  return args


def main() -> None:
  args = _arguments()
  contestants = _contestants(args)
  with tempfile.TemporaryDirectory() as folder:
    for case in args.cases:
      # Tunix pads every row to one length and has no packing: on chat it would only waste time.
      taking_part = [c for c in contestants if case == 'full' or c.kind != 'tunix']
      run_case(case, taking_part, args, Path(folder))


if __name__ == '__main__':
  main()
