"""evaluation/metrics/: texts against gold texts, against sacrebleu, rouge-score and by hand."""

import collections
import itertools
import math
import re
import string
import time

import numpy as np
import pytest
from metric_cases import check_resamples, figure, library, results

from ftjax.evaluation.metrics import answers, diversity, perplexity, summaries, translation
from ftjax.runtime.errors import ConfigError

TEXT = 'the cat sat on a mat , near Köln . 東京 is big ! so ? well-known 3.5 % &quot;'
WORDS = TEXT.split()


def _texts(n, seed, references=1, most=14):
  """(text, references) with words in common, empty texts and odd characters among them."""
  rng = np.random.default_rng(seed)
  edges = [
    '',
    ' ',
    '.',
    'a',
    '東京は大きい。',
    'naïve café\u0301 \U0001f600',
    'x ' * 30,
    'A\nB\n\nC',
  ]
  out = []
  for _ in range(n):
    words = rng.choice(WORDS, rng.integers(0, most)).tolist()
    other = [w if rng.random() < 0.7 else str(rng.choice(WORDS)) for w in words]
    texts = [' '.join(words), *(' '.join(other[i:]) for i in range(references))]
    if rng.random() < 0.25:
      texts[rng.integers(len(texts))] = str(rng.choice(edges))
    out.append((texts[0], texts[1:]))
  return out


CASES = {
  'random': _texts(25, 0),
  'three_references': _texts(25, 1, 3),
  'short': _texts(10, 2, 2, most=3),
  'equal': [('the cat sat on the mat .', ['the cat sat on the mat .'])] * 3,
  'nothing_in_common': [('a b c d e', ['v w x y z'])],
  'one_row': [('the cat sat', ['the cat sat on a mat'])],
  'empty_text': [('', ['a b'])],
  'empty_reference': [('a b', [''])],
  'both_empty': [('', [''])],
  'empty_among_others': [('', ['a b c d e']), ('a b c d e', ['a b c d e']), ('a b', [''])],
}


def _translated(case):
  rows = CASES[case]
  values = [translation.translation_values(text, gold) for text, gold in rows]
  return results(*({'values': v, 'prediction': str(i)} for i, v in enumerate(values)))


@pytest.mark.parametrize('name', ['BLEU', 'CHRF', 'TER'])
@pytest.mark.parametrize('case', CASES)
def test_translations_equal_sacrebleu_also_under_weights(name, case):
  scorer = getattr(library('sacrebleu.metrics'), name)()

  def reference(rows):
    pairs = [CASES[case][int(r.prediction)] for r in rows]
    streams = [list(stream) for stream in zip(*(gold for _, gold in pairs), strict=True)]
    return scorer.corpus_score([text for text, _ in pairs], streams).score

  check_resamples(getattr(translation, name), _translated(case), reference)


@pytest.mark.parametrize('tokenize', translation.TOKENIZERS)
def test_tokenizers_of_bleu(tokenize):
  sacrebleu = library('sacrebleu.metrics')
  pairs = _texts(30, 3)
  rows = results(
    *({'values': {'bleu': translation.bleu_counts(*p, tokenize)}} for p in pairs),
  )
  texts, golds = [p[0] for p in pairs], [[p[1][0] for p in pairs]]
  wanted = sacrebleu.BLEU(tokenize=tokenize).corpus_score(texts, golds).score
  assert figure(translation.BLEU, rows) == pytest.approx(wanted, abs=1e-9)


def test_translations_refuse_what_they_cannot_score():
  with pytest.raises(ValueError, match='no references'):
    translation.translation_values('a', [])
  with pytest.raises(ConfigError, match=r"tokenize='flores'.*13a"):
    translation.bleu_counts('a', ['a'], 'flores')


def test_two_thousand_resamples_of_bleu_take_about_a_second():
  rng = np.random.default_rng(0)
  counts = rng.integers(1, 30, (3000, 10)).astype(float)
  rows = results(*({'values': {'bleu': tuple(c)}} for c in counts.tolist()))
  weights = rng.multinomial(3000, np.full(3000, 1 / 3000), 2000).astype(float)
  columns = translation.BLEU.columns(rows, ())
  start = time.monotonic()
  found = translation.BLEU.value(weights, columns)
  seconds = time.monotonic() - start
  assert np.isfinite(found).all() and found.std() > 0
  assert seconds < 5  # 0.1 s on two idle cores


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
  from ftjax.evaluation.metrics import packages

  monkeypatch.setattr(packages.importlib.util, 'find_spec', lambda name: None)
  translation._ter.cache_clear()
  with pytest.raises(ConfigError, match=r'metric ter needs.*sacrebleu.*"ftjax\[eval\]"'):
    translation.ter_counts('a', ['a'])
  summaries._scorer.cache_clear()
  with pytest.raises(ConfigError, match='rouge_score'):
    summaries.rouge_values('a', ['a'])


@pytest.mark.parametrize('stem', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_summaries_equal_rouge_score(case, stem):
  scorer = library('rouge_score.rouge_scorer')
  kinds = ('rouge1', 'rouge2', 'rougeL', 'rougeLsum')
  scorer = scorer.RougeScorer(kinds, use_stemmer=stem)
  pairs = CASES[case]
  found = [summaries.rouge_values(text, gold, use_stemmer=stem) for text, gold in pairs]
  rows = results(*({'values': v, 'prediction': str(i)} for i, v in enumerate(found)))
  wanted = [scorer.score_multi(gold, text) for text, gold in pairs]
  assert set(summaries.MEANS) == set(found[0])
  for kind in kinds:
    for i, part in enumerate(('precision', 'recall', 'f1')):

      def reference(rows, kind=kind, i=i):
        return np.mean([wanted[int(r.prediction)][kind][i] for r in rows])

      check_resamples(summaries.MEANS[f'{kind}_{part}'], rows, reference, count=1)


def test_summaries_in_other_scripts():
  library('rouge_score')
  same = summaries.rouge_values('Он живёт', ['он живёт'], is_english=False)
  assert same['rouge1_f1'] == same['rougeL_f1'] == (1.0,)
  assert summaries.rouge_values('Он живёт', ['он живёт'])['rouge1_f1'] == (0.0,)
  with pytest.raises(ValueError, match='no references'):
    summaries.rouge_values('a', [])


def _official_squad(prediction, golds):
  """EM and F1 as the paper's script computes them, for texts without numbers and signs."""

  def tokens(text):
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r'\b(a|an|the)\b', ' ', text).split()

  def f1(one, two):
    if not one or not two:
      return float(one == two)
    common = sum((collections.Counter(one) & collections.Counter(two)).values())
    if common == 0:
      return 0.0
    precision, recall = common / len(one), common / len(two)
    return 2 * precision * recall / (precision + recall)

  pairs = [(tokens(prediction), tokens(g)) for g in golds]
  return max(float(a == b) for a, b in pairs), max(f1(a, b) for a, b in pairs)


def test_squad_equals_the_definition():
  rng = np.random.default_rng(0)
  words = ['the', 'A', 'Cat', 'cat.', 'sat,', 'on', '"mat"', 'Zürich', '東京']
  for _ in range(300):
    texts = [' '.join(rng.choice(words, rng.integers(1, 5)).tolist()) for _ in range(3)]
    if not all(answers.squad.normalize(t) for t in texts):
      continue
    wanted = _official_squad(texts[0], texts[1:])
    got = answers.squad_values(texts[0], texts[1:])
    np.testing.assert_allclose([got['exact_match'][0], got['token_f1'][0]], wanted)


def test_squad_by_hand_and_its_edges():
  got = answers.squad_values('in the city of Paris', ['Paris', 'Paris, France'])
  assert got == {'exact_match': (0.0,), 'token_f1': (0.4,)}  # 2 * 1 / (4 + 1)
  yes, no = {'exact_match': (1.0,), 'token_f1': (1.0,)}, {'exact_match': (0.0,), 'token_f1': (0.0,)}
  assert answers.squad_values('', ['']) == yes
  assert answers.squad_values('something', ['']) == no
  assert answers.squad_values('', ['a']) == no  # an article alone is not an empty answer
  assert answers.squad_values(' the ', ['the']) == yes
  assert answers.squad_values('35', ['3.5']) == no
  with pytest.raises(ValueError, match='no gold answers'):
    answers.squad_values('a', [])


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('Yes', 'yes'),
    ('no.', 'no'),
    ('**No**, yes is wrong', 'no'),
    ('True', 'yes'),
    ('The answer is no.', 'no'),
    ('I think yes or no', ''),
    ('Yesterday it was known', ''),
    ('', ''),
    ('¡\u00a0…', ''),
    ('\uff39\uff45\uff53', 'yes'),
    ('yes ' * 5, 'yes'),
  ],
)
def test_yes_no(text, wanted):
  assert answers.parse_yes_no(text) == wanted


@pytest.mark.parametrize(
  ('answer', 'output', 'is_match'),
  [
    ('Paris', ' paris.', True),
    ('Paris', '"Paris"', True),
    ('Paris', 'Paris, France', False),
    ('42', '**42**', True),
    ('3.5', '35', False),
    ('-5', '5', False),
    ('.5', '5', False),
    ('.5', '(.5)', True),
    ('5 %', '5', False),
    ("don't", "Don't!", True),
    ('ﬁne', 'fine', True),
    ('Straße', 'STRASSE', True),
    ('a', 'A', True),
    ('a', 'the', False),
    ('new  york', 'New\nYork', True),
    ('東京', '「東京」。', True),
    ('?', '?', True),
    ('?', '', False),
    ('?', '!', False),
    ('yes', '', False),
    ('yes', 'yes yes', False),
  ],
)
def test_normalized_match(answer, output, is_match):
  assert answers.normalized_match(answer, output) is is_match


def test_exact_match():
  assert answers.exact_match('Paris', ' Paris\n')
  assert not answers.exact_match('Paris', 'paris')


@pytest.mark.parametrize(
  ('completion', 'wanted'),
  [
    ('So 6 + 12 = 18.\n#### 18', '18'),
    (r'It is \boxed{18.0}', '18'),
    ('The answer is 1,234.50 dollars.', r'\frac{2469}{2}'),
    (r'so $x = y + 1$', 'x=y+1'),
    (r'\boxed{(1, 2)} = \boxed{(1,2)}', '(1,2)'),
    (r'\boxed{\text{New  York}}', 'New York'),
    ('50%', r'50\%'),
    (r'\boxed{3} or \boxed{4}', ''),
    (r'\boxed{3} and again \boxed{3.0}', '3'),
    ('<think>18</think>\n19', '19'),
    ('<think>18', ''),
    ('', ''),
    ('I do not know; it could be many things, who can be sure of what it is in the end?', ''),
  ],
)
def test_math_answers_in_one_form(completion, wanted):
  assert answers.parse_math(completion, '', 'flexible') == wanted


def _responses(*texts, **other):
  return results(*({'response': t} | other for t in texts))


def test_distinct_by_counting_also_under_weights():
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(list('abcdefgh'), rng.integers(0, 9)).tolist()) for _ in range(20)]
  for n in (1, 2):

    def reference(rows, n=n):
      words = [r.response.split() for r in rows]
      found = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
      return len(set(found)) / len(found) if found else np.nan

    check_resamples(diversity.distinct(n), _responses(*texts), reference)
  assert figure(diversity.DISTINCT_1, _responses('yes', 'yes', 'yes yes')) == 1 / 4
  assert np.isnan(figure(diversity.DISTINCT_2, _responses('yes', '', 'no')))


def test_repetition_lengths_and_truncation_by_hand():
  rows = _responses('a b a b a b', 'x', '')
  # 2-grams of the first: ab ba ab ba ab, three of them again.
  assert figure(diversity.self_repetition(2), rows) == 3 / 5
  assert np.isnan(figure(diversity.REPETITION, _responses('a b', '')))
  assert figure(diversity.CHARACTERS, rows) == pytest.approx(12 / 3)
  assert figure(diversity.WORDS, rows) == pytest.approx(7 / 3)
  rows = results({'tokens': 3, 'is_cut': True}, {'tokens': 6}, {'tokens': 0})
  assert figure(diversity.TOKENS, rows) == 3
  assert figure(diversity.TRUNCATED, rows) == pytest.approx(1 / 3)
  assert figure(diversity.CHARACTERS, _responses('東京\U0001f600')) == 3
  for metric in diversity.METRICS:
    assert np.isnan(figure(metric, []))


def test_many_resamples_of_distinct_stay_in_memory():
  rng = np.random.default_rng(0)
  texts = [' '.join(map(str, rng.integers(0, 20_000, 40))) for _ in range(500)]
  rows, weights = _responses(*texts), rng.multinomial(500, np.full(500, 1 / 500), 300)
  got = figure(diversity.DISTINCT_2, rows, weights=weights)
  wanted = [len({g for t, w in zip(texts, weights[0], strict=True) if w for g in _pairs(t)})]
  assert got[0] == pytest.approx(wanted[0] / (500 * 39))


def _pairs(text):
  words = text.split()
  return itertools.pairwise(words)


def test_perplexity_is_of_the_sums():
  texts = [('hello', -7.0, 3), ('東京', -2.5, 2), ('', 0.0, 0), ('\ud800', -1.0, 1)]
  rows = results(*({'values': perplexity.likelihood_values(p, n, t)} for t, p, n in texts))
  assert [r.values['likelihood'][2] for r in rows] == [5, 6, 0, 3]

  def reference(column):
    def of(rows):
      sums = np.sum([r.values['likelihood'] for r in rows], axis=0)
      return sums[0] / sums[column] if sums[column] else np.nan

    return of

  check_resamples(perplexity.PERPLEXITY, rows, lambda rows: np.exp(reference(1)(rows)))
  check_resamples(perplexity.BYTE_PERPLEXITY, rows, lambda rows: np.exp(reference(2)(rows)))
  check_resamples(perplexity.BITS_PER_BYTE, rows, lambda rows: reference(2)(rows) / math.log(2))


def test_perplexity_at_its_edges():
  far = results({'values': perplexity.likelihood_values(-1e6, 1, 'a')})
  assert np.isnan(figure(perplexity.PERPLEXITY, far))  # more than float64 holds
  assert figure(perplexity.BITS_PER_BYTE, far) == pytest.approx(1e6 / math.log(2))
  empty = results({'values': perplexity.likelihood_values(0.0, 0, '')})
  for metric in perplexity.METRICS:
    assert np.isnan(figure(metric, empty)) and np.isnan(figure(metric, []))
  # A uniform model over 256 bytes has 8 bits per byte.
  uniform = results({'values': perplexity.likelihood_values(-4 * math.log(256), 4, 'abcd')})
  assert figure(perplexity.BITS_PER_BYTE, uniform) == pytest.approx(8)
  assert figure(perplexity.PERPLEXITY, uniform) == pytest.approx(256)
  for bad in (np.nan, -np.inf):
    with pytest.raises(ValueError, match='finite'):
      perplexity.likelihood_values(bad, 1, 'a')
