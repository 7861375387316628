"""Keys of data: weights of rows and labels, curriculum, temperature of a mixture, augmentation."""

import json

import numpy as np
import pytest
from tiny_tokenizer import tiny_files

from ftjax import config
from ftjax.config import choices, validation
from ftjax.data import augment, class_balance, row_numbers
from ftjax.data.batches import eval_batches
from ftjax.data.formats import Chat, Completion, Text
from ftjax.data.order import SourceSchedule
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import data as examples
from ftjax.runtime.errors import ConfigError, DataError

T = 64


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer(tiny_files())


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def labeled(number=40, **more):
  """Rows with the answer ' yes' three times as often as ' no'."""
  return [
    {'prompt': f'Is {i} good?', 'completion': ' no' if i % 4 == 0 else ' yes', **more}
    for i in range(number)
  ]


def configured(path, tmp_path, **keys):
  c = config.default()
  c.model.random = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
  )
  c.seq_len, c.batch_size, c.steps, c.data.train = T, 2, 4, path
  c.data.cache = str(tmp_path / 'cache')
  c.data.workers = 1
  for name, value in keys.items():
    c.data[name] = value
  validation.validate(c)
  return c


def opened(path, tmp_path, tokenizer, **keys):
  return examples.open_rows(configured(path, tmp_path, **keys), tokenizer, str(tmp_path))


# Weights


def test_the_weight_of_a_row_multiplies_its_tokens_in_training_and_not_in_evaluation(
  tmp_path, tokenizer
):
  rows = labeled(8)
  plain = opened(write(tmp_path / 'a.jsonl', rows), tmp_path, tokenizer, eval='')
  for i, row in enumerate(rows):
    row['weight'] = 0.5 + i
  path = write(tmp_path / 'b.jsonl', rows)
  data = opened(path, tmp_path, tokenizer, eval=path)
  corpus = data.corpora[0]
  assert corpus.weights.tolist() == [0.5 + i for i in range(8)]
  assert corpus.fingerprint != plain.corpora[0].fingerprint
  assert not corpus.counts.unread_columns
  for step in range(4):
    batch = data.stream.batch(step)
    for i in range(2):
      row = data.mixture.row(step * 2 + i)
      for segment, example in enumerate(row.examples, 1):
        own = batch['weights'][i][batch['segments'][i] == segment]
        assert set(own[own > 0]) == {0.5 + example}
        assert (own > 0).sum() == corpus.example(example)[1].sum()
  for batch in eval_batches(data.evaluation[0], 2, T, packed=True):
    assert set(batch['weights'].ravel()) == {0.0, 1.0}


def test_rows_without_weights_have_the_tokens_and_fingerprint_of_before(tmp_path, tokenizer):
  rows = labeled(8)
  one = opened(write(tmp_path / 'a.jsonl', rows), tmp_path, tokenizer)
  same = opened(write(tmp_path / 'b.jsonl', [r | {'weight': 1} for r in rows]), tmp_path, tokenizer)
  assert one.corpora[0].weights is None and same.corpora[0].weights is None
  assert one.mixture.fingerprint == same.mixture.fingerprint


@pytest.mark.parametrize('value', [0, -1, 'much', True, float('nan'), [1]])
def test_unusable_weights(value):
  with pytest.raises(ValueError, match="'weight' is"):
    row_numbers.read({'weight': value})


def test_numbers_of_a_row():
  assert row_numbers.read({'weight': '2.5', 'difficulty': -3}) == (2.5, -3)
  weight, difficulty = row_numbers.read({})
  assert weight == 1 and np.isnan(difficulty)


@pytest.mark.parametrize('policy', ['error', 'drop'])
def test_a_row_with_a_wrong_weight_is_a_bad_row(policy, tmp_path, tokenizer):
  path = write(tmp_path / 'a.jsonl', [*labeled(8), labeled(1)[0] | {'weight': 0}])
  if policy == 'error':
    with pytest.raises(DataError, match=r"a.jsonl:9: 'weight' is 0.0"):
      opened(path, tmp_path, tokenizer)
  else:
    found = opened(path, tmp_path, tokenizer, on_bad_row='drop').corpora[0]
    assert (len(found), found.counts.bad) == (8, 1)


def test_balance_by_hand():
  """Counts 3 and 1 of 4: raw weights 4/3 and 4, of mean 2; their roots have mean 1.366."""
  found = class_balance.weights(np.array([7, 7, 7, 2]), 'equal')
  assert found.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
  found = class_balance.weights(np.array([7, 7, 7, 2]), 'sqrt')
  root = np.sqrt(np.array([4 / 3] * 3 + [4.0]))
  assert found.tolist() == pytest.approx((root / root.mean()).tolist())


def test_with_equal_balance_each_label_has_the_same_total_and_the_order_is_unchanged(
  tmp_path, tokenizer
):
  path = write(tmp_path / 'a.jsonl', labeled())
  plain = opened(path, tmp_path, tokenizer)
  data = opened(path, tmp_path, tokenizer, balance='equal')
  assert data.mixture.fingerprint == plain.mixture.fingerprint
  weights = data.corpora[0].weights
  is_no = np.arange(40) % 4 == 0
  assert weights[is_no].sum() == pytest.approx(weights[~is_no].sum())
  assert weights.mean() == pytest.approx(1)
  first, second = plain.stream.batch(0), data.stream.batch(0)
  assert all((first[k] == second[k]).all() for k in first if k != 'weights')
  assert ((first['weights'] > 0) == (second['weights'] > 0)).all()


def test_balance_multiplies_the_weights_of_rows(tmp_path, tokenizer):
  path = write(tmp_path / 'a.jsonl', labeled(weight=3))
  data = opened(path, tmp_path, tokenizer, balance='equal')
  assert data.corpora[0].weights.mean() == pytest.approx(3)


def test_balance_of_free_texts_is_refused(tmp_path, tokenizer):
  rows = [{'prompt': 'q', 'completion': f' answer {i}'} for i in range(40)]
  with pytest.raises(DataError, match='40 different answers in 40 examples are no labels'):
    opened(write(tmp_path / 'a.jsonl', rows), tmp_path, tokenizer, balance='sqrt')


# Curriculum


def schedule(lengths, ranks, packed=True, seed=1):
  return SourceSchedule(lengths, 32, fingerprint='f', seed=seed, packed=packed, ranks=ranks)


@pytest.mark.parametrize('packed', [True, False])
def test_a_curriculum_orders_the_rows_of_each_epoch_and_loses_none(packed):
  rng = np.random.default_rng(0)
  lengths, ranks = rng.integers(1, 33, 300).astype(np.int32), rng.normal(size=300)
  s = schedule(lengths, ranks, packed)
  r = s.rows_per_epoch
  epochs = [[s.row(e * r + i)[1] for i in range(r)] for e in (0, 3)]
  for rows in epochs:
    assert sorted(i for ids in rows for i in ids) == list(range(300))
    means = [ranks[list(ids)].mean() for ids in rows]
    assert (np.diff(means) >= -1e-12).all()
  if packed:
    assert epochs[0] != epochs[1]
  fresh = schedule(lengths, ranks, packed)
  for i in rng.permutation(2 * r):
    assert fresh.row(int(i)) == s.row(int(i))


def test_rows_of_equal_rank_are_in_random_order():
  lengths = np.full(50, 32, np.int32)
  s = schedule(lengths, np.arange(50) // 25)
  first, second = ([s.row(e * 50 + i)[1][0] for i in range(50)] for e in (0, 1))
  assert first != second and set(first[:25]) == set(second[:25]) == set(range(25))


def test_ranks_are_part_of_the_fingerprint():
  lengths = np.full(5, 32, np.int32)
  prints = {schedule(lengths, r).fingerprint for r in (None, np.arange(5), np.arange(5)[::-1])}
  assert len(prints) == 3


def test_curriculum_by_length_and_by_difficulty(tmp_path, tokenizer):
  rows = [
    {'prompt': 'q' * (1 + i * 7 % 20), 'completion': ' a', 'difficulty': -i} for i in range(20)
  ]
  path = write(tmp_path / 'a.jsonl', rows)
  by_length = opened(path, tmp_path, tokenizer, curriculum='length', packing=False)
  sizes = [by_length.corpora[0].lengths[by_length.mixture.row(i).examples[0]] for i in range(20)]
  assert sizes == sorted(sizes)
  harder = opened(path, tmp_path, tokenizer, curriculum='difficulty', packing=False)
  assert [harder.mixture.row(i).examples[0] for i in range(20)] == list(range(19, -1, -1))
  del rows[3]['difficulty']
  with pytest.raises(DataError, match=r'a.jsonl:4: no number in the column difficulty'):
    opened(write(tmp_path / 'a.jsonl', rows), tmp_path, tokenizer, curriculum='difficulty')


# Mixture


def test_the_temperature_of_a_mixture(tmp_path, tokenizer):
  paths = [write(tmp_path / f'{n}.jsonl', labeled(n)) for n in (8, 72)]
  shares = {}
  for t in (1.0, 2.0, 1e6):
    data = opened(','.join(paths), tmp_path, tokenizer, mix_temperature=t, packing=False)
    quotas = data.mixture.quotas
    shares[t] = quotas[0] / sum(quotas)
  assert shares[1.0] == 0.1
  assert shares[2.0] == pytest.approx(1 / (1 + 3), abs=0.02)  # sqrt(8) : sqrt(72)
  assert shares[1e6] == pytest.approx(0.5, abs=0.02)
  with pytest.raises(ConfigError, match='leave the @weight out'):
    opened(f'{paths[0]}@1,{paths[1]}@2', tmp_path, tokenizer, mix_temperature=2.0)


# Augmentation


def test_the_names_in_the_config_have_functions():
  assert {k for k, rate in choices.AUGMENTATIONS.items() if rate} == set(augment.BY_RATE)
  assert not choices.AUGMENTATIONS[augment.TEMPLATE]


TEXT = 'The quick brown fox jumps over the lazy dog, and then  it\nrests under a tree.'


@pytest.mark.parametrize('name', ['word_dropout@0.3', 'swap@0.3', 'noise@0.2'])
def test_alterations_are_functions_of_seed_copy_and_text(name):
  made = {
    (seed, number): augment.alter(TEXT, number, (name,), (), seed)
    for seed in (0, 1)
    for number in range(3)
  }
  assert len(set(made.values())) == 6 and TEXT not in made.values()
  assert augment.alter(TEXT, 1, (name,), (), 0) == made[0, 1]


def test_alterations_have_their_rate():
  text = ' '.join(f'word{i}' for i in range(10_000))
  kept = len(augment.alter(text, 0, ('word_dropout@0.1',), (), 0).split())
  assert abs(kept - 9000) < 5 * 30  # of a binomial distribution, five standard deviations
  moved = augment.alter(text, 0, ('swap@0.1',), (), 0).split()
  assert sorted(moved) == sorted(text.split())
  differ = sum(a != b for a, b in zip(moved, text.split(), strict=True))
  assert abs(differ / 2 - 910) < 5 * 30  # after a swap the next word stays
  assert augment.alter('one', 0, ('word_dropout@0.9',), (), 0) == 'one'
  assert augment.alter('', 0, ('word_dropout@0.9', 'swap@0.5', 'noise@0.5'), (), 0) == ''


def test_pinned_alterations():
  """They are part of the meaning of a cache: these texts may never change."""
  names = ('word_dropout@0.2', 'swap@0.2', 'noise@0.05')
  assert augment.alter(TEXT, 0, names, (), 7) == PINNED


PINNED = 'The quick jumps fox the lazy it and\nunder a tre.'


def test_templates_and_what_is_left_alone():
  templates = ('Please: {prompt}', '{prompt} Thanks.')
  found = {augment.alter('Why?', n, ('template',), templates, 0) for n in range(20)}
  assert found == {'Please: Why?', 'Why? Thanks.'}
  chat = Chat(({'role': 'system', 'content': 'S'}, {'role': 'user', 'content': TEXT},
               {'role': 'assistant', 'content': 'A'}))  # fmt: skip
  made = augment.copy(chat, 0, ('noise@0.5',), (), 0)
  assert made.messages[0::2] == chat.messages[0::2] and made.messages[1] != chat.messages[1]
  made = augment.copy(Completion(TEXT, 'A'), 0, ('noise@0.5',), (), 0)
  assert made.completion == 'A' and made.prompt != TEXT
  with pytest.raises(ConfigError, match='this one has none'):
    augment.copy(Text('a'), 0, ('noise@0.5',), (), 0)


def test_copies_are_examples_of_training_alone(tmp_path, tokenizer):
  """Held out rows have no copy on either side, and the split is the one without copies."""
  path = write(tmp_path / 'a.jsonl', labeled(60))
  keys = dict(eval_fraction=0.3, packing=False)
  plain = opened(path, tmp_path, tokenizer, **keys)
  more = dict(augment=('noise@0.3',), augment_copies=2)
  data = opened(path, tmp_path, tokenizer, **keys, **more)
  places = lambda corpus: [corpus.row_of(i) for i in range(len(corpus))]  # noqa: E731
  assert data.evaluation[0].fingerprint == plain.evaluation[0].fingerprint
  assert sorted(set(places(data.corpora[0]))) == places(plain.corpora[0])
  assert len(data.corpora[0]) == 3 * len(plain.corpora[0])
  again = opened(path, tmp_path / 'other', tokenizer, **keys, **more)
  assert again.mixture.fingerprint == data.mixture.fingerprint
  given = opened(path, tmp_path, tokenizer, eval=path, packing=False, **more)
  assert len(given.evaluation[0]) == 60 and len(given.corpora[0]) == 180


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'augment': 'noise@0.1'}, 'expected a tuple'),
    ({'augment': ('nois@0.1',)}, 'word_dropout@RATE'),
    ({'augment': ('noise',)}, 'noise@RATE'),
    ({'augment': ('noise@1.5',)}, r'in \(0, 1\)'),
    ({'augment': ('noise@0.1', 'noise@0.2')}, 'each name once'),
    ({'augment': ('template',)}, 'belong together'),
    ({'augment': ('template',), 'augment_templates': ('x',)}, 'once'),
    ({'augment_copies': 2}, 'does nothing without data.augment'),
    ({'mix_temperature': 0.5}, 'at least 1'),
    ({'balance': 'even'}, "expected one of"),
    ({'curriculum': 'hard'}, "expected one of"),
  ],
)  # fmt: skip
def test_wrong_keys(keys, message, tmp_path):
  with pytest.raises(ConfigError, match=message):
    configured('a.jsonl', tmp_path, **keys)


def test_keys_of_supervised_rows_are_refused_elsewhere(tmp_path):
  c = configured('a.jsonl', tmp_path)
  c.algorithm, c.data.balance = 'dpo', 'equal'
  with pytest.raises(ConfigError, match='does nothing with algorithm=dpo'):
    validation.validate(c)
