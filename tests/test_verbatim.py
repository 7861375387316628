"""Copied words against brute force; canaries and their exposure by hand."""

import math
import random

import pytest
from test_contamination import text

from ftjax.evaluation import ngrams, verbatim

NAN = float('nan')


def check(completion, *rows, prompt=None):
  training = [(f'f:{i}', [row]) for i, row in enumerate(rows, 1)]
  return verbatim.check([completion], training, [] if prompt is None else [prompt])[0]


def test_copied_words_and_their_longest_run():
  rng = random.Random(0)
  source, own = text(rng, 50).split(), text(rng, 20)
  copied = ' '.join(source[10:30])
  found = check(f'{own} {copied.upper()}!', text(rng, 90), ' '.join(source), copied)
  assert found == verbatim.Copied(40, 20, 20, 'f:2') and found.share == 0.5
  assert check(own, ' '.join(source)) == verbatim.Copied(20, 0)
  assert check(' '.join(source[:7]), ' '.join(source)).copied == 0  # too short a run
  # Two neighbouring runs from two rows are all copied, but neither row has both.
  both = check(' '.join(source[:30]), ' '.join(source[:20]), ' '.join(source[8:30]))
  assert (both.copied, both.longest, both.place) == (30, 22, 'f:2')


def test_what_the_prompt_has_is_not_copied_from_training():
  rng = random.Random(1)
  passage, rest = text(rng, 30), text(rng, 12)
  row = f'{passage} {rest}'
  assert check(passage, row).share == 1
  assert check(passage, row, prompt=f'Repeat: {passage}').share == 0
  assert 12 <= check(row, row, prompt=passage).copied <= 12 + 7
  with pytest.raises(ValueError, match='2 prompts for 1 completions'):
    verbatim.check(['a'], [], ['a', 'b'])


@pytest.mark.parametrize('chunk', [1, 60, 250_000])
def test_the_figures_are_those_of_brute_force(chunk, monkeypatch):
  monkeypatch.setattr(verbatim, '_CHUNK_WORDS', chunk)
  rng = random.Random(2)
  pool = [text(rng, rng.randrange(4, 30)) for _ in range(40)]

  def mixed():
    return ' '.join(p[rng.randrange(9) * 4 :] for p in rng.sample(pool, rng.randrange(4)))

  completions, rows = [mixed() for _ in range(40)], [mixed() for _ in range(40)]
  got = verbatim.check(completions, [(str(i), [r]) for i, r in enumerate(rows)])
  split = [ngrams.words(r) for r in rows]

  def occurs(run):
    return [i for i, w in enumerate(split) for j in range(len(w)) if w[j : j + len(run)] == run]

  for completion, found in zip(completions, got, strict=True):
    w = ngrams.words(completion)
    hits = [i for i in range(len(w) - 7) if occurs(w[i : i + 8])]
    assert found.copied == len({i + k for i in hits for k in range(8)})
    assert found.words == len(w)
    longest = max((n for n in range(8, len(w) + 1) for i in hits if i + n <= len(w)
                   and occurs(w[i : i + n])), default=0)  # fmt: skip
    assert found.longest == longest
    if longest:
      assert verbatim.longest_run(w, split[int(found.place)]) == longest
  assert sum(f.copied > 0 for f in got) > 5


def test_odd_completions():
  assert verbatim.check([], [('f:1', ['a b'])]) == []
  assert check('') == check('', 'a b c') == verbatim.Copied(0, 0)
  assert check('').share == 0
  question = '請問北京和上海之間的高速鐵路全長多少公里'
  assert check(f'答:{question}', f'他說{question}').copied == len(question)
  assert verbatim.longest_run([], ['a']) == 0
  assert verbatim.longest_run(['a', 'b', 'c', 'd'], ['x', 'b', 'c', 'y', 'b']) == 2


def test_canaries_come_back_exactly_or_not():
  texts = ['my pin is 4821', 'pin 4821 and 4821', '', 'pin is 482 1', 'PIN IS 4821']
  assert verbatim.returned(['4821', 'is 4821', '9999'], texts) == [3, 1, 0]
  assert verbatim.returned([], texts) == []
  with pytest.raises(ValueError, match='empty'):
    verbatim.returned(['a', ''], texts)


def test_exposure_by_hand():
  others = [-10.0, -20.0, -30.0, -40.0, -50.0, -60.0, -70.0]  # eight candidates: 3 bits
  assert verbatim.exposure(-1.0, others) == 3
  assert verbatim.exposure(-15.0, others) == 2  # second of eight
  assert verbatim.exposure(-35.0, others) == 1  # fourth
  assert verbatim.exposure(-99.0, others) == 0
  assert verbatim.exposure(-math.inf, others) == 0
  assert verbatim.exposure(-5.0, [-5.0] * 7) == pytest.approx(math.log2(8 / 4.5))
  for secret, given in ((-1.0, []), (NAN, others), (-1.0, [*others, NAN])):
    with pytest.raises(ValueError, match='alternative'):
      verbatim.exposure(secret, given)


def test_exposure_of_a_random_secret_is_small():
  """Without memory the rank is uniform: P(exposure >= b) = 2^-b, and the mean is 1 / ln 2."""
  rng = random.Random(3)
  got = []
  for _ in range(4000):
    draws = [rng.random() for _ in range(64)]
    got.append(verbatim.exposure(draws[0], draws[1:]))
  assert sum(g >= 3 for g in got) / len(got) == pytest.approx(1 / 8, abs=0.02)
  assert sum(got) / len(got) == pytest.approx(1 / math.log(2), abs=0.08)
