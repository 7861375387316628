"""A small T5 with random weights learns to translate short descriptions of software into French,
from scratch, in minutes on a CPU; BLEU is measured on the way.

`make eval-data` fetches the rows, and demo/t5_folder.py makes the model from them:
python demo/t5_folder.py .cache/t5_en_fr .cache/eval/en_fr/train.jsonl --vocab_size=3000
--d_model=192 --d_ff=384 --num_heads=6 --num_layers=2
"""

from ftjax import config

_DATA = '.cache/eval/en_fr'


def get_config():
  c = config.default()
  c.algorithm = 'seq2seq'
  c.model.path = '.cache/t5_en_fr'
  c.data.train = f'{_DATA}/train.jsonl'
  c.data.on_overlength = 'drop'  # what is longer than the rows: most are one line
  c.epochs = 5.0
  c.batch_size = 16  # packed sequences
  c.seq_len = 96
  c.optim.lr = 2e-3
  c.optim.schedule = 'linear'
  c.optim.warmup_steps = 50
  c.loss.label_smoothing = 0.1
  c.checkpoint.every = 150
  c.checkpoint.keep = 1
  c.eval.every = 150
  c.eval.batch_size = 32
  c.eval.tasks = (f'translation=translation:{_DATA}/test.jsonl',)
  c.eval.in_loop = ('translation',)
  c.eval.max_share = 0.3
  c.eval.max_tokens = 48
  return c
