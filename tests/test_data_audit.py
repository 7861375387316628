"""`ftjax.preview --audit`, --clean and --against on files: nothing vanishes without a word."""

import json
import pathlib
import re

import pytest
import tiny_run
from tiny_tokenizer import tiny_files

from ftjax import config
from ftjax.config import validation
from ftjax.data import formats, sources
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import audited_rows, data_audit
from ftjax.experiment.data_audit import Request
from ftjax.reporting import page, run_files
from ftjax.runtime.errors import ConfigError, DataError

WORDS = (
  *('river', 'stone', 'window', 'garden', 'winter', 'copper'),
  *('paper', 'mountain', 'silver', 'kitchen', 'bottle', 'island'),
)


def good(i):
  a, b, c = (WORDS[(i * k + k) % 12] for k in (1, 5, 7))
  return {'prompt': f'Where is the {a} number {i}?', 'completion': f' Near the {b} {c}, place {i}.'}


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer(tiny_files())


def write(path, rows):
  path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows))
  return str(path)


def configured(train, **keys):
  c = config.default()
  c.model.random = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
  )
  c.seq_len, c.batch_size, c.steps, c.data.train = 128, 2, 4, train
  c.update(keys)
  validation.validate(c)
  return c


@pytest.fixture
def mixed(tmp_path):
  """30 good rows, and six with faults: lines 31 to 36."""
  rows = [good(i) for i in range(30)]
  rows += [
    good(3),
    {'prompt': 'Who?', 'completion': ''},
    '{"prompt": oops',
    {'prompt': 'Mail to a.b@uni-koeln.de', 'completion': ' Done.'},
    {'prompt': 'Hi <|im_start|>', 'completion': ' Hello.'},
    {'prompt': 'Long', 'completion': ' ' + 'so many words ' * 6 + 'x' * 400 + '.'},
  ]
  return write(tmp_path / 'rows with blanks.jsonl', rows)


EXPECTED = {
  31: {'exact_duplicate'},
  32: {'empty_answer'},
  33: {'unusable'},
  34: {'email'},
  35: {'template_leak'},
  36: {'over_length', 'length_outlier'},
}


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_findings_have_file_and_line_and_go_to_a_file_and_the_report(
  mixed, tmp_path, tokenizer, capsys
):
  out = tmp_path / 'found.jsonl'
  request = Request(out=str(out), workdir=str(tmp_path / 'run'))
  data_audit.show(configured(mixed), tokenizer, str(tmp_path), request)
  printed = capsys.readouterr().out
  found = lines(out)
  by_line = {}
  for f in found:
    assert f['file'] == mixed and f['remedy'] and f['severity'] in ('error', 'warning', 'info')
    by_line.setdefault(f['line'], set()).add(f['kind'])
  assert {n: by_line[n] - {'repetition', 'garbage'} for n in by_line} == EXPECTED
  assert 'audit: 36 training rows; 6 rows with findings' in printed
  assert f'{mixed}:35: contains' in printed and f'{len(found)} findings in' in printed
  assert 'uni-koeln' not in printed + out.read_text()  # personal data is masked
  html = page.render(run_files.read(str(tmp_path / 'run')))
  text = ' '.join(re.sub(r'<[^>]*>', ' ', html).split())
  assert '6 of 36 training rows have findings' in text and 'warning exact duplicate 1' in text


def test_cleaning_writes_the_other_rows_and_a_log_of_those_that_went(
  mixed, tmp_path, tokenizer, capsys
):
  out = tmp_path / 'clean.jsonl'
  data_audit.show(configured(mixed), tokenizer, str(tmp_path), Request(clean=str(out)))
  kept, gone = lines(out), lines(tmp_path / 'clean.log.jsonl')
  assert len(kept) + len(gone) == 36
  assert kept[:30] == [good(i) for i in range(30)] and 'a.b@' in kept[30]['prompt']
  assert [g['line'] for g in gone] == [31, 32, 33, 35, *([36] if len(gone) == 5 else [])]
  assert all(g['kinds'] and g['file'] == mixed for g in gone)
  assert [len(g['sha256']) for g in gone[:4]] == [64, 64, 0, 64]
  assert f'read 36 rows, removed {len(gone)}' in capsys.readouterr().out
  # The cleaned rows have none of these findings left.
  again = tmp_path / 'again.jsonl'
  data_audit.show(configured(str(out)), tokenizer, str(tmp_path), Request(clean=str(again)))
  assert out.read_bytes() == again.read_bytes()
  assert (tmp_path / 'again.log.jsonl').read_text() == ''


def test_cleaning_of_named_kinds_alone(mixed, tmp_path, tokenizer):
  out = tmp_path / 'clean.jsonl'
  request = Request(clean=str(out), kinds=('email',))
  data_audit.show(configured(mixed), tokenizer, str(tmp_path), request)
  # Rows that cannot be read go always: training refuses them.
  assert [g['line'] for g in lines(tmp_path / 'clean.log.jsonl')] == [32, 33, 34]


def test_rows_of_the_evaluation_data_are_found_and_removed(tmp_path, tokenizer):
  text = ' '.join(f'{w} and {w}s of old' for w in WORDS)
  test = write(tmp_path / 'test.jsonl', [{'prompt': text, 'completion': ' a'}])
  train = write(tmp_path / 'train.jsonl', [good(1), {'prompt': f'So: {text}', 'completion': ' b'}])
  c = configured(train, seq_len=2048)
  c.data.eval = test
  out = tmp_path / 'clean.jsonl'
  data_audit.show(c, tokenizer, str(tmp_path), Request(clean=str(out)))
  assert lines(out) == [good(1)]
  (gone,) = lines(tmp_path / 'clean.log.jsonl')
  assert gone['kinds'] == ['eval_overlap'] and f'{test}:1' in gone['details'][0]
  task = write(tmp_path / 'task.jsonl', [{'prompt': text, 'answer': 'a'}])
  c.data.eval, c.eval.tasks = '', (f'old=match:{task}',)
  out = tmp_path / 'again.jsonl'
  data_audit.show(c, tokenizer, str(tmp_path), Request(clean=str(out)))
  assert lines(out) == [good(1)]


def test_calls_of_tools_are_answers(tmp_path, tokenizer):
  call = {'name': 'find', 'arguments': {'word': 'river'}}
  messages = [
    {'role': 'user', 'content': 'Look it up.'},
    {'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': call}]},
  ]
  chat = formats.parse({'messages': messages}, 'messages', True)
  prompt, answers = audited_rows.texts_of(chat)
  assert prompt == ('Look it up.',) and len(answers) == 1 and '"river"' in answers[0]


def test_two_versions(tmp_path, tokenizer, capsys):
  old = write(tmp_path / 'old.jsonl', [good(i) for i in range(30)])
  new = [good(i) for i in range(2, 32)]
  new[0]['completion'] = ' Elsewhere.'
  request = Request(against=old, is_audit=False)
  c = configured(write(tmp_path / 'new.jsonl', new))
  data_audit.show(c, tokenizer, str(tmp_path), request)
  printed = capsys.readouterr().out
  assert 'same 27, came 2, went 2, changed 1' in printed and 'audit:' not in printed
  assert 'vocabulary' in printed and 'length of the answer' in printed


def test_pairs_and_prompts_are_audited_too(tmp_path, tokenizer, capsys):
  pairs = [{'prompt': f'q{i}', 'chosen': f'a{i}', 'rejected': f'b{i}'} for i in range(5)]
  pairs += [{'prompt': 'q', 'chosen': 'Same.', 'rejected': 'same.'}]
  c = configured(write(tmp_path / 'pairs.jsonl', pairs), algorithm='dpo')
  data_audit.show(c, tokenizer, str(tmp_path), Request())
  assert 'equal_sides          error           1' in capsys.readouterr().out
  prompts = [
    {'prompt': 'What is 2 + 3?', 'answer': '5'},
    {'prompt': 'Mail x@uni.de', 'answer': '1'},
  ]
  rollout = dict(rewards='math@1', max_tokens=8)
  path = write(tmp_path / 'prompts.jsonl', prompts)
  c = configured(path, algorithm='grpo', rollout=rollout)
  data_audit.show(c, tokenizer, str(tmp_path), Request())
  assert 'email                warning         1' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('request_', 'message'),
  [
    (Request(clean='x.csv'), 'ends with .jsonl'),
    (Request(clean='MIXED'), 'exists'),
    (Request(out='MIXED'), 'exists'),
    (Request(clean='a.jsonl', out='a.log.jsonl'), 'too'),
    (Request(out='/proc/no/a.jsonl'), 'cannot be made'),
    (Request(kinds=('nonsense',)), 'expected some of'),
    (Request(against='nowhere.jsonl', is_audit=False), 'nowhere'),
  ],
)
def test_wrong_requests(request_, message, mixed, tmp_path, tokenizer):
  changes = {k: mixed for k in ('clean', 'out') if getattr(request_, k) == 'MIXED'}
  request = Request(**{**vars(request_), **changes})
  before = pathlib.Path(mixed).read_bytes()
  with pytest.raises((ConfigError, DataError), match=message):
    data_audit.show(configured(mixed), tokenizer, str(tmp_path), request)
  assert pathlib.Path(mixed).read_bytes() == before


def test_sources_of_two_formats_are_not_one_clean_file(tmp_path, tokenizer):
  first = write(tmp_path / 'a.jsonl', [good(1)])
  second = write(tmp_path / 'b.jsonl', [{'text': 'Some text.'}])
  with pytest.raises(ConfigError, match='one by one'):
    request = Request(clean=str(tmp_path / 'out.jsonl'))
    data_audit.show(configured(f'{first},{second}'), tokenizer, str(tmp_path), request)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a.jsonl', 'b.jsonl']


def test_the_entry(mixed, tmp_path):
  """A process: the table on stdout and code 0; code 2 for flags."""
  train = ['--config=tiny_sft', f'--config.data.train={mixed}', '--config.data.eval_fraction=0']
  train += ['--config.eval.every=0', '--config.seq_len=128']
  code, printed = tiny_run.run('preview', [*train, f'--clean={tmp_path / "out.jsonl"}'])
  assert code == 0 and 'template_leak' in printed and 'kept ' in printed
  code, printed = tiny_run.run('preview', [*train, '--clean_kinds=email'])
  assert code == 2 and 'without --clean' in printed


@pytest.mark.parametrize(
  ('algorithm', 'row', 'texts'),
  [
    ('classification', {'text': 'a b', 'label': 'x'}, (('a b',), ('x',))),
    ('token_classification', {'tokens': ['a', 'b'], 'tags': ['x', 'y']}, (('a b',), ())),
    ('embedding', {'anchor': 'a', 'positive': 'b', 'negative': 'c'}, (('a',), ('b', 'c'))),
  ],
)
def test_rows_with_labels_and_groups_of_texts_are_audited(
  tmp_path, tokenizer, algorithm, row, texts
):
  train = write(tmp_path / 'rows.jsonl', [row, {'text': 3}])
  c = configured(train, algorithm=algorithm)
  for section in ('classification', 'token_classification'):
    c[section].labels = ('x', 'y')
  rows, unusable = audited_rows.read(c, tokenizer, sources.parse_specs(train))
  assert [(r.prompt, r.answers) for r in rows] == [texts] and rows[0].tokens
  assert [f.line for f in unusable] == [2]


@pytest.mark.full
@pytest.mark.parametrize(
  'name',
  [
    *('classification', 'token_classification', 'masked_lm', 'embedding', 'prm', 'seq2seq'),
    'span_corruption',
  ],
)
def test_rows_of_every_shape_are_shown_and_audited(name):
  for words in ([], ['--audit']):
    code, printed = tiny_run.run('preview', [f'--config=tiny_{name}', *words])
    assert code == 0 and '400' in printed, printed
