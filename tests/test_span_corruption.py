"""Span corruption: counts and spans by hand and by T5's own rules, the paper's example, sentinels;
spans are a function of seed, document and epoch.
"""

import dataclasses
import json

import numpy as np
import pytest
import t5_tokenizer

from ftjax.data import span_corruption
from ftjax.data.formats import Bad, Completion, Text
from ftjax.data.sides import Sides
from ftjax.data.sources import Spec
from ftjax.data.span_corruption import Corruption
from ftjax.data.token_cache import Source
from ftjax.runtime.errors import ConfigError, DataError

HOW = Corruption(0.15, 3.0, tuple(range(99, 59, -1)), 1, 0)


def test_lengths_by_hand():
  """Of 512 tokens 77 are noise (76.8), in 26 spans (25.67): 435 kept + 26 + EOS; 77 + 26 + EOS. T5
  reads 568 tokens for a source of 512: 85 noise, 28 spans, 512 and 114.
  """
  how = dataclasses.replace(HOW, sentinels=tuple(range(100)))
  source, target = span_corruption.lengths(np.array([512, 568, 10, 2]), how)
  assert source.tolist() == [462, 512, 10, 3] and target.tolist() == [104, 114, 4, 3]
  assert span_corruption.longest(how, 512, 114) == 568
  assert span_corruption.longest(how, 512, 113) < 568
  # 40 sentinels: 810 tokens have 122 of noise (121.5), in 41 spans.
  assert span_corruption.longest(HOW, 5000, 5000) == 809


def test_the_example_of_the_paper():
  """Thank you [for inviting] me to your party [last] week, with ids for words."""
  words = np.arange(10, 20, dtype=np.int32)  # Thank you for inviting me to your party last week
  is_noise = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
  source, target = span_corruption.apply(words, is_noise, HOW)
  assert source.tolist() == [10, 11, 99, 14, 15, 16, 17, 98, 19, 1]
  assert target.tolist() == [99, 12, 13, 98, 18, 1]


def test_divisions_by_hand():
  """The places of the smallest bits end the segments."""
  bits = np.array([9, 1, 5, 3], np.uint64)  # of 5 items, places between them
  assert span_corruption._segments(5, 3, bits).tolist() == [2, 2, 1]
  assert span_corruption._segments(5, 1, bits).tolist() == [5]
  assert span_corruption._segments(5, 5, bits).tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize('length', [2, 3, 7, 20, 100, 511])
def test_masks_are_spans_of_the_promised_number(length):
  """A document begins with what is kept, ends with noise, and can be put together again."""
  how = dataclasses.replace(HOW, sentinels=tuple(range(9000, 9100)))
  tokens = np.arange(100, 100 + length, dtype=np.int32)
  wanted = [int(n) for n in span_corruption.lengths(length, how)]
  for i in range(20):
    mask = span_corruption.noise_mask(length, how, 'doc', 0, i)
    assert not mask[0] and mask[-1] and len(mask) == length
    source, target = span_corruption.corrupt(tokens, how, 'doc', 0, i)
    assert [len(source), len(target)] == wanted and source[-1] == target[-1] == 1
    spans, whole = {}, []
    for token in target[:-1].tolist():
      if token >= 9000:
        spans[token] = []
      else:
        spans[max(spans)].append(token)
    for token in source[:-1].tolist():
      whole += spans[token] if token >= 9000 else [token]
    assert whole == tokens.tolist()
    assert list(spans) == list(range(9000, 9000 + len(spans)))


def test_the_share_of_noise_and_its_places_are_even():
  how = dataclasses.replace(HOW, sentinels=tuple(range(100)))
  masks = np.stack([span_corruption.noise_mask(200, how, 'x', 0, i) for i in range(600)])
  assert (masks.sum(1) == 30).all()
  middle = masks[:, 20:-20].mean(0)
  assert middle.min() > 0.1 and middle.max() < 0.2
  begins = (masks[:, 1:] & ~masks[:, :-1]).sum(1)
  assert (begins == 10).all()


def test_spans_follow_from_seed_document_and_epoch():
  def mask(seed=0, *names):
    return span_corruption.noise_mask(60, dataclasses.replace(HOW, seed=seed), *names).tolist()

  first = mask(0, 'doc', 0, 5)
  assert first == mask(0, 'doc', 0, 5)
  others = [mask(1, 'doc', 0, 5), mask(0, 'doc', 1, 5), mask(0, 'doc', 0, 6), mask(0, 'o', 0, 5)]
  assert first not in others


def test_documents_are_cut_into_pieces():
  tokenizer = t5_tokenizer.tokenizer()
  text = 'hello world ' * 20
  ids = tokenizer.encode(text)
  pieces, chat, short = span_corruption.encode(
    [Text(text), Completion('a', 'b'), Text(' ')], tokenizer, 12
  )
  assert np.concatenate([p.tokens for p in pieces]).tolist() == ids
  assert {len(p.tokens) for p in pieces[:-1]} == {12}
  assert isinstance(chat, Bad) and 'no document' in chat.reason
  assert isinstance(short, Bad) and 'at least 2' in short.reason


def test_sentinels_of_a_vocabulary():
  tokenizer = t5_tokenizer.tokenizer()
  found = span_corruption.sentinels(tokenizer)
  assert [tokenizer.token(i) for i in found] == [f'<extra_id_{k}>' for k in range(8)]
  assert found[0] == tokenizer.vocab_size - 1 and found[1] == found[0] - 1

  class MT5:
    def find(self, text):
      return {'\u2581<extra_id_0>': 9, '\u2581<extra_id_1>': 8}.get(text)

  assert span_corruption.sentinels(MT5()) == (9, 8)
  with pytest.raises(DataError, match=r'model\.add_special_tokens'):
    span_corruption.sentinels(t5_tokenizer.tokenizer(0))
  with pytest.raises(ConfigError, match='too short'):
    span_corruption.longest(HOW, 2, 2)


def test_rows_of_documents_differ_from_epoch_to_epoch(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps({'text': f'hello world {i} ' * 9}) + '\n' for i in range(6)))
  tokenizer = t5_tokenizer.tokenizer()
  how = Corruption(0.15, 3.0, span_corruption.sentinels(tokenizer), 1, 0)
  settings = dict(loss_on='assistant', on_overlength='error', shape='document', progress=False)
  most = span_corruption.longest(how, 32, 16)
  corpus = Source(
    Spec(str(path), None, None), tokenizer, tmp_path, seq_len=most, workers=1, **settings
  ).open()
  sides = Sides(32, 16, 0, how)
  assert sides.lengths(corpus).max() <= 16
  pairs = [[sides.pair(corpus, 0, epoch) for _ in 'ab'] for epoch in range(3)]
  for own in pairs:
    assert all((a == b).all() for a, b in zip(*own, strict=True))
  assert len({tuple(own[0][0].tolist()) for own in pairs}) == 3
  batch = sides.empty(2)
  sides.fill(batch, 0, corpus, [0], 0)
  assert batch['labels'][0, : len(pairs[0][0][1])].tolist() == pairs[0][0][1].tolist()
  with pytest.raises(ValueError, match=r'Sides\.fill'):
    sides.fill(batch, 1, corpus, [0, 1], 0)
