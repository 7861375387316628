"""Shows that the first losses of a float32 run are those of TRL's SFTTrainer: the same weights,
tokens, order, schedule, AdamW and clipping.

TRL is no dependency. It lives in an environment of its own; `make assets` brings the model:

  python3 -m venv /tmp/trl && /tmp/trl/bin/pip install torch transformers==5.23.0 trl==1.16.0
  .venv/bin/python benchmarks/trl_parity.py ftjax ours.json
  /tmp/trl/bin/python benchmarks/trl_parity.py trl ours.json theirs.json
  .venv/bin/python benchmarks/trl_parity.py compare ours.json theirs.json

The first half writes the rows it trained on, as token ids and mask, with its losses; the second
trains on these. `--data=FILE --loss-on=...` take other rows. Two cases:
`plain` (20 steps of 4 rows) and `accumulate` (5 steps of 2 x 2 rows). Weight decay spares the norms
on both sides, the learning rate rises for some steps and falls along a cosine, and gradients are
clipped to a norm of 1 (most of them are longer, see grad_norm). A few minutes each on two cores.

The gradient norms differ by some 1e-4 for a known reason: SmolLM2's padding token is its end of
turn, and transformers gives the embedding of a padding token no gradient where it is read, so
neither has a real end of turn in TRL. Without that, step 0 agrees with float64 torch to 2e-7.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

TOLERANCE = 1e-3  # relative, of every loss
SETTINGS = {
  'lr': 5e-5,
  'schedule': 'cosine',
  'warmup_steps': 3,
  'weight_decay': 0.1,
  'b1': 0.9,
  'b2': 0.95,
  'eps': 1e-8,
  'clip_norm': 1.0,
}
CASES = {'plain': (20, 1), 'accumulate': (5, 2)}  # steps, micro-batches


def train_ftjax(args: argparse.Namespace, steps: int, grad_accum: int) -> dict:
  """Trains with the real step; {'rows': token ids and masks in order, 'losses': ..., ...}."""
  import jax
  import numpy as np

  from ftjax.algorithms import sft
  from ftjax.config import keys, validation
  from ftjax.experiment import run as experiment
  from ftjax.experiment.trainer import Trainer
  from ftjax.training.prefetch import Prefetch

  c = keys.default()
  c.model.path = args.model
  c.data.train, c.data.loss_on = args.data, args.loss_on
  c.data.packing, c.data.on_overlength = False, 'drop'
  c.compile_cache = False
  c.steps, c.batch_size, c.grad_accum, c.seq_len = steps, args.batch_size, grad_accum, args.seq_len
  for name, value in SETTINGS.items():
    c.optim[name] = value
  validation.validate(c)
  rows, metrics = [], []
  with tempfile.TemporaryDirectory() as workdir:
    run = experiment.start(c, workdir)
    trainer = Trainer(run, sft.make_loss(run.forward, c))
    state, compiled = trainer.fresh(), trainer.compile()
    for i in range(steps * args.batch_size):
      row = run.data.mixture.row(i)
      for example in row.examples:
        tokens, supervised = run.data.corpora[row.source].example(example)
        rows.append({'input_ids': tokens.tolist(), 'completion_mask': supervised.tolist()})
    feed = Prefetch(run.data.stream, run.abstract_batch(), 0, steps)
    for step in range(steps):
      state, values = compiled(state, feed.take(step))
      metrics.append({k: np.asarray(v).item() for k, v in jax.device_get(values).items()})
      print(json.dumps(metrics[-1]), file=sys.stderr, flush=True)
    feed.close()
  return {'rows': rows} | {
    name: [m[key] for m in metrics]
    for name, key in (('losses', 'loss'), ('grad_norms', 'grad_norm'), ('rates', 'lr'))
  }


def train_trl(args: argparse.Namespace, grad_accum: int, ours: dict) -> dict:
  """Trains with SFTTrainer on the rows in their order; {'losses': ..., 'grad_norms': ..., ...}."""
  import torch
  import transformers
  import trl
  from datasets import Dataset

  logs = []

  class Record(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
      if 'loss' in logs:
        record(logs)

  def record(values):
    logs.append(values)
    print(json.dumps({k: values[k] for k in ('loss', 'grad_norm', 'learning_rate')}), flush=True)

  s, steps = SETTINGS, len(ours['losses'])
  with tempfile.TemporaryDirectory() as folder:
    settings = trl.SFTConfig(
      output_dir=folder,
      use_cpu=True,
      bf16=False,
      gradient_checkpointing=False,
      max_steps=steps,
      per_device_train_batch_size=args.batch_size // grad_accum,
      gradient_accumulation_steps=grad_accum,
      train_sampling_strategy='sequential',
      completion_only_loss=True,
      max_length=None,
      learning_rate=s['lr'],
      lr_scheduler_type=s['schedule'],
      warmup_steps=s['warmup_steps'],
      weight_decay=s['weight_decay'],
      adam_beta1=s['b1'],
      adam_beta2=s['b2'],
      adam_epsilon=s['eps'],
      max_grad_norm=s['clip_norm'],
      logging_steps=1,
      save_strategy='no',
      report_to=[],
      disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    trainer = trl.SFTTrainer(
      model=model,
      args=settings,
      train_dataset=Dataset.from_list(ours['rows']),
      processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
      callbacks=[Record()],
    )
    trainer.train()
  return {
    name: [log[key] for log in logs]
    for name, key in (('losses', 'loss'), ('grad_norms', 'grad_norm'), ('rates', 'learning_rate'))
  }


def compare(ours: dict, theirs: dict) -> bool:
  """Prints a line per case; whether every loss agrees within TOLERANCE."""
  agrees = True
  for case, mine in ours['cases'].items():
    other = theirs['cases'][case]
    if not len(mine['losses']) == len(other['losses']) == CASES[case][0]:
      raise SystemExit(f'{case}: {len(mine["losses"])} and {len(other["losses"])} losses')
    line = {'case': case, 'steps': len(mine['losses'])}
    for name in ('losses', 'grad_norms', 'rates'):
      pairs = zip(mine[name], other[name], strict=True)
      line[f'{name}_max_relative_difference'] = max(abs(a - b) / max(b, 1e-30) for a, b in pairs)
    line |= {'first_loss': mine['losses'][0], 'last_loss': mine['losses'][-1]}
    line['clipped_steps'] = sum(n > SETTINGS['clip_norm'] for n in other['grad_norms'])
    line['supervised_tokens'] = sum(sum(row['completion_mask']) for row in mine['rows'])
    line['agrees'] = line['losses_max_relative_difference'] <= TOLERANCE
    agrees &= line['agrees']
    print(json.dumps(line))
  return agrees


def _arguments() -> argparse.Namespace:
  root = Path(__file__).resolve().parent.parent / '.cache'
  parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
  parser.add_argument('half', choices=('ftjax', 'trl', 'compare'))
  parser.add_argument(
    'files', nargs='+', type=Path, help='ours.json, and theirs.json but for ftjax'
  )
  parser.add_argument('--model', default=str(root / 'smollm2'), help='HF folder')
  parser.add_argument('--data', default=str(root / 'data/sentiment/train.jsonl'))
  parser.add_argument('--loss-on', default='assistant', choices=('assistant', 'completion', 'all'))
  parser.add_argument('--batch-size', default=4, type=int, help='rows of an update')
  parser.add_argument('--seq-len', default=96, type=int, help='longer rows are dropped')
  args = parser.parse_args()
  if len(args.files) != (1 if args.half == 'ftjax' else 2):
    parser.error('give ours.json, and for trl and compare also theirs.json')
  return args


def main() -> None:
  args = _arguments()
  if args.half == 'ftjax':
    cases = {name: train_ftjax(args, *sizes) for name, sizes in CASES.items()}
    args.files[0].write_text(json.dumps({'settings': SETTINGS, 'cases': cases}) + '\n')
    return
  ours = json.loads(args.files[0].read_text())
  if ours['settings'] != SETTINGS:
    raise SystemExit(f'{args.files[0]} was made with other settings: {ours["settings"]}')
  if args.half == 'trl':
    cases = {n: train_trl(args, CASES[n][1], case) for n, case in ours['cases'].items()}
    args.files[1].write_text(json.dumps({'settings': SETTINGS, 'cases': cases}) + '\n')
  elif not compare(ours, json.loads(args.files[1].read_text())):
    raise SystemExit(f'some loss differs by more than {TOLERANCE} relative')


if __name__ == '__main__':
  main()
