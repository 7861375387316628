"""Rows of texts that are to have vectors: parsed, tokenized, cut, refused, and put into batches."""

import json

import numpy as np
import pytest
import tiny_words

from ftjax.data import batches, embedding_examples, embedding_rows, token_cache
from ftjax.data.annotated_rows import Annotation
from ftjax.data.embedding_rows import TextGroup
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

LIBRARY = tiny_words.word_pieces()
TOKENIZER = Tokenizer(tiny_words.files(LIBRARY))
CONTRASTIVE = Annotation('contrastive', negatives=2)
COSINE = Annotation('cosine')


@pytest.mark.parametrize(
  ('row', 'annotation', 'wanted'),
  [
    ({'anchor': 'x', 'positive': 'y'}, CONTRASTIVE, (('x', 'y'),)),
    ({'query': 'x', 'passage': 'y', 'negative': 'z'}, CONTRASTIVE, (('x', 'y', 'z'),)),
    (
      {'anchor': 'x', 'positive': 'y', 'negative_2': 'w', 'negative_1': 'z'},
      CONTRASTIVE,
      (('x', 'y', 'z', 'w'),),
    ),
    (
      {'query': 'x', 'positive': 'y', 'negatives': ['z', 'w']},
      CONTRASTIVE,
      (('x', 'y', 'z', 'w'),),
    ),
    ({'question': 'x', 'answer': 'y', 'negative': '["z"]'}, CONTRASTIVE, (('x', 'y', 'z'),)),
    ({'sentence1': 'x', 'sentence2': 'y', 'score': 0.5}, COSINE, (('x', 'y'), 0.5)),
    ({'text': 'x', 'text_pair': 'y', 'label': '-1'}, COSINE, (('x', 'y'), -1.0)),
  ],
)
def test_columns_of_texts(row, annotation, wanted):
  assert embedding_rows.parse(row, annotation) == TextGroup(*wanted)


@pytest.mark.parametrize(
  ('row', 'annotation', 'message'),
  [
    ({'text': 'x'}, CONTRASTIVE, 'no two texts'),
    ({'anchor': 'x', 'positive': ' '}, CONTRASTIVE, "'positive' is empty"),
    ({'anchor': 'x', 'positive': 3}, CONTRASTIVE, 'expected a string'),
    ({'anchor': 'x', 'positive': 'y', 'query': 'z', 'passage': 'w'}, CONTRASTIVE, 'several pairs'),
    ({'anchor': 'x', 'positive': 'y', 'negatives': ['a', 'b', 'c']}, CONTRASTIVE, '3 negatives'),
    ({'anchor': 'x', 'positive': 'y', 'negatives': ['a', '']}, CONTRASTIVE, r'negatives\[1\]'),
    ({'anchor': 'x', 'positive': 'y', 'negative': 'y'}, CONTRASTIVE, 'same text as the positive'),
    ({'anchor': 'x', 'positive': 'y', 'label': 0}, CONTRASTIVE, 'one of near texts'),
    (
      {'anchor': 'x', 'positive': 'y'},
      Annotation('margin', negatives=1, needs_negative=True),
      'no negative',
    ),
    ({'sentence1': 'x', 'sentence2': 'y'}, COSINE, 'no score'),
    ({'sentence1': 'x', 'sentence2': 'y', 'score': 4.2}, COSINE, 'from -1 to 1'),
    ({'sentence1': 'x', 'sentence2': 'y', 'score': 'high'}, COSINE, 'from -1 to 1'),
    ({'sentence1': 'x', 'sentence2': 'y', 'score': 1, 'label': 1}, COSINE, 'several scores'),
  ],
)
def test_rows_that_cannot_be_used(row, annotation, message):
  with pytest.raises(ValueError, match=message):
    embedding_rows.parse(row, annotation)


def test_other_columns_are_reported():
  row = {'anchor': 'x', 'positive': 'y', 'negative_1': 'z', 'weight': 2, 'lang': 'en', 'id': 1}
  assert embedding_rows.unread(row, CONTRASTIVE) == {'lang'}
  row = {'sentence1': 'x', 'sentence2': 'y', 'score': 1, 'genre': 'news'}
  assert embedding_rows.unread(row, COSINE) == {'genre'}


def encoded(*texts):
  ((one,),) = embedding_examples.encode([TextGroup(texts)], TOKENIZER)
  return one


def test_each_text_has_the_tokens_of_a_text_alone():
  texts = ('a good film', 'a long play .', 'in new york')
  found = encoded(*texts)
  for number, text in enumerate(texts):
    assert found.tokens[found.labels == number].tolist() == LIBRARY.encode(text).ids
  assert not found.supervised[np.isin(found.tokens, (2, 3))].any()


@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize(
  ('sizes', 'limit', 'wanted'),
  [
    ((5, 5), 14, (5, 5)),
    ((8, 2), 12, (6, 2)),
    ((8, 7, 1), 13, (3, 3, 1)),
    ((4, 4, 4), 16, (3, 3, 4)),
  ],
)
def test_the_longest_texts_lose_tokens(sizes, limit, wanted, side):
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(tiny_words.WORDS[:6], n)) for n in sizes]
  found = embedding_examples.fit(encoded(*texts), limit, f'truncate_{side}')
  for number, (text, count) in enumerate(zip(texts, wanted, strict=True)):
    library = tiny_words.word_pieces()
    library.enable_truncation(count + 2, direction=side)
    assert found.tokens[found.labels == number].tolist() == library.encode(text).ids


def test_the_other_policies_for_long_texts():
  example = encoded('a good film', 'a long play')
  assert embedding_examples.fit(example, 10, 'error') is example
  assert embedding_examples.fit(example, 9, 'drop') is None
  with pytest.raises(ValueError, match='2 texts of 10 tokens together, more than seq_len=9'):
    embedding_examples.fit(example, 9, 'error')
  with pytest.raises(ValueError, match='no room'):
    embedding_examples.fit(example, 5, 'truncate_right')


def corpus(tmp_path, rows, annotation):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return token_cache.build_or_open(
    Spec(str(path), None, None),
    TOKENIZER,
    cache_dir=tmp_path / 'cache',
    shape='texts',
    annotation=annotation,
    seq_len=24,
    loss_on='assistant',
    on_overlength='error',
    progress=False,
  )


def test_a_batch_of_groups(tmp_path):
  rows = [
    {'anchor': 'a film', 'positive': 'film', 'negative': 'play', 'weight': 3},
    {'anchor': 'bad', 'positive': 'a film'},
  ]
  found = corpus(tmp_path, rows, Annotation('contrastive', negatives=1))
  documents = {'text_ids': (3, 6), 'document_weights': (3,)}
  (batch,) = batches.eval_batches(found, 1, 24, packed=True, documents=documents)
  segments = [1] * 4 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 4 + [0] * 7
  assert batch['segments'][0].tolist() == segments
  positions = [*range(4), *range(3), *range(3), *range(3), *range(4), *[0] * 7]
  assert batch['positions'][0].tolist() == positions
  assert batch['tokens'][0, :4].tolist() == LIBRARY.encode('a film').ids
  assert not batch['weights'].any() and batch['row_numbers'].tolist() == [0]
  assert batch['document_weights'][0].tolist() == [1, 1, 0]  # weights are of training alone
  ids = batch['text_ids'][0].reshape(3, 3, 2)
  assert (ids[0, 0] == ids[1, 1]).all()  # 'a film'
  different = {tuple(i) for i in (ids[0, 0], ids[0, 1], ids[0, 2], ids[1, 0])}
  assert len(different) == 4 and not ids[1, 2].any() and not ids[2].any()
  assert (batch['text_ids'] < 2**24).all()


def test_a_batch_of_scored_pairs(tmp_path):
  rows = [{'sentence1': 'a film', 'sentence2': 'film', 'score': 0.25}]
  found = corpus(tmp_path, rows, COSINE)
  documents = {'targets': (2,), 'document_weights': (2,)}
  (batch,) = batches.eval_batches(found, 1, 24, packed=True, documents=documents)
  assert batch['targets'][0].tolist() == [0.25, 0] and batch['segments'][0].max() == 2


def test_bad_rows_are_named_by_file_and_line(tmp_path):
  rows = [{'anchor': 'a film', 'positive': 'film'}, {'anchor': 'a film'}]
  with pytest.raises(DataError, match=r'rows\.jsonl:2'):
    corpus(tmp_path, rows, CONTRASTIVE)
