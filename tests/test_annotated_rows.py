"""Texts with labels, and words with tags: read, tokenized as the library does it, cut, refused."""

import json

import numpy as np
import pytest
import tiny_words
import tokenizers
from tokenizers import models, pre_tokenizers

from ftjax.data import (
  annotated_examples,
  annotated_rows,
  batches,
  class_balance,
  packing,
  token_cache,
)
from ftjax.data.annotated_rows import Annotation, LabeledText, TaggedWords
from ftjax.data.formats import Bad
from ftjax.data.order import Mixture, SourceSchedule
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

NAMES = ('negative', 'neutral', 'positive')
SINGLE, MULTI = Annotation('single', NAMES), Annotation('multi', NAMES)


def as_ours(library: tokenizers.Tokenizer) -> Tokenizer:
  return Tokenizer(tiny_words.files(library))


LIBRARY = tiny_words.word_pieces()
TOKENIZER = as_ours(LIBRARY)


# Rows


@pytest.mark.parametrize(
  ('row', 'annotation', 'wanted'),
  [
    ({'text': 'x', 'label': 'positive'}, SINGLE, (('x',), (2.0,))),
    ({'sentence': 'x', 'label': 1}, SINGLE, (('x',), (1.0,))),
    ({'text': 'x', 'label': '0'}, SINGLE, (('x',), (0.0,))),
    ({'text': 'x', 'label': 2.0}, SINGLE, (('x',), (2.0,))),
    ({'text': 'x', 'label': True}, Annotation('single', ('false', 'true')), (('x',), (1.0,))),
    ({'premise': 'x', 'hypothesis': 'y', 'label': 0}, SINGLE, (('x', 'y'), (0.0,))),
    ({'text': 'x', 'labels': ['positive', 'negative']}, MULTI, (('x',), (0.0, 2.0))),
    ({'text': 'x', 'labels': []}, MULTI, (('x',), ())),
    ({'text': 'x', 'labels': [1, 0, 1]}, MULTI, (('x',), (0.0, 2.0))),
    ({'text': 'x', 'labels': '["neutral"]'}, MULTI, (('x',), (1.0,))),
    ({'query': 'x', 'passage': 'y', 'score': '0.5'}, Annotation('binary'), (('x', 'y'), (0.5,))),
    ({'text': 'x', 'label': -3.5}, Annotation('regression'), (('x',), (-3.5,))),
  ],
)
def test_labels_of_texts(row, annotation, wanted):
  assert annotated_rows.parse(row, 'class', annotation) == LabeledText(*wanted)


@pytest.mark.parametrize(
  ('row', 'annotation', 'message'),
  [
    ({'text': 'x', 'label': 'good'}, SINGLE, r"'label' is 'good'; expected one of"),
    ({'text': 'x', 'label': 3}, SINGLE, "'label' is 3; expected one of"),
    ({'text': 'x', 'label': -1}, SINGLE, "'label' is -1"),
    ({'text': 'x', 'label': [1]}, SINGLE, "objective='multi'"),
    ({'text': 'x', 'label': 1}, MULTI, 'expected a list of labels'),
    ({'text': 'x'}, SINGLE, 'expected a column label, labels or score'),
    ({'text': 'x', 'label': 1, 'score': 1}, SINGLE, 'keep one of them'),
    ({'label': 1}, SINGLE, 'expected a column text, sentence'),
    ({'text': 'x', 'review': 'y', 'label': 1}, SINGLE, 'keep one of them'),
    ({'text': ' ', 'label': 1}, SINGLE, "'text' is empty"),
    ({'text': 'x', 'label': float('nan')}, Annotation('regression'), 'finite number'),
    ({'text': 'x', 'label': 1.5}, Annotation('binary'), 'from 0 to 1'),
  ],
)
def test_rows_without_a_usable_label_are_refused(row, annotation, message):
  with pytest.raises(ValueError, match=message):
    annotated_rows.parse(row, 'class', annotation)


TAGS = Annotation('tags', ('O', 'B-LOC', 'I-LOC'))


def test_tags_of_words():
  row = {'tokens': ['in', 'new', 'york'], 'ner_tags': [0, 'B-LOC', 2]}
  assert annotated_rows.parse(row, 'tags', TAGS) == TaggedWords(('in', 'new', 'york'), (0, 1, 2))
  plain = {'text': 'in new york', 'tags': [0, 1, 2]}
  assert annotated_rows.parse(plain, 'tags', TAGS).words == ('in', 'new', 'york')
  for wrong, message in (
    ({'tokens': ['a'], 'tags': [0, 0]}, '1 words and 2 tags'),
    ({'tokens': [], 'tags': []}, 'empty'),
    ({'tokens': ['a', ''], 'tags': [0, 0]}, r"tokens\[1\] is ''"),
    ({'tokens': ['a'], 'tags': ['B-PER']}, r"tags\[0\]' is 'B-PER'; expected one of"),
    ({'tokens': 'a', 'tags': [0]}, 'expected a list'),
  ):
    with pytest.raises(ValueError, match=message):
      annotated_rows.parse(wrong, 'tags', TAGS)


@pytest.mark.parametrize(
  ('rows', 'wanted'),
  [
    ([{'label': 'b'}, {'label': 'a'}, {'label': 'b'}], ('a', 'b')),
    ([{'label': 2}, {'label': '0'}], ('0', '1', '2')),
    ([{'label': True}, {'label': False}], ('false', 'true')),
    ([{'labels': ['x', 'y']}, {'labels': ['z']}, {'text': 'no label'}], ('x', 'y', 'z')),
  ],
)
def test_the_names_of_labels_are_those_of_the_rows(rows, wanted):
  assert annotated_rows.names_of(rows, 'class') == wanted


def test_names_and_numbers_together_are_refused():
  with pytest.raises(ValueError, match='numbers, such as 1, and texts'):
    annotated_rows.names_of([{'label': 1}, {'label': 'one'}], 'class')


def test_other_columns_are_reported():
  row = {'text': 'x', 'label': 1, 'weight': 2, 'author': 'me', 'empty': None}
  assert annotated_rows.unread(row, 'class') == {'author'}
  assert annotated_rows.unread({'tokens': ['x'], 'tags': [0], 'lang': 'en'}, 'tags') == {'lang'}


# Tokens


def encoded(row, annotation=SINGLE, tokenizer=TOKENIZER):
  ((one,),) = annotated_examples.encode([row], tokenizer, annotation)
  return one


@pytest.mark.parametrize('texts', [('a good film',), ('a good film', 'a longer play')])
def test_tokens_and_types_are_the_librarys(texts):
  wanted = LIBRARY.encode(*texts)
  found = encoded(LabeledText(texts, (2.0,)))
  assert found.tokens.tolist() == wanted.ids
  types = np.arange(len(wanted.ids)) >= (found.boundary or len(wanted.ids))
  assert types.astype(int).tolist() == wanted.type_ids
  assert found.labels.tolist() == [2] + [-1] * (len(wanted.ids) - 1)


@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('sizes', [(9, 0), (5, 5), (2, 8), (8, 2), (7, 6), (1, 12)])
def test_a_long_text_is_cut_as_the_library_cuts_it(sizes, side):
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(tiny_words.WORDS[:6], n)) for n in sizes if n]
  for limit in range(4, 16):
    library = tiny_words.word_pieces()
    library.enable_truncation(limit, strategy='longest_first', direction=side)
    wanted = library.encode(*texts)
    example = encoded(LabeledText(tuple(texts), (1.0,)))
    found = annotated_examples.fit(example, limit, f'truncate_{side}', 'class')
    assert found.tokens.tolist() == wanted.ids, limit
    boundary = found.boundary or len(wanted.ids)
    assert (np.arange(len(wanted.ids)) >= boundary).astype(int).tolist() == wanted.type_ids
    assert found.labels.tolist() == [1] + [-1] * (len(wanted.ids) - 1)


def test_the_other_policies_for_long_texts():
  example = encoded(LabeledText(('a good film and a long play',), (0.0,)))
  assert annotated_examples.fit(example, 5, 'drop', 'class') is None
  assert annotated_examples.fit(example, 9, 'error', 'class') is example
  with pytest.raises(ValueError, match='9 tokens, more than seq_len=8'):
    annotated_examples.fit(example, 8, 'error', 'class')
  with pytest.raises(ValueError, match='no room'):
    annotated_examples.fit(example, 2, 'truncate_right', 'class')


def test_several_labels_need_as_many_tokens():
  many = Annotation('multi', tuple(f'l{i}' for i in range(8)))
  found = encoded(LabeledText(('a good film',), (0.0, 3.0, 7.0)), many)
  assert found.labels.tolist() == [0, 3, 7, -1, -1]
  (bad,) = annotated_examples.encode(
    [LabeledText(('a',), tuple(map(float, range(8))))], TOKENIZER, many
  )
  assert isinstance(bad, Bad) and '8 labels of a text of 3 tokens' in bad.reason


def test_the_first_sub_word_has_the_tag_of_its_word():
  row = TaggedWords(('longer', 'film', 'in', 'new', 'york', '.'), (0, 0, 0, 1, 2, 0))
  found = encoded(row, TAGS)
  # [CLS] long ##er film in new york . [SEP]
  assert found.labels.tolist() == [-1, 0, -1, 0, 0, 1, 2, 0, -1]
  words = LIBRARY.encode(list(row.words), is_pretokenized=True)
  assert found.tokens.tolist() == words.ids
  cut = annotated_examples.fit(found, 7, 'truncate_right', 'tags')
  assert cut.labels.tolist() == [-1, 0, -1, 0, 0, 1, -1]


def test_all_sub_words_go_on_inside_the_entity():
  names = ('O', 'B-LOC', 'I-LOC')
  row = TaggedWords(('longer', 'playing'), (1, 0))
  assert encoded(row, Annotation('tags', names, True)).labels.tolist() == [-1, 1, 2, 0, 0, -1]


def test_a_word_without_a_token_does_not_lose_its_tag_in_silence():
  row = TaggedWords(('new', '\u200b'), (1, 2))
  (bad,) = annotated_examples.encode([row], TOKENIZER, TAGS)
  assert isinstance(bad, Bad) and "word 1, '\\u200b', has no token" in bad.reason


def test_byte_level_tokens_begin_with_the_space_before_a_word():
  letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), '\u0120y']
  vocab = {c: i for i, c in enumerate(letters)}
  row = TaggedWords(('in', 'york'), (0, 1))
  for merges, wanted in (
    ([('\u0120', 'y')], [0, -1, 1, -1, -1, -1]),  # i n _y o r k
    ([], [0, -1, -1, 1, -1, -1, -1]),  # i n _ y o r k
  ):
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert encoded(row, TAGS, as_ours(library)).labels.tolist() == wanted


# Batches


def corpus(tmp_path, rows, shape='class', annotation=SINGLE, **changes):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  settings = dict(seq_len=16, loss_on='assistant', on_overlength='error', progress=False) | changes
  return token_cache.build_or_open(
    Spec(str(path), None, None),
    TOKENIZER,
    cache_dir=tmp_path / 'cache',
    shape=shape,
    annotation=annotation,
    **settings,
  )


def test_a_batch_of_texts_with_a_label(tmp_path):
  rows = [
    {'text': 'a good film', 'label': 'positive', 'weight': 2},
    {'sentence1': 'bad', 'sentence2': 'a long film', 'label': 'negative'},
    {'text': 'runs', 'label': 'neutral'},
  ]
  found = corpus(tmp_path, rows)
  documents = {'targets': (4, 1), 'document_weights': (4,)}
  (batch,) = batches.eval_batches(found, 1, 16, packed=True, documents=documents)
  assert batch['segments'][0].tolist() == [1] * 5 + [2] * 7 + [3] * 3 + [0]
  assert batch['targets'][0, :, 0].tolist() == [2, 0, 1, 0]
  assert batch['document_weights'][0].tolist() == [1, 1, 1, 0]
  assert batch['token_types'][0].tolist() == [0] * 5 + [0, 0, 0, 1, 1, 1, 1] + [0] * 4
  assert not batch['weights'].any() and not batch['labels'].any()
  schedule = SourceSchedule(found.lengths, 16, fingerprint='x', seed=0, packed=True, most=2)
  stream = batches.Stream(Mixture([schedule], [None]), [found], 16, 2, documents)
  trained = stream.batch(0)
  weights = dict(zip(trained['targets'].ravel(), trained['document_weights'].ravel(), strict=True))
  assert weights[2] == 2 and sorted(trained['document_weights'].ravel()) == [0] * 5 + [1, 1, 2]


def test_a_batch_of_texts_with_several_labels(tmp_path):
  rows = [{'text': 'a film', 'labels': ['positive', 'neutral']}, {'text': 'a film', 'labels': []}]
  found = corpus(tmp_path, rows, annotation=MULTI)
  documents = {'targets': (2, 3), 'document_weights': (2,)}
  (batch,) = batches.eval_batches(found, 1, 16, packed=True, documents=documents)
  assert batch['targets'][0].tolist() == [[0, 1, 1], [0, 0, 0]]


def test_a_batch_of_tags(tmp_path):
  rows = [{'tokens': ['in', 'york'], 'tags': ['O', 'B-LOC'], 'weight': 3}]
  found = corpus(tmp_path, rows, 'tags', TAGS)
  (batch,) = batches.eval_batches(found, 1, 16, packed=True)
  assert batch['labels'][0, :4].tolist() == [0, 0, 1, 0]
  assert batch['weights'][0, :4].tolist() == [0, 1, 1, 0]
  schedule = SourceSchedule(found.lengths, 16, fingerprint='x', seed=0, packed=True)
  trained = batches.Stream(Mixture([schedule], [None]), [found], 16, 1).batch(0)
  assert trained['weights'][0, :4].tolist() == [0, 3, 3, 0]


def test_bad_rows_are_named_by_file_and_line(tmp_path):
  rows = [{'text': 'a film', 'label': 'positive'}, {'text': 'a film', 'label': 'great'}]
  with pytest.raises(DataError, match=r"rows.jsonl:2.*|'great'"):
    corpus(tmp_path, rows)
  kept = corpus(tmp_path, rows, on_bad_row='drop')
  assert len(kept) == 1 and kept.counts.bad == 1


def test_rows_hold_no_more_texts_than_they_have_arrays_for():
  counts = np.bincount(np.random.default_rng(1).integers(1, 9, 200), minlength=33)
  for most in (1, 2, 3, 7):
    groups = packing.pack_lengths(counts, 32, most)
    assert max(len(held) for _, held in groups) <= most
    total = np.zeros(33, int)
    for rows, held in groups:
      np.add.at(total, list(held), rows)
      assert sum(held) <= 32
    assert (total == counts).all()
  assert packing.pack_lengths(counts, 32, 1000) == packing.pack_lengths(counts, 32)


def test_the_balance_of_labels_is_by_the_label_and_not_by_the_text(tmp_path):
  rows = [{'text': 'a film', 'label': 'positive'}] * 3 + [{'text': 'a play', 'label': 'negative'}]
  found = corpus(tmp_path, rows)
  class_balance.weigh(found, 'equal')
  np.testing.assert_allclose(found.weights, [2 / 3, 2 / 3, 2 / 3, 2])
  several = [
    {'text': 'a film', 'labels': ['neutral', 'positive']},
    {'text': 'a play', 'labels': []},
  ]
  found = corpus(tmp_path, several * 2, annotation=MULTI)
  class_balance.weigh(found, 'sqrt')
  np.testing.assert_allclose(found.weights, np.ones(4))
