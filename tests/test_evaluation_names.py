"""Names in `gate` and eval.models are checked before data are read."""

import json
import os
import subprocess
import sys

import pytest
from fake_endpoint import FakeEndpoint

from ftjax.config import keys
from ftjax.experiment import evaluation_names
from ftjax.runtime.errors import ConfigError


def _config(**settings):
  c = keys.default()
  c.eval.tasks = ('films=choice:nowhere.jsonl', 'sums=math:nowhere.jsonl', 'lm_eval:arc_easy')
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in settings.items()})
  return c


@pytest.mark.parametrize(
  'gate',
  [
    'films/accuracy > base',
    'films/macro_f1 > base',  # of tasks with classes
    'films/ece < 0.1',
    'sums/truncated < 0.5',
    'lm_eval:arc_easy/any > 0',
    'arc_easy/acc > 0',  # lm-eval's figures are known when it has run
    'general_answers/one_word < 0.1',
    'sums/pass_at_4 > base',
    'sums/maj_at_8 > base',
  ],
)
def test_known_names(gate):
  c = _config(gate=(gate.replace('lm_eval:arc_easy', 'arc_easy'),))
  c.eval.general, c.eval.samples, c.eval.temperature = True, 8, 0.7
  evaluation_names.check(c)


@pytest.mark.parametrize(
  ('gate', 'message'),
  [
    ('flims/accuracy > base', "no task 'flims'; did you mean films"),
    ('other/accuracy > base', "no task 'other'; there are arc_easy, films, sums"),
    ('films/acuracy > base', "'films' has no figure 'acuracy'; did you mean accuracy"),
    ('sums/macro_f1 > base', "'sums' has no figure 'macro_f1'"),
    ('sums/pass_at_4 > base', "'sums' has no figure 'pass_at_4'"),  # eval.samples=1
    ('general_answers/one_word < 0.1', "no task 'general_answers'"),  # eval.general=False
  ],
)
def test_unknown_names(gate, message):
  with pytest.raises(ConfigError, match=message) as caught:
    evaluation_names.check(_config(gate=(gate,)))
  assert caught.value.exit_code == 2


def test_a_run_ends_before_its_data_are_read(tmp_path):
  rows = tmp_path / 'rows.jsonl'
  rows.write_text(json.dumps({'prompt': 'a', 'answer': 'b'}))
  command = [sys.executable, '-m', 'ftjax.train', '--config=tiny_sft']
  command += [f'--workdir={tmp_path / "run"}', '--config.data.train=missing.jsonl']
  command += [f'--config.eval.tasks=("mine=match:{rows}",)', '--config.gate=("mine/acc > base",)']
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
  assert done.returncode == 2, done.stderr
  assert "gate: 'mine/acc > base': the task 'mine' has no figure 'acc'" in done.stderr
  assert 'missing.jsonl' not in done.stderr


@pytest.fixture
def fake():
  with FakeEndpoint(models=('tiny', 'large')) as server:
    yield server


def _served(server, name):
  return _config(eval__models=(f'endpoint:{server.base}#{name}',))


def test_a_model_that_the_server_lists(fake):
  evaluation_names.check(_served(fake, 'large'))
  assert fake.bodies() == []  # no tokens


def test_a_model_that_the_server_does_not_have(fake):
  with pytest.raises(ConfigError, match=r"^eval\.models: .*'lrage'.*has 'tiny', 'large'$"):
    evaluation_names.check(_served(fake, 'lrage'))
  assert {b['max_tokens'] for b in fake.bodies()} == {1}


def test_a_server_that_answers_for_any_name(fake):
  fake.always = lambda handler: handler.reply({'choices': []})
  evaluation_names.check(_served(fake, 'alias'))
  assert len(fake.bodies()) == 1


def test_a_server_of_texts_alone_that_answers_for_any_name(fake):
  def answer(handler):
    if handler.path.endswith('chat/completions'):
      return handler.reply({'error': {'message': 'no template'}}, 400)
    return handler.reply({'choices': []})

  fake.always = answer
  evaluation_names.check(_served(fake, 'alias'))
  assert len(fake.bodies()) == 2


def test_a_server_that_fails_or_is_not_there_is_logged(fake, caplog):
  fake.always = lambda handler: handler.reply({'error': 'busy'}, 503)
  evaluation_names.check(_served(fake, 'other'))
  assert "'other' is not known" in caplog.text
  c = _config(eval__models=('endpoint:http://127.0.0.1:9/v1#name',))
  evaluation_names.check(c)
  assert 'lists no models now' in caplog.text


def test_an_entry_of_another_form():
  with pytest.raises(ConfigError, match='does not begin with endpoint:'):
    evaluation_names.check(_config(eval__models=('runs/mine',)))
