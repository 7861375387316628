"""The short audit at the start of a run: what it counts, reads, writes, and when it ends a run."""

import json
import logging
import types

import pytest
from test_data_audit import configured, good, write
from tiny_tokenizer import tiny_files

from ftjax.config import validation
from ftjax.data import sources
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import audited_rows, run_card, start_audit
from ftjax.reporting import data_audit as shown
from ftjax.runtime.errors import CheckError, ConfigError


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer(tiny_files())


def faulty(tmp_path):
  rows = [good(i) for i in range(20)]
  rows += [good(3), good(4), {'prompt': 'Who?', 'completion': ''}]
  rows += [{'prompt': 'Mail to a.b@uni-koeln.de', 'completion': ' Done.'}]
  return write(tmp_path / 'rows.jsonl', rows)


def audited(train, tmp_path, tokenizer, **keys):
  """The summary of a run's audit; keys: of the section data."""
  c = configured(train)
  for key, value in keys.items():
    c.data[key] = value
  run = types.SimpleNamespace(
    config=c, workdir=str(tmp_path), model=types.SimpleNamespace(tokenizer=tokenizer)
  )
  start_audit.check(run)
  path = tmp_path / 'audit.json'
  return json.loads(path.read_text()) if path.exists() else None


def counts(summary):
  return {k['kind']: k['count'] for k in summary['kinds']}


def test_it_counts_faults_in_one_line_and_in_the_report(tmp_path, tokenizer, caplog):
  caplog.set_level(logging.INFO)
  found = audited(faulty(tmp_path), tmp_path, tokenizer)
  assert counts(found) == {'empty_answer': 1, 'exact_duplicate': 2, 'email': 1}
  assert (found['rows'], found['flagged'], found['is_whole']) == (24, 4, True)
  (line,) = [r for r in caplog.records if 'audit of' in r.getMessage()]
  assert line.levelno == logging.WARNING  # one kind is an error
  assert line.getMessage().startswith(
    'audit of all 24 training rows: 4 with findings: empty_answer 1, exact_duplicate 2, email 1'
  )
  text = shown.build(found)
  assert text['text'].startswith('4 of 24 training rows') and len(text['rows']) == 3
  assert 'a short audit' in text['notes'][0]
  card = run_card._audit(found)
  assert card == (
    'An audit of 24 training rows found empty answer: 1, exact duplicate: 2, e-mail address: 1.'
  )


def test_it_reads_the_first_rows_alone(tmp_path, tokenizer, caplog):
  caplog.set_level(logging.INFO)
  found = audited(faulty(tmp_path), tmp_path, tokenizer, audit=10)
  assert (found['rows'], found['kinds'], found['is_whole']) == (10, [], False)
  assert 'audit of the first 10 training rows: no findings' in caplog.text
  assert shown.build(found)['text'].startswith('0 of the first 10 training rows')
  assert run_card._audit(found) == 'An audit of the first 10 training rows found no fault.'


def test_each_source_has_its_share_and_texts_are_bounded(tmp_path, tokenizer):
  first = write(tmp_path / 'a.jsonl', [good(i) for i in range(9)])
  second = write(tmp_path / 'b.jsonl', [good(i) for i in range(20, 23)])
  c = configured(f'{first},{second}')
  specs = sources.parse_specs(c.data.train)
  rows, unusable, is_whole = audited_rows.read_first(c, tokenizer, specs, 8, 10**6)
  assert [r.file for r in rows] == [first] * 4 + [second] * 3
  assert not unusable and not is_whole
  assert audited_rows.read_first(c, tokenizer, specs, 100, 10**6)[2]
  rows, _, is_whole = audited_rows.read_first(c, tokenizer, specs, 100, 2)
  assert len(rows) == 2 and not is_whole


def test_long_rows_are_tokenized_a_few_at_a_time(tmp_path, tokenizer, monkeypatch):
  train = write(tmp_path / 'long.jsonl', [{'text': f'{i} ' + 'word ' * 30} for i in range(20)])
  monkeypatch.setattr(audited_rows, '_CHUNK_CHARACTERS', 300)
  counted, tokens = [], audited_rows._Reader._tokens
  monkeypatch.setattr(
    audited_rows._Reader, '_tokens', lambda self, own: counted.append(len(own)) or tokens(self, own)
  )
  specs = sources.parse_specs(train)
  rows, _, is_whole = audited_rows.read_first(configured(train), tokenizer, specs, 100, 500)
  assert len(rows) == 4 and counted == [2, 2, 2] and not is_whole


def test_without_rows_nothing_is_looked_at(tmp_path, tokenizer):
  assert audited(faulty(tmp_path), tmp_path, tokenizer, audit=0) is None


def test_a_whole_audit_stays(tmp_path, tokenizer):
  whole = {'version': 1, 'rows': 99, 'flagged': 0, 'kinds': [], 'notes': []}
  (tmp_path / 'audit.json').write_text(json.dumps(whole))
  assert audited(faulty(tmp_path), tmp_path, tokenizer) == whole
  (tmp_path / 'audit.json').write_text('oops')
  assert audited(faulty(tmp_path), tmp_path, tokenizer)['rows'] == 24


def test_errors_end_the_run_only_where_that_is_asked(tmp_path, tokenizer):
  with pytest.raises(
    CheckError, match=r'found empty_answer 1 \(the first: .*:23\), and data.on_aud'
  ):
    audited(faulty(tmp_path), tmp_path, tokenizer, on_audit='error')
  warned = write(tmp_path / 'w.jsonl', [good(1), good(1)])
  assert counts(audited(warned, tmp_path, tokenizer, on_audit='error')) == {'exact_duplicate': 1}


def test_a_fault_of_the_audit_costs_nothing(tmp_path, tokenizer, caplog, monkeypatch):
  def broken(*_, **__):
    raise RuntimeError('no')

  monkeypatch.setattr(start_audit.audit, 'run', broken)
  assert audited(faulty(tmp_path), tmp_path, tokenizer, on_audit='error') is None
  assert 'the audit of the training data failed: RuntimeError: no' in caplog.text


def test_a_rule_without_rows_is_refused(tmp_path):
  c = configured(faulty(tmp_path))
  c.data.audit, c.data.on_audit = 0, 'error'
  with pytest.raises(ConfigError, match=r'data.on_audit=error does nothing with data.audit=0'):
    validation.validate(c)
