"""Label errors by the models of a cross-validation, and coverage by an encoder's embeddings, in the
audit.
"""

import dataclasses
import json
import math
import random

import family_models
import jax
import numpy as np
import pytest
from test_audit import worded
from test_data_audit import configured, write
from tiny_tokenizer import tiny_files

from ftjax.audit import audit, diversity, labels, table
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import data_audit, out_of_fold
from ftjax.experiment.data_audit import Request
from ftjax.families import table as families
from ftjax.hf import export
from ftjax.models import kinds
from ftjax.runtime.errors import ConfigError, DataError


def study(folder, probs, names=('negative', 'positive'), repeats=2, **changes):
  """Writes the files of a study whose models gave probs [n, C] to rows 'rows.jsonl:1', ..."""
  (folder / 'folds').mkdir(parents=True)
  (folder / 'out_of_fold').mkdir()
  tasks = [{'id': str(i), 'choices': list(names)} for i in range(len(probs))]
  (folder / 'folds' / 'truth.jsonl').write_text(''.join(json.dumps(t) + '\n' for t in tasks))
  lines = []
  for model in ('base', 'tuned'):
    for i, own in enumerate(probs):
      scores = [math.log(p) - 40.0 if model == 'tuned' else 0.0 for p in own]
      line = {'model': model, 'id': str(i), 'place': f'rows.jsonl:{i + 1}', 'scores': scores}
      lines += [line | changes] * repeats
  path = folder / 'out_of_fold' / 'truth.jsonl'
  path.write_text(''.join(json.dumps(x) + '\n' for x in lines))
  return str(path)


def test_probabilities_are_those_of_the_tuned_models_by_place(tmp_path):
  path = study(tmp_path / 'a study', [[0.25, 0.75], [0.9, 0.1]])
  found = out_of_fold.read(path)
  assert found.keys() == {'rows.jsonl:1', 'rows.jsonl:2'}
  assert found['rows.jsonl:1'] == pytest.approx({'negative': 0.25, 'positive': 0.75})
  with open(path, 'a') as file:  # another repeat: the mean
    scores = [math.log(0.75), math.log(0.25)]
    line = {'model': 'tuned', 'id': '0', 'place': 'rows.jsonl:1', 'scores': scores}
    file.write(json.dumps(line) + '\n')
  assert out_of_fold.read(path)['rows.jsonl:1']['negative'] == pytest.approx((2 * 0.25 + 0.75) / 3)


def test_flipped_labels_are_found_by_the_models_of_a_study():
  """Models that are right with 0.95, 5 % of the labels flipped; rows that are not in the study are
  not looked at.
  """
  rows, wrong = worded(250)
  rows = [dataclasses.replace(row, line=i + 1) for i, row in enumerate(rows)]
  given = {}
  for i, row in enumerate(rows):
    other = {'positive': 'negative', 'negative': 'positive'}[row.answer]
    true, false = (other, row.answer) if i in wrong else (row.answer, other)
    given[row.place] = {f' {true.upper()}': 0.95, false: 0.05}
  found, facts = labels.errors(rows, labels.of_rows(rows), None, given=given)
  assert {f.row for f in found} == set(wrong)
  assert facts['rows'] == 250 and facts['suspects'] == len(wrong)
  half = dict(list(given.items())[:125])
  found, facts = labels.errors(rows, labels.of_rows(rows), None, given=half)
  assert {f.row for f in found} == {i for i in wrong if i < 125} and facts['rows'] == 125
  few = dict(list(given.items())[:50])
  assert labels.errors(rows, labels.of_rows(rows), None, given=few) == ([], {})


def test_the_audit_names_them_and_says_by_which_models(tmp_path, capsys):
  rng = random.Random(0)
  words = ['fine', 'great', 'dull', 'slow', 'long', 'short', 'odd', 'old']
  rows, probs, wrong = [], [], []
  for i in range(150):
    is_good, is_flipped = rng.random() < 0.5, i % 25 == 7
    text = ' '.join(rng.choices(words, k=6))
    label = 'positive' if is_good != is_flipped else 'negative'
    rows.append({'prompt': f'{text}, case {i}?', 'completion': f' {label}'})
    probs.append([0.03, 0.97] if is_good else [0.97, 0.03])
    wrong += [i + 1] * is_flipped
  train = write(tmp_path / 'rows.jsonl', rows)
  path = study(tmp_path / 's', probs)
  text = (tmp_path / 's' / 'out_of_fold' / 'truth.jsonl').read_text()
  (tmp_path / 's' / 'out_of_fold' / 'truth.jsonl').write_text(
    text.replace('"rows.jsonl:', f'"{train}:')
  )
  out = tmp_path / 'findings.jsonl'
  request = Request(out=str(out), out_of_fold=path)
  data_audit.show(configured(train), Tokenizer(tiny_files()), str(tmp_path), request)
  found = [json.loads(line) for line in out.read_text().splitlines()]
  assert sorted(f['line'] for f in found if f['kind'] == 'label_error') == wrong
  assert 'models of the study on 150 rows out of fold: accuracy 96.0%' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'scores': []}, ConfigError, 'no log-probabilities of choices'),
    ({'scores': [0.0] * 3}, DataError, '3 scores for 2 choices'),
    ({'model': 'other'}, ConfigError, 'no result of a tuned model'),
  ],
)
def test_files_of_another_form_are_refused(changes, error, message, tmp_path):
  with pytest.raises(error, match=message):
    out_of_fold.read(study(tmp_path / 's', [[0.5, 0.5]], **changes))


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(
    ConfigError, match=r'nowhere/out_of_fold/t.jsonl is not there; expected STUDY'
  ):
    out_of_fold.read(str(tmp_path / 'nowhere' / 'out_of_fold' / 't.jsonl'))
  path = study(tmp_path / 's', [[0.5, 0.5]])
  (tmp_path / 's' / 'out_of_fold' / 'truth.jsonl').write_text('{oops')
  with pytest.raises(DataError, match=r'truth.jsonl:1: not JSON'):
    out_of_fold.read(path)


# Coverage.


def test_coverage_embeds_evenly_spread_rows(monkeypatch):
  monkeypatch.setattr(diversity, '_MOST', 200)
  rows, _ = worded(410)
  seen = []

  def embed(texts):
    seen.append(len(texts))
    return np.eye(len(texts))[:, :64] + 1e-3

  _, facts = diversity.of_rows(rows, True, embed)
  assert seen == [137] and facts['coverage_rows'] == 137


def test_an_encoder_gives_one_embedding_for_each_text(tmp_path):
  """A small BERT: the order and the other texts of a batch do not matter; long texts are cut."""
  from ftjax.experiment.text_encoder import TextEncoder

  config = family_models.config('bert') | {'vocab_size': 384}
  arch = families.architecture(config)
  folder = tmp_path / 'an encoder'
  export.export(
    kinds.init(arch, jax.random.key(0)),
    arch,
    str(folder),
    source_config=config,
    tokenizer_files=tiny_files(),
    dtype=np.dtype('float32'),
    stop_ids=(),
  )
  encoder = TextEncoder(str(folder))
  texts = ['short', 'a text of some more words', 'x ' * 5000, '']
  found = encoder(texts)
  assert found.shape == (4, arch.model_dim) and np.isfinite(found).all()
  np.testing.assert_allclose(encoder(texts[::-1])[::-1], found, atol=1e-5)
  np.testing.assert_allclose(encoder(texts[:1])[0], found[0], atol=1e-5)
  assert abs(found[0] - found[1]).max() > 1e-3
  assert encoder([]).shape == (0, 0)
  rows, _ = worded(60)
  result = audit.run(rows, embed=encoder, scorer=None)
  facts = result.facts[rows[0].source]['diversity']
  assert 1 <= facts['coverage_effective'] <= 60 and facts['coverage_rows'] == 60
  assert f'embeddings: {facts["coverage_effective"]:.1f} effective rows of 60' in table.text(result)
