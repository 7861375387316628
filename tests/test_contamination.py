"""Evaluation rows that are in the training data: planted ones are found, others are not."""

import json
import pathlib
import random

import numpy as np
import pytest

from ftjax.evaluation import contamination, ngrams
from ftjax.evaluation.contamination import Item

SENTIMENT = pathlib.Path(__file__).resolve().parents[1] / '.cache' / 'data' / 'sentiment'
WORDS = [f'{a}{b}' for a in ('ka', 'lo', 'mi', 'ru', 'te', 'su') for b in 'bcdfghjklmnp']
ASK = 'Summarize the following article in one sentence, please:'


def text(rng, count):
  return ' '.join(rng.choice(WORDS) for _ in range(count))


def report(items, rows, name='t'):
  """The report on items against training rows: texts, or lists of texts."""
  training = [(f'f:{i}', [r] if isinstance(r, str) else r) for i, r in enumerate(rows, 1)]
  return contamination.check({name: items}, training, ['f'])[name]


def one(question, *rows, answers=()):
  """The finding on a single question."""
  return report([Item('q', (question,), answers)], rows).findings[0]


# Words


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ('', []),
    (' \n\t.,;!?', []),
    ("Don't STOP — now!", ['don', 't', 'stop', 'now']),
    ('caf\u0065\u0301 ﬁne Straße', ['café', 'fine', 'strasse']),
    ('snake_case x2 3.5%', ['snake', 'case', 'x2', '3', '5']),
    ('हिन्दी में', ['हिन्दी', 'में']),  # vowel signs are no letters, but inside words
    ('co\u00adoperate zero\u200bwidth', ['cooperate', 'zerowidth']),
    ('我爱北京。', ['我', '爱', '北', '京']),
    ('東京タワーへGo1回', ['東', '京', 'タ', 'ワ', 'ー', 'へgo1', '回']),
    ('ไทยดี', ['ไ', 'ท', 'ย', 'ดี']),  # a vowel sign stays with its letter
    ('한국어 문장', ['한국어', '문장']),
    ('😀 ok \ud800', ['ok']),
  ],
)
def test_words(given, expected):
  assert ngrams.words(given) == expected


def test_ngrams_equal_those_of_tuples():
  rng = random.Random(0)
  for size in (1, 2, 5, 13):
    ids = [rng.choice([-1, 0, 1, 2, 2, 1]) for _ in range(400)] if size < 13 else [1, 2] * 20
    starts, grams = ngrams.of_numbers(np.array(ids), size)
    windows = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    assert starts.tolist() == [i for i, w in enumerate(windows) if min(w) >= 0]
    kept = [windows[i] for i in starts]
    assert (
      len(set(grams.tolist())) == len(set(kept)) == len(set(zip(grams.tolist(), kept, strict=True)))
    )


# Planted rows


def test_planted_rows_are_found_in_whatever_form():
  rng = random.Random(1)
  question, other = text(rng, 40), text(rng, 40)
  words = question.split()
  changed = ' '.join([*words[:20], 'entirely', *words[21:]])
  for planted in (
    question,
    question.upper(),
    changed,
    f'{text(rng, 30)} {question} {text(rng, 30)}',
    ', '.join(words),
    '\n'.join(words),
  ):
    found = one(question, other, ['x', planted])
    assert found.is_contaminated and found.place == 'f:2', planted
    assert found.share == pytest.approx(39 / 40 if planted == changed else 1)
  rng.shuffle(words)
  for innocent in (' '.join(words), other, '', ' '.join(reversed(question.split()))):
    found = one(question, innocent)
    assert (found.is_contaminated, found.share, found.place) == (False, 0, '')


def test_halves_in_another_order_are_found():
  question = text(random.Random(2), 40).split()
  assert one(' '.join(question), ' '.join(question[20:] + question[:20])).share == 1


def test_an_answer_is_found_and_any_column_of_the_training_row_counts():
  rng = random.Random(3)
  answer = text(rng, 20)
  found = one(text(rng, 30), [text(rng, 10), text(rng, 10), answer], answers=('no', answer))
  assert found.is_contaminated and found.share == pytest.approx(20 / 50)
  assert not one(text(rng, 30), text(rng, 30), answers=(answer,)).is_contaminated


def test_a_short_answer_is_no_evidence():
  assert not one(text(random.Random(4), 20), ['yes'], 'yes', answers=('yes',)).is_contaminated


def test_the_rules_at_their_borders():
  rng = random.Random(5)
  question = text(rng, 100).split()

  def share_of(count):
    return one(' '.join(question), f'Zu {" ".join(question[30 : 30 + count])} end')

  assert not share_of(7).share
  assert (share_of(12).is_contaminated, share_of(12).share) == (False, 0.12)
  assert (share_of(13).is_contaminated, share_of(13).share) == (True, 0.13)
  short = question[:16]
  assert one(' '.join(short), ' '.join(short[:8])).is_contaminated  # half of its words
  assert not one(' '.join([*short, 'more']), ' '.join(short[:8])).is_contaminated


def test_the_first_place_is_given():
  rng = random.Random(6)
  question = text(rng, 60).split()
  late, early = ' '.join(question), ' '.join(question[-9:])
  assert one(' '.join(question), text(rng, 9), early, late, late).place == 'f:2'


# Whole questions


@pytest.mark.parametrize('planted', ['7 + 5 =', ' 7  + 5 =\n', '\uff17 + 5 ='])
def test_a_short_question_is_compared_as_a_whole(planted):
  found = one('7 + 5 =', ['12', planted])
  assert found.is_contaminated and found.is_whole and found.share == 1 and found.place == 'f:1'


@pytest.mark.parametrize('other', ['7 - 5 =', '17 + 5 =', '7 + 5 = 12', '', '7 5'])
def test_a_short_question_differs_from_others(other):
  found = one('7 + 5 =', other)
  assert not found.is_contaminated and found.is_whole


def test_a_question_that_many_rows_have_is_not_compared():
  rng = random.Random(7)
  items = [Item(str(i), (text(rng, 7), 'Which one?')) for i in range(9)]
  got = report(items, [[items[3].prompt[0], 'Which one?']])
  assert (got.contaminated, got.whole) == (0, 9)
  assert report(items[:2], ['Which one?']).contaminated == 2  # two rows are not many


# Templates


def test_words_that_many_rows_share_are_no_evidence():
  rng = random.Random(8)
  shot = f'{text(rng, 30)} Summary: {text(rng, 8)}'
  contents = [text(rng, 30) for _ in range(40)]
  items = [Item(str(i), (shot, f'{ASK} {c} Summary:')) for i, c in enumerate(contents)]
  # Training rows of the same task: the shot, and the instruction with other contents.
  rows = [[shot, f'{ASK} {text(rng, 30)} Summary:'] for _ in range(50)]
  got = report(items, rows)
  assert got.contaminated == got.near_duplicates == 0
  assert all(f.share == 0 for f in got.findings)
  shared = 39 + 8 + 1 + 1
  assert got.template_share == pytest.approx(shared / (shared + 30), abs=0.02)
  # A content is found with the template and without it.
  got = report(items, [*rows, f'{ASK} {contents[7]} Summary:', contents[9]])
  assert [f.id for f in got.findings if f.is_contaminated] == ['7', '9']
  assert {f.share for f in got.findings} == {0, 1}
  assert got.clean_ids() == {str(i) for i in range(40)} - {'7', '9'}


def test_rows_that_are_equal_are_no_template():
  question = text(random.Random(9), 30)
  items = [Item(str(i), (question,)) for i in range(20)]
  assert report(items, [question]).contaminated == 20


# Against brute force


def brute_force(items, rows):
  """Ids that the rules find, by sets of tuples, for items without a template."""
  seen = {}
  for size in (contamination.NGRAM, contamination.SHORT):
    words = [ngrams.words(t) for r in rows for t in r]
    seen[size] = {tuple(w[i : i + size]) for w in words for i in range(len(w) - size + 1)}
  wholes = {ngrams.whole(t) for r in rows for t in r}
  out, shares = set(), {}
  for item in items:
    comparable = inside = 0
    for t in (*item.prompt, *item.answers):
      w = ngrams.words(t)
      grams = [tuple(w[i : i + 8]) for i in range(len(w) - 7)]
      comparable += len(w) if grams else 0
      inside += len({i + k for i, g in enumerate(grams) if g in seen[8] for k in range(8)})
      if any(tuple(w[i : i + 13]) in seen[13] for i in range(len(w) - 12)):
        out.add(item.id)
    shares[item.id] = inside / comparable if comparable else 0
    if shares[item.id] >= 0.5:
      out.add(item.id)
    if not comparable and item.prompt[-1].strip() and ngrams.whole(item.prompt[-1]) in wholes:
      out.add(item.id)
      shares[item.id] = 1.0
  return out, shares


@pytest.mark.parametrize('chunk', [1, 70, 250_000])
@pytest.mark.parametrize('seed', range(4))
def test_exactly_the_rows_of_brute_force(seed, chunk, monkeypatch):
  monkeypatch.setattr(contamination, '_CHUNK_WORDS', chunk)
  rng = random.Random(seed)
  pool = [text(rng, rng.randrange(1, 40)) for _ in range(60)]

  def mixed():
    parts = [rng.choice(pool).split() for _ in range(rng.randrange(0, 3))]
    words = [w for p in parts for w in p[rng.randrange(len(p)) :]]
    return rng.choice([' ', ', ', '-']).join(words)

  items = [Item(str(i), (text(rng, rng.randrange(5)), mixed()), (mixed(),)) for i in range(120)]
  rows = [[mixed() for _ in range(rng.randrange(4))] for _ in range(60)]
  expected, shares = brute_force(items, rows)
  got = report(items, rows)
  assert {f.id for f in got.findings if f.is_contaminated} == expected
  assert 10 < len(expected) < 110
  assert {f.id: f.share for f in got.findings} == pytest.approx(shares)


# Odd data


def test_scripts_without_spaces():
  question = '請問北京和上海之間的高速鐵路全長多少公里以及何時通車'
  assert one(question, f'他問我{question}我不知道').is_contaminated
  assert not one(question, '北京和上海之間的高速鐵公路全長是多少里呢').is_contaminated
  japanese = '吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。'
  assert one(japanese, f'「{japanese}」と言った').share == 1


def test_odd_rows_and_sets():
  items = [Item('a', ('',)), Item('b', (), ()), Item('c', ('!?',), ('',)), Item('d', ('x\ud800',))]
  for rows in ([], ['', []], [['', '!?', 'x\ud800']]):
    got = report(items, rows)
    assert [f.is_clean for f in got.findings[:2]] == [True, True] and got.whole == 4
  assert report([], ['some text']).findings == ()
  assert report([], []).template_share == 0
  assert contamination.check({}, [('f:1', ['a text'])], []) == {}
  long = text(random.Random(0), 300_000)
  assert one(long[:200], long).is_contaminated


def test_several_sets_are_found_in_one_pass():
  rng = random.Random(10)
  first, second = text(rng, 30), text(rng, 30)
  sets = {'a': [Item('1', (first,)), Item('2', (second,))], 'b': [Item('1', (second,))]}
  got = contamination.check(sets, iter([('f:1', (second,))]), ['f'])
  assert [f.is_contaminated for f in got['a'].findings] == [False, True]
  assert got['b'].contaminated == 1 and got['b'].against == ('f',)


def test_disjoint_real_data_is_clean():
  if not SENTIMENT.is_dir():
    pytest.skip('make demo fetches the reviews')

  def rows(name):
    lines = (SENTIMENT / f'{name}.jsonl').read_text().splitlines()
    return [[m['content'] for m in json.loads(line)['messages']] for line in lines]

  train, held = rows('train'), rows('test')
  items = [Item(str(i), tuple(r), ('positive',)) for i, r in enumerate(held)]
  assert not set(map(tuple, held)) & {tuple(r[:2]) for r in train}
  got = report(items, train)
  assert (got.contaminated, got.near_duplicates) == (0, 0)
  planted = report(items, [*train, *held[::10]])
  assert planted.contaminated == 40 and planted.near_duplicates == 0


@pytest.mark.parametrize('seed', range(3))
def test_the_rule_of_13_words_is_that_of_lm_eval(seed, monkeypatch):
  janitor = pytest.importorskip('lm_eval.decontamination.janitor', reason='an optional package')
  monkeypatch.setattr(contamination, 'OVERLAP', 2)  # which lm-eval does not have
  rng = random.Random(seed)
  pool = [text(rng, rng.randrange(8, 30)) for _ in range(50)]

  def mixed():
    return ' '.join(p[rng.randrange(9) * 4 :] for p in rng.sample(pool, rng.randrange(1, 5)))

  questions, rows = [mixed().title() for _ in range(150)], [mixed() for _ in range(30)]
  theirs = janitor.Janitor(ngram_n=13)
  for row in rows:
    theirs.register_contaminant_python(row)
  expected = [
    any(theirs.normalize_string(g) in theirs.dirt_ngrams for g in janitor.word_ngrams(q, 13))
    for q in questions
  ]
  got = report([Item(str(i), (q,)) for i, q in enumerate(questions)], rows)
  assert [f.is_contaminated for f in got.findings if not f.is_whole] == [
    e for e, f in zip(expected, got.findings, strict=True) if not f.is_whole
  ]
  assert 20 < sum(expected) < 130
