"""Near-duplicates, compared with Jaccard's index of all pairs."""

import importlib.util
import random

import pytest
from test_contamination import WORDS, report, text

from ftjax.evaluation import near_duplicates, ngrams
from ftjax.evaluation.contamination import Item
from ftjax.runtime.errors import ConfigError

needs_datasketch = pytest.mark.skipif(
  importlib.util.find_spec('datasketch') is None, reason='an optional package'
)


def shingles(given):
  words = ngrams.words(given)
  return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(a, b):
  a, b = shingles(a), shingles(b)
  return len(a & b) / len(a | b) if a | b else 0.0


def variants(rng, count):
  """Texts, and copies of them with some words changed, inserted or moved."""
  texts = [text(rng, rng.randrange(3, 90)) for _ in range(count)]
  for original in list(texts):
    words = original.split()
    for _ in range(rng.randrange(4)):
      at = rng.randrange(len(words))
      action = rng.randrange(3)
      if action == 0:
        words[at] = rng.choice(WORDS)
      elif action == 1:
        words.insert(at, rng.choice(WORDS))
      else:
        words = words[at:] + words[:at]
    texts.append(' '.join(words))
  rng.shuffle(texts)
  return texts


@pytest.mark.parametrize('seed', range(3))
def test_the_nearest_training_text_is_that_of_all_pairs(seed):
  rng = random.Random(seed)
  texts = variants(rng, 80)
  items = [Item(str(i), (t,)) for i, t in enumerate(texts[:80])]
  rows = texts[80:]
  got, found = report(items, rows), 0
  for finding, item in zip(got.findings, items, strict=True):
    best = max(jaccard(item.prompt[0], r) for r in rows)
    is_long = len(shingles(item.prompt[0])) >= 4
    expected = best if best >= near_duplicates.THRESHOLD and is_long else 0
    assert finding.similarity == pytest.approx(expected)
    if expected:
      found += 1
      place = int(finding.near.partition(':')[2]) - 1
      assert jaccard(item.prompt[0], rows[place]) == pytest.approx(best)
  assert found > 10


def test_a_near_duplicate_may_have_no_long_ngram_in_common():
  """Every twelfth word changed, no run of 13 left: the 8-grams still show it."""
  rng = random.Random(3)
  words = text(rng, 100).split()
  changed = [w if i % 12 else 'new' for i, w in enumerate(words)]
  got = report([Item('a', (' '.join(words),))], [' '.join(changed)])
  assert got.contaminated == 1 and got.findings[0].similarity == 0


def test_a_template_does_not_make_rows_similar():
  rng = random.Random(4)
  head = text(rng, 60)
  items = [Item(str(i), (f'{head} {text(rng, 9)}',)) for i in range(20)]
  copy = items[4].prompt[0]
  got = report(items, [f'{head} {text(rng, 9)}' for _ in range(30)])
  assert not any(f.similarity for f in got.findings)
  for planted in (copy, copy.removeprefix(head)):
    got = report(items, [planted])
    assert [(f.id, f.similarity) for f in got.findings if f.similarity] == [('4', 1)]


@needs_datasketch
@pytest.mark.parametrize('seed', range(2))
def test_minhash_finds_nearly_all_pairs_and_no_others(seed):
  rng = random.Random(seed)
  texts = [t for t in variants(rng, 80) if len(shingles(t)) >= 4]
  near = {
    i
    for i, a in enumerate(texts)
    if any(jaccard(a, b) >= 0.8 for j, b in enumerate(texts) if j != i)
  }
  got = near_duplicates.count([[ngrams.words(t)] for t in texts])
  assert 0.98 * len(near) <= got <= len(near) and len(near) > 20
  assert near_duplicates.count([[ngrams.words(t)] for t in texts]) == got


@needs_datasketch
def test_counts_of_few_or_equal_rows():
  words = ngrams.words(text(random.Random(5), 30))
  assert near_duplicates.count([]) == near_duplicates.count([[]]) == 0
  assert near_duplicates.count([[words]]) == near_duplicates.count([[[]], [[]]]) == 0
  assert near_duplicates.count([[words]] * 5000) == 5000
  assert near_duplicates.count([[['yes']]] * 3) == 0  # too short to compare


def test_without_datasketch_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"datasketch; pip install '.\[eval\]'"):
    near_duplicates.count([[['a']]])
