"""Prediction of masked tokens: which are hidden, long texts in parts, a run, what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_words

from ftjax.algorithms import masked_lm
from ftjax.config import keys, validation
from ftjax.data import annotated_examples
from ftjax.data.annotated_rows import Annotation, LabeledText
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError

TOKENIZER = Tokenizer(tiny_words.files())


def config(**changes):
  c = keys.default()
  c.algorithm, c.steps, c.data.train, c.model.path = 'masked_lm', 1, 'x.jsonl', 'm'
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return c


def test_hidden_tokens_have_the_shares_of_the_config():
  tokens = jnp.full((64, 512), 7, jnp.int32)
  weights = jnp.ones((64, 512)).at[:, ::2].set(0.0)
  batch = {'tokens': tokens, 'labels': tokens, 'weights': weights}
  rows = jax.random.split(jax.random.key(3), 64)
  found = masked_lm.mask(batch, rows, 1000, config(masked_lm__mask_id=3))
  hidden, now = np.asarray(found['weights']) > 0, np.asarray(found['tokens'])
  assert not hidden[:, ::2].any() and (now[~hidden] == 7).all()
  assert (np.asarray(found['labels']) == 7).all()
  n = hidden.sum()

  def near(share, wanted, of):
    assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / of), (share, wanted)

  near(n / (weights > 0).sum(), 0.15, 64 * 256)
  near((now[hidden] == 3).mean(), 0.8, n)
  near(((now[hidden] != 3) & (now[hidden] != 7)).mean(), 0.1, n)
  again = masked_lm.mask(batch, rows, 1000, config(masked_lm__mask_id=3))
  assert (np.asarray(again['tokens']) == now).all()
  # A row is hidden by its own key alone.
  half = {k: v[32:] for k, v in batch.items()}
  other = masked_lm.mask(half, rows[32:], 1000, config(masked_lm__mask_id=3))
  assert (np.asarray(other['tokens']) == now[32:]).all()
  assert (now[0] != now[1]).any()


@pytest.mark.parametrize('length', [1, 5, 6, 7, 13, 60])
def test_a_long_text_is_read_whole_in_parts(length):
  text = ' '.join(np.random.default_rng(length).choice(tiny_words.WORDS[:6], length))
  rows = [LabeledText((text,), ())]
  (parts,) = annotated_examples.encode(rows, TOKENIZER, Annotation('masked'), 8)
  assert all(len(p.tokens) <= 8 and p.tokens[0] == 2 and p.tokens[-1] == 3 for p in parts)
  whole = np.concatenate([p.tokens[1:-1] for p in parts])
  assert whole.tolist() == TOKENIZER.encode(text)
  assert all((p.labels == [-1, *p.tokens[1:-1], -1]).all() for p in parts)
  sizes = [len(p.tokens) for p in parts]
  assert len(sizes) == -(-length // 6) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
  'changes',
  [
    {'masked_lm__share': 0.0},
    {'masked_lm__share': 1.0},
    {'masked_lm__masked': 0.8, 'masked_lm__random': 0.3},
    {'masked_lm__random': -0.1},
  ],
)
def test_shares_that_are_none(changes):
  with pytest.raises(ConfigError, match=r'masked_lm\.share'):
    validation.validate(config(**changes))


@pytest.mark.full
def test_the_shipped_config_learns_and_its_export_becomes_a_classifier(tmp_path):
  run = tmp_path / 'run'
  code, printed = tiny_run.run('train', ['--config=tiny_masked_lm', f'--workdir={run}'])
  assert code == 0, printed
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  shown = [r['loss'] for r in rows if r['split'] == 'eval']
  assert shown[-1] < shown[0] and 'with algorithm classification' in printed
  exported = json.loads((run / 'export' / 'config.json').read_text())
  assert exported['architectures'] == ['BertForMaskedLM']
  (tmp_path / 'c.py').write_text(
    'from ftjax import config\n\ndef get_config():\n  c = config.default()\n'
    f"  c.algorithm, c.model.path = 'classification', '{run}/export'\n"
    "  c.data.train, c.steps, c.seq_len, c.batch_size = 'classes:60', 1, 64, 4\n  return c\n"
  )
  words = [f'--config={tmp_path / "c.py"}', f'--workdir={tmp_path / "next"}']
  code, printed = tiny_run.run('train', words)
  assert code == 0 and 'classifier.weight' in printed, printed


def test_a_decoder_and_a_tokenizer_without_a_mask_are_refused(tmp_path):
  words = ['--config=tiny_masked_lm', f'--workdir={tmp_path}']
  code, printed = tiny_run.run('train', [*words, '--config.masked_lm.mask_id=-1'])
  assert code == 2 and 'has no mask_token' in printed and 'masked_lm.mask_id' in printed
  changes = ['--config.algorithm=masked_lm', '--config.data.train=texts:60']
  words = ['--config=tiny_sft', f'--workdir={tmp_path}', *changes, '--config.eval.prompts=()']
  code, printed = tiny_run.run('train', words)
  assert code == 2 and 'needs an encoder' in printed, printed
