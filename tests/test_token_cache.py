"""The tokenized cache: same content in and out, keyed by all that matters, whole or absent."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import time

import numpy as np
import pytest
from tiny_tokenizer import CHATML, tiny_files

from ftjax.data import blocks, corpus_builder, encode, formats, token_cache
from ftjax.data.corpus_builder import DTYPES
from ftjax.data.row_counts import Counts
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError


def ask(question, answer):
  return {
    'messages': [
      {'role': 'user', 'content': question},
      {'role': 'assistant', 'content': answer},
    ]
  }


def chat_rows(n, words=3):
  return [ask(f'q{i}', f'answer {i} ' * words) for i in range(n)]


def write(path, rows):
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return Spec(str(path))


def build(tmp_path, spec, *, tokenizer=None, **changes):
  settings = {'seq_len': 64, 'loss_on': 'assistant', 'on_overlength': 'error', 'progress': False}
  return token_cache.build_or_open(
    spec, tokenizer or Tokenizer(tiny_files()), cache_dir=tmp_path / 'cache', **(settings | changes)
  )


def folders(tmp_path):
  return sorted(p.name for p in (tmp_path / 'cache').iterdir())


def test_content_survives(tmp_path):
  rows = chat_rows(1100)  # more than one chunk
  t = Tokenizer(tiny_files())
  corpus = build(tmp_path, write(tmp_path / 'a.jsonl', rows))
  assert len(corpus) == corpus.counts.rows == corpus.counts.examples == 1100
  parsed = [formats.parse(r, 'messages', True) for r in rows]
  for i, (want,) in enumerate(encode.encode(parsed, t, 'assistant')):
    tokens, supervised = corpus.example(i)
    assert tokens.tolist() == want.tokens.tolist()
    assert supervised.tolist() == want.supervised.tolist()
    assert corpus.lengths[i] == len(tokens)
    assert corpus.where(i) == f'{tmp_path}/a.jsonl:{i + 1}'
  assert corpus.tokens == corpus.counts.tokens == corpus.lengths.sum()
  assert corpus.supervised == corpus.counts.supervised == sum(
    int(corpus.example(i)[1].sum()) for i in range(1100)
  )  # fmt: skip


def test_second_open_reads_no_row(tmp_path, monkeypatch):
  spec = write(tmp_path / 'a.jsonl', chat_rows(5))
  first = build(tmp_path, spec)
  monkeypatch.setattr(corpus_builder.sources, 'scan', None)
  again = build(tmp_path, spec)
  assert again.fingerprint == first.fingerprint and again.counts == first.counts


def test_moved_file_keeps_its_cache_and_names_its_new_place(tmp_path):
  write(tmp_path / 'a.jsonl', chat_rows(5))
  build(tmp_path, Spec(str(tmp_path / 'a.jsonl')))
  (tmp_path / 'a.jsonl').rename(tmp_path / 'b.jsonl')
  moved = build(tmp_path, Spec(str(tmp_path / 'b.jsonl')))
  assert len(folders(tmp_path)) == 1 and moved.where(4).endswith('b.jsonl:5')


def test_key_depends_on_all_settings(tmp_path, monkeypatch):
  spec = write(tmp_path / 'a.jsonl', chat_rows(5))
  build(tmp_path, spec)
  build(tmp_path, Spec(spec.path, None, 3.0))  # a weight changes no token
  assert len(folders(tmp_path)) == 1
  build(tmp_path, spec, seq_len=65)
  build(tmp_path, spec, loss_on='completion')
  build(tmp_path, spec, on_overlength='drop')
  build(tmp_path, Spec(spec.path, 'messages'))
  build(tmp_path, spec, tokenizer=Tokenizer(tiny_files('{{ bos_token }}' + CHATML)))
  build(tmp_path, spec, tokenizer=Tokenizer(tiny_files(vocab_size=300)))
  monkeypatch.setattr(token_cache, 'SCHEMA', token_cache.SCHEMA + 1)
  build(tmp_path, spec)
  build(tmp_path, write(tmp_path / 'a.jsonl', chat_rows(6)))
  assert len(folders(tmp_path)) == 9


def test_a_change_of_what_a_cache_holds_raises_the_schema():
  """Caches outlive a version of ftjax: one with other counts or arrays would not be read."""
  parts = [*(f.name for f in dataclasses.fields(Counts)), *DTYPES.items()]
  held = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
  assert (token_cache.SCHEMA, held) == (7, '76b78eb7'), 'raise SCHEMA, then put both here'


def test_fingerprint_is_of_what_is_trained_on(tmp_path):
  spec = write(tmp_path / 'a.jsonl', chat_rows(5))
  one = build(tmp_path, spec)
  assert build(tmp_path, spec, seq_len=65).fingerprint == one.fingerprint
  assert build(tmp_path, spec, loss_on='all').fingerprint != one.fingerprint
  swapped = write(tmp_path / 'b.jsonl', chat_rows(5)[::-1])
  assert build(tmp_path, swapped).fingerprint != one.fingerprint


def test_bad_rows_are_listed_and_nothing_stays(tmp_path):
  rows = [*chat_rows(3), {'messages': []}, {'text': 'x'}, *chat_rows(1)]
  spec = write(tmp_path / 'a.jsonl', rows)
  with open(spec.path, 'a') as file:
    file.write('{"messages": \n')
  with pytest.raises(DataError) as caught:
    build(tmp_path, spec)
  text = str(caught.value)
  assert 'a.jsonl:4: the list of messages is empty' in text
  assert "a.jsonl:5: 'messages' is NoneType" in text and 'a.jsonl:7: not JSON' in text
  assert caught.value.exit_code == 3 and folders(tmp_path) == []


BAD = ({'messages': []}, {'text': 7}, {'messages': [{'role': 'bot', 'content': 'x'}]})


@pytest.mark.parametrize('row', BAD)
def test_the_same_reason_is_listed_once_with_its_count(tmp_path, row):
  spec = write(tmp_path / 'a.jsonl', chat_rows(1) + [row] * 50)
  with pytest.raises(DataError, match='50 of 51 rows read') as caught:
    build(tmp_path, spec)
  first, *others = str(caught.value).splitlines()
  assert 'data.on_bad_row' in first and len(others) == 1
  assert 'a.jsonl:2: ' in others[0] and '(50 rows, also lines 3, 4, ...)' in others[0]


def test_reasons_that_differ_in_numbers_only_are_one(tmp_path):
  spec = write(tmp_path / 'a.jsonl', chat_rows(1) + chat_rows(9, words=40))
  with pytest.raises(
    DataError, match=r'a\.jsonl:2: \d+ tokens.*\(9 rows, also lines 3, 4'
  ) as caught:
    build(tmp_path, spec)
  assert len(str(caught.value).splitlines()) == 2


def test_at_most_twenty_reasons_are_listed(tmp_path):
  rows = [{'messages': [{'role': 'r' * n, 'content': 'x'}]} for n in range(1, 150)]
  spec = write(tmp_path / 'a.jsonl', chat_rows(1) + rows)
  with pytest.raises(DataError, match='149 of 150 rows') as caught:
    build(tmp_path, spec)
  assert str(caught.value).count('a.jsonl:') == 1 + 20
  assert '129 rows, are not listed' in str(caught.value)


@pytest.mark.parametrize('row', BAD)
def test_bad_rows_may_be_dropped_and_are_counted(tmp_path, row):
  rows = chat_rows(6)
  spec = write(tmp_path / 'a.jsonl', [*rows[:3], row, *rows[3:], row])
  with open(spec.path, 'a') as file:
    file.write('{"messages": \n')
  corpus = build(tmp_path, spec, on_bad_row='drop')
  assert (corpus.counts.rows, corpus.counts.examples, corpus.counts.bad) == (9, 6, 3)
  assert [e['rows'] for e in corpus.counts.bad_reasons] == [2, 1]
  (note,) = corpus.notes()
  assert '3 of 9 rows left out' in note and 'a.jsonl:4: ' in note and 'a.jsonl:9: not JSON' in note
  clean = build(tmp_path, write(tmp_path / 'b.jsonl', rows))
  assert corpus.fingerprint == clean.fingerprint and clean.notes() == []
  with pytest.raises(DataError, match='3 of 9 rows read'):  # the other policy's cache is its own
    build(tmp_path, spec)


def test_all_rows_bad_is_an_error_whatever_the_policy(tmp_path):
  spec = write(tmp_path / 'a.jsonl', list(BAD))
  with pytest.raises(DataError, match=r'none of the 3 rows read can be used:\n.*a\.jsonl:1: '):
    build(tmp_path, spec, on_bad_row='drop')


def test_dropping_bad_rows_leaves_long_ones_to_their_own_policy(tmp_path):
  spec = write(tmp_path / 'a.jsonl', [*chat_rows(2), BAD[0], *chat_rows(1, words=40)])
  with pytest.raises(DataError, match=r'a\.jsonl:4: \d+ tokens, more than seq_len=64') as caught:
    build(tmp_path, spec, on_bad_row='drop')
  assert 'a.jsonl:3' not in str(caught.value)


def pair(chosen, rejected):
  return {'prompt': 'hello', 'chosen': chosen, 'rejected': rejected}


@pytest.mark.parametrize(
  'row, on_overlength',
  [
    (pair('yes', 'yes'), 'error'),
    (pair('yes' + ' a' * 60, 'yes' + ' a' * 60 + ' b'), 'truncate_right'),
    (pair('1 + 1', '1 + 1'), 'drop'),
  ],
)
def test_pairs_with_equal_sides_are_left_out_and_counted(tmp_path, row, on_overlength):
  spec = write(tmp_path / 'a.jsonl', [pair('yes', 'no'), row])
  corpus = build(tmp_path, spec, shape='pair', on_overlength=on_overlength)
  assert (len(corpus), corpus.counts.identical) == (1, 1)
  assert any('1 pairs left out' in note for note in corpus.notes())
  alone = write(tmp_path / 'b.jsonl', [row])
  with pytest.raises(
    DataError, match='1 pairs whose chosen and rejected sides have the same tokens'
  ):
    build(tmp_path, alone, shape='pair', on_overlength=on_overlength)


def _unrendered(monkeypatch):
  """Rows whose text has an exclamation mark have content that is not rendered."""
  plain = encode.encode

  def marked(rows, *rest):
    for row, found in zip(rows, plain(rows, *rest), strict=True):
      places = ('messages[1].reasoning',) if '!' in row.messages[1]['content'] else ()
      yield [dataclasses.replace(e, unrendered=places) for e in found]

  monkeypatch.setattr(encode, 'encode', marked)
  reason = lambda places, _: f'not rendered: {places[0]}'  # noqa: E731
  monkeypatch.setattr(encode, 'unrendered_reason', reason, raising=False)


def test_content_that_is_not_rendered_is_an_error_or_counted(tmp_path, monkeypatch):
  _unrendered(monkeypatch)
  spec = write(tmp_path / 'a.jsonl', [ask('a', 'b'), ask('c', 'd!'), ask('e', 'f!')])
  with pytest.raises(DataError, match=r'2 of 3 rows(.|\n)*a\.jsonl:2: not rendered: messages'):
    build(tmp_path, spec, on_bad_row='drop')
  corpus = build(tmp_path, spec, on_unrendered='warn')
  assert (len(corpus), corpus.counts.unrendered) == (3, 2)
  (note,) = corpus.notes()
  assert '2 of 3 rows' in note and 'a.jsonl:2: messages[1].reasoning (2 rows, also line 3)' in note


def test_columns_that_no_reader_knows_are_listed_with_counts(tmp_path):
  rows = [ask('a', 'b') | {'id': 1, 'source': 'x'}, ask('c', 'd') | {'id': 2, 'source': None}]
  found = build(tmp_path, write(tmp_path / 'a.jsonl', rows)).counts.unread_columns
  assert {e['reason']: e['rows'] for e in found} == {'id': 2, 'source': 1}


@pytest.mark.parametrize('turns, is_reported', [(2, False), (40, True)])
def test_a_row_that_becomes_many_examples_is_reported(tmp_path, turns, is_reported):
  from test_encode import THINK

  turn = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  spec = write(tmp_path / 'a.jsonl', [{'messages': turn}, {'messages': turn * turns}])
  tokenizer = Tokenizer(tiny_files(THINK))
  corpus = build(tmp_path, spec, tokenizer=tokenizer, seq_len=4000)
  assert len(corpus) == 1 + turns
  tokens = corpus.lengths[1:].sum()
  assert corpus.counts.largest == {'place': [0, 2], 'examples': turns, 'tokens': tokens}
  notes = [n for n in corpus.notes() if f'a.jsonl:2 became {turns} examples of {tokens:,}' in n]
  assert bool(notes) is is_reported


def test_long_rows_by_policy(tmp_path):
  rows = chat_rows(4) + chat_rows(2, words=30)
  rows.append(
    {'messages': [{'role': 'user', 'content': 'long ' * 80}, {'role': 'assistant', 'content': 'a'}]}
  )
  spec = write(tmp_path / 'a.jsonl', rows)
  with pytest.raises(
    DataError, match=r'a\.jsonl:5: \d+ tokens, more than seq_len=64.*on_overlength'
  ):
    build(tmp_path, spec)
  dropped = build(tmp_path, spec, on_overlength='drop').counts
  assert (dropped.examples, dropped.dropped, dropped.truncated, dropped.unsupervised) == (
    4,
    3,
    0,
    0,
  )
  right = build(tmp_path, spec, on_overlength='truncate_right')
  counts = right.counts
  assert (counts.examples, counts.dropped, counts.truncated, counts.unsupervised) == (6, 0, 2, 1)
  left = build(tmp_path, spec, on_overlength='truncate_left')
  assert (left.counts.examples, left.counts.truncated, left.counts.unsupervised) == (7, 3, 0)
  for corpus in (right, left):
    assert corpus.lengths.max() == 64
    assert all(corpus.example(i)[1].any() for i in range(len(corpus)))


def test_corpora_that_cannot_be_meant(tmp_path):
  (tmp_path / 'a.jsonl').write_text('\n')
  with pytest.raises(DataError, match='no row in it'):
    build(tmp_path, Spec(str(tmp_path / 'a.jsonl')))
  spec = write(tmp_path / 'a.jsonl', chat_rows(3, words=50))
  with pytest.raises(DataError, match=r'none of 3 rows is left \(3 dropped'):
    build(tmp_path, spec, on_overlength='drop')
  question = {'role': 'user', 'content': '1 ' * 2000}
  thin = write(
    tmp_path / 'b.jsonl', [{'messages': [question, {'role': 'assistant', 'content': 'a'}]}]
  )
  with pytest.raises(DataError, match=r'2 of .* less than 0\.1%'):
    build(tmp_path, thin, seq_len=9999)
  template = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    '{% endif %}{% endfor %}'
  )
  only_answers = {'tokenizer': Tokenizer(tiny_files(template)), 'on_unrendered': 'warn'}
  one_chat = write(tmp_path / 'c.jsonl', chat_rows(2))
  with pytest.raises(DataError, match=r"data\.loss_on='all'"):
    build(tmp_path, one_chat, **only_answers)
  assert build(tmp_path, one_chat, **only_answers, loss_on='all').supervised
  assert folders(tmp_path) != [] and not any(f.startswith('building') for f in folders(tmp_path))


def test_what_a_killed_process_was_building_is_swept_after_a_day(tmp_path):
  cache_dir = tmp_path / 'cache'
  for name, hours in (('old', 25), ('new', 1)):
    folder = cache_dir / f'building-{name}'
    folder.mkdir(parents=True)
    (folder / 'tokens.bin').write_bytes(b'half')
    for path in (folder / 'tokens.bin', folder):
      os.utime(path, (time.time() - hours * 3600,) * 2)
  build(tmp_path, write(tmp_path / 'a.jsonl', [{'text': 'one two'}]), loss_on='all')
  assert [p.name for p in cache_dir.glob('building-*')] == ['building-new']


def test_a_shared_cache_can_be_read_by_others(tmp_path):
  build(tmp_path, write(tmp_path / 'a.jsonl', [{'text': 'one two'}]), loss_on='all')
  (folder,) = (tmp_path / 'cache').iterdir()
  assert folder.stat().st_mode & 0o055 == 0o055


def test_long_rows_are_tokenized_a_few_at_a_time(tmp_path, monkeypatch):
  """The same content, whatever the size of a chunk."""
  spec = write(tmp_path / 'a.jsonl', chat_rows(30))
  whole = build(tmp_path, spec)
  sizes = []
  encode_all = encode.encode
  monkeypatch.setattr(blocks, '_CHUNK_BYTES', 500)
  monkeypatch.setattr(
    encode, 'encode', lambda rows, *a: sizes.append(len(rows)) or encode_all(rows, *a)
  )
  other = tmp_path / 'other'
  other.mkdir()
  again = build(other, spec)
  assert max(sizes) < 10 and sum(sizes) == 30
  assert [again.example(i)[0].tolist() for i in range(30)] == [
    whole.example(i)[0].tolist() for i in range(30)
  ]


def test_documents_may_be_supervised_whole(tmp_path):
  spec = write(tmp_path / 'a.jsonl', [{'text': 'one two'}, {'text': 'three'}])
  corpus = build(tmp_path, spec)
  assert corpus.supervised == corpus.tokens - 2


def test_settings_are_checked(tmp_path):
  spec = write(tmp_path / 'a.jsonl', chat_rows(3))
  for changes, key in (
    ({'on_overlength': 'cut'}, r'data\.on_overlength'),
    ({'loss_on': 'cut'}, r'data\.loss_on'),
    ({'seq_len': 1}, 'seq_len=1'),
  ):
    with pytest.raises(ConfigError, match=key):
      build(tmp_path, spec, **changes)


def _race(tmp_path, barrier, results):
  barrier.wait(60)
  corpus = build(tmp_path, Spec(str(tmp_path / 'a.jsonl')))
  results.put((os.getpid(), corpus.fingerprint, len(corpus)))


def test_racing_builders_end_with_one_whole_cache(tmp_path):
  write(tmp_path / 'a.jsonl', chat_rows(1500))
  context = multiprocessing.get_context('spawn')
  barrier, results = context.Barrier(2), context.Queue()
  racers = [
    context.Process(target=_race, args=(tmp_path, barrier, results), daemon=True) for _ in range(2)
  ]
  for racer in racers:
    racer.start()
  found = {results.get(timeout=60)[1:] for _ in racers}
  for racer in racers:
    racer.join()
  assert len(found) == 1 and len(folders(tmp_path)) == 1
  assert found == {(build(tmp_path, Spec(str(tmp_path / 'a.jsonl'))).fingerprint, 1500)}


def test_lost_race_uses_the_winner(tmp_path, monkeypatch):
  """The other process finishes between our look and our rename."""
  spec = write(tmp_path / 'a.jsonl', chat_rows(3))
  rename = os.rename

  def late(source, target):
    monkeypatch.setattr(os, 'rename', rename)
    build(tmp_path, spec)
    rename(source, target)

  monkeypatch.setattr(os, 'rename', late)
  assert len(build(tmp_path, spec)) == 3
  assert len(folders(tmp_path)) == 1


def test_damaged_cache_is_named(tmp_path):
  spec = write(tmp_path / 'a.jsonl', chat_rows(3))
  build(tmp_path, spec)
  (path,) = (tmp_path / 'cache').glob('*/tokens.bin')
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(DataError, match=r'tokens\.bin: missing or truncated; delete'):
    build(tmp_path, spec)


def test_views(tmp_path):
  corpus = build(tmp_path, write(tmp_path / 'a.jsonl', chat_rows(10)))
  view = corpus.view(np.array([7, 2, 5])).view(np.array([2, 0]))
  assert [view.where(i)[-2:] for i in range(2)] == [':6', ':8']
  assert view.example(0)[0].tolist() == corpus.example(5)[0].tolist()
  assert len(view) == 2 and view.tokens == corpus.lengths[[5, 7]].sum()
  assert view.fingerprint != corpus.fingerprint


def sides(parts):
  return [{tuple(p.example(i)[0]) for i in range(len(p))} for p in parts]


def test_split_is_by_content(tmp_path):
  rows = chat_rows(400)
  corpus = build(tmp_path, write(tmp_path / 'a.jsonl', rows + rows[:100]))
  train, held = token_cache.split(corpus, 0.2, seed=0)
  assert len(train) + len(held) == 500
  assert not sides((train, held))[0] & sides((train, held))[1]  # duplicates stay together
  assert abs(len(held) - 100) < 50
  shuffled = build(tmp_path, write(tmp_path / 'b.jsonl', rows[::-1]))
  assert sides(token_cache.split(shuffled, 0.2, seed=0)) == sides((train, held))
  assert sides(token_cache.split(shuffled, 0.2, seed=1)) != sides((train, held))
  fewer = build(tmp_path, write(tmp_path / 'c.jsonl', rows[:200]))
  assert sides(token_cache.split(fewer, 0.2, seed=0))[1] <= sides((train, held))[1]


def test_split_keeps_the_turns_of_a_row_together(tmp_path):
  from test_encode import THINK

  def row(i):
    turn = lambda role, text: {'role': role, 'content': f'{text}{i}'}  # noqa: E731
    return {
      'messages': [
        turn('user', 'a'),
        turn('assistant', 'b'),
        turn('user', 'c'),
        turn('assistant', 'd'),
      ]
    }

  corpus = build(
    tmp_path, write(tmp_path / 'a.jsonl', [row(i) for i in range(60)]),
    tokenizer=Tokenizer(tiny_files(THINK)), seq_len=200
  )  # fmt: skip
  assert len(corpus) == 120
  train, held = token_cache.split(corpus, 0.5, seed=0)
  lines = [{p.where(i) for i in range(len(p))} for p in (train, held)]
  assert not lines[0] & lines[1] and all(lines)


def test_split_refuses_nonsense(tmp_path):
  corpus = build(tmp_path, write(tmp_path / 'a.jsonl', chat_rows(2)))
  with pytest.raises(ConfigError, match='between 0 and 1'):
    token_cache.split(corpus, 1.5, seed=0)
  with pytest.raises(DataError, match='leaves one side'):
    token_cache.split(corpus, 1e-9, seed=0)
