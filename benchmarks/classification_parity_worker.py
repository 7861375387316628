"""The side of transformers in classification_parity.py; runs where torch and transformers are.

python classification_parity_worker.py '{"model": ..., "data": ..., "out": ..., "seed": 0, ...}'
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers

NAMES = ('negative', 'positive')


class Clock(transformers.TrainerCallback):
  """Measures training from the end of the first step on."""

  begin = end = 0.0

  def on_step_end(self, args, state, control, **_):
    now = time.perf_counter()
    self.begin, self.end = self.begin or now, now


def main() -> None:
  job = json.loads(sys.argv[1])
  transformers.set_seed(job['seed'])
  tokenizer = transformers.AutoTokenizer.from_pretrained(job['model'])
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    job['model'], num_labels=len(NAMES), dtype=torch.float32
  )

  def rows(side):
    lines = (Path(job['data']) / f'{side}.jsonl').read_text().splitlines()
    read = [json.loads(line) for line in lines]
    longest = dict(truncation=True, max_length=job['seq_len'])
    return [dict(tokenizer(r['text'], **longest), labels=NAMES.index(r['label'])) for r in read]

  train, test, clock = rows('train'), rows('test'), Clock()
  trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(
      output_dir=job['out'],
      num_train_epochs=job['epochs'],
      per_device_train_batch_size=job['sentences'],
      per_device_eval_batch_size=32,
      learning_rate=1e-4,
      lr_scheduler_type='linear',
      warmup_steps=50,
      weight_decay=0.01,
      adam_epsilon=1e-8,
      max_grad_norm=1.0,
      seed=job['seed'],
      save_strategy='no',
      report_to=[],
      logging_strategy='no',
      disable_tqdm=True,
      use_cpu=True,
    ),
    train_dataset=train,
    data_collator=transformers.DataCollatorWithPadding(tokenizer),
    callbacks=[clock],
  )
  trainer.train()
  steps = trainer.state.global_step
  found = trainer.predict(test).predictions.argmax(-1).tolist()
  print(
    json.dumps(
      {
        'right': [a == r['labels'] for a, r in zip(found, test, strict=True)],
        'sentences_per_s': len(train)
        * job['epochs']
        * (steps - 1)
        / steps
        / (clock.end - clock.begin),
      }
    )
  )


if __name__ == '__main__':
  main()
