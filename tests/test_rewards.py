"""Rewards are read, run within limits, and summed; what fails is counted and never paid."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import ml_collections
import numpy as np
import pytest

from ftjax.grading.rewards import Batch, Rewards, parse
from ftjax.runtime.errors import ConfigError, DataError


def needs(package):
  missing = importlib.util.find_spec(package) is None
  return pytest.mark.skipif(missing, reason=f'{package} is not installed')


FUNCTIONS = """
import multiprocessing, os, signal, subprocess, sys, time
if os.path.exists('kill_me'):
  os.remove('kill_me')
  os.kill(os.getpid(), signal.SIGKILL)
calls = []
def length_of(completions):
  return [len(c) for c in completions]
def same(prompts, completions, *, answer, missing=None, **rest):
  print('printing does no harm')
  return [float(c == a) for c, a in zip(completions, answer)]
def everything(prompts, completions, token_ids, token_counts, is_truncated, level):
  out = zip(prompts, completions, token_ids, token_counts, is_truncated, level)
  return [len(p) + len(c) + sum(i) + n + t + v for p, c, i, n, t, v in out]
def counts_calls(completions):
  calls.append(1)
  return [len(calls)] * len(completions)
def raises(completions):
  return [1 / (len(c) - len(c)) for c in completions]
def hangs(completions):
  if 'hang' in completions:
    while True:
      pass
  return [1.0] * len(completions)
def dies(completions):
  if 'die' in completions:
    os.kill(os.getpid(), signal.SIGKILL)
  if 'exit' in completions:
    sys.exit(3)
  return [1.0] * len(completions)
def forks(completions):
  for _ in range(50):
    p = multiprocessing.get_context('fork').Process(target=hangs, args=(['hang'],))
    p.start()
    p.terminate()  # as early as can be
    p.join()
  return [1.0] * len(completions)
def leaves(completions):
  p = subprocess.Popen(['sleep', '600'])
  open('left', 'w').write(str(p.pid))
  return [1.0] * len(completions)
def is_killed_once(completions):
  if not os.path.exists('killed'):
    open('killed', 'w').close()
    os.kill(os.getpid(), signal.SIGKILL)
  return [1.0] * len(completions)
def slow(completions):
  open('pid', 'w').write(f'{os.getpid()} {os.getpgid(0)}')
  time.sleep(1.0)
  return [1.0] * len(completions)
def short(completions): return [1.0]
def none(completions): return None
def words(completions): return ['one'] * len(completions)
def lone(completions): return 1.0
def nan(completions): return [1.0, float('nan')]
def huge(completions): return [1.0, 1e39]
def truths(completions): return [True, False]
def place(completions): return [os.environ['JAX_PLATFORMS'] == 'cpu', 'jax' in sys.modules]
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
  (tmp_path / 'my_rewards.py').write_text(textwrap.dedent(FUNCTIONS))
  (tmp_path / 'broken_rewards.py').write_text('import no_such_module_at_all\n')
  monkeypatch.chdir(tmp_path)
  # As `python -m` puts it: the current directory.
  monkeypatch.syspath_prepend('')


def batch(*completions, **columns):
  n = len(completions)
  return Batch(
    prompts=['question'] * n,
    completions=completions,
    prompt_ids=[[1]] * n,
    token_ids=[list(range(len(c))) for c in completions],
    is_truncated=[False] * n,
    columns=columns,
  )


def score(spec, b, **options):
  with Rewards(parse(spec), tuple(b.columns), **options) as r:
    return r.score(b)


def test_a_tuple_and_a_text_say_the_same():
  rows = (('math', 1.0), ('format:think,answer', 0.2), ('my_rewards:helpful', 0.5))
  text = 'math@1, format:think,answer@0.2,my_rewards:helpful@5e-1'
  assert parse(rows) == parse(text) == parse([list(r) for r in rows])
  assert [p.name for p in parse(rows)] == ['math', 'format', 'helpful']
  assert parse('math') == parse(('math',)) == parse((('math', 1),))
  assert parse('format:think,answer')[0].verifier.tags == ('think', 'answer')
  names = [p.name for p in parse(('length:target=9', 'length:at_most=9', 'a.b:length'))]
  assert names == ['length', 'length_2', 'length_3']
  c = ml_collections.ConfigDict({'rewards': rows})
  assert parse(c.rewards) == parse(rows)
  json.dumps(c.rewards)


@pytest.mark.parametrize(
  ('value', 'match'),
  [
    ('maths', 'did you mean math'),
    ('fromat:think,answer', 'did you mean format'),
    ('math,length:at_most=9', 'weight'),
    ('math@1,length:at_most=9', 'no weight'),
    ('', 'empty'),
    ((), 'empty'),
    ((('math', -1.0),), 'penalty'),
    ((('math', float('nan')),), 'weight'),
    ((('math', 'much'),), 'number'),
    ((('math', 1.0, 2.0),), 'expected'),
    ((1.0,), 'expected'),
    ('math@0', 'every weight is 0'),
    ('math@1.2.3', 'number'),
    ('os.system("x"):y', 'no reward'),
  ],
)
def test_bad_specifications(value, match):
  with pytest.raises(ConfigError, match=match) as e:
    parse(value)
  assert 'rollout.rewards' in str(e.value)


def test_weighted_sum_by_hand():
  b = batch('yes', 'no', 'yes and no', answer=['yes'] * 3)
  got = score('exact@2,length:at_most=2@0.5,exact@0', b)
  # 3 tokens are half too many of 2; 10 are all too many
  parts = np.array([[1, -0.5, 1], [0, 0, 0], [0, -1, 0]], np.float32)
  np.testing.assert_array_equal(got.parts, parts)
  np.testing.assert_array_equal(got.total, np.array([1.75, 0, -0.5], np.float32))
  assert got.total.dtype == got.parts.dtype == np.float32
  assert got.failures == {'exact': 0, 'length': 0, 'exact_2': 0} and not got.reasons
  m = got.metrics()
  assert m['reward'] == pytest.approx(1.25 / 3) and m['reward/length'] == -0.5
  assert m['reward/exact/failures'] == 0


def test_functions_get_what_they_ask_for(functions):
  b = batch('a', 'bcd', answer=['a', 'x'], level=[100, 200])
  got = score('my_rewards:same@1,my_rewards:everything@1,my_rewards:truths@1', b)
  # question is 8 letters; ids 0 1 2 sum to 3
  np.testing.assert_array_equal(
    got.parts, [[1, 8 + 1 + 0 + 1 + 100, 1], [0, 8 + 3 + 3 + 3 + 200, 0]]
  )
  with Rewards(parse('my_rewards:counts_calls'), ()) as r:
    assert [r.score(b).total[0] for _ in range(3)] == [1, 2, 3], (
      'one process, which keeps its state'
    )
  np.testing.assert_array_equal(score('my_rewards:place', b).total, [1, 0])


def test_a_missing_column_is_reported_before_training(functions):
  for spec in ('my_rewards:same', 'exact', 'label'):
    with pytest.raises(
      ConfigError, match=r'(answer|label), which the data lacks.*answers, label_id'
    ):
      Rewards(parse(spec), ('answers', 'label_id'))


def test_functions_that_are_not_there(functions):
  for spec, match in (
    ('my_rewards:lenght_of', 'did you mean length_of'),
    ('no_such_rewards:f', 'cannot import no_such_rewards'),
    ('broken_rewards:f', 'no_such_module_at_all'),
    ('my_rewards:calls', 'no function calls'),
  ):
    with pytest.raises(ConfigError, match=match):
      Rewards(parse(spec), ())


def test_an_exception_is_counted_and_scores_zero(functions):
  got = score('my_rewards:raises@1,my_rewards:length_of@1', batch('a', 'bc'))
  np.testing.assert_array_equal(got.total, [1, 2])
  assert got.failures == {'raises': 2, 'length_of': 0}
  assert 'ZeroDivisionError' in got.reasons['raises'] and 'my_rewards.py' in got.reasons['raises']


@pytest.mark.full
def test_a_function_that_hangs_or_dies_is_started_again(functions):
  with Rewards(parse('my_rewards:hangs@1,my_rewards:dies@1'), (), call_limit=5.0) as r:
    start = time.monotonic()
    got = r.score(batch('hang', 'die'))
    assert time.monotonic() - start < 60
    np.testing.assert_array_equal(got.parts, np.zeros((2, 2)))
    assert got.failures == {'hangs': 2, 'dies': 2}
    assert 'out of time' in got.reasons['hangs'] and '-9' in got.reasons['dies']
    got = r.score(batch('exit', 'b'))
    assert got.failures == {'hangs': 0, 'dies': 2} and 'exit code 3' in got.reasons['dies']
    np.testing.assert_array_equal(r.score(batch('a', 'b')).parts, np.ones((2, 2)))


def test_a_stop_of_the_whole_job_leaves_it_to_answer(functions, tmp_path):
  with Rewards(parse('my_rewards:slow'), ()) as r:
    found = []
    asked = threading.Thread(target=lambda: found.append(r.score(batch('a', 'b'))))
    asked.start()
    while not (tmp_path / 'pid').exists() or not (tmp_path / 'pid').read_text():
      time.sleep(0.01)
    pid, group = map(int, (tmp_path / 'pid').read_text().split())
    assert group != os.getpgid(0), 'Ctrl-C at a terminal goes to the group'
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    asked.join()
  np.testing.assert_array_equal(found[0].total, [1, 1])
  assert not found[0].failures['slow']


def runs(pid):
  """False for a dead one that its new parent has not yet buried, too."""
  try:
    with open(f'/proc/{pid}/stat') as f:
      return f.read().rpartition(')')[2].split()[0] not in 'ZX'
  except FileNotFoundError:
    return False


def test_child_processes_end_on_a_signal_and_with_the_worker(functions, tmp_path):
  with Rewards(parse('my_rewards:forks@1,my_rewards:leaves@1'), (), call_limit=30.0) as r:
    got = r.score(batch('a', 'b'))
    assert not any(got.failures.values()), got.reasons
    pid = int((tmp_path / 'left').read_text())
    os.kill(pid, 0)
  deadline = time.monotonic() + 30
  while runs(pid):
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_what_was_killed_is_asked_once_more(functions, tmp_path):
  (tmp_path / 'kill_me').touch()  # as it loads
  with Rewards(parse('my_rewards:is_killed_once'), ()) as r:
    got = r.score(batch('a', 'b'))
  np.testing.assert_array_equal(got.total, [1, 1])
  assert not got.failures['is_killed_once']


@pytest.mark.parametrize(
  ('name', 'match'),
  [('short', '1 scores for 2'), ('none', 'None'), ('words', 'one'),
   ('lone', "returned float '1.0'"),
   ('nan', 'nan for completion 1'), ('huge', r'1e\+39')],
)  # fmt: skip
def test_wrong_results_name_the_function(functions, name, match):
  with pytest.raises(ConfigError, match=match) as e:
    score(f'my_rewards:{name}', batch('a', 'b'))
  assert f'my_rewards:{name}' in str(e.value)


def test_a_bad_gold_is_a_failure_of_its_row():
  got = score('exact', batch('a', 'b', 'c', answer=['a', None, ['c', 'd']]))
  np.testing.assert_array_equal(got.total, [1, 0, 1])
  assert got.failures == {'exact': 1} and 'answer' in got.reasons['exact']


def check_rows(spec, *golds):
  rows = [(f'train.jsonl:{i}', {'answer': g}) for i, g in enumerate(golds, 1)]
  with Rewards(parse(spec), ('answer',)) as r:
    r.check_rows(rows)


@pytest.mark.parametrize(
  ('spec', 'bad', 'match'),
  [('math:symbolic=off', ['2'], r"train.jsonl:2: .*expected a text or a number, got \['2'\]"),
   ('exact', {'a': 1}, 'train.jsonl:2: exact'), ('choice:ABCD', 'E', 'none of the letters ABCD'),
   ('label:yes,no,column=answer', '1', r"none of \('yes', 'no'\)"), ('exact', None, 'got None'),
   ('length:at_most=9@1,normalized@0.5', '', 'train.jsonl:2: normalized')],
)  # fmt: skip
def test_golds_that_nothing_could_equal_are_found_before_training(spec, bad, match):
  good = {'label': 'yes', 'choic': 'B'}.get(spec[:5], '1')
  check_rows(spec, good, good)
  with pytest.raises(DataError, match=match) as e:
    check_rows(spec, good, bad, good)
  assert '1 row has' in str(e.value) and DataError.exit_code == 3


def test_a_reason_is_reported_once_with_its_count_and_missing_columns_by_row():
  with pytest.raises(DataError, match=r'train.jsonl:1: exact: .*got None \(and 99 more rows\)'):
    check_rows('exact', *[None] * 100)
  with pytest.raises(DataError, match='100 rows have') as e:
    check_rows('exact', *[{'n': i} for i in range(100)])
  assert str(e.value).count('\n') == 21 and '80 more' in str(e.value)
  refused = pytest.raises(DataError, match=r"b\.jsonl:7: exact: no column 'answer'")
  with Rewards(parse('exact'), ('answer',)) as r, refused:
    r.check_rows([('b.jsonl:6', {'answer': 'x'}), ('b.jsonl:7', {'other': 'x'})])


def test_the_source_without_the_column_is_named_with_its_columns(functions):
  sources = {'train.jsonl': ['answer', 'id'], 'eval.jsonl': ['gold'], 'other.jsonl': []}
  with pytest.raises(ConfigError, match=r'lacks\. eval\.jsonl has the columns: gold'):
    Rewards(parse('exact'), sources)
  del sources['eval.jsonl']
  for spec in ('exact', 'my_rewards:same'):
    with pytest.raises(ConfigError, match=r'other\.jsonl has the columns: none'):
      Rewards(parse(spec), sources)


def test_columns_hidden_from_rewards_are_reported(caplog):
  with Rewards(parse('exact'), {'a.jsonl': ['answer', 'prompts'], 'b.jsonl': ['answer']}):
    pass
  [record] = caplog.records
  assert 'no reward sees the columns prompts' in record.getMessage()


def test_columns_that_cannot_be_used(functions):
  with pytest.raises(DataError, match='not JSON'):
    score('my_rewards:same', batch('a', answer=[b'a']))
  with pytest.raises(DataError, match='2 values for 1'):
    score('exact', batch('a', answer=['a', 'b']))


def test_a_model_is_a_part():
  b = batch('abc', 'a')
  with Rewards(parse('model@0.5'), (), has_model=True) as r:
    np.testing.assert_array_equal(r.score(b, np.float32([3, 0])).total, [1.5, 0])
    for wrong in ([1.0], [1.0, np.nan]):
      with pytest.raises(ConfigError, match='reward model returned'):
        r.score(b, np.float32(wrong))
  with pytest.raises(ConfigError, match=r'name its folder in rollout\.reward_model'):
    score('model', b)


@pytest.mark.full
@needs('math_verify')
def test_math_is_isolated_and_the_order_kept():
  texts = [str(i) if i % 3 else f'\\boxed{{\\sqrt{{{i**2}}}}}' for i in range(13)]
  b = batch(*texts, answer=[str(i) for i in range(13)])
  shifted = batch(*texts, answer=[str(i + 1) for i in range(13)])
  # A gold of its kind lets a tower through to sympy, which would compute for ever.
  towers = batch('\\boxed{9^{9^{9^8}}}', '7', answer=['9^{9^{9^9}}', '7'])
  with Rewards(parse('math'), ('answer',), completion_limit=5.0, workers=2) as r:
    np.testing.assert_array_equal(r.score(b).total, np.ones(13))
    start = time.monotonic()
    got = r.score(towers)
    assert time.monotonic() - start < 60
    np.testing.assert_array_equal(got.total, [0, 1])
    assert got.failures == {'math': 1} and got.reasons == {'math': 'out of time'}
    np.testing.assert_array_equal(r.score(shifted).total, np.zeros(13))


@needs('jsonschema')
def test_a_hanging_pattern_costs_one_completion(tmp_path):
  path = tmp_path / 's.json'
  path.write_text('{"type": "string", "pattern": "^(a+)+$"}')
  with Rewards(parse((f'json_schema:{path}',)), (), completion_limit=3.0, workers=2) as r:
    for _ in range(2):
      start = time.monotonic()
      got = r.score(batch('"aaa"', json.dumps('a' * 60 + '!'), '"aa"', '"b"'))
      assert time.monotonic() - start < 60
      np.testing.assert_array_equal(got.total, [1, 0, 1, 0])
      assert got.failures == {'json_schema': 1}


def test_no_process_stays(functions):
  r = Rewards(parse('my_rewards:hangs'), ())
  [worker] = r._pools['hangs']._workers
  r.close()
  assert worker._process.poll() is not None
  with pytest.raises(ProcessLookupError):
    os.kill(worker._process.pid, 0)


def test_the_import_is_light():
  code = (
    'import sys, ftjax.grading.rewards; print(sorted({"jax", "sympy", "re2", "jsonschema", '
    '"math_verify"} & set(sys.modules)))'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == '[]'
