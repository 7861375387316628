"""The audit of training data: every planted fault is found, and good rows are left alone."""

import itertools
import json
import pathlib
import random
import string

import numpy as np
import pytest
from planted_rows import BROKEN, LEAKS, LOOPS, Planter, as_rows

from ftjax.audit import (
  answers,
  audit,
  characters,
  cleaning,
  diversity,
  drift,
  duplicates,
  labels,
  languages,
  personal,
  table,
)
from ftjax.audit.finding import KINDS
from ftjax.audit.rows import Row
from ftjax.evaluation import near_duplicates
from ftjax.runtime.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXTS = ROOT / 'ftjax' / 'evaluation' / 'general_texts' / 'texts.jsonl'
CACHE = ROOT / '.cache'
FRENCH = (
  'Ce film est une merveille pour les enfants et pour les parents qui les accompagnent au cinéma.',
  'Les acteurs sont très bons, mais le scénario manque de rythme et la fin est un peu longue.',
  'Il est difficile de ne pas être touché par cette histoire, qui est celle de toute une famille.',
)
ACCENTS = ('déjà vu à l\u2019école', 'Straße über Köln', 'señor, mañana')


def row(prompt, *texts, **more):
  return Row('f.jsonl', 1, (prompt,) if prompt else (), texts, **more)


def kinds(findings):
  return sorted((f.kind, f.row) for f in findings)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def sentences():
  """Pairs of consecutive sentences of the product's own prose, and of questions and replies."""
  out = []
  for found in read(TEXTS):
    parts = [f'{s.rstrip(".")}.' for s in found['text'].split('. ') if len(s) > 20]
    out += [(f'Continue the text.\n\n{a}', b) for a, b in itertools.pairwise(parts)]
  replies = read(TEXTS.with_name('replies.jsonl'))
  return out + [(r['messages'][-1]['content'], r['answer']) for r in replies]


# Planted faults


def test_faults_planted_into_prose_are_found_and_the_prose_is_left_alone():
  pairs = enumerate(sentences(), 1)
  rows = [Row('prose.jsonl', i, (q,), (a,), source='prose') for i, (q, a) in pairs]
  clean = audit.run(rows, scorer=None)
  assert clean.findings == ()
  plant = Planter(rows)
  plant.personal()
  plant.in_question('template_leak', LEAKS)
  plant.in_question('garbage', BROKEN)
  plant.in_question('repetition', LOOPS)
  plant.mojibake(ACCENTS)
  plant.exact(3)
  plant.empty()
  plant.over_length(1)
  plant.phrases()
  plant.repeated(2)
  found = audit.run(plant.rows, scorer=None)
  assert not plant.missed(found.findings)
  assert {f.row for f in found.findings} <= plant.touched


@pytest.mark.full
@pytest.mark.skipif(not (CACHE / 'eval' / 'en_fr').exists(), reason='make assets eval-data')
def test_faults_planted_into_2000_real_rows_are_found():
  """1,000 sentences with labels and 1,000 translations: every fault is found, and at most 2 % of
  the rows are named before anything is planted.
  """
  reviews = as_rows(read(CACHE / 'data/sentiment/train.jsonl')[:1000], 'reviews')
  debian = as_rows(read(CACHE / 'eval/en_fr/train.jsonl')[:1000], 'debian')
  test = as_rows(read(CACHE / 'eval/en_fr/test.jsonl'), 'test')
  clean = audit.run([*reviews, *debian], test)
  assert clean.flagged() <= 0.02 * 2000, clean.counts()
  known = {f.row for f in clean.findings}
  first, second = Planter(reviews, 1), Planter(debian, 2)
  first.exact(20)
  first.personal()
  first.conflicts({'positive': 'negative', 'negative': 'positive'}, 10)
  first.rare('neutral', 3)
  first.language(FRENCH)
  first.in_question('template_leak', LEAKS)
  second.near(10)
  second.overlap(test, 10)
  second.empty()
  second.cut(10)
  second.over_length(5)
  second.outliers(3)
  second.mojibake(ACCENTS)
  second.in_question('garbage', BROKEN)
  second.in_question('repetition', LOOPS)
  second.phrases()
  second.repeated(5)
  n = len(first.rows)
  found = audit.run([*first.rows, *second.rows], test)
  assert not first.missed(f for f in found.findings if f.row < n)
  assert not [
    (kind, at) for kind, at in second.wanted if (kind, n + at) not in set(kinds_of_rows(found))
  ]
  touched = first.touched | {n + i for i in second.touched}
  others = {f.row for f in found.findings} - touched - known
  assert len(others) <= 0.02 * 2000


def kinds_of_rows(found):
  return [(f.kind, f.row) for f in found.findings]


# Personal data and secrets


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('mail a.b-c@uni-koeln.de.', ['email']),
    ('see user@example.com or x@test', []),
    ('@anna and foo@ are names', []),
    ('call +49 (0) 221 4701234 or 555-555-0123', ['phone']),
    ('in 2019-2020, 1,234,567 of 10.5.3 at 12:30', []),
    ('DE89370400440532013000', ['iban']),
    ('DE89370400440532013001', []),  # the check digits are wrong
    ('GB33 BUKB 2020 1555 5555 55', ['iban']),
    ('4111 1111 1111 1111', ['credit_card']),
    ('4111 1111 1111 1112', []),  # Luhn
    ('3782 822463 10005', ['credit_card']),
    ('serial 0000 0000 0000 0000', []),
    ('from 8.8.8.8 or v1.2.3.4 or 192.168.1.1', []),
    ('from 203.0.113.7, which documentation has', []),
    ('at 151.101.1.140 and 2a00:1450:4001:80b::200e', ['ip_address', 'ip_address']),
    ('version 151.101.1.140', []),
    ('std::vector or 12:30:45 or a::b', []),
    ('AKIAIOSFODNN7EXAMPLE', ['api_key']),
    ('AIzaSyA1234567890abcdefghijklmnopqrstuv', ['api_key']),
    ('hf_abcdefghijklmnopqrstuvwxyzABCDEF12', ['api_key']),
    ('my password is swordfishes', []),
    ('api_key = "f3Kq9zLm27xPvb"', ['api_key']),
    ('a token of a tokenizer: eos_token_id=128001', []),
    ('-----BEGIN OPENSSH PRIVATE KEY-----', ['private_key']),
    ('-----BEGIN PUBLIC KEY-----', []),
  ],
)  # fmt: skip
def test_personal_data_by_pattern(text, expected):
  assert [kind for kind, _ in personal.matches(text)] == expected


def test_secrets_are_masked_in_what_is_printed():
  secret = 'ghp_16C7e42F292c6912E7710c838347Ae178B4a'
  found = audit.run([row(f'use {secret}', 'Thank you.'), row('a', 'b')], scorer=None)
  (one,) = [f for f in found.findings if f.kind == 'api_key']
  assert secret not in table.text(found) and secret not in json.dumps(one.to_json())
  assert one.excerpt.startswith('ghp_*')


def test_a_card_with_any_one_digit_changed_is_none():
  good = '4539578763621486'
  assert personal.is_card(good)
  for i, digit in itertools.product(range(1, len(good)), string.digits):
    if digit != good[i]:
      assert not personal.is_card(good[:i] + digit + good[i + 1 :])


# Characters


@pytest.mark.parametrize('with_ftfy', [True, False])
def test_mojibake_with_and_without_ftfy(with_ftfy, monkeypatch):
  if with_ftfy:
    pytest.importorskip('ftfy')
  monkeypatch.setattr(characters, 'has_ftfy', lambda: with_ftfy)
  good = ['déjà vu', 'Ärger über Öl', 'naïve — “quoted”…', 'Ça va Â', '日本語', 'łódź', '🙂 fine']
  bad = [
    text.encode().decode('cp1252', 'ignore') for text in ('déjà vu', 'it\u2019s', 'Über', '“so”')
  ]
  found = characters.mojibake([row('q', text) for text in (*good, *bad)])
  assert [f.row for f in found] == [*range(len(good), len(good) + len(bad))]


@pytest.mark.parametrize(
  ('text', 'is_broken'),
  [
    ('a tab\tand\nlines\r\n', False),
    ('e\u0301 combining, \u200d joined, \u00ad soft', False),
    ('x\x07', True),
    ('\ufffd', True),
    ('\ufdd0', True),
    ('def f(x): return {k: [v] for k, v in x.items() if v != "" and k is not None}', False),
    ('----------------------------------------', True),
    ('https://host.org/a/b/c?d=e&f=g', False),
  ],
)
def test_garbage(text, is_broken):
  assert bool(characters.garbage([row('q', text)])) == is_broken


def test_repetition_is_what_goes_on_and_on():
  good = ['no no no, never', 'la la la la', '1 1 1 1 1 1 1 1 1', '0000000000000000000000', 'aaah']
  assert not characters.repetition([row('q', text) for text in good])
  assert len(characters.repetition([row('q', text) for text in LOOPS])) == len(LOOPS)


# Answers


@pytest.mark.parametrize(
  ('text', 'is_leak'),
  [
    ('<|im_end|>', True),
    ('x [/INST] y', True),
    ('### Instruction: go', True),
    ('Assistant: yes', True),
    ('<s> for strike-through in HTML</s>', True),
    ('<span>a</span> b < s > c', False),
    ('he said: Human: beings', False),
    ('a <user> and [inst]', False),
    ('<unused7>', True),  # a special token of the tokenizer
  ],
)
def test_template_markers(text, is_leak):
  assert bool(answers.template_leaks([row('q', text)], frozenset({'<unused7>', '.'}))) == is_leak


def test_empty_answers_and_symbols():
  texts = ['', ' \n', '...', '-', '+', '<=', '7', '\U0001f642', 'no']
  found = answers.empty([row('q', text) for text in texts])
  assert [f.row for f in found] == [0, 1, 2, 3]
  assert answers.empty([row('q'), row('q')]) == []  # prompts have none
  assert [f.row for f in answers.empty([row('q'), row('q', 'a')])] == [0]


def test_cut_answers_by_their_last_word_and_by_the_habit_of_the_set():
  tail = 'a good answer has a beginning and also goes on from there until the very last word'
  whole = [row('q', f'{tail} {i} of it.') for i in range(40)]
  bad = [row('q', f'{tail} of the'), row('q', f'{tail},'), row('q', 'it is so because of the new')]
  assert kinds(answers.truncated([*whole, *bad])) == [
    ('truncated_answer', 40), ('truncated_answer', 41)
  ]  # fmt: skip
  without_mark = row('q', f'{tail} and the whole story again')
  assert [f.row for f in answers.truncated([*whole, without_mark])] == [40]
  assert answers.truncated([without_mark] * 40) == []  # no answer of this set has a mark


def test_answers_that_repeat_the_prompt():
  question = 'Why do the leaves of the oak fall in autumn?'
  rows = [
    row(question, f'{question} Because.'),
    row(question, 'They fall.'),
    row('Why?', 'Why? So.'),
  ]
  assert [f.row for f in answers.prompt_repeated(rows)] == [0]


def test_lengths_far_from_the_others():
  usual = [row('q' * n, 'a' * (n // 2)) for n in range(40, 200)]
  rows = [*usual, row('q' * 100_000, 'a' * 50), row('q' * 90, 'a' * 30_000)]
  assert [f.row for f in answers.length_outliers(rows)] == [160, 161]
  assert answers.length_outliers(rows[-5:]) == []


def test_equal_sides_of_a_pair():
  rows = [row('q', 'a', 'A ', is_pair=True), row('q', 'a', 'b', is_pair=True), row('q', 'a', 'a')]
  assert [f.row for f in answers.equal_sides(rows)] == [0]


# Duplicates and overlap


def prose(rng, words=40):
  return ' '.join(''.join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(words))


def test_near_duplicates_are_the_later_rows_and_as_many_as_counted():
  rng = random.Random(0)
  texts = [prose(rng) for _ in range(30)]
  texts += [f'{texts[3]} end', f'{texts[3]} other', texts[7].upper()]
  rows = [row('', text) for text in texts]
  found = duplicates.near(rows)
  assert [f.row for f in found] == [30, 31, 32]
  words = [[text.lower().split()] for text in texts]
  assert near_duplicates.count(words) == 5


def test_without_the_rows_of_an_overlap_nothing_overlaps():
  rng = random.Random(0)
  evaluation = [Row('test', i, (prose(rng, 30),), ('x',)) for i in range(20)]
  rows = [row(prose(rng), 'a') for _ in range(50)]
  rows += [row(f'{e.question} {prose(rng)}', 'a') for e in (*evaluation[:5], *evaluation[:3])]
  found = duplicates.overlap(rows, evaluation)
  assert [f.row for f in found] == [*range(50, 58)]
  left = [r for i, r in enumerate(rows) if i not in {f.row for f in found}]
  assert duplicates.overlap(left, evaluation) == []


# Labels


def test_conflicts_and_rare_labels():
  rows = [row(f'text {i}', 'yes' if i % 2 else 'no') for i in range(60)]
  rows += [row('TEXT  1', 'no'), row('a new one', 'maybe')]
  names = labels.of_rows(rows)
  assert kinds(labels.conflicts(rows, names)) == [
    ('conflicting_labels', 1),
    ('conflicting_labels', 60),
  ]
  assert kinds(labels.rare(rows, names)) == [('rare_label', 61)]


def test_which_rows_have_labels():
  texts = [row(f'question {i}', f'answer number {i}') for i in range(50)]
  assert labels.of_rows(texts) is None
  assert labels.of_rows([row('', 'a text', label='3')] * 20) == ['3'] * 20
  assert labels.of_rows([row('q', 'a', 'b', is_pair=True)] * 20) is None


def test_suspects_by_hand():
  """Thresholds are the mean p of each class over the rows with its label: 0.6 and 0.7.

  Row 2 (label 0) has p(1) = 0.8 >= 0.7 and p(0) = 0.2 < 0.6; row 5 (label 1) has p(0) = 0.6 >= 0.6
  and p(1) = 0.4 < 0.7. The margins are 0.2 - 0.8 and 0.4 - 0.6: row 2 is the likelier one.
  """
  given = np.array([0, 0, 0, 1, 1, 1])
  first = np.array([0.9, 0.7, 0.2, 0.1, 0.2, 0.6])
  probs = np.stack([first, 1 - first], 1)
  assert labels.suspects(given, probs).tolist() == [2, 5]
  assert labels.suspects(np.zeros(0, int), np.zeros((0, 2))).tolist() == []


@pytest.mark.parametrize(
  ('given', 'probs'),
  [([0, 1], [[1.0, 0.0]]), ([0, 2], [[1.0, 0.0]] * 2), ([0], [[np.nan, 1.0]]), ([0], [[1.5, 0.0]])],
)
def test_suspects_refuse_wrong_arrays(given, probs):
  with pytest.raises(ValueError, match='suspects'):
    labels.suspects(np.array(given), np.array(probs))


def worded(number, seed=0):
  """Rows whose label can be read from their words, and the rows with a wrong label."""
  rng = random.Random(seed)
  good, bad = 'fine great lovely superb charming', 'poor dull awful clumsy boring'
  rows, wrong = [], []
  for i in range(number):
    is_good, is_flipped = rng.random() < 0.5, rng.random() < 0.05
    words = [*rng.choices((good if is_good else bad).split(), k=3), prose(rng, 4)]
    wrong += [i] * is_flipped
    rows.append(row(' '.join(words), 'positive' if is_good != is_flipped else 'negative'))
  return rows, wrong


def test_flipped_labels_are_found_by_out_of_fold_confidence():
  rows, wrong = worded(250)
  found, facts = labels.errors(rows, labels.of_rows(rows), labels.out_of_fold)
  named = [f.row for f in found]
  hits = len(set(named) & set(wrong))
  assert hits >= 0.9 * len(wrong) and hits >= 0.9 * len(named)
  assert facts['accuracy'] > 0.9


def test_labels_that_words_do_not_show_are_not_doubted():
  rng = random.Random(1)
  rows = [row(prose(rng, 8), rng.choice(['yes', 'no'])) for _ in range(200)]
  assert labels.errors(rows, labels.of_rows(rows), labels.out_of_fold)[0] == []


def test_equal_texts_are_in_one_fold():
  texts, y = ['same words here'] * 2 + [f'text {i}' for i in range(100)], np.arange(102) % 2
  probs = labels.out_of_fold(texts, y, 2, 5, 0)
  assert (probs[0] == probs[1]).all() and np.allclose(probs.sum(1), 1)


# Languages


@pytest.mark.parametrize('with_langid', [True, False])
def test_a_language_that_few_rows_have(with_langid, monkeypatch):
  if with_langid:
    pytest.importorskip('py3langid')
  monkeypatch.setattr(languages, 'has_langid', lambda: with_langid)
  english = [row(f'Rate it.\n\n{a}', 'good') for _, a in sentences()][:60]
  german = (
    'Der Film ist für die Kinder und auch für die Eltern ein schöner Abend, den man nicht vergisst.'
  )
  others = [
    row(f'Rate it.\n\n{text}', 'good') for text in (FRENCH[0], german, 'Это очень хороший фильм.')
  ]
  found, mix = languages.find([*english, *others])
  n = len(english)
  assert [f.row for f in found] == [n, n + 1, n + 2]
  assert mix['question']['en'] >= 20
  both = [row(f'Rate it.\n\n{text}', 'good') for text in FRENCH] * 3
  assert languages.find([*english, *both])[0] == []  # the set has two languages


# Diversity


def test_distinct_and_coverage_by_hand():
  assert diversity.distinct(['a b a b'], 1) == 0.5
  assert diversity.distinct(['a b a b'], 2) == pytest.approx(2 / 3)
  assert diversity.distinct([], 2) == 0
  assert diversity.coverage(np.eye(4))['effective'] == pytest.approx(4)
  assert diversity.coverage(np.ones((4, 3))) == pytest.approx({'effective': 1, 'nearest': 1})
  with pytest.raises(ValueError, match='float'):
    diversity.coverage(np.full((2, 2), np.nan))


def test_answers_that_resemble_each_other():
  same = [
    row(f'q{i}', f'Thank you for your question, here is what I know about it {i}.')
    for i in range(60)
  ]
  found, facts = diversity.of_rows(same, False, embed=lambda texts: np.eye(len(texts)))
  assert [f.kind for f in found] == ['low_diversity'] and facts[
    'coverage_effective'
  ] == pytest.approx(60)
  assert diversity.of_rows(same, True)[0] == []


# Versions


def test_rows_that_came_went_and_changed():
  old = [row(f'q{i}', f'a{i}') for i in range(10)]
  new = [row('Q0', 'A0'), row('q1', 'other'), *old[3:], *old[3:4], row('new', 'x')]
  found = drift.compare(old, new)
  assert (found.old, found.new, found.same) == (10, 11, 8)
  assert [r.question for r in found.came] == ['q3', 'new']
  assert [r.question for r in found.went] == ['q2']
  assert [(a.answer, b.answer) for a, b in found.changed] == [('a1', 'other')]


def test_drift_has_small_p_values_where_something_drifted_and_only_there():
  rng = random.Random(0)
  words = ['red', 'blue', 'green', 'black', 'white']

  def version(share, length):
    names = ['a' if rng.random() < share else 'b' for _ in range(200)]
    return [row(' '.join(rng.choices(words, k=length + rng.randrange(9))), name) for name in names]

  same = {t.name: t.p for t in drift.compare(version(0.5, 8), version(0.5, 8)).tests}
  assert min(same.values()) > 0.01
  other = {t.name: t.p for t in drift.compare(version(0.5, 8), version(0.8, 14)).tests}
  assert other['labels'] < 1e-4 and other['length of the question'] < 1e-4
  words[0] = 'purple'
  changed = {t.name: t.p for t in drift.compare(version(0.5, 8), version(0.5, 8)).tests}
  assert changed['vocabulary'] > 0.01
  old = version(0.5, 8)
  words[0] = 'orange'
  assert {t.name: t.p for t in drift.compare(old, version(0.5, 8)).tests}['vocabulary'] == 0.002


# Cleaning, and the kinds


def test_kinds_to_remove():
  assert cleaning.kinds_of(['email']) == {'email'}
  assert 'eval_overlap' in cleaning.kinds_of([]) and 'near_duplicate' not in cleaning.kinds_of([])
  with pytest.raises(ConfigError, match='expected some of'):
    cleaning.kinds_of(['emial'])
  with pytest.raises(ConfigError, match='whole set'):
    cleaning.kinds_of(['rare_label'])


def test_every_kind_is_documented():
  page = (ROOT / 'docs' / 'audit.md').read_text()
  assert not [kind for kind in KINDS if f'`{kind}`' not in page]
